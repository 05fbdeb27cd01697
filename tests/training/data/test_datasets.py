"""Data sets in small: which images, labels and masks are found, whether masks stay on their images, and what the checker says."""

from __future__ import annotations

import csv
import gc
import multiprocessing
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import photo, write_photos
from helpers.real_iad_tree import write_real_iad
from helpers.trees import MARK, defective, write_btad, write_mpdd, write_mvtec, write_mvtec3d, write_visa
from PIL import Image
from scipy import ndimage

from adfeatures.errors import ImageError, InputError, UnknownNameError
from adfeatures.images import PRESETS, build_transform
from training.data import DATASETS, btad, checks, dataset, folder, mpdd, mvtec, mvtec3d, real_iad, visa
from training.data.images import ImageDataset, loader
from training.data.items import ANOMALOUS, NORMAL, Item
from training.data.protocol import EVALUATED, original_geometry
from training.data.transforms import MaskTransform

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
TRANSFORM = build_transform((32, 32), **PLAIN)
WRITERS = {"mvtec": write_mvtec, "visa": write_visa, "btad": write_btad, "mvtec3d": write_mvtec3d, "mpdd": write_mpdd}
NAMES = list(WRITERS)


def rows(root, items):
    """Items as (image, label, mask, defect) with paths relative to the root."""
    short = [
        [None if path is None else Path(path).relative_to(root).as_posix() for path in (item.image, item.mask)]
        for item in items
    ]
    return [(image, item.label, mask, item.defect) for (image, mask), item in zip(short, items, strict=True)]


# --- Masks stay on their images ---


def cropped(image, shorter_side, resample):
    """Resize of the shorter side and central crop of 224, in plain Pillow."""
    width, height = image.size
    scale = shorter_side / min(width, height)
    size = (shorter_side, int(height * scale + 1e-9)) if width <= height else (int(width * scale + 1e-9), shorter_side)
    left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    return image.resize(size, resample).crop((left, top, left + 224, top + 224))


@pytest.mark.parametrize("size", [(300, 200), (200, 333), (97, 97), (640, 230)])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_square_in_image_and_mask_lands_on_the_same_pixels(preset, size):
    width, height = size
    box = (width // 2 - 20, height // 2 - 35, width // 2 + 25, height // 2 + 15)
    image, mask = Image.new("RGB", size), Image.new("L", size)
    image.paste((255, 255, 255), box)
    mask.paste(255, box)

    if preset == "squash":
        expected = mask.resize((80, 48), Image.Resampling.NEAREST)
    else:
        expected = cropped(mask, {"resize224_crop224": 224, "resize256_crop224": 256}[preset], Image.Resampling.NEAREST)
    found = MaskTransform((48, 80), preset)(mask)
    assert found.dtype == torch.uint8 and found.shape == (1, expected.height, expected.width)
    assert np.array_equal(found[0], np.asarray(expected) > 0)

    # The image is smooth at the border of the square; beyond a pixel of it, both must tell the same.
    drawn = build_transform((48, 80), **PLAIN, preset=preset)(image).mean(dim=0).numpy() > 0.5
    inside = found[0].numpy().astype(bool)
    assert drawn.shape == inside.shape and 50 < inside.sum() < inside.size
    around = np.ones((3, 3))
    assert (
        drawn[ndimage.binary_erosion(inside, around)].all()
        and not drawn[~ndimage.binary_dilation(inside, around)].any()
    )


def test_an_unknown_preset_is_refused():
    with pytest.raises(UnknownNameError, match="'resize224_crop224'"):
        MaskTransform((32, 32), "resize224")


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "I;16", "instances", "blue", "gray edge", "RGBA", "LA", "transparent color"]
)
def test_masks_are_binary_after_resizing_whatever_their_values(tmp_path, mode):
    defect = np.zeros((40, 60), dtype=np.uint8)
    defect[8:20, 12:36] = 1
    stored = {
        "1": lambda: Image.fromarray(defect * 255).convert("1"),
        "L": lambda: Image.fromarray(defect),
        "P": lambda: _palette(defect),
        "I;16": lambda: Image.fromarray(defect.astype(np.uint16) * 65535),
        "instances": lambda: Image.fromarray(defect.astype(np.uint16)),
        "RGBA": lambda: Image.fromarray(np.stack([defect * 9, 0 * defect, 0 * defect, defect * 255], axis=2)),
        "LA": lambda: Image.fromarray(np.stack([defect * 255, defect * 90], axis=2), mode="LA"),
        "transparent color": lambda: _palette(defect),
        "blue": lambda: Image.fromarray(np.stack([0 * defect, 0 * defect, defect], axis=2)),
        "gray edge": lambda: Image.fromarray(
            defect * 127 + ndimage.binary_erosion(defect, iterations=2).astype(np.uint8) * 128
        ),
    }[mode]()
    photo(0, (60, 40)).save(tmp_path / "image.png")
    stored.save(tmp_path / "mask.png", **({"transparency": 0} if mode == "transparent color" else {}))
    item = Item(str(tmp_path / "image.png"), ANOMALOUS, "product", str(tmp_path / "mask.png"), "scratch")
    for height, width in ((40, 60), (20, 30), (80, 120)):
        mask = ImageDataset([item], build_transform((height, width), **PLAIN))[0]["mask"]
        expected = Image.fromarray(defect * 255).resize((width, height), Image.Resampling.NEAREST)
        assert mask.dtype == torch.uint8 and np.array_equal(mask[0], np.asarray(expected) // 255)


def _palette(defect):
    image = Image.fromarray(defect, mode="P")
    image.putpalette([0, 0, 0, 10, 200, 30])
    return image


# --- Entries and batches ---


def test_an_entry_holds_image_mask_label_product_and_path(tmp_path):
    root = write_mvtec(tmp_path, size=(64, 48))
    items = mvtec.find_items(root, "test")
    data = pickle.loads(pickle.dumps(ImageDataset(items, TRANSFORM)))
    assert len(data) == 4
    for item, entry in zip(items, data, strict=True):
        assert set(entry) == {"image", "mask", "label", "product", "path"}
        assert entry["image"].shape == (3, 32, 32) and entry["image"].dtype == torch.float32
        assert entry["mask"].shape == (1, 32, 32) and entry["mask"].dtype == torch.uint8
        assert entry["mask"].any() == (item.label == ANOMALOUS)
        assert (entry["label"], entry["product"], entry["path"]) == (item.label, "bottle", item.image)


def test_batches_have_the_form_that_methods_expect(tmp_path):
    items = mvtec.find_items(write_mvtec(tmp_path, test_good=3), "test")
    batches = list(loader(ImageDataset(items, TRANSFORM), 2))
    assert [len(batch["path"]) for batch in batches] == [2, 2, 1]
    assert batches[0]["image"].shape == (2, 3, 32, 32) and batches[0]["mask"].shape == (2, 1, 32, 32)
    assert batches[0]["label"].dtype == torch.int64 and batches[0]["label"].tolist() == [ANOMALOUS, ANOMALOUS]
    assert [path for batch in batches for path in batch["path"]] == [item.image for item in items]
    assert batches[2]["product"] == ["bottle"]
    assert [len(batch["path"]) for batch in loader(ImageDataset(items, TRANSFORM), 2, drop_last=True)] == [2, 2]


def test_shuffled_batches_depend_on_the_seed_only(tmp_path):
    items = mvtec.find_items(write_mvtec(tmp_path, good=9, size=(16, 16)), "train")
    data = ImageDataset(items, TRANSFORM)

    def passes(seed, workers):
        batches = loader(data, 4, shuffle=True, seed=seed, workers=workers)
        next(iter(batches))  # A pass that is broken off, while workers have read all of it.
        return [[(batch["path"], batch["image"].sum().item()) for batch in batches] for _ in range(2)]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = passes(seed=5, workers=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert passes(seed=5, workers=1) == first == passes(seed=5, workers=2)
    assert passes(seed=6, workers=0) != first and first[0] != first[1]
    for one in first:
        assert sorted(path for paths, _ in one for path in paths) == [item.image for item in items]


def test_an_unreadable_file_leaves_no_workers_behind(tmp_path):
    """Not even until the garbage is collected: a worker forked meanwhile would inherit them."""
    write_photos(tmp_path, range(4))
    (tmp_path / "001.png").write_bytes(b"no image")
    items = [Item(str(path), NORMAL, "bottle") for path in sorted(tmp_path.iterdir())]
    gc.disable()
    try:
        with pytest.raises(ImageError, match="001.png") as caught:
            list(loader(ImageDataset(items, TRANSFORM), 1, workers=2))
        del caught
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files_are_named_by_the_loader_too(tmp_path, workers):
    root = write_mvtec(tmp_path, size=(16, 16))
    items = mvtec.find_items(root, "test")
    broken = root / "bottle/ground_truth/broken/001_mask.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(ImageError) as caught:
        list(loader(ImageDataset(items, TRANSFORM), 1, workers=workers))
    assert str(caught.value).startswith(f"Cannot read {broken}: ") and "\n" not in str(caught.value)

    (root / "bottle/test/broken/000.png").write_text("no image")
    with pytest.raises(ImageError, match=r"broken/000\.png"):
        ImageDataset(items, TRANSFORM)[0]


def test_a_mask_of_another_size_is_refused_upright(tmp_path):
    """A camera that was held sideways: its file is 40 x 24, the image and its mask are 24 x 40."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(0, (40, 24)).save(tmp_path / "image.jpg", exif=exif)
    mask = defective(1, (24, 40))[1]
    mask.save(tmp_path / "upright.png")
    mask.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png")
    upright, lying = (
        Item(str(tmp_path / "image.jpg"), ANOMALOUS, "p", str(tmp_path / name), "d")
        for name in ("upright.png", "lying.png")
    )
    assert ImageDataset([upright], TRANSFORM)[0]["mask"].any()
    with pytest.raises(ImageError, match=r"lying\.png has 40 x 24 pixels, its image .*image\.jpg has 24 x 40"):
        ImageDataset([lying], TRANSFORM)[0]


# --- What is found, in which order ---


def test_mvtec(tmp_path):
    root = write_mvtec(tmp_path, ("cable", "bottle"), good=2, test_good=1, bad=2, kinds=("hole", "cut"), size=(16, 16))
    assert rows(root, mvtec.find_items(root, "train", ["bottle"])) == [
        ("bottle/train/good/000.png", NORMAL, None, "good"),
        ("bottle/train/good/001.png", NORMAL, None, "good"),
    ]
    assert rows(root, mvtec.find_items(root, "test", ["bottle"])) == [
        ("bottle/test/cut/000.png", ANOMALOUS, "bottle/ground_truth/cut/000_mask.png", "cut"),
        ("bottle/test/cut/001.png", ANOMALOUS, "bottle/ground_truth/cut/001_mask.png", "cut"),
        ("bottle/test/good/000.png", NORMAL, None, "good"),
        ("bottle/test/hole/000.png", ANOMALOUS, "bottle/ground_truth/hole/000_mask.png", "hole"),
        ("bottle/test/hole/001.png", ANOMALOUS, "bottle/ground_truth/hole/001_mask.png", "hole"),
    ]
    assert [item.product for item in mvtec.find_items(root, "train")] == ["bottle"] * 2 + ["cable"] * 2
    assert [item.product for item in mvtec.find_items(root, "train", ["cable", "bottle"])] == ["cable"] * 2 + [
        "bottle"
    ] * 2


def test_visa(tmp_path):
    root = write_visa(tmp_path, ("candle", "pcb1"), good=1, test_good=2, bad=1, size=(16, 16))
    assert rows(root, visa.find_items(root, "train", ["pcb1"])) == [
        ("pcb1/Data/Images/Normal/0000.JPG", NORMAL, None, "good")
    ]
    assert rows(root, visa.find_items(root, "test", ["pcb1"])) == [
        ("pcb1/Data/Images/Normal/0001.JPG", NORMAL, None, "good"),
        ("pcb1/Data/Images/Normal/0002.JPG", NORMAL, None, "good"),
        ("pcb1/Data/Images/Anomaly/000.JPG", ANOMALOUS, "pcb1/Data/Masks/Anomaly/000.png", "anomaly"),
    ]
    assert [item.product for item in visa.find_items(root, "test")] == ["candle"] * 3 + ["pcb1"] * 3


def test_visa_columns_are_found_by_name_and_rows_stay_in_order(tmp_path):
    root = write_visa(tmp_path, good=1, test_good=2, bad=2, size=(16, 16))
    folder = root / "candle/Data/Images/Anomaly"
    (folder / "001.JPG").rename(folder / "1,1.JPG")
    table = root / "split_csv/1cls.csv"
    with table.open(newline="") as file:
        old = list(csv.DictReader(file))
    next(row for row in old if row["image"].endswith("Anomaly/001.JPG"))["image"] = "candle/Data/Images/Anomaly/1,1.JPG"
    with table.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["mask", "extra", "label", "image", "split", "object"])
        writer.writeheader()
        writer.writerows(row | {"extra": "x"} for row in reversed(old))
    assert rows(root, visa.find_items(root, "test")) == [
        ("candle/Data/Images/Normal/0002.JPG", NORMAL, None, "good"),
        ("candle/Data/Images/Normal/0001.JPG", NORMAL, None, "good"),
        ("candle/Data/Images/Anomaly/1,1.JPG", ANOMALOUS, "candle/Data/Masks/Anomaly/001.png", "anomaly"),
        ("candle/Data/Images/Anomaly/000.JPG", ANOMALOUS, "candle/Data/Masks/Anomaly/000.png", "anomaly"),
    ]


@pytest.mark.parametrize("product, image, mask", [("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")])
def test_btad(tmp_path, product, image, mask):
    root = write_btad(tmp_path, (product,), good=1, test_good=1, bad=1, size=(16, 16))
    assert rows(root, btad.find_items(root, "train")) == [(f"{product}/train/ok/0000.{image}", NORMAL, None, "good")]
    assert rows(root, btad.find_items(root, "test")) == [
        (f"{product}/test/ko/0000.{image}", ANOMALOUS, f"{product}/ground_truth/ko/0000.{mask}", "ko"),
        (f"{product}/test/ok/0000.{image}", NORMAL, None, "good"),
    ]


def test_mvtec3d_takes_the_color_images_only(tmp_path):
    root = write_mvtec3d(tmp_path, good=1, test_good=1, bad=1, size=(16, 16))
    (root / "bagel/test/good/gt").mkdir()
    Image.new("L", (16, 16)).save(root / "bagel/test/good/gt/000.png")
    for split in ("test", "train"):
        (root / "bagel" / split / "good" / "xyz").mkdir()
        (root / "bagel" / split / "good" / "xyz" / "000.tiff").write_bytes(b"points")
    shutil.copytree(root / "bagel/train", root / "bagel/validation")
    assert rows(root, mvtec3d.find_items(root, "train")) == [("bagel/train/good/rgb/000.png", NORMAL, None, "good")]
    assert rows(root, mvtec3d.find_items(root, "test")) == [
        ("bagel/test/broken/rgb/000.png", ANOMALOUS, "bagel/test/broken/gt/000.png", "broken"),
        ("bagel/test/good/rgb/000.png", NORMAL, None, "good"),
    ]


def test_mpdd(tmp_path):
    root = write_mpdd(tmp_path, good=1, test_good=1, bad=1, size=(16, 16))
    assert rows(root, mpdd.find_items(root, "train")) == [("tubes/train/good/000.png", NORMAL, None, "good")]
    assert rows(root, mpdd.find_items(root, "test")) == [
        ("tubes/test/broken/000.png", ANOMALOUS, "tubes/ground_truth/broken/000_mask.png", "broken"),
        ("tubes/test/good/000.png", NORMAL, None, "good"),
    ]


def test_a_folder_takes_any_names_and_image_formats(tmp_path):
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
    assert rows(root, folder.find_items(root, "train", ["shaft"])) == [
        ("shaft/train/good/000.png", NORMAL, None, "good"),
        ("shaft/train/good/001.png", NORMAL, None, "good"),
        ("shaft/train/good/Extra.JPG", NORMAL, None, "good"),
    ]
    assert rows(root, folder.find_items(root, "test")) == [
        (f"{product}/test/broken/000.png", ANOMALOUS, f"{product}/ground_truth/broken/000.png", "broken")
        for product in ("gear 7", "shaft")
    ]


def test_a_folder_may_be_the_only_product_and_prefers_masks_named_so(tmp_path):
    root = write_mvtec(tmp_path, ("shaft",), bad=1, test_good=1, size=(16, 16)) / "shaft"
    shutil.copy(root / "ground_truth/broken/000_mask.png", root / "ground_truth/broken/000.png")
    items = folder.find_items(root, "test")
    assert {item.product for item in items} == {"shaft"}
    assert items[0].mask == str(root / "ground_truth/broken/000_mask.png")


def test_a_folder_without_ground_truth_has_no_masks(tmp_path):
    root = write_mvtec(tmp_path, ("shaft",), bad=1, test_good=1, size=(16, 16), masks=None)
    assert [(item.label, item.mask) for item in folder.find_items(root, "test")] == [(ANOMALOUS, None), (NORMAL, None)]
    (root / "shaft/ground_truth").mkdir()
    with pytest.raises(InputError, match=r"ground_truth/broken/000_mask\.png is missing"):
        folder.find_items(root, "test")


@pytest.mark.parametrize("name", NAMES)
def test_every_mask_marks_the_defect_of_its_own_image(tmp_path, name):
    root = WRITERS[name](tmp_path, bad=4, size=(40, 32))
    bad = [item for item in dataset(name).find_items(root, "test") if item.label == ANOMALOUS]
    assert len(bad) == 4
    if name != "visa":
        # Pairing by position would now give every image the mask of its neighbor; the table of VisA has no position.
        Path(bad[0].image).unlink()
        bad = [item for item in dataset(name).find_items(root, "test") if item.label == ANOMALOUS]
        assert len(bad) == 3
    for entry in ImageDataset(bad, TRANSFORM):
        marked = entry["image"][:, entry["mask"][0] > 0].median(dim=1).values * 255
        assert torch.allclose(marked, torch.tensor(MARK, dtype=torch.float32), atol=10)


# --- Bad input ---


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_mask_is_named(tmp_path, name):
    root = WRITERS[name](tmp_path, size=(16, 16))
    item = next(item for item in dataset(name).find_items(root, "test") if item.label == ANOMALOUS)
    Path(item.mask).unlink()
    with pytest.raises(InputError) as caught:
        dataset(name).find_items(root, "test")
    assert item.mask in str(caught.value) and item.image in str(caught.value)
    dataset(name).find_items(root, "train")


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_root_is_answered_with_the_right_one(tmp_path, name):
    data = dataset(name)
    root = WRITERS[name](tmp_path / "sets" / name, data.PRODUCTS[:1], size=(16, 16))
    product = root / data.PRODUCTS[0]
    for wrong in (root.parent, tmp_path, product, next(path for path in product.iterdir() if path.is_dir())):
        with pytest.raises(InputError, match=f"Give {root} instead"):
            data.find_items(wrong, "test")
    with pytest.raises(InputError, match="There is no folder"):
        data.find_items(tmp_path / "nowhere", "test")
    (tmp_path / "a/b/c/d").mkdir(parents=True)
    with pytest.raises(InputError, match="Give the folder that holds"):
        data.find_items(tmp_path / "a/b/c", "test")


def test_products_that_are_missing_or_unknown_are_named(tmp_path):
    root = write_mvtec(tmp_path, size=(16, 16))
    with pytest.raises(InputError, match="holds no cable, zipper"):
        mvtec.find_items(root, "test", ["bottle", "cable", "zipper"])
    with pytest.raises(UnknownNameError, match="Did you mean 'bottle'"):
        mvtec.find_items(root, "test", ["botle"])
    with pytest.raises(UnknownNameError, match="Did you mean 'bottle'"):
        folder.find_items(root, "test", ["botle"])
    with pytest.raises(UnknownNameError, match="Did you mean 'test'"):
        mvtec.find_items(root, "tests")


def test_a_product_that_is_named_twice_is_taken_once(tmp_path):
    root = write_mvtec(tmp_path, size=(16, 16))
    assert mvtec.find_items(root, "test", ["bottle", "bottle"]) == mvtec.find_items(root, "test")


def test_a_half_extracted_product_is_refused(tmp_path):
    root = write_mvtec(tmp_path, size=(16, 16))
    (root / "bottle/test/crack").mkdir()
    with pytest.raises(InputError, match=r"No images in .*test/crack"):
        mvtec.find_items(root, "test")
    shutil.rmtree(root / "bottle/test")
    with pytest.raises(InputError, match=r"bottle/test is missing"):
        mvtec.find_items(root, "test")
    (root / "bottle/train/good").rename(root / "bottle/train/Good parts")
    with pytest.raises(InputError, match=r"bottle/train holds no folder 'good'"):
        mvtec.find_items(root, "train")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "There is no .*1cls.csv"),
        ("", "has no column object, split, label, image, mask"),
        ("object,split,label,image\n", "has no column mask"),
        (
            "object,split,label,image,mask\ncandle,test,good,a.JPG,\n",
            "Line 2 .* has the label 'good', not normal or anomaly",
        ),
        ("object,split,label,image,mask\ncandle,test,anomaly,a.JPG,\n", r"names no mask of a\.JPG"),
        ("object,split,label,image,mask\ncandle,test,normal,a.JPG,\n", r"The image .*a\.JPG is missing"),
        (
            "object,split,label,image,mask\npcb1,test,normal,a.JPG,\n",
            "has no rows of the object 'candle' in the split 'test'",
        ),
        (b"object,split,label,image,mask\n\xff\xfe,test\n", "Cannot read .*1cls.csv"),
    ],
)
def test_a_damaged_table_of_visa_is_refused(tmp_path, content, message):
    root = write_visa(tmp_path, size=(16, 16))
    table = root / "split_csv/1cls.csv"
    table.unlink()
    if content is not None:
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        visa.find_items(root, "test")


def test_data_sets_are_known_by_name():
    for name in DATASETS:
        assert callable(dataset(name).find_items) and isinstance(dataset(name).PRODUCTS, tuple)
    with pytest.raises(UnknownNameError, match="Did you mean 'mvtec"):
        dataset("mvtek")
    assert [len(dataset(name).PRODUCTS) for name in DATASETS] == [15, 12, 3, 10, 6, 30, 0]


# --- The original's geometry ---


def test_original_geometry_is_that_of_the_published_code():
    larger = {
        (method, "mvtec", product)
        for method, products in {
            "patchcore": mvtec.PRODUCTS,
            "padim": mvtec.PRODUCTS,
            "validation": mvtec.PRODUCTS,
            "glass": ("toothbrush", "wood"),
        }.items()
        for product in products
    }
    for method in EVALUATED:
        for name in DATASETS:
            for product in dataset(name).PRODUCTS:
                expected = "resize256_crop224" if (method, name, product) in larger else "resize224_crop224"
                assert original_geometry(method, name, "image", product) == expected
                assert original_geometry(method, name, "reference", product) == "resize224_crop224"


@pytest.mark.parametrize(
    "arguments", [("patchcor", "mvtec", "image"), ("padim", "mvtek", "image"), ("padim", "mvtec", "images")]
)
def test_original_geometry_refuses_unknown_names(arguments):
    with pytest.raises(UnknownNameError, match="Did you mean"):
        original_geometry(*arguments, "bottle")


# --- The checker ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Complete sets by name, to be copied before anything is changed."""
    root = tmp_path_factory.mktemp("whole")
    for name, write in WRITERS.items():
        write(root / name, dataset(name).PRODUCTS, good=2, test_good=1, bad=1, size=(12, 12))
    write_real_iad(root / "real_iad", real_iad.PRODUCTS, ok=1, ng=1, views=2, defects=("HS",), size=(12, 12))
    write_mvtec(root / "folder", ("shaft", "gear"), good=2, test_good=1, bad=1, size=(12, 12))
    return root


@pytest.mark.parametrize("name", DATASETS)
def test_nothing_is_said_of_a_whole_set_and_it_is_recognized(whole, name):
    assert checks.recognize(whole / name) == name
    assert checks.check(whole / name) == checks.check(whole / name, name) == []
    text, code = checks.report(whole / name)
    assert code == 0 and DATASETS[name] in text and text.endswith("Nothing is missing or misnamed.")


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def gray(path, size=(12, 12), value=7):
    canvas = Image.new("L", size)
    canvas.paste(value, (0, 0, 3, 3))
    canvas.save(path)


PCB2 = "pcb2/Data/Masks/Anomaly/000.png"
FAULTS = {
    "half extracted": ("mvtec", lambda r: remove(r / "wood"), ["lacks 1 of 15 products of MVTec AD: wood"], []),
    "misnamed product": (
        "mvtec",
        lambda r: (r / "wood").rename(r / "wod"),
        ["lacks 1 of 15 products of MVTec AD: wood"],
        ["wod is not read. Unknown product of MVTec AD 'wod'. Did you mean 'wood'"],
    ),
    "misnamed split": (
        "mpdd",
        lambda r: (r / "tubes/test").rename(r / "tubes/tests"),
        ["tubes/test is missing"],
        ["tubes/tests is not read. Unknown folder 'tests'. Did you mean 'test'"],
    ),
    "misnamed masks": (
        "folder",
        lambda r: (r / "gear/ground_truth").rename(r / "gear/groundtruth"),
        [],
        ["gear/groundtruth is not read. Unknown folder 'groundtruth'. Did you mean 'ground_truth'"],
    ),
    "misnamed kind": (
        "mvtec",
        lambda r: (r / "pill/test/broken").rename(r / "pill/test/broke"),
        [
            "pill has 1 images without their mask: .*test/broke/000.png .mask expected in .*ground_truth/broke/000_mask.png"
        ],
        ["ground_truth/broken is not read: test has no such folder. Unknown kind 'broken'. Did you mean 'broke'"],
    ),
    "empty folder": ("mvtec", lambda r: (r / "pill/test/crack").mkdir(), ["test/crack holds no images"], []),
    "no color images": (
        "mvtec3d",
        lambda r: remove(r / "rope/test/good/rgb"),
        ["test/good/rgb holds no images", "rope/test holds no normal"],
        [],
    ),
    "no normal images": (
        "btad",
        lambda r: remove(r / "03/train/ok"),
        ["03/train is missing or has no sub-folders"],
        [],
    ),
    "one normal image": (
        "btad",
        lambda r: remove(r / "03/train/ok/0000.bmp"),
        [],
        ["03/train holds a single normal image"],
    ),
    "no anomalies": (
        "folder",
        lambda r: remove(r / "gear/test/broken"),
        ["gear/test holds no images with defects"],
        ["Unknown kind 'broken'"],
    ),
    "image without mask": (
        "btad",
        lambda r: remove(r / "01/ground_truth/ko/0000.png"),
        [r"01 has 1 images without their mask: .*01/test/ko/0000.bmp .mask expected in .*01/ground_truth/ko/0000.png"],
        [],
    ),
    "mask without image": (
        "mvtec",
        lambda r: gray(r / "tile/ground_truth/broken/001_mask.png"),
        ["tile/ground_truth/broken has 1 files that belong to no image: 001_mask.png"],
        [],
    ),
    "misnamed mask": (
        "real_iad",
        lambda r: next(r.glob("realiad_512/pcb/NG/HS/*/*.png")).rename(r / "realiad_512/pcb/NG/HS/S0000/x_mask.png"),
        ["belong to no image: x_mask.png", "pcb holds no images with defects"],
        [],
    ),
    "other size": (
        "visa",
        lambda r: gray(r / PCB2, (9, 12), 255),
        ["000.png has 9 x 12 pixels, its image .* has 12 x 12"],
        [],
    ),
    "gray mask": ("visa", lambda r: gray(r / PCB2), [], ["pcb2 has 1 gray masks, .*000.png"]),
    "empty mask": ("visa", lambda r: gray(r / PCB2, value=0), [], ["pcb2 has 1 masks without a defect"]),
    "full mask": (
        "visa",
        lambda r: Image.new("L", (12, 12), 255).save(r / PCB2),
        [],
        ["pcb2 has 1 masks in which every pixel is a defect"],
    ),
    "broken image": (
        "mpdd",
        lambda r: (r / "tubes/train/good/000.png").write_bytes(b""),
        [r"Cannot read .*train/good/000.png: the file is empty"],
        [],
    ),
    "broken mask": (
        "mpdd",
        lambda r: (r / "tubes/ground_truth/broken/000_mask.png").write_text("x" * 50),
        [r"Cannot read .*broken/000_mask.png"],
        [],
    ),
    "no table": ("visa", lambda r: remove(r / "split_csv/1cls.csv"), ["There is no .*split_csv/1cls.csv"], []),
    "missing image": (
        "visa",
        lambda r: remove(r / "fryum/Data/Images/Normal/0000.JPG"),
        ["fryum has 1 missing images: .*Normal/0000.JPG"],
        [],
    ),
    "image in no row": (
        "visa",
        lambda r: photo(0, (12, 12)).save(r / "fryum/Data/Images/Normal/77.JPG"),
        ["fryum/Data/Images/Normal has 1 files that belong to no image: 77.JPG"],
        [],
    ),
    "foreign folder": (
        "folder",
        lambda r: (r / "notes").mkdir(),
        [],
        ["notes is not read: it holds none of the folders train, test, ground_truth"],
    ),
    "no good parts": ("real_iad", lambda r: remove(r / "realiad_512/toy/OK"), ["toy/OK"], []),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checker_names_what_is_wrong_and_nothing_else(whole, tmp_path, fault):
    name, spoil, errors, warnings = FAULTS[fault]
    root = shutil.copytree(whole / name, tmp_path / name)
    spoil(root)
    problems = checks.check(root)
    for serious, expected in ((True, errors), (False, warnings)):
        found = [problem.text for problem in problems if problem.serious is serious]
        assert len(found) == len(expected), found
        for pattern in expected:
            assert any(re.search(pattern, text) for text in found), (pattern, found)
    text, code = checks.report(root, name)
    assert code == (1 if errors else 0) and text.endswith(f"errors: {len(errors)}, warnings: {len(warnings)}")


def test_the_checker_names_three_of_many_files(whole, tmp_path):
    root = write_mvtec(tmp_path, ("shaft",), bad=5, size=(12, 12))
    for path in (root / "shaft/ground_truth/broken").iterdir():
        path.unlink()
    (problem,) = checks.check(root, "folder")
    assert "shaft has 5 images without their mask" in problem.text and problem.text.endswith("and 2 more.")
    assert problem.text.count("mask expected in") == 3


@pytest.mark.parametrize("name", DATASETS)
def test_the_checker_answers_a_wrong_root_with_the_right_one(whole, tmp_path, name):
    root = shutil.copytree(whole / name, tmp_path / "downloads" / name)
    for wrong in (root.parent, tmp_path):
        with pytest.raises(InputError, match=f"Give {root} instead"):
            checks.check(wrong)
        with pytest.raises(InputError, match=f"Give {root} instead"):
            checks.check(wrong, name)
    if name not in ("folder", "real_iad"):
        product = dataset(name).PRODUCTS[0]
        for wrong in (root / product, next(path for path in (root / product).iterdir() if path.is_dir())):
            with pytest.raises(InputError, match=f"Give {root} instead"):
                checks.check(wrong)


def test_the_checker_refuses_what_is_no_data_set(tmp_path):
    with pytest.raises(InputError, match="There is no folder"):
        checks.check(tmp_path / "nowhere")
    (tmp_path / "a/b/c").mkdir(parents=True)
    with pytest.raises(InputError, match="--dataset to see what is missed"):
        checks.check(tmp_path / "a/b/c")
    with pytest.raises(UnknownNameError, match="Did you mean 'btad'"):
        checks.check(tmp_path, "btat")
