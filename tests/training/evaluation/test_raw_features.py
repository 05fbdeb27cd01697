"""Raw features: encoded once, in each geometry, with masks on the same pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import write_photos
from helpers.trees import MARK, write_mvtec

from adfeatures.errors import InputError
from adfeatures.images import build_transform, read_image
from training.data import dataset
from training.data.images import ImageDataset, loader
from training.data.items import Item
from training.evaluation.feature_cache import CachedExtractor
from training.evaluation.model import load_model
from training.evaluation.raw_features import KnownImages, RawFeatures

SIZE = 64


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    root = write_mvtec(tmp_path / "mvtec", good=1, test_good=2, bad=2, size=(300, 250))
    return dataset("mvtec").find_items(root, "test", ["bottle"])


def test_features_are_those_of_the_backbone(items: list[Item], tmp_path: Path) -> None:
    model = load_model("residual_lite", ("padim",), img_size=SIZE)
    raw = RawFeatures(model, tmp_path / "cache")
    raw.encode(items, "squash")
    transform = build_transform((SIZE, SIZE), model.mean, model.std)
    expected = model.backbone(torch.stack([transform(read_image(item.image)) for item in items]))
    # Of images whose pixels are not there, so from the cache.
    (batch,) = loader(KnownImages(items, model.img_size))
    for level, other in zip(raw.of("squash")(batch), expected, strict=True):
        torch.testing.assert_close(level, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("preset", ["squash", "resize256_crop224"])
def test_masks_lie_on_the_pixels_of_the_images(items: list[Item], tmp_path: Path, preset: str) -> None:
    model = load_model("residual_lite", ("padim",), img_size=224)
    raw = RawFeatures(model, tmp_path / "cache")
    masks, noticed = raw.masks(items, preset)
    assert noticed == [] and masks.dtype == torch.uint8 and masks.shape == (4, 224, 224)
    assert all(raw.of(preset).holds(item.image) for item in items)
    mark = torch.tensor(MARK)[:, None, None] / 255
    images = ImageDataset(items, build_transform((224, 224), (0.0,) * 3, (1.0,) * 3, preset=preset))
    for index, (item, mask) in enumerate(zip(items, masks, strict=True)):
        assert mask.any() == (item.mask is not None)
        marked = (images[index]["image"] - mark).abs().amax(dim=0) < 0.05
        if item.mask is not None:
            # But for the edges of the square, which are blurred.
            assert marked[mask.bool()].float().mean() > 0.9 and mask[marked].float().mean() > 0.9


def test_another_geometry_shares_nothing(items: list[Item], tmp_path: Path) -> None:
    raw = RawFeatures(load_model("residual_lite", ("padim",), img_size=SIZE), tmp_path / "cache")
    raw.encode(items, "squash")
    assert not raw.of("resize224_crop224").holds(items[0].image)
    assert raw.of("squash") is raw.of("squash")


def test_folders_of_features_keep_their_names(tmp_path: Path) -> None:
    """Features that an earlier version wrote are found: their folder is a hash of these facts."""
    raw = RawFeatures(load_model("residual_lite", ("padim",), img_size=SIZE), tmp_path / "cache")
    identity = raw.identity("squash")
    assert list(identity) == ["backbone", "levels", "img_size", "preset", "mean", "std"]
    assert raw.of("squash").folder == CachedExtractor(raw.of("squash"), tmp_path / "cache", identity).folder


def test_known_images_have_no_pixels_to_encode(tmp_path: Path) -> None:
    raw = RawFeatures(load_model("residual_lite", ("padim",), img_size=SIZE), tmp_path / "cache")
    paths = write_photos(tmp_path / "photos", range(4))
    items = [Item(str(path), 1, "nut") for path in paths]
    (batch,) = loader(KnownImages(items, (12, 10)), 8)
    assert batch["image"].shape == (4, 3, 12, 10) and batch["mask"].shape == (4, 1, 12, 10)
    assert batch["label"].tolist() == [1] * 4 and batch["product"] == ["nut"] * 4
    with pytest.raises(InputError, match=f"{paths[0].name} are no longer in the cache"):
        raw.of("squash")(batch)
