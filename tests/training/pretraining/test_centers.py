"""Centers: against a naive loop over every patch, interrupted and resumed, and files that do not fit."""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.real_iad_tree import write_real_iad
from safetensors.torch import load_file
from torch import Tensor, nn

from adfeatures.backbones import create_backbone
from adfeatures.catalog import BACKBONES
from adfeatures.checkpoints import load_checkpoint, save_checkpoint, weights_fingerprint
from adfeatures.errors import AdfeaturesError, CheckpointError, InputError
from adfeatures.images import build_transform, read_image
from training.data import real_iad
from training.data.items import Item
from training.pretraining import centers
from training.pretraining.centers import compute_centers, load_centers
from training.pretraining.config import CentersConfig
from training.pretraining.frozen_backbone import FrozenBackbone

STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
TRANSFORM = build_transform((28, 42), *STATISTICS)
PRODUCTS = ("gasket", "rivet")

pytestmark = pytest.mark.filterwarnings("ignore:Fewer normal images")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_real_iad(tmp_path_factory.mktemp("data"), PRODUCTS, ok=3, ng=2, views=2)


@pytest.fixture(scope="module")
def items(root: Path) -> list[Item]:
    return real_iad.read(root)


def tiny_backbone(seed: int = 0) -> FrozenBackbone:
    torch.manual_seed(seed)
    module = create_backbone("dinov2_base", embed_dim=16, depth=4, num_heads=2, levels=(1, 4))
    for name, parameter in module.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
    entry = replace(
        BACKBONES["dinov2_base"], blocks=(1, 4), channels=(16, 16), img_size=(28, 42), normalization=STATISTICS
    )
    return FrozenBackbone("tiny", module, entry)


@pytest.fixture(scope="module")
def backbone() -> FrozenBackbone:
    return tiny_backbone()


def compute(
    output: Path, backbone: FrozenBackbone, items: list[Item], pool: list[Item] | None = None, **settings: Any
) -> list[Tensor]:
    pool = real_iad.reference_pool(items) if pool is None else pool
    # In this process unless said otherwise.
    settings = {"batch_size": 3, "workers": 0, **settings}
    return compute_centers(CentersConfig(output=str(output), **settings), backbone, items, pool)


def patches(backbone: FrozenBackbone, item: Item) -> list[np.ndarray]:
    """Patch features (h * w, C) of each level of an image encoded alone."""
    with torch.no_grad():
        maps = backbone.module(TRANSFORM(read_image(item.image))[None])
    return [level[0].flatten(1).T.double().numpy() for level in maps]


def naive_mean(backbone: FrozenBackbone, item: Item, references: list[Item]) -> list[np.ndarray]:
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
    tmp_path: Path, backbone: FrozenBackbone, items: list[Item]
) -> None:
    """Two references of each group in the pool, and so many draws that both are among them: the bank is known."""
    pool = [item for item in real_iad.reference_pool(items) if not item.sample.endswith("S0300")]
    assert all(len(of_group(pool, item)) == 2 for item in items)
    normal = [item for item in items if item.label == 0]
    # Of the OK tree, and the sides of defective parts that do not show the defect.
    assert len(normal) == 2 * (3 * 2 + 4)
    means = [naive_mean(backbone, item, of_group(pool, item)) for item in normal]
    found = compute(tmp_path / "centers.safetensors", backbone, items, pool, shots=40)
    assert [center.shape for center in found] == [(16,), (16,)]
    for center, expected in zip(found, zip(*means, strict=True), strict=True):
        expected = np.mean(expected, axis=0)
        assert np.abs(center.double().numpy() - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_subset_is_of_so_many_different_images(tmp_path: Path, backbone: FrozenBackbone, items: list[Item]) -> None:
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


def test_seed_decides_workers_do_not(tmp_path: Path, backbone: FrozenBackbone, items: list[Item]) -> None:
    runs: dict[str, dict[str, Any]] = {"first": {}, "again": {}, "workers": {"workers": 2}, "seed": {"seed": 1}}
    found = {
        name: compute(tmp_path / f"{name}.safetensors", backbone, items, **settings) for name, settings in runs.items()
    }
    contents = {name: (tmp_path / f"{name}.safetensors").read_bytes() for name in runs}
    assert contents["first"] == contents["again"] == contents["workers"]
    assert not torch.equal(found["first"][0], found["seed"][0])


@contextmanager
def giving_up(backbone: FrozenBackbone, calls: int) -> Iterator[list[None]]:
    """A backbone that is interrupted after so many calls. What is yielded grows with each of them."""
    made: list[None] = []

    def count(*_: object) -> None:
        if len(made) == calls:
            raise KeyboardInterrupt
        made.append(None)

    hook = backbone.module.register_forward_pre_hook(count)
    try:
        yield made
    finally:
        hook.remove()


@pytest.mark.parametrize("calls", [1, 4, 5, 12])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tmp_path: Path, backbone: FrozenBackbone, items: list[Item], monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    monkeypatch.setattr(centers, "SAVE_EVERY", 2)
    compute(tmp_path / "whole.safetensors", backbone, items)
    output, partial = tmp_path / "cut.safetensors", tmp_path / "cut.partial.safetensors"
    with giving_up(backbone, calls), pytest.raises(KeyboardInterrupt):
        compute(output, backbone, items)
    assert not output.exists()
    # Two calls a batch, and a state after every second batch.
    assert partial.exists() == (calls >= 4)
    # 20 images are 7 batches: no batch that was saved is computed again.
    rest = 14 - calls // 4 * 4
    with giving_up(backbone, rest) as made:
        compute(output, backbone, items)
    assert len(made) == rest
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.safetensors", "whole.safetensors"]


def test_a_finished_file_is_returned_and_another_run_refused(
    tmp_path: Path, backbone: FrozenBackbone, items: list[Item]
) -> None:
    output = tmp_path / "centers.safetensors"
    first = compute(output, backbone, items)
    with giving_up(backbone, 0):
        again = compute(output, backbone, items)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    before = output.read_bytes()
    message = r"centers.safetensors is of another run, with other {}\. Remove it"
    changes: tuple[tuple[str, Any], ...] = (("seed", 1), ("shots", 2), ("images", 5))
    for name, value in changes:
        with pytest.raises(CheckpointError, match=message.format(name)):
            compute(output, backbone, items, **{name: value})
    with pytest.raises(CheckpointError, match=message.format("backbone")):
        compute(output, replace(backbone, name="other"), items)
    with pytest.raises(CheckpointError, match="products, normal_images, references, images"):
        compute(output, backbone, [item for item in items if item.product == "rivet"])
    assert output.read_bytes() == before


def test_the_state_of_another_run_is_refused(
    tmp_path: Path, backbone: FrozenBackbone, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(centers, "SAVE_EVERY", 1)
    output = tmp_path / "centers.safetensors"
    with giving_up(backbone, 3), pytest.raises(KeyboardInterrupt):
        compute(output, backbone, items)
    with pytest.raises(CheckpointError, match="centers.partial.safetensors is of another run, with other batch_size"):
        compute(output, backbone, items, batch_size=4)
    with pytest.raises(CheckpointError, match="with other weights"):
        compute(output, tiny_backbone(seed=1), items)


def test_the_file_says_what_it_was_computed_from(
    tmp_path: Path, backbone: FrozenBackbone, items: list[Item], root: Path
) -> None:
    path = tmp_path / "centers.safetensors"
    found = compute(path, backbone, items)
    facts = load_checkpoint(path).metadata
    assert facts["backbone"] == "tiny"
    assert json.loads(facts["weights"]) == weights_fingerprint(backbone.module.state_dict())
    assert (json.loads(facts["levels"]), json.loads(facts["img_size"]), json.loads(facts["products"])) == (
        [1, 4],
        [28, 42],
        list(PRODUCTS),
    )
    assert (facts["images"], facts["shots"], facts["seed"]) == ("20", "4", "42")
    assert str(root) not in path.read_bytes().decode("latin-1")
    stored = load_file(path)
    assert list(stored) == ["center.1", "center.2"]
    loaded = load_centers(path, backbone)
    for one, other, third in zip(found, loaded, stored.values(), strict=True):
        assert torch.equal(one, other) and torch.equal(one, third) and one.dtype == torch.float32


def test_a_header_of_any_length_is_no_long_message(tmp_path: Path, backbone: FrozenBackbone, items: list[Item]) -> None:
    path = tmp_path / "centers.safetensors"
    compute(path, backbone, items, images=3)
    found = load_checkpoint(path)
    for name in ("img_size", "bit_depth", "weights"):
        save_checkpoint(path, found.state_dict, metadata={**found.metadata, name: json.dumps(["x" * 6000])})
        with pytest.raises(
            CheckpointError, match=f"centers.safetensors holds centers of other features: .*{name}"
        ) as refused:
            load_centers(path, backbone)
        assert len(str(refused.value)) < 1000


def test_centers_of_other_features_are_refused(tmp_path: Path, backbone: FrozenBackbone, items: list[Item]) -> None:
    path = tmp_path / "centers.safetensors"
    compute(path, backbone, items, images=3)
    for change, message in (
        ({"channels": (16, 32)}, r"\[16, 16\] channels, but the levels have \[16, 32\]"),
        ({"blocks": (2, 4)}, r"levels \[1, 4\], not \[2, 4\]"),
        ({"img_size": (28, 28)}, r"img_size \[28, 42\], not \[28, 28\]\. .*--img-size"),
        ({"normalization": ((0.0, 0.0, 0.0), STATISTICS[1])}, "other mean"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_centers(path, replace(backbone, entry=replace(backbone.entry, **change)))
    with pytest.raises(
        CheckpointError, match=r"features: backbone tiny, not dinov2_base\. Compute .*training\.centers"
    ):
        load_centers(path, replace(backbone, name="dinov2_base"))
    with pytest.raises(CheckpointError, match="features: preset squash, not resize224_crop224. .*--recipe"):
        load_centers(path, replace(backbone, preset="resize224_crop224"))
    with pytest.raises(CheckpointError, match="features: other weights"):
        load_centers(path, tiny_backbone(seed=1))
    # Weights in half precision are the same ones.
    for dtype in (torch.float16, torch.bfloat16):
        load_centers(path, replace(backbone, module=copy.deepcopy(backbone.module).to(dtype)))
    save_checkpoint(tmp_path / "projector.safetensors", {"projector.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match="holds no centers"):
        load_centers(tmp_path / "projector.safetensors", backbone)
    for name in ("missing.safetensors", "missing.npy"):
        with pytest.raises(CheckpointError, match=name):
            load_centers(tmp_path / name, backbone)


def test_the_original_form_is_read(tmp_path: Path, backbone: FrozenBackbone) -> None:
    array = np.random.RandomState(0).randn(2, 16).astype(np.float32)
    np.save(tmp_path / "centers.npy", array)
    assert np.array_equal(torch.stack(load_centers(tmp_path / "centers.npy", backbone)), array)
    np.save(tmp_path / "centers.npy", array[:, :6].repeat(2, axis=0))
    with pytest.raises(CheckpointError, match=r"\[6, 6, 6, 6\] channels, but the levels have \[16, 16\]"):
        load_centers(tmp_path / "centers.npy", backbone)


@pytest.mark.parametrize(
    "array",
    [np.ones(16), np.full((2, 16), np.nan), np.array([[{}]]), np.ones((2, 16), int)],
    ids=["flat", "nan", "pickle", "integers"],
)
def test_arrays_that_are_no_centers(tmp_path: Path, backbone: FrozenBackbone, array: np.ndarray) -> None:
    np.save(tmp_path / "centers.npy", array, allow_pickle=True)
    with pytest.raises(CheckpointError, match="centers.npy"):
        load_centers(tmp_path / "centers.npy", backbone)


def test_arrays_that_announce_more_than_they_hold(tmp_path: Path, backbone: FrozenBackbone) -> None:
    np.save(tmp_path / "centers.npy", np.ones((2, 16)))
    whole = (tmp_path / "centers.npy").read_bytes()
    for content in (whole.replace(b"(2, 16), }         ", b"(2, 1600000000), }"), whole[:-8], whole[:20], b""):
        (tmp_path / "centers.npy").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"centers\.npy cannot be read as centers"):
            load_centers(tmp_path / "centers.npy", backbone)
    (tmp_path / "centers.npy").unlink()
    os.mkfifo(tmp_path / "centers.npy")
    with pytest.raises(CheckpointError, match="pipe"):
        load_centers(tmp_path / "centers.npy", backbone)


@pytest.mark.parametrize(
    ("header", "tensors"),
    [
        ({"weights": "[" * 100_000}, {}),
        ({"weights": "[1]"}, {}),
        ({"weights": "5"}, {}),
        ({"mean": None}, {}),
        ({}, {"center.1": torch.ones(4, 4)}),
        ({}, {"center.1": torch.tensor(1.0)}),
        ({}, {"center.1": torch.ones(16, dtype=torch.int32)}),
    ],
)
def test_damaged_centers(
    tmp_path: Path,
    backbone: FrozenBackbone,
    items: list[Item],
    header: dict[str, str | None],
    tensors: dict[str, torch.Tensor],
) -> None:
    path = tmp_path / "centers.safetensors"
    compute(path, backbone, items, images=3)
    metadata = {**load_checkpoint(path).metadata, **header}
    save_checkpoint(
        path, {**load_file(path), **tensors}, metadata={key: text for key, text in metadata.items() if text is not None}
    )
    with pytest.raises(CheckpointError, match=r"centers\.safetensors holds"):
        load_centers(path, backbone)


def test_features_that_are_not_finite_stop_it(tmp_path: Path, items: list[Item]) -> None:
    backbone = tiny_backbone()
    backbone.module.get_parameter("cls_token").data.fill_(torch.nan)
    with pytest.raises(AdfeaturesError, match="not finite.*jpg"):
        compute(tmp_path / "centers.safetensors", backbone, items)
    assert not list(tmp_path.iterdir())


def test_without_normal_images_there_are_no_centers(
    tmp_path: Path, backbone: FrozenBackbone, items: list[Item]
) -> None:
    with pytest.raises(InputError, match="no normal images"):
        compute(tmp_path / "centers.safetensors", backbone, [item for item in items if item.label])
