"""What the methods do alike: features, seeds and the gathering of batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_extractor, write_photos
from helpers.planted import batches, patch_extractor
from torch import Tensor

from adfeatures.errors import InputError
from adfeatures.images import build_transform
from training.data.images import ImageDataset, loader
from training.data.items import NORMAL, Item
from training.methods import CFLOW, GLASS, UniAD
from training.methods.base import Batch, Extractor
from training.methods.trained import feature_maps, first_maps, gather, seeded

EXTRACT = patch_extractor(4, 5, 6)


def test_feature_maps_are_the_last_levels_in_float32_without_gradient() -> None:
    weight = torch.ones((), requires_grad=True)
    (batch,) = batches(2, seed=0)

    def extractor(batch: Batch) -> list[Tensor]:
        return [(level * weight).half() for level in EXTRACT(batch)]

    for levels, channels in ((None, [4, 5, 6]), (2, [5, 6]), (3, [4, 5, 6]), (9, [4, 5, 6])):
        maps = feature_maps(extractor, batch, levels)
        assert [level.shape[1] for level in maps] == channels
        assert all(level.dtype == torch.float32 and not level.requires_grad for level in maps)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("level", [0, 2])
def test_features_that_are_not_finite_are_named(value: float, level: int) -> None:
    (batch,) = batches(4, seed=0)

    def broken(batch: Batch) -> list[Tensor]:
        maps = EXTRACT(batch)
        maps[level][2, 0, 1, 1] = value
        return maps

    with pytest.raises(InputError, match=r"noise/002\.png"):
        feature_maps(broken, batch)
    with pytest.raises(InputError, match="an augmented image"):
        feature_maps(broken, {**batch, "path": [None] * 4})
    with pytest.raises(InputError, match="an image hold"):
        feature_maps(broken, {"image": batch["image"]})
    if level == 0:
        assert len(feature_maps(broken, batch, 2)) == 2


def test_first_maps_read_one_batch_only() -> None:
    served = iter(batches(6, seed=0, batch_size=2))
    assert first_maps(EXTRACT, served)[0].shape == (2, 4, 8, 8)
    assert len(list(served)) == 2
    with pytest.raises(InputError, match="drop_last"):
        first_maps(EXTRACT, [])


def test_seeded_gives_the_numbers_of_the_seed_and_puts_the_state_back() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with seeded(7):
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(KeyError), seeded(7):
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


def test_gather_joins_batches() -> None:
    parts = [(torch.full((n, 3, 4), n, dtype=torch.float64), torch.arange(n, dtype=torch.float16)) for n in (2, 1)]
    found = gather(iter(parts))
    assert found.maps.dtype == found.scores.dtype == torch.float32
    assert found.maps[:, 0, 0].tolist() == [2, 2, 1] and found.scores.tolist() == [0, 1, 0]
    with pytest.raises(InputError, match="nothing to score"):
        gather([])
    with pytest.raises(InputError, match=r"\[\(3, 4\), \(4, 3\)\]"):
        gather([(torch.zeros(1, 3, 4), torch.zeros(1)), (torch.zeros(1, 4, 3), torch.zeros(1))])


@pytest.mark.parametrize(
    "make",
    [
        lambda extractor: CFLOW(extractor, blocks=1, meta_epochs=1, sub_epochs=2),
        lambda extractor: GLASS(extractor, dim=16, hidden=8, epochs=2),
        lambda extractor: UniAD(extractor, hidden=8, heads=2, layers=1, feed_forward=8, epochs=2),
    ],
    ids=["CFLOW", "GLASS", "UniAD"],
)
def test_methods_run_on_image_files_and_a_shuffled_loader(tmp_path: Path, make: Callable[[Extractor], Any]) -> None:
    model = tiny_extractor()
    paths = write_photos(tmp_path, range(6))
    model.set_references([str(path) for path in paths[:2]])
    dataset = ImageDataset(
        [Item(str(path), NORMAL, "photo") for path in paths],
        build_transform((56, 56), model.pretrained_cfg["mean"], model.pretrained_cfg["std"]),
    )

    def extractor(batch: Batch) -> list[Tensor]:
        return model(batch["image"])

    first, second = (
        make(extractor).fit(loader(dataset, 4, shuffle=True, seed=3)).predict(loader(dataset, 4)) for _ in range(2)
    )
    assert first.maps.shape == (6, 56, 56) and first.maps.isfinite().all()
    assert first.maps.std() > 0
    assert torch.equal(first.maps, second.maps) and torch.equal(first.scores, second.scores)
