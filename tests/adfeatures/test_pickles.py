"""Files of torch are read as data: honest ones equal what torch reads, hostile ones run and exhaust nothing."""

from __future__ import annotations

import pickle
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden_values import fill, golden, shapes, value
from torch import Tensor, nn

from adfeatures.backbones import create_backbone
from adfeatures.checkpoints import load_checkpoint
from adfeatures.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")


class Tower(nn.Module):
    """Everything that a module can hold besides parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).half()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)])
        self.register_buffer("resolution", torch.tensor(224))
        # As in OpenAI's files: a tensor that is neither a parameter nor a buffer, and is not finite.
        self.attn_mask = torch.full((2, 2), -torch.inf)
        self.sizes, self.names = torch.jit.Attribute([1, 2], list[int]), torch.jit.Attribute({"a": 1}, dict[str, int])
        self.pair, self.none = (1, 2.5), None
        self.device, self.large, self.text, self.flag = torch.device("cpu"), 1 << 40, "x" * 300, True

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Tower()
        self.tied = self.visual.linear
        self.base = nn.Parameter(torch.arange(12.0).reshape(3, 4))
        self.turned = nn.Parameter(self.base.detach().T)
        self.part = nn.Parameter(self.base.detach()[1:, ::2])
        self.rounded = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.empty(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x)


def save(module: nn.Module, path: Path, example: Tensor | None = None) -> Path:
    compiled = torch.jit.script(module) if example is None else torch.jit.trace(module, example)
    torch.jit.save(compiled, str(path))
    return path


def rewrite(
    path: Path, change: bytes | Callable[[bytes], bytes], entry: str = "data.pkl", compression: int = zipfile.ZIP_STORED
) -> None:
    """Change, or replace, one file within an archive."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in entries if name.endswith(f"/{entry}"))
    entries[name] = change if isinstance(change, bytes) else change(entries[name])
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


class TestHonestArchives:
    def test_equal_to_torch(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        path = save(Model(), tmp_path / "model.pt")
        checkpoint = load_checkpoint(path)
        assert_equal(checkpoint.state_dict, torch.jit.load(path).state_dict())
        assert checkpoint.metrics == {} and checkpoint.metadata == {}

    def test_traced_module(self, tmp_path: Path) -> None:
        path = save(
            nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)).eval(), tmp_path / "traced.pth", torch.ones(1, 3, 4, 4)
        )
        assert_equal(load_checkpoint(path).state_dict, torch.jit.load(path).state_dict())

    def test_without_warnings(self, tmp_path: Path) -> None:
        path = save(nn.Linear(2, 2), tmp_path / "model.pt")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_checkpoint(path)

    def test_clip_in_half_precision_as_openai_published_it(self, tmp_path: Path) -> None:
        weights = fill(shapes("backbone_clip"), "clip.")
        visual, text = nn.Module(), nn.Module()
        for key, tensor in weights.items():
            owner = visual
            *parents, name = key.split(".")
            for parent in parents:
                if not hasattr(owner, parent):
                    owner.add_module(parent, nn.Module())
                owner = getattr(owner, parent)
            owner.register_parameter(name, nn.Parameter(tensor.half()))
        text.attn_mask, text.weight = torch.full((2, 2), -torch.inf), nn.Parameter(torch.ones(2).half())
        model = nn.Module()
        model.visual, model.transformer = visual, text
        model.register_buffer("input_resolution", torch.tensor(224))
        path = tmp_path / "ViT-B-16.pt"
        torch.jit.save(torch.jit.script(model), str(path))
        backbone = create_backbone("clip_base", weights=path, embed_dim=64, num_heads=2)
        found = backbone(value("backbone.image", (2, 3, 224, 224)))[-1].flatten(2).transpose(1, 2)
        expected = golden("backbone_clip")["tokens.3"]
        # Weights in half precision, features in single: three digits.
        assert (found - expected).abs().max() < 3e-3 * expected.abs().max()


class Writes(nn.Module):
    """Makes a file of ``target``'s name when torch loads it."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.weight: Tensor = nn.Parameter(torch.ones(2))
        self.target = target

    def forward(self) -> Tensor:
        return self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, str, bool]:
        return self.weight, self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, str, bool]) -> None:
        self.weight, self.target, self.training = state[0], state[1], state[2]
        self.weight = torch.from_file(state[1], shared=True, size=4)


class Loops(Writes):
    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, str, bool]) -> None:
        self.weight, self.target, self.training = state[0], state[1], state[2]
        count = 0
        while count >= 0:
            count = (count + 1) % 1000


class Allocates(Writes):
    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, str, bool]) -> None:
        self.weight, self.target, self.training = state[0], state[1], state[2]
        self.weight = torch.zeros(1 << 44)


class TestHostileArchives:
    def test_file_that_torch_would_write(self, tmp_path: Path) -> None:
        target = tmp_path / "written"
        path = save(Writes(str(target)), tmp_path / "ViT-B-16.pt")
        with pytest.raises(CheckpointError, match=r"ViT-B-16\.pt"):
            load_checkpoint(path)
        with pytest.raises(CheckpointError, match=r"ViT-B-16\.pt"):
            create_backbone("clip_base", weights=path)
        assert not target.exists()
        torch.jit.load(path)
        assert target.exists(), "the archive was to be one that writes"

    @pytest.mark.parametrize("kind", [Loops, Allocates])
    def test_code_that_never_ends_or_takes_all_memory(self, tmp_path: Path, kind: type[Writes]) -> None:
        path = save(kind("x"), tmp_path / "model.pt")
        start = time.monotonic()
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
        assert time.monotonic() - start < 10

    @pytest.mark.parametrize(
        "name", [b"os\nsystem", b"builtins\neval", b"torch\nload", b"torch._utils\n_rebuild_parameter"]
    )
    def test_names_that_are_no_modules_are_refused(self, tmp_path: Path, name: bytes) -> None:
        path = save(nn.Linear(2, 2), tmp_path / "model.pt")
        rewrite(path, lambda data: data.replace(b"collections\nOrderedDict", name))
        with pytest.raises(CheckpointError, match=name.decode().replace("\n", r"\.")):
            load_checkpoint(path)

    def test_pickle_that_torch_does_not_write(self, tmp_path: Path) -> None:
        path = save(nn.Linear(2, 2), tmp_path / "model.pt")
        rewrite(path, pickle.dumps({"a": 1}, protocol=4))
        with pytest.raises(CheckpointError, match="opcode"):
            load_checkpoint(path)

    def test_keys_that_take_for_ever_to_hash(self, tmp_path: Path) -> None:
        path = save(nn.Linear(2, 2), tmp_path / "model.pt")
        nested = b"\x80\x02}(K\x01" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(60)) + b"K\x01u."
        rewrite(path, nested)
        start = time.monotonic()
        with pytest.raises(CheckpointError, match="keys"):
            load_checkpoint(path)
        assert time.monotonic() - start < 5

    def test_modules_that_share_modules_a_thousand_times_over(self, tmp_path: Path) -> None:
        path = save(nn.Linear(2, 2), tmp_path / "model.pt")
        module = b"c__torch__\nM\n)\x81}(X\x01\x00\x00\x00a%sX\x01\x00\x00\x00b%sub"
        data = module % (b"K\x01", b"K\x01")
        for number in range(40):
            data = module % (data + b"q%c" % number, b"h%c" % number)
        rewrite(path, b"\x80\x02" + data + b".")
        start = time.monotonic()
        with pytest.raises(CheckpointError, match="attributes"):
            load_checkpoint(path)
        assert time.monotonic() - start < 10

    @pytest.mark.parametrize(("shape", "stride"), [(8, 1), (7, 2)])
    def test_tensor_larger_than_its_storage(self, tmp_path: Path, shape: int, stride: int) -> None:
        module = nn.Module()
        module.weight = nn.Parameter(torch.ones(7))
        path = save(module, tmp_path / "model.pt")
        rewrite(path, lambda data: data.replace(b"(K\x07t(K\x01t", b"(K%ct(K%ct" % (shape, stride)))
        with pytest.raises(CheckpointError, match="exceeds its storage"):
            load_checkpoint(path)

    def test_small_file_of_much_text(self, tmp_path: Path) -> None:
        path = save(nn.Linear(2, 2), tmp_path / "model.pt")
        rewrite(path, b"\x80\x02" + b"N" * (100 << 20), compression=zipfile.ZIP_DEFLATED)
        assert path.stat().st_size < 1 << 20
        with pytest.raises(CheckpointError, match="larger than"):
            load_checkpoint(path)


def archive(path: Path, pickled: bytes, storage: bytes = b"", compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of torch.save, of a pickle of one's own."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in (("data.pkl", pickled), ("version", b"3"), ("byteorder", b"little"), ("data/0", storage)):
            file.writestr(f"archive/{name}", b"\x80\x02" + data + b"." if name == "data.pkl" else data)
    return path


def tensor(elements: int = 7, shape: bytes = b"K\x07\x85", stride: bytes = b"K\x01\x85") -> bytes:
    """The operations that make a tensor of storage 0."""
    size = b"J" + elements.to_bytes(4, "little")
    storage = b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu" + size + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + b"K\0" + shape + stride + b"\x89}tR"


def number(value: int) -> bytes:
    return b"\x8a\xff" + value.to_bytes(255, "little")


def named(name: bytes, content: bytes) -> bytes:
    """The operations that put an entry into a dictionary."""
    return b"X" + len(name).to_bytes(4, "little") + name + content + b"s"


class TestHostileFilesOfSave:
    """Time and memory stay small; what is refused is named."""

    def test_honest_file_of_these_operations(self, tmp_path: Path) -> None:
        data = torch.arange(7.0)
        path = archive(tmp_path / "a.pth", b"}" + named(b"a", tensor()), data.numpy().tobytes())
        assert_equal(load_checkpoint(path).state_dict, {"a": data})
        assert_equal(torch.load(path, weights_only=True), {"a": data})

    @pytest.mark.parametrize("zipped", [True, False])
    def test_tensors_with_attributes_and_expanded_ones(self, tmp_path: Path, zipped: bool) -> None:
        module, path = nn.Linear(2, 3), tmp_path / "a.pth"
        state = {**module.state_dict(keep_vars=True), "tagged": torch.ones(2), "wide": torch.ones(2, 1).expand(2, 300)}
        for name in ("weight", "bias", "tagged"):
            vars(state[name])["note"] = [1]
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        assert_equal(load_checkpoint(path).state_dict, {key: tensor.detach() for key, tensor in state.items()})

    @pytest.mark.parametrize(
        ("pickled", "says"),
        [
            # Nested tuples as keys: hashing them takes twice as long with each level.
            (b"}(K\x01" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(60)) + b"K\x01u", "keys"),
            # Numbers of equal hash: each is compared with all others.
            (b"}(" + b"".join(number(n * (2**61 - 1)) + b"N" for n in range(9)) + b"u", "keys"),
            (b"\x8b\0\0\x10\0" + b"\x7f" * (1 << 20), "opcode LONG4"),
            (b"}" + named(b"a", tensor(shape=number(10**9) + b"\x85", stride=b"K\0\x85")), "exceeds its storage"),
            (b"}" + named(b"a", tensor(shape=number(2**20 + 1) + b"\x85", stride=b"K\0\x85")), "exceeds its storage"),
            (b"}" + named(b"a", tensor(elements=1 << 30)), "larger than the file"),
            (b"}" + named(b"a", tensor(elements=8)), "28 bytes instead of 32"),
            (
                b"}" + named(b"a", tensor(shape=b"(" + b"K\1" * 999 + b"t", stride=b"(" + b"K\1" * 999 + b"t")),
                "999 dim",
            ),
            (b"N0" * 600_000 + b"N", "1,000,000 operations"),
            (b"}" + named(b"a" * 2000, tensor()), "not the name of a tensor"),
            (b"]" * 200_000 + b"a" * 199_999, "list"),
            (b"}q\0" + named(b"a", b"h\0"), "'a'"),
            (b"}q\0" + named(b"model", b"h\0"), "'model'"),
            (b"}" + named(b"model", b"}" + named(b"a", tensor())) + named(b"m", number(1 << 2000)), "metrics"),
            (b"}" + named(b"model", b"}" + named(b"a", tensor())) + named(b"m", b"G\x7f\xf8" + b"\0" * 6), "metrics"),
            (b"ctorch\nTensor\nK\1\x85R", "NoneType"),
            (b"ctorch._utils\n_rebuild_tensor_v2\nNR", "_rebuild_tensor_v2"),
            (b"cx\n" + b"y" * 100_000 + b"\n", r"x\.yyy"),
        ],
    )
    def test_refused(self, tmp_path: Path, pickled: bytes, says: str) -> None:
        path = archive(tmp_path / "a.pth", pickled, bytes(28))
        with pytest.raises(CheckpointError, match=says) as caught:
            load_checkpoint(path)
        assert len(str(caught.value)) < 2500

    def test_many_names_of_one_tensor(self, tmp_path: Path) -> None:
        elements = 1 << 20
        shape = b"J" + elements.to_bytes(4, "little") + b"\x85"
        first = named(b"first", tensor(elements, shape) + b"q\0")
        others = b"".join(named(str(number).encode(), b"h\0") for number in range(50))
        path = archive(tmp_path / "a.pth", b"}" + first + others, bytes(4 * elements))
        with pytest.raises(CheckpointError, match="its tensors share memory"):
            load_checkpoint(path)

    @pytest.mark.parametrize("announced", [100, None])
    def test_storage_that_unpacks_to_much(self, tmp_path: Path, announced: int | None) -> None:
        elements, size = (25, 100) if announced else (25 << 20, 100 << 20)
        content = b"}" + named(b"a", tensor(elements))
        path = archive(tmp_path / "a.pth", content, bytes(100 << 20), zipfile.ZIP_DEFLATED)
        assert path.stat().st_size < 1 << 20
        # The directory at the end says how long it will be, and need not be right.
        path.write_bytes(path.read_bytes().replace((100 << 20).to_bytes(4, "little"), size.to_bytes(4, "little")))
        tracemalloc.start()
        with pytest.raises(CheckpointError, match="larger than the file|CRC"):
            load_checkpoint(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20

    def test_way_of_compression_without_bounds(self, tmp_path: Path) -> None:
        path = archive(tmp_path / "a.pth", b"}" + named(b"a", tensor()), bytes(28), zipfile.ZIP_BZIP2)
        with pytest.raises(CheckpointError, match="compressed"):
            load_checkpoint(path)

    def test_old_form_that_announces_much(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pth"
        torch.save({"a": torch.ones(7)}, path, _use_new_zipfile_serialization=False)
        whole = path.read_bytes()
        for old, new in ((b"cpuq\x06K\x07", b"cpuq\x06J\0\0\0\x40"), (b"K\x07Nt", b"K\x08Nt"), (whole[-4:], b"")):
            path.write_bytes(whole.replace(old, new) if new else whole[:-4])
            with pytest.raises(CheckpointError, match=r"larger than the file|elements, or is cut off"):
                load_checkpoint(path)

    def test_torch_is_not_asked(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """So its list of safe globals, which the whole process shares, stays as it is at every moment."""
        torch.save({"model": {"a": torch.ones(2)}, "m": np.float64(0.5)}, tmp_path / "a.pth")
        for name in (
            "load",
            "serialization.load",
            "serialization.clear_safe_globals",
            "serialization.add_safe_globals",
        ):
            monkeypatch.delattr(f"torch.{name}")
        assert load_checkpoint(tmp_path / "a.pth").metrics == {"m": 0.5}


class TestDamagedArchives:
    def test_truncated(self, tmp_path: Path) -> None:
        path = save(nn.Linear(2, 2), tmp_path / "model.pt")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(CheckpointError, match="truncated"):
            load_checkpoint(path)

    def test_other_byte_order(self, tmp_path: Path) -> None:
        path = save(nn.Linear(2, 2), tmp_path / "model.pt")
        rewrite(path, b"big", entry="byteorder")
        with pytest.raises(CheckpointError, match="order"):
            load_checkpoint(path)

    def test_weights_that_are_not_finite(self, tmp_path: Path) -> None:
        module = nn.Linear(2, 2)
        with torch.no_grad():
            module.bias[0] = torch.nan
        with pytest.raises(CheckpointError, match="bias holds NaN"):
            load_checkpoint(save(module, tmp_path / "model.pt"))

    def test_random_damage_never_raises_anything_else(self, tmp_path: Path) -> None:
        path = save(nn.Linear(2, 2), tmp_path / "model.pt")
        whole, random = path.read_bytes(), np.random.RandomState(0)
        with zipfile.ZipFile(path) as archive:
            pickled = archive.read("model/data.pkl")
        for number in range(600):
            data = bytearray(pickled if number % 2 else whole)
            for position in random.randint(0, len(data), 2):
                data[position] = random.randint(256)
            if number % 2:
                path.write_bytes(whole)
                # A new zip file, so that its checksums let the damage through.
                rewrite(path, bytes(data))
            else:
                path.write_bytes(data)
            try:
                load_checkpoint(path)
            except CheckpointError:
                continue
