"""Centers: against a naive loop over every patch, interrupted and resumed, and files that do not fit."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.real_iad_tree import write_real_iad
from safetensors.torch import load_file
from torch import Tensor, nn

from adfeatures.backbones import create_backbone
from adfeatures.checkpoints import load_checkpoint, save_checkpoint
from adfeatures.errors import AdfeaturesError, CheckpointError, InputError
from adfeatures.images import build_transform, read_image
from adfeatures.loading import load_backbone
from adfeatures.references import weights_fingerprint
from training import centers
from training.centers import compute_centers, load_centers, main, origin
from training.data import real_iad
from training.data.items import Item

TRANSFORM = build_transform((28, 42), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
PRODUCTS = ("gasket", "rivet")
HERE = ("--workers", "0", "--device", "cpu")

pytestmark = pytest.mark.filterwarnings("ignore:Fewer normal images")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_real_iad(tmp_path_factory.mktemp("data"), PRODUCTS, ok=3, ng=2, views=2)


@pytest.fixture(scope="module")
def items(root: Path) -> list[Item]:
    return real_iad.read(root)


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    torch.manual_seed(0)
    backbone = create_backbone("dinov2_base", embed_dim=16, depth=4, num_heads=2, levels=(1, 4))
    for name, parameter in backbone.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
    return backbone


def compute(
    output: Path, backbone: nn.Module, items: list[Item], pool: list[Item] | None = None, **settings: object
) -> list[Tensor]:
    pool = real_iad.reference_pool(items) if pool is None else pool
    settings = {"name": "tiny", "batch_size": 3, "shots": 4, **settings}
    return compute_centers(output, backbone, items, pool, TRANSFORM, **settings)  # type: ignore[arg-type]


def patches(backbone: nn.Module, item: Item) -> list[np.ndarray]:
    """Patch features (h * w, C) of each level of an image encoded alone."""
    with torch.no_grad():
        maps = backbone(TRANSFORM(read_image(item.image))[None])
    return [level[0].flatten(1).T.double().numpy() for level in maps]


def naive_mean(backbone: nn.Module, item: Item, references: list[Item]) -> list[np.ndarray]:
    """Mean residual of an image per level, one patch after the other."""
    banks = [
        np.concatenate(level) for level in zip(*(patches(backbone, reference) for reference in references), strict=True)
    ]
    means = []
    for level, bank in zip(patches(backbone, item), banks, strict=True):
        residuals = []
        for patch in level:
            cosines = [float(patch @ row) / (np.linalg.norm(patch) * np.linalg.norm(row)) for row in bank]
            residuals.append(patch - bank[int(np.argmax(cosines))])
        means.append(np.mean(residuals, axis=0))
    return means


def of_group(pool: list[Item], item: Item) -> list[Item]:
    return [reference for reference in pool if (reference.product, reference.view) == (item.product, item.view)]


def test_centers_are_the_mean_over_every_patch_of_every_normal_image(
    tmp_path: Path, backbone: nn.Module, items: list[Item]
) -> None:
    """Two references of each group in the pool, and so many draws that both are among them: the bank is known."""
    pool = [item for item in real_iad.reference_pool(items) if not item.sample.endswith("S0300")]
    assert all(len(of_group(pool, item)) == 2 for item in items)
    normal = [item for item in items if item.label == 0]
    assert len(normal) == 2 * (
        3 * 2 + 4
    )  # of the OK tree, and the sides of defective parts that do not show the defect
    means = [naive_mean(backbone, item, of_group(pool, item)) for item in normal]
    found = compute(tmp_path / "centers.safetensors", backbone, items, pool, shots=40)
    assert [center.shape for center in found] == [(16,), (16,)]
    for center, expected in zip(found, zip(*means, strict=True), strict=True):
        expected = np.mean(expected, axis=0)
        assert np.abs(center.double().numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_subset_is_of_so_many_different_images(tmp_path: Path, backbone: nn.Module, items: list[Item]) -> None:
    items = [item for item in items if item.product == "gasket" and item.view == "C1"]
    pool = real_iad.reference_pool(items)[:1]
    normal = [item for item in items if item.label == 0]
    means = [naive_mean(backbone, item, pool)[1] for item in normal]
    found = [
        compute(tmp_path / f"{seed}.safetensors", backbone, items, pool, images=2, seed=seed)[1] for seed in range(8)
    ]
    pairs = [np.mean(pair, axis=0) for pair in itertools.combinations(means, 2)]
    errors = np.array([[np.abs(center.double().numpy() - pair).max() for pair in pairs] for center in found])
    assert len(normal) == 3 and (errors.min(axis=1) < 1e-5).all()
    assert len(set(errors.argmin(axis=1))) > 1


def test_seed_decides_workers_do_not(tmp_path: Path, backbone: nn.Module, items: list[Item]) -> None:
    runs = {"first": {}, "again": {}, "workers": {"workers": 2}, "seed": {"seed": 1}}
    found = {
        name: compute(tmp_path / f"{name}.safetensors", backbone, items, **settings) for name, settings in runs.items()
    }
    contents = {name: (tmp_path / f"{name}.safetensors").read_bytes() for name in runs}
    assert contents["first"] == contents["again"] == contents["workers"]
    assert not torch.equal(found["first"][0], found["seed"][0])


class Breaking(nn.Module):
    """A backbone that gives up after some calls."""

    def __init__(self, backbone: nn.Module, calls: int) -> None:
        super().__init__()
        self.inner, self.calls, self.levels = [backbone], calls, backbone.levels
        self.weight = nn.Parameter(torch.zeros(()))

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        return self.inner[0].state_dict()

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        return self.inner[0](images)


@pytest.mark.parametrize("calls", [1, 4, 5, 12])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tmp_path: Path, backbone: nn.Module, items: list[Item], monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    monkeypatch.setattr(centers, "SAVE_EVERY", 2)
    compute(tmp_path / "whole.safetensors", backbone, items)
    output, partial = tmp_path / "cut.safetensors", tmp_path / "cut.partial.safetensors"
    with pytest.raises(KeyboardInterrupt):
        compute(output, Breaking(backbone, calls), items)
    assert not output.exists()
    assert partial.exists() == (calls >= 4)  # two calls a batch, and a state after every second batch
    rest = Breaking(backbone, 14 - calls // 4 * 4)  # 20 images are 7 batches: no batch that was saved is computed again
    compute(output, rest, items)
    assert rest.calls == 0
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.safetensors", "whole.safetensors"]


def test_a_finished_file_is_returned_and_another_run_refused(
    tmp_path: Path, backbone: nn.Module, items: list[Item]
) -> None:
    output = tmp_path / "centers.safetensors"
    first = compute(output, backbone, items)
    again = compute(output, Breaking(backbone, 0), items)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    before = output.read_bytes()
    for settings, differing in (
        ({"seed": 1}, "seed"),
        ({"shots": 2}, "shots"),
        ({"images": 5}, "images"),
        ({"name": "other"}, "backbone"),
    ):
        with pytest.raises(
            CheckpointError, match=f"centers.safetensors is of another run, with other {differing}\\. Remove it"
        ):
            compute(output, backbone, items, **settings)
    with pytest.raises(CheckpointError, match="products, normal_images, references, images"):
        compute(output, backbone, [item for item in items if item.product == "rivet"])
    assert output.read_bytes() == before


def test_the_state_of_another_run_is_refused(
    tmp_path: Path, backbone: nn.Module, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(centers, "SAVE_EVERY", 1)
    output = tmp_path / "centers.safetensors"
    with pytest.raises(KeyboardInterrupt):
        compute(output, Breaking(backbone, 3), items)
    with pytest.raises(CheckpointError, match="centers.partial.safetensors is of another run, with other batch_size"):
        compute(output, backbone, items, batch_size=4)
    other = create_backbone("dinov2_base", embed_dim=16, depth=4, num_heads=2, levels=(1, 4))
    with pytest.raises(CheckpointError, match="with other weights"):
        compute(output, other, items)


def test_the_file_says_what_it_was_computed_from(
    tmp_path: Path, backbone: nn.Module, items: list[Item], root: Path
) -> None:
    path = tmp_path / "centers.safetensors"
    found = compute(path, backbone, items)
    facts = load_checkpoint(path).metadata
    assert facts["backbone"] == "tiny"
    assert json.loads(facts["weights"]) == weights_fingerprint(backbone.state_dict())
    assert (json.loads(facts["levels"]), json.loads(facts["img_size"]), json.loads(facts["products"])) == (
        [1, 4],
        [28, 42],
        list(PRODUCTS),
    )
    assert (facts["images"], facts["shots"], facts["seed"]) == ("20", "4", "42")
    assert str(root) not in path.read_bytes().decode("latin-1")
    stored = load_file(path)
    assert list(stored) == ["center.1", "center.2"]
    loaded = load_centers(path, [16, 16], origin(backbone, TRANSFORM, name="tiny"))
    for one, other, third in zip(found, loaded, stored.values(), strict=True):
        assert torch.equal(one, other) and torch.equal(one, third) and one.dtype == torch.float32


def test_centers_of_other_features_are_refused(tmp_path: Path, backbone: nn.Module, items: list[Item]) -> None:
    path = tmp_path / "centers.safetensors"
    compute(path, backbone, items, images=3)
    with pytest.raises(CheckpointError, match=r"\[16, 16\] channels, but the levels have \[16, 32\]"):
        load_centers(path, [16, 32])
    own = load_checkpoint(path).metadata
    for key, value, message in (
        ("backbone", "dinov2_base", r"features: backbone tiny, not dinov2_base\. Compute .*training\.centers"),
        ("levels", "[2, 4]", r"levels \[1, 4\], not \[2, 4\]"),
        ("img_size", "[28, 28]", r"img_size \[28, 42\], not \[28, 28\]\. .*--img-size"),
        ("weights", '["0", "1"]', "features: other weights"),
        ("mean", "[0, 0, 0]", "features: other mean"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_centers(path, [16, 16], {key: value})
    # Weights in half precision are the same ones.
    load_centers(path, [16, 16], {"weights": json.dumps([json.loads(own["weights"])[0], "1"])})
    save_checkpoint(tmp_path / "projector.safetensors", {"projector.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match="holds no centers"):
        load_centers(tmp_path / "projector.safetensors", [16])
    for name in ("missing.safetensors", "missing.npy"):
        with pytest.raises(CheckpointError, match=name):
            load_centers(tmp_path / name, [16])


def test_the_original_form_is_read(tmp_path: Path) -> None:
    array = np.random.RandomState(0).randn(4, 6).astype(np.float32)
    np.save(tmp_path / "centers.npy", array)
    assert np.array_equal(
        torch.stack(load_centers(tmp_path / "centers.npy", [6] * 4, {"backbone": "dinov2_base"})), array
    )
    with pytest.raises(CheckpointError, match=r"\[6, 6, 6, 6\] channels, but the levels have \[6, 6\]"):
        load_centers(tmp_path / "centers.npy", [6, 6])


@pytest.mark.parametrize(
    "array",
    [np.ones(4), np.full((4, 6), np.nan), np.array([[{}]]), np.ones((4, 6), int)],
    ids=["flat", "nan", "pickle", "integers"],
)
def test_arrays_that_are_no_centers(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "centers.npy", array, allow_pickle=True)
    with pytest.raises(CheckpointError, match="centers.npy"):
        load_centers(tmp_path / "centers.npy", [6] * 4)


def test_features_that_are_not_finite_stop_it(tmp_path: Path, items: list[Item]) -> None:
    backbone = create_backbone("dinov2_base", embed_dim=16, depth=4, num_heads=2, levels=(1, 4))
    with torch.no_grad():
        backbone.cls_token.fill_(torch.nan)
    with pytest.raises(AdfeaturesError, match="not finite.*jpg"):
        compute(tmp_path / "centers.safetensors", backbone, items)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{"shots": 0}, {"batch_size": 0}, {"images": 0}, {"seed": -1}])
def test_senseless_numbers(tmp_path: Path, backbone: nn.Module, items: list[Item], settings: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        compute(tmp_path / "centers.safetensors", backbone, items, **settings)
    with pytest.raises(InputError, match="no normal images"):
        compute(tmp_path / "centers.safetensors", backbone, [item for item in items if item.label])


def test_the_command_writes_the_centers_of_what_the_pretraining_sees(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "centers.safetensors"
    arguments = [
        "--root",
        str(root),
        "--backbone",
        "efficientnet_lite",
        "--img-size",
        "32",
        "48",
        "--held-out",
        "0.4",
        *HERE,
    ]
    assert main([*arguments, "--output", str(output)]) == 0
    assert "done" in capsys.readouterr().out
    backbone, entry = load_backbone("efficientnet_lite", img_size=(32, 48))
    assert len(set(entry.channels)) == 3
    train, held_out = real_iad.split_by_sample(real_iad.read(root), 0.4, 42)
    assert held_out
    transform = build_transform((32, 48), *entry.normalization)
    pool = real_iad.reference_pool(train)
    expected = compute_centers(
        tmp_path / "expected.safetensors", backbone, train, pool, transform, name="efficientnet_lite", batch_size=16
    )
    found = load_centers(output, entry.channels)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_errors_of_the_command_take_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--root", str(tmp_path / "nowhere"), "--backbone", "efficientnet_lite", *HERE]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("training.centers: error: There is no folder")
    assert main([*arguments, "--output", "centers.pth"]) == 2
    assert "safetensors" in capsys.readouterr().err


def test_errors_in_workers_read_as_any_other(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = write_real_iad(tmp_path, PRODUCTS, ok=3, ng=1, views=1)
    for path in broken.rglob("*_OK_*.jpg"):
        path.write_bytes(b"no image")
    arguments = [
        "--root",
        str(broken),
        "--backbone",
        "efficientnet_lite",
        "--img-size",
        "32",
        "--device",
        "cpu",
        "--workers",
        "1",
    ]
    assert main([*arguments, "--output", str(tmp_path / "centers.safetensors")]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("training.centers: error: 10 images in a row could not be read")
