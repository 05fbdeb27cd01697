"""What a product is evaluated on."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.trees import write_mvtec
from PIL import Image

from adfeatures.errors import InputError
from training.data import dataset
from training.evaluation.model import load_model
from training.evaluation.product import Product
from training.evaluation.raw_features import RawFeatures


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_mvtec(tmp_path / "mvtec", good=3, test_good=2, bad=2)


@pytest.fixture
def raw(tmp_path: Path) -> RawFeatures:
    return RawFeatures(load_model("residual_lite", ("padim",), img_size=64), tmp_path / "cache")


def product(root: Path, raw: RawFeatures) -> Product:
    return Product("bottle", dataset("folder"), root, raw)


def test_masks_and_labels_of_the_test_images(root: Path, raw: RawFeatures) -> None:
    truth = product(root, raw).truth("squash")
    assert truth.masks.shape == (4, 64, 64) and truth.warnings == []
    assert truth.masks.flatten(1).any(dim=1).tolist() == [label == 1 for label in truth.labels.tolist()]
    assert sorted(truth.labels.tolist()) == [0, 0, 1, 1]


def test_all_images_are_encoded(root: Path, raw: RawFeatures) -> None:
    made = product(root, raw)
    made.encode("squash")
    assert len(made.train) == 3
    assert all(raw.of("squash").holds(item.image) for item in (*made.train, *made.test))


def test_odd_masks_are_counted(root: Path, raw: RawFeatures) -> None:
    Image.new("L", (64, 64)).save(root / "bottle/ground_truth/broken/001_mask.png")
    made = product(root, raw)
    made.test = [replace(item, mask=None) if "broken/000" in item.image else item for item in made.test]
    assert made.truth("squash").warnings == [
        "1 anomalous test images have no mask: their pixels count as normal.",
        "1 masks are empty at the size of the model's input: their pixels count as normal.",
        f"1 masks without a defect: {root / 'bottle/ground_truth/broken/001_mask.png'}.",
    ]


def test_the_digest_is_of_the_images_wherever_they_lie(root: Path, raw: RawFeatures, tmp_path: Path) -> None:
    before = product(root, raw).digest
    moved = shutil.copytree(root, tmp_path / "moved")
    assert product(moved, raw).digest == before
    shutil.copy(moved / "bottle/train/good/000.png", moved / "bottle/train/good/003.png")
    assert product(moved, raw).digest != before
    (moved / "bottle/train/good/003.png").unlink()
    assert product(moved, raw).digest == before
    Image.new("L", (1, 1)).save(moved / "bottle/ground_truth/broken/001_mask.png")
    assert product(moved, raw).digest != before


def test_nothing_to_learn_from_or_to_judge(root: Path, raw: RawFeatures) -> None:
    for path in (root / "bottle/test").rglob("*.png"):
        path.unlink()
    with pytest.raises(InputError, match="test"):
        product(root, raw).encode("squash")
    for path in (root / "bottle/train/good").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="bottle"):
        product(root, raw)


def test_files_that_are_left_out_are_noticed(root: Path, raw: RawFeatures) -> None:
    (root / "bottle/test/broken/photo.cr2").write_bytes(b"photo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (text,) = product(root, raw).noticed
    assert "photo.cr2 cannot be read" in text and "test/broken" in text
