"""Data sets in the manner of MVTec AD: which images, labels and masks are found, in which order."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal, TypeAlias
from unicodedata import normalize

import pytest
from helpers.models import photo
from helpers.trees import rows, write_btad, write_mpdd, write_mvtec, write_mvtec3d
from PIL import Image

from adfeatures.errors import InputError
from training.data import btad, folder, mpdd, mvtec, mvtec3d
from training.data.items import ANOMALOUS, NORMAL

Form: TypeAlias = 'Literal["NFC", "NFD"]'


def test_mvtec(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path, ("cable", "bottle"), good=2, test_good=1, bad=2, kinds=("hole", "cut"), size=(16, 16))
    assert rows(root, mvtec.TREE.find_items(root, "train", ["bottle"])) == [
        ("bottle/train/good/000.png", NORMAL, None, "good"),
        ("bottle/train/good/001.png", NORMAL, None, "good"),
    ]
    assert rows(root, mvtec.TREE.find_items(root, "test", ["bottle"])) == [
        ("bottle/test/cut/000.png", ANOMALOUS, "bottle/ground_truth/cut/000_mask.png", "cut"),
        ("bottle/test/cut/001.png", ANOMALOUS, "bottle/ground_truth/cut/001_mask.png", "cut"),
        ("bottle/test/good/000.png", NORMAL, None, "good"),
        ("bottle/test/hole/000.png", ANOMALOUS, "bottle/ground_truth/hole/000_mask.png", "hole"),
        ("bottle/test/hole/001.png", ANOMALOUS, "bottle/ground_truth/hole/001_mask.png", "hole"),
    ]
    assert [item.product for item in mvtec.TREE.find_items(root, "train")] == ["bottle"] * 2 + ["cable"] * 2
    assert [item.product for item in mvtec.TREE.find_items(root, "train", ["cable", "bottle"])] == ["cable"] * 2 + [
        "bottle"
    ] * 2


@pytest.mark.parametrize("product, image, mask", [("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")])
def test_btad(tmp_path: Path, product: str, image: str, mask: str) -> None:
    root = write_btad(tmp_path, (product,), good=1, test_good=1, bad=1, size=(16, 16))
    assert rows(root, btad.TREE.find_items(root, "train")) == [
        (f"{product}/train/ok/0000.{image}", NORMAL, None, "good")
    ]
    assert rows(root, btad.TREE.find_items(root, "test")) == [
        (f"{product}/test/ko/0000.{image}", ANOMALOUS, f"{product}/ground_truth/ko/0000.{mask}", "ko"),
        (f"{product}/test/ok/0000.{image}", NORMAL, None, "good"),
    ]


def test_mvtec3d_takes_the_color_images_only(tmp_path: Path) -> None:
    root = write_mvtec3d(tmp_path, good=1, test_good=1, bad=1, size=(16, 16))
    (root / "bagel/test/good/gt").mkdir()
    Image.new("L", (16, 16)).save(root / "bagel/test/good/gt/000.png")
    for split in ("test", "train"):
        (root / "bagel" / split / "good" / "xyz").mkdir()
        (root / "bagel" / split / "good" / "xyz" / "000.tiff").write_bytes(b"points")
    shutil.copytree(root / "bagel/train", root / "bagel/validation")
    assert rows(root, mvtec3d.TREE.find_items(root, "train")) == [
        ("bagel/train/good/rgb/000.png", NORMAL, None, "good")
    ]
    assert rows(root, mvtec3d.TREE.find_items(root, "test")) == [
        ("bagel/test/broken/rgb/000.png", ANOMALOUS, "bagel/test/broken/gt/000.png", "broken"),
        ("bagel/test/good/rgb/000.png", NORMAL, None, "good"),
    ]


def test_mpdd(tmp_path: Path) -> None:
    root = write_mpdd(tmp_path, good=1, test_good=1, bad=1, size=(16, 16))
    assert rows(root, mpdd.TREE.find_items(root, "train")) == [("tubes/train/good/000.png", NORMAL, None, "good")]
    assert rows(root, mpdd.TREE.find_items(root, "test")) == [
        ("tubes/test/broken/000.png", ANOMALOUS, "tubes/ground_truth/broken/000_mask.png", "broken"),
        ("tubes/test/good/000.png", NORMAL, None, "good"),
    ]


def test_a_folder_takes_any_names_and_image_formats(tmp_path: Path) -> None:
    root = write_mvtec(
        tmp_path,
        ("shaft", "gear 7"),
        good=2,
        test_good=0,
        bad=1,
        size=(16, 16),
        masks="ground_truth/{kind}/{number:03d}.png",
    )
    photo(9, (16, 16)).save(root / "shaft/train/good/Extra.JPG")
    photo(9, (16, 16)).save(root / "shaft/train/good/.hidden.png")
    (root / "notes").mkdir()
    assert rows(root, folder.TREE.find_items(root, "train", ["shaft"])) == [
        ("shaft/train/good/000.png", NORMAL, None, "good"),
        ("shaft/train/good/001.png", NORMAL, None, "good"),
        ("shaft/train/good/Extra.JPG", NORMAL, None, "good"),
    ]
    assert rows(root, folder.TREE.find_items(root, "test")) == [
        (f"{product}/test/broken/000.png", ANOMALOUS, f"{product}/ground_truth/broken/000.png", "broken")
        for product in ("gear 7", "shaft")
    ]


def test_a_folder_may_be_the_only_product_and_prefers_masks_named_so(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path, ("shaft",), bad=1, test_good=1, size=(16, 16)) / "shaft"
    shutil.copy(root / "ground_truth/broken/000_mask.png", root / "ground_truth/broken/000.png")
    items = folder.TREE.find_items(root, "test")
    assert {item.product for item in items} == {"shaft"}
    assert items[0].mask == str(root / "ground_truth/broken/000_mask.png")


def test_a_folder_without_ground_truth_has_no_masks(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path, ("shaft",), bad=1, test_good=1, size=(16, 16), masks=None)
    assert [(item.label, item.mask) for item in folder.TREE.find_items(root, "test")] == [
        (ANOMALOUS, None),
        (NORMAL, None),
    ]
    (root / "shaft/ground_truth").mkdir()
    with pytest.raises(InputError, match=r"ground_truth/broken/000_mask\.png is missing"):
        folder.TREE.find_items(root, "test")


def test_a_half_extracted_product_is_refused(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path, size=(16, 16))
    (root / "bottle/test/crack").mkdir()
    with pytest.raises(InputError, match=r"No images in .*test/crack"):
        mvtec.TREE.find_items(root, "test")
    shutil.rmtree(root / "bottle/test")
    with pytest.raises(InputError, match=r"bottle/test is missing"):
        mvtec.TREE.find_items(root, "test")
    (root / "bottle/train/good").rename(root / "bottle/train/Good parts")
    with pytest.raises(InputError, match=r"bottle/train holds no folder 'good'"):
        mvtec.TREE.find_items(root, "train")


@pytest.mark.parametrize("image, mask", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_whose_accents_are_written_in_two_ways(tmp_path: Path, image: Form, mask: Form) -> None:
    """As where images were copied from a Mac and masks were not."""
    root = write_mvtec(tmp_path, bad=1, kinds=("Riß é",), size=(16, 16))
    for place, form in (("test", image), ("ground_truth", mask)):
        kind = (root / "bottle" / place / "Riß é").rename(root / "bottle" / place / normalize(form, "Riß é"))
        (path,) = kind.iterdir()
        path.rename(kind / normalize(form, f"über{path.name}"))
    (item,) = (item for item in mvtec.TREE.find_items(root, "test") if item.label == ANOMALOUS)
    assert item.mask is not None and Path(item.mask).is_file() and item.image != item.mask
    assert normalize("NFC", Path(item.mask).name) == normalize("NFC", "über000_mask.png")
    (root / "bottle/ground_truth" / normalize(mask, "Riß é") / normalize(mask, "über000_mask.png")).unlink()
    with pytest.raises(InputError, match="its mask .*000_mask.png is missing"):
        mvtec.TREE.find_items(root, "test")


def test_folders_of_file_systems_are_no_kinds(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path, ("shaft",), size=(16, 16))
    before = folder.TREE.find_items(root, "test")
    for place in ("@eaDir", "shaft/@eaDir", "shaft/test/@eaDir", "shaft/test/broken/@eaDir", "shaft/test/__MACOSX"):
        (root / place / "train").mkdir(parents=True)
        photo(0, (16, 16)).save(root / place / "000.png")
    assert list(folder.TREE.find_products(root)) == ["shaft"]
    assert folder.TREE.find_items(root, "test") == before
