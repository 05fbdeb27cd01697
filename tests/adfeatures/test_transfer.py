"""What a hostile or broken server of weights can name, bound and leave behind, over real HTTP."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.hub_server import HubServer
from huggingface_hub import file_download

from adfeatures import hub as hub_module
from adfeatures.errors import DownloadError
from adfeatures.hub import download

REPO, FILE = "xcyao00/ADPretrain", "dino-base/checkpoints_pro_norm.pth"
CONTENT = bytes(range(256)) * 40
PLANTED = "../../../../planted"


def refusal(said: str) -> None:
    with pytest.raises(DownloadError, match=said) as caught:
        download(REPO, FILE)
    assert "Next step: " in str(caught.value)


def files(folder: Path) -> set[str]:
    """All that is there except what huggingface_hub puts into each cache."""
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
    return {name for name in there if not name.endswith((".lock", "CACHEDIR.TAG", "/refs/main"))}


class TestNames:
    @pytest.mark.parametrize("lfs", [True, False])
    @pytest.mark.parametrize("etag", [f'"{PLANTED}"', f"W/{PLANTED}", "..", "", None, "5f3-abc", "0" * 39, "A" * 64])
    def test_etag_that_is_no_hash(self, hub: HubServer, tmp_path: Path, etag: str | None, lfs: bool) -> None:
        hub.add(REPO, FILE, CONTENT, lfs=lfs)
        hub.fault(method="HEAD", headers={"X-Linked-ETag": etag, "ETag": etag})
        refusal("does not name the hash(?s:.*)ADFEATURES_UNVERIFIED=1")
        assert files(tmp_path) == set() and [request.method for request in hub.requests] == ["HEAD"]

    @pytest.mark.parametrize("commit", [PLANTED, "main", "", "0" * 39, "g" * 40])
    @pytest.mark.parametrize("name", [FILE, "missing.pth"])
    def test_commit_that_is_none(self, hub: HubServer, tmp_path: Path, commit: str, name: str) -> None:
        hub.add(REPO, name, CONTENT)
        hub.fault(method="HEAD", headers={"X-Repo-Commit": commit})
        refusal("not that of a Hub")
        assert not list(tmp_path.rglob("*planted*")) + list(tmp_path.rglob("refs"))
        assert files(tmp_path) == set()

    def test_answer_is_asked_for_once(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add(REPO, FILE, CONTENT)
        hub.fault(method="HEAD", times=1)
        hub.fault(method="HEAD", headers={"X-Linked-ETag": PLANTED})
        assert download(REPO, FILE).read_bytes() == CONTENT
        assert [request.method for request in hub.requests] == ["HEAD", "GET"]
        assert not list(tmp_path.rglob("*planted*"))

    def test_answer_after_a_redirect(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add(REPO, FILE, CONTENT)
        hub.add("new/name", FILE, CONTENT)
        hub.fault(method="HEAD", match=REPO, status=307, headers={"Location": f"/new/name/resolve/main/{FILE}"})
        hub.fault(method="HEAD", match="new/name", times=1, headers={"X-Linked-ETag": PLANTED})
        refusal("does not name the hash")
        assert files(tmp_path) == set()
        assert download(REPO, FILE).read_bytes() == CONTENT

    def test_other_users_of_huggingface_hub_notice_nothing(self, hub: HubServer) -> None:
        before = dict(vars(file_download))
        hub.add(REPO, FILE, CONTENT)
        during: list[bool] = []
        looking = threading.Thread(target=lambda: during.extend(vars(file_download) == before for _ in range(2000)))
        looking.start()
        download(REPO, FILE)
        looking.join()
        assert all(during) and vars(file_download) == before


class TestWithoutHash:
    def test_taken_on_trust_where_asked_for(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        names = {FILE: CONTENT, "other.pth": CONTENT[::-1]}
        for name, content in names.items():
            hub.add(REPO, name, content)
        hub.fault(method="HEAD", headers={"X-Linked-ETag": PLANTED, "ETag": PLANTED})
        monkeypatch.setenv("ADFEATURES_UNVERIFIED", "1")
        # the same ETag for two files, as servers give it that make it of size and time
        paths = {name: download(REPO, name) for name in names}
        assert {name: path.read_bytes() for name, path in paths.items()} == names
        assert all(path.resolve().name.startswith("unverified-") for path in paths.values())
        monkeypatch.delenv("ADFEATURES_UNVERIFIED")
        with hub.counting() as requests:
            assert download(REPO, FILE) == paths[FILE]
        assert requests == []

    def test_hash_is_compared_all_the_same(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add(REPO, FILE, CONTENT)
        hub.fault(method="GET", body=bytes(len(CONTENT)))
        monkeypatch.setenv("ADFEATURES_UNVERIFIED", "1")
        with pytest.raises(DownloadError, match="wrong hash"):
            download(REPO, FILE)


class TestLength:
    @pytest.mark.parametrize("length", [None, str(1 << 60)])
    @pytest.mark.parametrize("lfs", [True, False])
    def test_endless_body_is_cut_off(self, hub: HubServer, tmp_path: Path, length: str | None, lfs: bool) -> None:
        hub.add(REPO, FILE, CONTENT, lfs=lfs)
        hub.fault(method="GET", endless=True, headers={"Content-Length": length, "Connection": "close"})
        refusal(f"more than the announced {len(CONTENT)} bytes")
        assert files(tmp_path) == set() and nothing_runs()

    def test_small_file_that_inflates(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add(REPO, FILE, CONTENT)
        body = gzip.compress(bytes(16 << 20))
        hub.fault(method="GET", body=body, headers={"Content-Encoding": "gzip"})
        refusal("more than the announced")
        assert files(tmp_path) == set()

    @pytest.mark.filterwarnings("ignore:Not enough free disk space")
    @pytest.mark.parametrize(("size", "said"), [("1" + "0" * 18, "are free"), (None, "not that of a Hub")])
    def test_size_that_cannot_be(self, hub: HubServer, tmp_path: Path, size: str | None, said: str) -> None:
        hub.add(REPO, FILE, CONTENT, lfs=False)
        hub.fault(method="HEAD", headers={"Content-Length": size, "Connection": "close"})
        refusal(said)
        assert files(tmp_path) == set() and not [request for request in hub.requests if request.method == "GET"]


class TestKilledDownloads:
    @pytest.mark.slow
    def test_next_one_leaves_nothing_of_it(self, hub: HubServer, tmp_path: Path) -> None:
        content = bytes(12 << 20)
        hub.add(REPO, FILE, content)
        hub.fault(method="GET", cut=11 << 20, stall=True)
        root, code = Path(__file__).parents[2], f"from adfeatures.hub import download; download({REPO!r}, {FILE!r})"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL)
        while not any(path.stat().st_size for path in tmp_path.rglob("*.incomplete")):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        foreign = next(tmp_path.rglob("*.incomplete")).with_name(f"{'0' * 64}.01234567.incomplete")
        foreign.write_bytes(b"a download that goes on in another process")
        hub.faults.clear()
        assert download(REPO, FILE).read_bytes() == content
        assert list(tmp_path.rglob("*.incomplete")) == [foreign]

    @pytest.mark.slow
    def test_given_up_one_writes_no_more(self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add(REPO, FILE, bytes(12 << 20))
        hub.fault(method="GET", cut=11 << 20, stall=True)
        monkeypatch.setattr(hub_module, "_PATIENCE", 0.5)
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.1")
        refusal("nothing arrived")
        left = [path for path in tmp_path.rglob("*") if path.is_file()]
        hub.faults.clear()
        hub.stopped.set()
        assert nothing_runs()
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == left
        assert download(REPO, FILE).read_bytes() == bytes(12 << 20)


def nothing_runs() -> bool:
    """Whether the threads of downloads end, at the latest when their server hangs up."""
    for thread in threading.enumerate():
        if thread.name == "adfeatures-download":
            thread.join(timeout=10)
    return not any(thread.name == "adfeatures-download" for thread in threading.enumerate())
