"""Small data sets in the layout of each real one: random pictures, in which a bright square is a defect, with masks.

Each function returns the root, whose file names are those of the real data set. What it holds depends on its arguments
only.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import numpy as np
from helpers.models import photo
from PIL import Image

from training.data.items import Item

MARK = (255, 40, 40)


def defective(seed: int, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """A photo of (width, height) pixels with a square in `MARK` somewhere, and the mask of that square, 0 and 255."""
    width, height = size
    side = max(2, min(size) // 4)
    random = np.random.RandomState(seed)
    left, top = int(random.randint(0, width - side + 1)), int(random.randint(0, height - side + 1))
    image, mask = photo(seed, size), Image.new("L", size)
    for canvas, color in ((image, MARK), (mask, 255)):
        canvas.paste(color, (left, top, left + side, top + side))
    return image, mask


def write_mvtec(
    root: Path,
    products: Sequence[str] = ("bottle",),
    *,
    good: int = 4,
    test_good: int = 2,
    bad: int = 2,
    size: tuple[int, int] = (64, 64),
    seed: int = 0,
    kinds: Sequence[str] = ("broken",),
    normal: str = "good",
    images: str = "{split}/{kind}/{number:03d}.png",
    masks: str | None = "ground_truth/{kind}/{number:03d}_mask.png",
) -> Path:
    """MVTec AD, or with other arguments any set in its manner.

    Args:
        root: Folder to write, made where it is missing.
        products: Names of the products.
        good: Training images of each product.
        test_good: Normal test images of each product.
        bad: Test images of each kind of defect.
        size: (width, height) of the images.
        seed: No two images of a tree, and none of trees whose seeds lie 1000 apart, show the same.
        kinds: Names of the kinds of defect.
        normal: Name of the folders of normal images.
        images: Path of an image in the folder of its product.
        masks: Path of a mask there, None for no masks.
    """
    seeds = count(seed)
    for product in products:
        for split, number in [*(("train", n) for n in range(good)), *(("test", n) for n in range(test_good))]:
            _save(photo(next(seeds), size), root / product / images.format(split=split, kind=normal, number=number))
        for kind in kinds:
            for number in range(bad):
                image, mask = defective(next(seeds), size)
                _save(image, root / product / images.format(split="test", kind=kind, number=number))
                if masks is not None:
                    _save(mask, root / product / masks.format(split="test", kind=kind, number=number))
    return root


def write_mpdd(root: Path, products: Sequence[str] = ("tubes",), **options: object) -> Path:
    """MPDD; options as for `write_mvtec`."""
    return write_mvtec(root, products, **options)  # type: ignore[arg-type]


def write_btad(root: Path, products: Sequence[str] = ("01",), **options: object) -> Path:
    """BTAD, with the file formats of each product: images .bmp, 02 .png; masks .png, 03 .bmp.

    Options as for `write_mvtec`.
    """
    for index, product in enumerate(products):
        image, mask = {"02": ("png", "png"), "03": ("bmp", "bmp")}.get(product, ("bmp", "png"))
        own: dict[str, object] = {
            "seed": 100 * index,
            "kinds": ("ko",),
            "normal": "ok",
            "images": f"{{split}}/{{kind}}/{{number:04d}}.{image}",
            "masks": f"ground_truth/{{kind}}/{{number:04d}}.{mask}",
        }
        write_mvtec(root, (product,), **(own | options))  # type: ignore[arg-type]
    return root


def write_mvtec3d(root: Path, products: Sequence[str] = ("bagel",), **options: object) -> Path:
    """The color images of MVTec 3D-AD; options as for `write_mvtec`."""
    own: dict[str, object] = {
        "images": "{split}/{kind}/rgb/{number:03d}.png",
        "masks": "{split}/{kind}/gt/{number:03d}.png",
    }
    return write_mvtec(root, products, **(own | options))  # type: ignore[arg-type]


def write_visa(
    root: Path,
    products: Sequence[str] = ("candle",),
    *,
    good: int = 4,
    test_good: int = 2,
    bad: int = 2,
    size: tuple[int, int] = (64, 64),
    seed: int = 0,
) -> Path:
    """VisA with its table; arguments as for `write_mvtec`."""
    seeds = count(seed)
    rows = []
    for product in products:
        for number in range(bad):
            image, mask = defective(next(seeds), size)
            paths = [
                f"{product}/Data/Images/Anomaly/{number:03d}.JPG",
                f"{product}/Data/Masks/Anomaly/{number:03d}.png",
            ]
            _save(image, root / paths[0])
            _save(mask, root / paths[1])
            rows.append((product, "test", "anomaly", *paths))
        for number in range(good + test_good):
            path = f"{product}/Data/Images/Normal/{number:04d}.JPG"
            _save(photo(next(seeds), size), root / path)
            rows.append((product, "train" if number < good else "test", "normal", path, ""))
    table = root / "split_csv" / "1cls.csv"
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])
    return root


WRITERS: dict[str, Callable[..., Path]] = {
    "mvtec": write_mvtec,
    "visa": write_visa,
    "btad": write_btad,
    "mvtec3d": write_mvtec3d,
    "mpdd": write_mpdd,
}


def write_manifest(root: Path, **columns: Callable[[Path], str]) -> Path:
    """A table of a tree in the manner of MVTec AD, ``all.csv``; further columns are made of each image's path there."""
    lines = [",".join(["image", "mask", "product", *columns])]
    for image in sorted(path.relative_to(root) for path in root.glob("*/t*/*/*.png")):
        product, _, kind, _ = image.parts
        mask = "" if kind == "good" else f"{product}/ground_truth/{kind}/{image.stem}_mask.png"
        lines.append(",".join([image.as_posix(), mask, product, *(column(image) for column in columns.values())]))
    (root / "all.csv").write_text("\n".join(lines))
    return root / "all.csv"


def rows(root: Path, items: Sequence[Item]) -> list[tuple[str | None, int, str | None, str]]:
    """Items as (image, label, mask, defect) with paths relative to the root."""
    short = [
        [None if path is None else Path(path).relative_to(root).as_posix() for path in (item.image, item.mask)]
        for item in items
    ]
    return [(image, item.label, mask, item.defect) for (image, mask), item in zip(short, items, strict=True)]


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".JPG":
        image.save(path, quality=95, subsampling=0)  # Else the colors of a small defect run.
    else:
        image.save(path)
