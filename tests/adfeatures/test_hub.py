"""Weights found, fetched from a loopback Hub over real HTTP, and verified."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from helpers.hub_server import HubServer

from adfeatures import hub as hub_module
from adfeatures.errors import DownloadError, InputError
from adfeatures.hub import download, resolve, verify

REPO, FILE = "xcyao00/ADPretrain", "dino-base/checkpoints_pro_norm.pth"
CONTENT = bytes(range(256)) * 40
# of old, huggingface_hub does not try again what a server has put off
WAITS_AS_TOLD = int(huggingface_hub.__version__.split(".")[0]) >= 2


class TestLocalSpecifications:
    def test_existing_file_is_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "w.pth").write_bytes(b"x")
        for spec in (
            "w.pth",
            tmp_path / "w.pth",
            str(tmp_path / "w.pth"),
            "local-dir:w.pth",
            f"local-dir:{tmp_path}/w.pth",
        ):
            assert resolve(spec).samefile(tmp_path / "w.pth")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert resolve("~/w.pth").samefile(tmp_path / "w.pth") and resolve("local-dir:~/w.pth").samefile(
            tmp_path / "w.pth"
        )

    def test_path_after_the_colon_is_opaque(self, tmp_path: Path) -> None:
        folder = tmp_path / "a:b@c"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x")
        assert resolve(f"local-dir:{folder}") == folder / "model.safetensors"

    def test_candidates_by_path_then_by_name_in_order(self, tmp_path: Path) -> None:
        candidates = (FILE, "model.safetensors")
        (tmp_path / "model.safetensors").write_bytes(b"x")
        assert resolve(f"local-dir:{tmp_path}", candidates=candidates).name == "model.safetensors"
        (tmp_path / Path(FILE).name).write_bytes(b"x")
        assert resolve(f"local-dir:{tmp_path}", candidates=candidates) == tmp_path / Path(FILE).name
        (tmp_path / FILE).parent.mkdir()
        (tmp_path / FILE).write_bytes(b"x")
        assert resolve(f"local-dir:{tmp_path}", candidates=candidates) == tmp_path / FILE

    def test_missing_candidate_lists_what_there_is(self, tmp_path: Path) -> None:
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "checkpoints_pro_last.pth").write_bytes(b"x")
        with pytest.raises(DownloadError) as caught:
            resolve(f"local-dir:{tmp_path}", candidates=(FILE,))
        assert FILE in str(caught.value) and "deep/checkpoints_pro_last.pth" in str(caught.value)
        with pytest.raises(DownloadError, match="does not exist"):
            resolve(f"local-dir:{tmp_path}/nowhere")

    def test_folder_needs_its_prefix(self, tmp_path: Path) -> None:
        for spec in (tmp_path, str(tmp_path)):
            with pytest.raises(DownloadError, match=f"local-dir:{tmp_path}"):
                resolve(spec)

    @pytest.mark.parametrize(
        "spec",
        [
            "weights/missing.pth",
            "missing.safetensors",
            r"C:\weights\w.pth",
            "timm/vit_base",
            "/no/such",
            "x" * 5000,
            "",
        ],
    )
    def test_missing_file_names_both_spellings(self, spec: str) -> None:
        with pytest.raises(DownloadError, match=r"local-dir:(?s:.*)hf-hub:") as caught:
            resolve(spec)
        assert ("hf-hub:timm/vit_base" in str(caught.value)) == (spec == "timm/vit_base")

    @pytest.mark.parametrize(
        "spec",
        ["hf-hub:", "hf-hub:name", "hf-hub:a/b/c", "hf-hub:a/b:", "hf-hub:a/b@", "hf-hub:a/b@:f", "hf-hub:https://x/y"],
    )
    def test_malformed_hub_specification(self, spec: str) -> None:
        with pytest.raises(InputError, match=r"owner/repo\[@revision\]"):
            resolve(spec)

    @pytest.mark.parametrize(
        "spec",
        ["hf-hub:a/b:../../secret", "hf-hub:a/b@../x:f", "hf-hub:a/b:/etc/passwd", "hf-hub:a/-b", "hf-hub:a/b--c"],
    )
    def test_names_that_the_hub_cannot_have(self, spec: str) -> None:
        with pytest.raises(InputError):
            resolve(spec)


class TestDownload:
    @pytest.mark.parametrize("lfs", [True, False])
    def test_fetch_then_cache_first(self, hub: HubServer, tmp_path: Path, lfs: bool) -> None:
        commit = hub.add(REPO, FILE, CONTENT, lfs=lfs)
        path = download(REPO, FILE)
        assert path.read_bytes() == CONTENT and path.name == Path(FILE).name
        assert path.is_relative_to(tmp_path / "hf" / "hub") and commit in path.parts
        with hub.counting() as requests:
            assert download(REPO, FILE) == path
            assert resolve(f"hf-hub:{REPO}:{FILE}") == resolve(f"hf-hub:{REPO}@main:{FILE}") == path
            assert resolve(f"hf-hub:{REPO}", candidates=("nothing.bin", FILE)) == path
        assert requests == []

    def test_revisions(self, hub: HubServer) -> None:
        first = hub.add(REPO, FILE, b"first")
        hub.add(REPO, FILE, b"second")
        hub.add(REPO, FILE, b"branch", revision="refs/pr/1")
        assert resolve(f"hf-hub:{REPO}:{FILE}").read_bytes() == b"second"
        assert resolve(f"hf-hub:{REPO}@{first}:{FILE}").read_bytes() == b"first"
        assert resolve(f"hf-hub:{REPO}@refs/pr/1:{FILE}").read_bytes() == b"branch"

    def test_candidates_in_order(self, hub: HubServer) -> None:
        hub.add(REPO, "model.safetensors", CONTENT)
        assert resolve(f"hf-hub:{REPO}").name == "model.safetensors"
        assert resolve(f"hf-hub:{REPO}", candidates=(FILE, "model.safetensors")).name == "model.safetensors"
        with pytest.raises(DownloadError) as caught:
            resolve(f"hf-hub:{REPO}", candidates=(FILE, "other.pth"))
        assert f"{FILE}, other.pth" in str(caught.value) and "model.safetensors" in str(caught.value)

    def test_cache_folder_of_the_moment(self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add(REPO, FILE, CONTENT)
        assert download(REPO, FILE, cache_dir=tmp_path / "mine").is_relative_to(tmp_path / "mine")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        assert download(REPO, FILE).is_relative_to(tmp_path / "home" / "hub")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        assert download(REPO, FILE).is_relative_to(tmp_path / "cache")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert download(REPO, FILE, cache_dir="~/tilde").is_relative_to(tmp_path / "tilde")

    def test_mirror_of_the_moment(self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with HubServer() as mirror:
            mirror.add(REPO, FILE, CONTENT)
            monkeypatch.setenv("HF_ENDPOINT", mirror.url + "/")
            assert download(REPO, FILE).read_bytes() == CONTENT
            assert mirror.requests and not hub.requests
        monkeypatch.setenv("HF_ENDPOINT", "no address")
        with pytest.raises(InputError, match="HF_ENDPOINT"):
            download(REPO, FILE)

    def test_token_goes_to_the_hub_and_not_to_its_storage(
        self, hub: HubServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.add(REPO, FILE, CONTENT)
        hub.require_token(REPO, "hf_secret")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert download(REPO, FILE).read_bytes() == CONTENT
        assert {"hub", "storage"} == {request.origin for request in hub.requests}

    def test_two_processes_at_once(self, hub: HubServer) -> None:
        hub.add(REPO, FILE, CONTENT)
        hub.fault(origin="storage", delay=1.0)
        code = f"from adfeatures.hub import download; print(download({REPO!r}, {FILE!r}))"
        root = Path(__file__).parents[2]
        processes = [
            subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        paths = {process.communicate(timeout=30)[0].strip() for process in processes}
        assert [process.returncode for process in processes] == [0, 0, 0] and len(paths) == 1
        assert Path(paths.pop()).read_bytes() == CONTENT

    def test_import_is_cheap(self) -> None:
        heavy = "{'torch', 'huggingface_hub', 'numpy', 'safetensors'}"
        code = f"import sys, adfeatures.checkpoints; print({heavy} & set(sys.modules))"
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == "set()"


def refusal(call: Callable[[], object], limit: float = 2.0) -> str:
    """The message of the DownloadError that the call raises within the limit in seconds."""
    start = time.monotonic()
    with pytest.raises(DownloadError) as caught:
        call()
    assert time.monotonic() - start < limit
    return str(caught.value)


def names_everything(message: str, hub: HubServer, cache: Path, revision: str = "main") -> bool:
    return all(name in message for name in (REPO, FILE, f"revision {revision}", hub.url, str(cache), "Next step: "))


class TestOffline:
    def check(self, message: str, hub: HubServer, tmp_path: Path) -> None:
        assert names_everything(message, hub, tmp_path / "hf" / "hub")
        for way in ("adfeatures download", f"hf download {REPO} {FILE}", "HF_HOME", "local-dir:", "HF_ENDPOINT"):
            assert way in message

    @pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
    def test_offline_mode(self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
        hub.add(REPO, FILE, CONTENT)
        monkeypatch.setenv(variable, "1")
        self.check(refusal(lambda: download(REPO, FILE)), hub, tmp_path)
        assert hub.requests == []
        monkeypatch.delenv(variable)
        path = download(REPO, FILE)
        monkeypatch.setenv(variable, "1")
        assert download(REPO, FILE) == path

    def test_offline_mode_of_huggingface_hub(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        self.check(refusal(lambda: download(REPO, FILE)), hub, tmp_path)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        self.check(refusal(lambda: download(REPO, FILE)), hub, tmp_path)

    def test_refused_connection(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add(REPO, "other.pth", CONTENT)
        cached = download(REPO, "other.pth")
        hub.__exit__()
        message = refusal(lambda: download(REPO, FILE))
        self.check(message, hub, tmp_path)
        assert "no connection" in message
        assert download(REPO, "other.pth") == cached

    def test_time_out(self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.fault(delay=60)
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
        self.check(refusal(lambda: download(REPO, FILE), limit=3), hub, tmp_path)

    def test_server_that_never_accepts(self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            hub.url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
            self.check(refusal(lambda: download(REPO, FILE), limit=3), hub, tmp_path)

    def test_name_that_does_not_resolve(self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.url = "http://hub.invalid"
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        self.check(refusal(lambda: download(REPO, FILE), limit=30), hub, tmp_path)

    def test_cache_copied_from_another_machine(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.add(REPO, FILE, CONTENT)
        download(REPO, FILE)
        os.rename(tmp_path / "hf", tmp_path / "stick")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "stick"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert resolve(f"hf-hub:{REPO}:{FILE}").read_bytes() == CONTENT


class TestRefusals:
    @pytest.mark.parametrize(
        ("status", "said"),
        [
            (401, "hf auth login"),
            (403, "hf auth login"),
            (404, "does not exist"),
            (429, "429"),
            (500, "500"),
            (502, "502"),
            (503, "503"),
            (418, "418"),
        ],
    )
    def test_status(self, hub: HubServer, tmp_path: Path, status: int, said: str) -> None:
        hub.add(REPO, FILE, CONTENT)
        hub.fail(status)
        message = refusal(lambda: download(REPO, FILE))
        assert names_everything(message, hub, tmp_path / "hf" / "hub") and said in message
        hub.faults.clear()
        assert download(REPO, FILE).read_bytes() == CONTENT

    @pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
    def test_status_of_the_storage(self, hub: HubServer, tmp_path: Path, status: int) -> None:
        hub.add(REPO, FILE, CONTENT)
        hub.fail(status, origin="storage")
        message = refusal(lambda: download(REPO, FILE))
        assert names_everything(message, hub, tmp_path / "hf" / "hub") and str(status) in message

    def test_rate_limit_names_the_wait(self, hub: HubServer) -> None:
        hub.fail(429, headers={"Retry-After": "3600"})
        assert "wait 3600 s" in refusal(lambda: download(REPO, FILE))

    def test_missing_repository(self, hub: HubServer, tmp_path: Path) -> None:
        message = refusal(lambda: download(REPO, FILE))
        assert names_everything(message, hub, tmp_path / "hf" / "hub") and "does not exist or is private" in message

    @pytest.mark.parametrize("gated", [False, True])
    def test_private_and_gated_repository(self, hub: HubServer, tmp_path: Path, gated: bool) -> None:
        hub.add(REPO, FILE, CONTENT)
        hub.require_token(REPO, "hf_secret", gated=gated)
        message = refusal(lambda: download(REPO, FILE))
        assert (
            names_everything(message, hub, tmp_path / "hf" / "hub")
            and "hf auth login" in message
            and "gated" in message
        )

    def test_missing_revision(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add(REPO, FILE, CONTENT)
        message = refusal(lambda: download(REPO, FILE, "v9"))
        assert names_everything(message, hub, tmp_path / "hf" / "hub", "v9") and "no such revision" in message

    def test_missing_file_lists_its_folder(self, hub: HubServer, tmp_path: Path) -> None:
        for name in ("dino-base/checkpoints_pro_last.pth", "clip-base/x.pth", "README.md"):
            hub.add(REPO, name, CONTENT)
        message = refusal(lambda: resolve(f"hf-hub:{REPO}:{FILE}"))
        assert names_everything(message, hub, tmp_path / "hf" / "hub")
        assert "dino-base/checkpoints_pro_last.pth" in message and "clip-base" not in message
        assert "clip-base/x.pth" in refusal(lambda: download(REPO, "nothing.pth"))
        hub.add(REPO, FILE, CONTENT)
        assert download(REPO, FILE).read_bytes() == CONTENT

    def test_missing_file_whose_folder_cannot_be_listed(self, hub: HubServer) -> None:
        hub.add(REPO, "README.md", CONTENT)
        hub.fail(500, match="/api/")
        assert "no such file" in refusal(lambda: download(REPO, FILE))

    def test_login_page_instead_of_a_hub(self, hub: HubServer) -> None:
        hub.fail(200)
        assert "not that of a Hub" in refusal(lambda: download(REPO, FILE))


class TestBrokenTransfers:
    @pytest.fixture(autouse=True)
    def short_rests(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """huggingface_hub tries again after 0.1 s instead of 1 s, and no thread sleeps on when the test is over."""
        sleep, over = time.sleep, threading.Event()

        def rest(seconds: float) -> None:
            if seconds < 60:
                sleep(min(seconds, 0.1))
            elif over.wait(seconds):
                raise TimeoutError("the test is over")

        monkeypatch.setattr(time, "sleep", rest)
        yield
        over.set()

    def nothing_kept(self, cache: Path) -> bool:
        return not [
            path
            for path in cache.rglob("*")
            if path.is_file() and path.suffix not in (".lock", ".TAG") and "refs" not in path.parts
        ]

    def test_half_a_file_is_not_kept(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add(REPO, FILE, CONTENT)
        hub.fault(method="GET", cut=len(CONTENT) // 2)
        message = refusal(lambda: download(REPO, FILE), limit=10)
        assert names_everything(message, hub, tmp_path / "hf" / "hub") and "broke off" in message
        assert self.nothing_kept(tmp_path / "hf" / "hub")
        hub.faults.clear()
        assert download(REPO, FILE).read_bytes() == CONTENT

    @pytest.mark.parametrize("ignore_range", [True, False])
    def test_one_drop_is_mended_at_once(self, hub: HubServer, ignore_range: bool) -> None:
        hub.add(REPO, FILE, CONTENT)
        hub.fault(method="GET", cut=len(CONTENT) // 2, times=1)
        hub.fault(method="GET", ignore_range=ignore_range)
        assert download(REPO, FILE).read_bytes() == CONTENT

    def test_what_arrived_before_a_drop_is_not_asked_for_again(self, hub: HubServer) -> None:
        hub.add(REPO, FILE, content := bytes(12 << 20))
        hub.fault(method="GET", cut=11 << 20, times=1)
        assert download(REPO, FILE).read_bytes() == content
        first, second = (request.headers.get("Range") for request in hub.requests if request.method == "GET")
        assert first in (None, "bytes=0-") and second in (f"bytes={10 << 20}-", f"bytes={11 << 20}-")

    def test_server_that_begins_again_for_ever(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.add(REPO, FILE, bytes(12 << 20))
        hub.fault(method="GET", cut=11 << 20, ignore_range=True)
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.4")
        message = refusal(lambda: download(REPO, FILE), limit=8)
        assert "nothing arrived for 2 s" in message and "HF_HUB_DOWNLOAD_TIMEOUT" in message

    def test_wait_that_a_server_demands_is_not_endless(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add(REPO, FILE, CONTENT)
        hub.fail(429, method="GET", headers={"Retry-After": "3600"})
        monkeypatch.setattr(hub_module, "_PATIENCE", 0.5)
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
        told = "nothing arrived" if WAITS_AS_TOLD else "wait 3600 s"
        for _ in range(2):
            # the second would wait for the lock of the first if that one kept it while it sleeps
            assert told in refusal(lambda: download(REPO, FILE), limit=4)
        hub.faults.clear()
        assert download(REPO, FILE).read_bytes() == CONTENT

    @pytest.mark.parametrize("lfs", [True, False])
    def test_wrong_content_of_the_right_size(self, hub: HubServer, tmp_path: Path, lfs: bool) -> None:
        hub.add(REPO, FILE, CONTENT, lfs=lfs)
        wrong = bytes(len(CONTENT))
        hub.fault(method="GET", body=wrong)
        message = refusal(lambda: download(REPO, FILE))
        assert names_everything(message, hub, tmp_path / "hf" / "hub")
        file = hub.commits[hub.branches[REPO]["main"]][FILE]
        found = hashlib.sha256(wrong) if lfs else hashlib.sha1(b"blob %d\0" % len(wrong) + wrong)
        assert f"expected {file.etag}, found {found.hexdigest()}" in message and "removed" in message
        assert self.nothing_kept(tmp_path / "hf" / "hub")
        hub.faults.clear()
        assert download(REPO, FILE).read_bytes() == CONTENT

    def test_wrong_size(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add(REPO, FILE, CONTENT)
        hub.fault(method="GET", body=CONTENT + b"more")
        assert "broke off" in refusal(lambda: download(REPO, FILE))
        assert self.nothing_kept(tmp_path / "hf" / "hub")

    @pytest.mark.parametrize("lfs", [True, False])
    def test_damaged_cache_is_noticed_offline(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch, lfs: bool) -> None:
        hub.add(REPO, FILE, CONTENT, lfs=lfs)
        path = download(REPO, FILE)
        path.resolve().write_bytes(CONTENT[:-1])
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert "wrong hash" in refusal(lambda: download(REPO, FILE))
        monkeypatch.delenv("HF_HUB_OFFLINE")
        assert download(REPO, FILE).read_bytes() == CONTENT

    def test_cache_without_symbolic_links(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*arguments: object, **options: object) -> None:
            raise OSError("as Windows does")

        monkeypatch.setattr(os, "symlink", refuse)
        hub.add(REPO, FILE, CONTENT)
        hub.fault(method="GET", body=bytes(len(CONTENT)))
        assert "wrong hash" in refusal(lambda: download(REPO, FILE))
        hub.faults.clear()
        path = download(REPO, FILE)
        assert path.read_bytes() == CONTENT and not path.is_symlink()
        with hub.counting() as requests:
            assert download(REPO, FILE) == path
        assert requests == []

    def test_shared_blobs_are_known_by_their_own_name(self, tmp_path: Path) -> None:
        # a blob may be a link into a store where files are named by Xet hash, which looks like a sha256
        store, blobs = tmp_path / "store" / ("0" * 64), tmp_path / "blobs" / hashlib.sha256(CONTENT).hexdigest()
        for path in (store, blobs):
            path.parent.mkdir()
        store.write_bytes(CONTENT)
        blobs.symlink_to(store)
        snapshot = tmp_path / "weights.pth"
        snapshot.symlink_to(blobs)
        verify(snapshot)
        store.write_bytes(b"other")
        with pytest.raises(DownloadError, match="removed"):
            verify(snapshot)
        assert not store.exists() and not blobs.is_symlink() and not snapshot.is_symlink()

    def test_what_has_no_digest_is_not_compared(self, tmp_path: Path) -> None:
        (tmp_path / "w.pth").write_bytes(b"x")
        verify(tmp_path / "w.pth")
        verify(tmp_path / "w.pth", "5f3-abc")
        verify(tmp_path / "w.pth", hashlib.sha256(b"x").hexdigest())
        with pytest.raises(DownloadError, match="wrong hash"):
            verify(tmp_path / "w.pth", "0" * 64)


class TestUnusableCaches:
    def test_file_in_place_of_the_folder(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add(REPO, FILE, CONTENT)
        (tmp_path / "cache").write_text("")
        message = refusal(lambda: download(REPO, FILE, cache_dir=tmp_path / "cache"))
        assert names_everything(message, hub, tmp_path / "cache")
        assert "cannot be written" in message and "HF_HOME or cache_dir" in message and "local-dir:" in message

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
    @pytest.mark.parametrize("where", [["os.makedirs"], ["os.replace", "shutil.move"]])
    def test_full_or_read_only(
        self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, where: list[str]
    ) -> None:
        hub.add(REPO, FILE, CONTENT)

        def fail(*arguments: object, **options: object) -> None:
            raise OSError(number, os.strerror(number), "somewhere")

        with monkeypatch.context() as patch:
            for name in where:
                patch.setattr(name, fail)
            message = refusal(lambda: download(REPO, FILE))
        assert names_everything(message, hub, tmp_path / "hf" / "hub") and os.strerror(number) in message
        assert "cannot be written" in message
        assert download(REPO, FILE).read_bytes() == CONTENT

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
    def test_pipe_in_place_of_a_blob(self, hub: HubServer) -> None:
        hub.add(REPO, FILE, CONTENT)
        blob = download(REPO, FILE).resolve()
        blob.unlink()
        os.mkfifo(blob)
        assert "found a pipe or device" in refusal(lambda: download(REPO, FILE))
        assert download(REPO, FILE).read_bytes() == CONTENT

    def test_read_only_cache_that_has_the_file(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add(REPO, FILE, CONTENT)
        path = download(REPO, FILE)

        def fail(*arguments: object, **options: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        for name in ("makedirs", "replace", "symlink", "mkdir", "unlink", "rename"):
            monkeypatch.setattr(os, name, fail)
        assert download(REPO, FILE) == path
        path.resolve().write_bytes(b"damaged")
        assert "could not be removed" in refusal(lambda: download(REPO, FILE))
