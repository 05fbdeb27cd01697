"""Weights on disk: read without running their code, saved atomically, converted."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import random
import stat
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden_values import FOLDER, value
from safetensors import safe_open
from safetensors.torch import save_file

from adfeatures.checkpoints import (
    atomic_path,
    convert,
    git_blob_id,
    load_checkpoint,
    regular_file,
    save_checkpoint,
    sha256,
)
from adfeatures.errors import AdfeaturesError, CheckpointError, DownloadError, InputError

GOLDEN = FOLDER / "upstream_checkpoint.pth"
CONTENT = bytes(range(256)) * 40


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return list(first) == list(second) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True)
    )


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {"a.weight": value("a", (3, 4), 1.0), "b": value("b", (5,), 1.0).bfloat16(), "count": torch.tensor(7)}


class TestPickles:
    def test_published_file(self) -> None:
        checkpoint = load_checkpoint(GOLDEN)
        assert set(checkpoint.metrics) == {"img_auc", "pix_auc", "pix_pro"}
        assert all(type(number) is float and 0 < number <= 100 for number in checkpoint.metrics.values())
        assert checkpoint.metadata == {}
        assert len(checkpoint.state_dict) == 60
        for key, tensor in checkpoint.state_dict.items():
            expected = value("projector." + key, tuple(tensor.shape), 0.05).bfloat16()
            assert tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and torch.equal(tensor, expected), key

    @pytest.mark.parametrize("scalar", [np.float64(0.975), np.float32(0.5), 0.25, 3])
    @pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_float_scalars_of_both_numpy_majors(
        self, tmp_path: Path, weights: dict[str, torch.Tensor], scalar: float, module: str, zipped: bool
    ) -> None:
        path = tmp_path / "scalars.pth"
        torch.save({"projectors": weights, "img_auc": scalar}, path, _use_new_zipfile_serialization=zipped)
        rewrite(path, b"numpy._core.multiarray", module.encode())
        checkpoint = load_checkpoint(path)
        assert checkpoint.metrics == {"img_auc": float(scalar)} and type(checkpoint.metrics["img_auc"]) is float
        assert same(checkpoint.state_dict, weights)

    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".PTH"])
    @pytest.mark.parametrize("wrapper", [None, "projectors", "state_dict", "model"])
    def test_plain_and_wrapped_state_dicts(
        self, tmp_path: Path, weights: dict[str, torch.Tensor], suffix: str, wrapper: str | None
    ) -> None:
        path = tmp_path / f"weights{suffix}"
        torch.save(weights if wrapper is None else {wrapper: weights}, path)
        assert same(load_checkpoint(path).state_dict, weights)

    def test_parameters_become_plain_tensors(self, tmp_path: Path) -> None:
        module = torch.nn.Linear(2, 2)
        torch.save(dict(module.named_parameters()), tmp_path / "module.pth")
        tensors = load_checkpoint(tmp_path / "module.pth").state_dict
        assert all(type(tensor) is torch.Tensor and not tensor.requires_grad for tensor in tensors.values())

    @pytest.mark.filterwarnings("ignore:Validating sparse")
    @pytest.mark.parametrize(
        ("content", "named"),
        [
            ({"state_dict": {"a": torch.ones(1)}, "args": {"lr": 0.1}}, "'args'"),
            ({"state_dict": {"a": torch.ones(1)}, "done": True}, "'done'"),
            ({"state_dict": {"a": torch.ones(1), "name": "vit"}}, "'name'"),
            ({"a": torch.ones(1), "epoch": 3}, "'epoch'"),
            ({1: torch.ones(1)}, "1"),
            (torch.ones(1), "Tensor"),
            ([torch.ones(1)], "list"),
            ({}, "no tensors"),
            ({"a": torch.ones(1, device="meta")}, "a is not a plain tensor"),
            ({"a": torch.eye(2).to_sparse()}, "a is not a plain tensor"),
            ({"a": torch.ones(1, dtype=torch.complex64)}, "a is not a plain tensor"),
        ],
    )
    def test_anything_but_weights_and_metrics_is_refused(self, tmp_path: Path, content: object, named: str) -> None:
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(CheckpointError, match=r"odd\.pth") as caught:
            load_checkpoint(tmp_path / "odd.pth")
        assert named in str(caught.value)


def test_a_tensor_that_torch_cannot_compute_with_is_refused(tmp_path: Path) -> None:
    for rank in (64, 65):
        save_file({"a": torch.ones(1).view([1] * rank)}, tmp_path / f"{rank}.safetensors")
    assert load_checkpoint(tmp_path / "64.safetensors").state_dict["a"].ndim == 64
    with pytest.raises(CheckpointError, match=r"65\.safetensors: a is not a plain tensor"):
        load_checkpoint(tmp_path / "65.safetensors")


class Harmful:
    """Calls ``function`` when it is unpickled without restriction."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes in the pickle of a file made by torch.save."""
    if not zipfile.is_zipfile(path):
        path.write_bytes(path.read_bytes().replace(old, new))
        return
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
class TestHarmfulFiles:
    @pytest.mark.parametrize("form", ["torch", "torch legacy", "pickle 2", "pickle 4", "pickle 5"])
    @pytest.mark.parametrize(
        ("function", "named"), [(os.system, f"{os.name}.system|posix.system"), (eval, "builtins.eval|eval")]
    )
    def test_global_is_named_and_not_run(
        self, tmp_path: Path, form: str, function: Callable[..., object], named: str
    ) -> None:
        path, mark = tmp_path / "harmful.pth", tmp_path / "executed"
        command = f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')"
        content = {
            "projectors": {"a": torch.ones(2)} if form.startswith("torch") else {},
            "img_auc": Harmful(function, command),
        }
        if form.startswith("torch"):
            torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
        else:
            path.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
        with pytest.raises(CheckpointError, match=named) as caught:
            load_checkpoint(path)
        assert "not unpickled" in str(caught.value) and str(path) in str(caught.value)
        assert "weights_only" not in str(caught.value) and caught.value.__cause__ is None
        assert not mark.exists()

    def test_os_system_by_that_name(self, tmp_path: Path) -> None:
        path = tmp_path / "harmful.bin"
        path.write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
        with pytest.raises(CheckpointError, match=r"names os\.system"):
            load_checkpoint(path)

    @pytest.mark.parametrize(
        ("entry", "named"),
        [
            (np.arange(3), "numpy._core.multiarray._reconstruct, numpy.ndarray"),
            (np.int64(3), "numpy.i8"),
            (np.array(["a"], dtype=object)[:0].dtype, "numpy.O8"),
            (Path("x"), "PosixPath" if os.name == "posix" else "WindowsPath"),
        ],
    )
    def test_nothing_of_numpy_but_float_scalars(self, tmp_path: Path, entry: object, named: str) -> None:
        torch.save({"projectors": {"a": torch.ones(1)}, "entry": entry}, tmp_path / "more.pth")
        with pytest.raises(CheckpointError, match="not unpickled") as caught:
            load_checkpoint(tmp_path / "more.pth")
        assert named in str(caught.value).replace("numpy.core", "numpy._core")

    def test_dtype_state_that_would_corrupt_memory(self, tmp_path: Path) -> None:
        # dtype.__setstate__ of numpy believes this: 100000 bytes an element, read from a string of 8
        path = tmp_path / "state.pth"
        torch.save({"projectors": {"a": torch.ones(1)}, "img_auc": np.float64(0.5)}, path)
        rewrite(path, b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t", b"J\xa0\x86\x01\x00J\xff\xff\xff\xffK\x00t")
        assert load_checkpoint(path).metrics == {"img_auc": 0.5}

    def test_what_the_process_allows_elsewhere_is_not_allowed_here_and_stays(self, tmp_path: Path) -> None:
        torch.save({"a": torch.ones(1), "x": Harmful(zlib.crc32, b"")}, tmp_path / "x.pth")
        with torch.serialization.safe_globals([zlib.crc32]):
            before = set(torch.serialization.get_safe_globals())
            with pytest.raises(CheckpointError, match=r"zlib\.crc32"):
                load_checkpoint(tmp_path / "x.pth")
            load_checkpoint(GOLDEN)
            assert set(torch.serialization.get_safe_globals()) == before >= {zlib.crc32}

    def test_threads_do_not_take_each_others_permission(self) -> None:
        failures: list[BaseException] = []

        def run() -> None:
            try:
                for _ in range(5):
                    load_checkpoint(GOLDEN)
            except CheckpointError as error:
                failures.append(error)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
class TestDamagedFiles:
    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
    @pytest.mark.parametrize(
        ("content", "advice"),
        [
            (b"", "empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
            (b"<!DOCTYPE html><html>", "web page"),
            (b"\x00" * 999, "fetch it again"),
            (b"PK\x03\x04 not really", "fetch it again"),
            (random.Random(0).randbytes(999), "fetch it again"),
            (
                b"\x93" + random.Random(1).randbytes(999),
                "fetch it again",
            ),  # reads as a pickle that names something without a name
        ],
    )
    def test_other_content(self, tmp_path: Path, suffix: str, content: bytes, advice: str) -> None:
        path = tmp_path / f"file{suffix}"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{path}.*{advice}|Download it again"):
            load_checkpoint(path)

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    @pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
    def test_truncated(self, tmp_path: Path, weights: dict[str, torch.Tensor], suffix: str, kept: float) -> None:
        path = tmp_path / f"file{suffix}"
        torch.save(weights, path) if suffix == ".pth" else save_file(weights, path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
        with pytest.raises(CheckpointError, match="truncated"):
            load_checkpoint(path)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_random_damage_never_raises_anything_else(self, tmp_path: Path, zipped: bool) -> None:
        buffer = io.BytesIO()
        torch.save(
            {"projectors": {"a": torch.ones(2)}, "m": np.float64(1)}, buffer, _use_new_zipfile_serialization=zipped
        )
        random = np.random.RandomState(0)
        path = tmp_path / "damaged.pth"
        for _ in range(150):
            data = bytearray(buffer.getvalue())
            for position in random.randint(0, len(data), 2):
                data[position] = random.randint(256)
            path.write_bytes(data)
            try:
                load_checkpoint(path)
            except CheckpointError:
                continue

    def test_other_suffix_folder_and_missing_file(self, tmp_path: Path) -> None:
        (tmp_path / "weights.onnx").write_bytes(b"x")
        with pytest.raises(CheckpointError, match=r"'\.onnx'.*\.safetensors"):
            load_checkpoint(tmp_path / "weights.onnx")
        for path in (tmp_path, tmp_path / "missing.pth"):
            with pytest.raises(CheckpointError, match="Cannot open .*: "):
                load_checkpoint(path)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_first_tensor_that_is_not_finite_is_named(
        self, tmp_path: Path, suffix: str, dtype: torch.dtype, bad: float
    ) -> None:
        path = tmp_path / f"nan{suffix}"
        spoiled = torch.tensor([1.0, float("nan") if dtype == torch.float8_e4m3fn else bad]).to(dtype)
        tensors = {"fine": torch.ones(2).to(dtype), "spoiled": spoiled, "spoiled_too": spoiled.clone()}
        torch.save(tensors, path) if suffix == ".pth" else save_file(tensors, path)
        with pytest.raises(CheckpointError, match="spoiled holds NaN"):
            load_checkpoint(path)

    @pytest.mark.parametrize("metrics", ["[1]", "{", '{"img_auc": "high"}', '{"img_auc": null}'])
    def test_metrics_that_are_none(self, tmp_path: Path, metrics: str) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"metrics": metrics})
        with pytest.raises(CheckpointError, match="metrics"):
            load_checkpoint(tmp_path / "a.safetensors")


class TestRegularFile:
    def test_file_and_link(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "link").symlink_to("file")
        assert regular_file(tmp_path / "file") == tmp_path / "file"
        assert regular_file(str(tmp_path / "link")) == tmp_path / "link"

    def test_what_is_none(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "link").symlink_to("pipe")
        (tmp_path / "loop").symlink_to("loop")
        paths = [tmp_path, tmp_path / "missing", tmp_path / "pipe", tmp_path / "link", tmp_path / "loop"]
        for path in (*map(str, paths), "/dev/zero", "x" * 300, "a\0b"):
            with pytest.raises(CheckpointError, match="Cannot open .*: "):
                regular_file(path)
            with pytest.raises(DownloadError, match="Cannot open .*: "):
                regular_file(path, DownloadError)

    def test_without_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "secret.pth").touch()
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
        with pytest.raises(CheckpointError, match=r"Cannot open .*secret\.pth: permission denied"):
            load_checkpoint(tmp_path / "secret.pth")

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_weights_that_are_a_pipe(self, tmp_path: Path, suffix: str) -> None:
        os.mkfifo(tmp_path / f"weights{suffix}")
        with pytest.raises(CheckpointError, match="pipe or device"):
            load_checkpoint(tmp_path / f"weights{suffix}")


class TestSaving:
    def test_round_trip(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        path = tmp_path / "new" / "folder" / "w.safetensors"
        save_checkpoint(
            path,
            weights,
            metrics={"pix_pro": 93.25, "n": 2},
            metadata={"model": "adpretrain_dinov2_base", "note": "ä\n\x01"},
        )
        checkpoint = load_checkpoint(path)
        assert same(dict(sorted(checkpoint.state_dict.items())), dict(sorted(weights.items())))
        assert checkpoint.metrics == {"pix_pro": 93.25, "n": 2.0}
        assert checkpoint.metadata == {"model": "adpretrain_dinov2_base", "note": "ä\n\x01"}
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["metrics"]) == {"pix_pro": 93.25, "n": 2.0}
        assert os.listdir(path.parent) == ["w.safetensors"]

    def test_same_content_same_bytes(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        metadata = {name: name for name in "zyxwvuts"}
        for number in range(3):
            save_checkpoint(
                tmp_path / f"{number}.safetensors",
                weights,
                metrics={"x": 1.0},
                metadata=dict(reversed(metadata.items())),
            )
        assert len({sha256(tmp_path / f"{number}.safetensors") for number in range(3)}) == 1
        save_checkpoint(tmp_path / "plain.safetensors", weights)
        assert load_checkpoint(tmp_path / "plain.safetensors").metadata == {}

    def test_views_and_shared_tensors(self, tmp_path: Path) -> None:
        base = torch.arange(12.0).reshape(3, 4)
        tensors = {
            "base": base,
            "same": base,
            "view": base[1:],
            "turned": base.T,
            "weight": torch.nn.Parameter(base),
            "none": base[:0],
        }
        save_checkpoint(tmp_path / "w.safetensors", tensors)
        loaded = load_checkpoint(tmp_path / "w.safetensors").state_dict
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())

    def test_permissions_follow_the_umask(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        (tmp_path / "plain").touch()
        save_checkpoint(tmp_path / "w.safetensors", weights)
        assert stat.S_IMODE(os.stat(tmp_path / "w.safetensors").st_mode) == stat.S_IMODE(
            os.stat(tmp_path / "plain").st_mode
        )

    def test_what_cannot_be_saved(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        for name in ("w.pth", "w"):
            with pytest.raises(InputError, match="safetensors"):
                save_checkpoint(tmp_path / name, weights)
        for metadata in ({"k": 1}, {1: "v"}, {"metrics": "{}"}):
            with pytest.raises(InputError, match="text"):
                save_checkpoint(tmp_path / "w.safetensors", weights, metadata=metadata)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="b holds NaN"):
            save_checkpoint(tmp_path / "w.safetensors", {"a": torch.ones(1), "b": torch.tensor([float("nan")])})
        assert os.listdir(tmp_path) == []

    def test_failure_keeps_the_old_file(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        path = tmp_path / "w.safetensors"
        save_checkpoint(path, weights)
        before = path.read_bytes()
        with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
            assert temporary.suffix == ".safetensors" and temporary.parent.parent == tmp_path
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["w.safetensors"]

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
    @pytest.mark.parametrize("where", ["touch", "fsync", "replace"])
    def test_disk_that_is_full_or_read_only(
        self, tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, number: int, where: str
    ) -> None:
        def fail(*arguments: object, **options: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path if where == "touch" else os, where, fail)
        with pytest.raises(AdfeaturesError) as caught:
            save_checkpoint(tmp_path / "w.safetensors", weights)
        assert str(tmp_path / "w.safetensors") in str(caught.value) and os.strerror(number) in str(caught.value)
        assert os.listdir(tmp_path) == []

    def test_disk_that_fills_up_while_safetensors_writes(
        self, tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from safetensors import SafetensorError

        def fill(*arguments: object, **options: object) -> None:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("safetensors.torch.save_file", fill)
        with pytest.raises(AdfeaturesError, match=r"w\.safetensors.*No space left"):
            save_checkpoint(tmp_path / "w.safetensors", weights)
        assert os.listdir(tmp_path) == []

    def test_folder_that_is_a_file(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        (tmp_path / "folder").write_text("")
        with pytest.raises(AdfeaturesError, match="Cannot write .*folder"):
            save_checkpoint(tmp_path / "folder" / "w.safetensors", weights)

    def test_errors_of_ours_pass_through_atomic_path(self, tmp_path: Path) -> None:
        with pytest.raises(DownloadError, match="^mine$"), atomic_path(tmp_path / "x"):
            raise DownloadError("mine")


class TestConvert:
    def test_published_file(self, tmp_path: Path) -> None:
        source, destination = load_checkpoint(GOLDEN), tmp_path / "out.safetensors"
        converted = convert(GOLDEN, destination, metadata={"model": "adpretrain_dinov2_base", "source": "overruled"})
        assert same(dict(sorted(converted.state_dict.items())), dict(sorted(source.state_dict.items())))
        assert converted.metrics == source.metrics
        digest = hashlib.sha256(GOLDEN.read_bytes()).hexdigest()
        facts = {"format": "adfeatures", "source": GOLDEN.name, "source_sha256": digest}
        assert converted.metadata == {"model": "adpretrain_dinov2_base", **facts}
        assert load_checkpoint(destination).metadata == converted.metadata

    def test_again_is_a_no_op_and_other_files_are_not_overwritten(
        self, tmp_path: Path, weights: dict[str, torch.Tensor]
    ) -> None:
        destination = tmp_path / "out.safetensors"
        convert(GOLDEN, destination)
        before = destination.stat()
        assert convert(GOLDEN, destination).metrics
        assert destination.stat().st_mtime_ns == before.st_mtime_ns and destination.stat().st_ino == before.st_ino
        torch.save(weights, tmp_path / "other.pth")
        for content in (destination.read_bytes(), b"something else"):
            destination.write_bytes(content)
            with pytest.raises(InputError, match="exists"):
                convert(tmp_path / "other.pth", destination)
            assert destination.read_bytes() == content

    def test_source_that_cannot_be_read_leaves_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "bad.pth").write_bytes(b"bad")
        with pytest.raises(CheckpointError, match="bad.pth"):
            convert(tmp_path / "bad.pth", tmp_path / "out.safetensors")
        with pytest.raises(InputError, match="safetensors"):
            convert(GOLDEN, tmp_path / "out.pth")
        assert os.listdir(tmp_path) == ["bad.pth"]


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT * 300)
    assert sha256(tmp_path / "file") == hashlib.sha256(CONTENT * 300).hexdigest()


def test_git_blob_id(tmp_path: Path) -> None:
    """The ids are those that ``git hash-object`` prints."""
    for content, expected in (
        (b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
        (b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a"),
        (bytes(3_000_000), "73e77f405a9ff5ab6f54695cf10e7be6d23c9a4b"),
    ):
        (tmp_path / "file").write_bytes(content)
        assert git_blob_id(tmp_path / "file") == expected
