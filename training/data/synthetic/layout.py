"""Parts and their photographs as folders and files named as those of Real-IAD, traps included."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from adfeatures.catalog import unknown
from adfeatures.checkpoints import atomic_path
from adfeatures.documents import DocumentError, dumps, read_document
from adfeatures.errors import InputError, UnknownNameError
from adfeatures.images import read_image
from adfeatures.locks import only_run_in
from adfeatures.overlays import contact_sheet, save_picture

from ...console import progress
from ...workers import mapper
from .camera import VIEWS
from .defects import DEFECTS
from .specimen import BUILDERS, SMALLEST_SIZE, Specimen

PRODUCTS = tuple(BUILDERS)
FOLDER, SETTINGS, README, SHEET = "realiad_512", "synthetic.json", "README.txt", "contact_sheet.jpg"
# Raised whenever the same settings give other images.
VERSION = 2
JPEG_QUALITY = 95
# As in Real-IAD: some names of one product have two underscores before the number, and some names of another carry the
# code of another folder.
DOUBLE_UNDERSCORE, WRONG_CODE = PRODUCTS[1], PRODUCTS[2]
OK, NG = range(2)


def render(
    product: str, seed: int, defect: str | None = None, view: int = 1, size: int = 256
) -> tuple[Image.Image, np.ndarray | None]:
    """One picture in memory. With the same seed, the same part is seen with and without a defect and from all views.

    Args:
        product: One of PRODUCTS.
        seed: Which part; any number from 0.
        defect: One of DEFECTS, None for a normal part.
        view: Camera 1 (from above) to VIEWS (from the sides).
        size: Height and width in pixels, at least 32.

    Returns:
        RGB image, and its mask, uint8 (size, size) of 0 and 255. The mask is None where nothing of a defect is to be
        seen; from above there is always something. More than two pixels away from the mask the picture is that of the
        normal part.

    Raises:
        UnknownNameError: For an unknown product or defect.
        InputError: For a view or size out of range or a negative seed.
    """
    if not 1 <= view <= VIEWS:
        raise InputError(f"There are the views 1 to {VIEWS}, not {view}.")
    return Specimen.make(product, (seed, OK, 0), defect, size).photograph(view)


@dataclass(frozen=True)
class Sample:
    """A part to be written, by its number within the product; its defect is None where it is normal."""

    product: str
    number: int
    defect: str | None

    @classmethod
    def of(cls, product: str, number: int, bad: int) -> Sample:
        """The first ``bad`` parts have the DEFECTS in turn, each product from another one on; those after them none."""
        kind = (number - 1 + PRODUCTS.index(product)) % len(DEFECTS)
        return cls(product, number, list(DEFECTS)[kind] if number <= bad else None)

    def path(self, view: int) -> Path:
        """Path of an image below the output folder. The mask is beside it, as ``.png``."""
        tree, code = ("OK", "OK") if self.defect is None else (f"NG/{self.defect}", f"NG_{self.defect}")
        if self.product == WRONG_CODE and self.defect == "HS" and self.number % 16 >= 8:
            code = "NG_QS"
        gap = "__" if self.product == DOUBLE_UNDERSCORE and self.number % 4 else "_"
        time = datetime(2024, 1, 1, 8) + timedelta(minutes=3 * self.number, seconds=7 * view)
        name = f"{self.product}{gap}{self.number:04d}_{code}_C{view}_{time:%Y%m%d%H%M%S}.jpg"
        return Path(FOLDER, self.product, tree, f"S{self.number:04d}", name)

    def missing(self, output: Path) -> list[int]:
        """The views that are not in the output folder yet."""
        return [view for view in range(1, VIEWS + 1) if not (output / self.path(view)).exists()]


def synthesize(
    output: str | Path,
    *,
    products: int | Sequence[str] | None = None,
    good: int = 20,
    bad: int = 16,
    size: int = 256,
    seed: int = 0,
    workers: int = 1,
) -> int:
    """Write a data set, or what is missing of it.

    The same settings give the same bytes, whatever the number of workers.

    Args:
        output: Folder that is new, empty, or was begun with the same settings. The images come below its
            ``realiad_512``.
        products: Names from PRODUCTS, or how many of them; all by default.
        good: Normal parts of each product, of VIEWS images each.
        bad: Defective parts of each product, of the kinds of DEFECTS in turn.
        size: Height and width of the images.
        seed: Other seeds give other parts of the same products.
        workers: Processes that render.

    Returns:
        The number of images written now.

    Raises:
        InputError: For numbers out of range, or a folder that holds anything else.
        UnknownNameError: For unknown products.
        AdfeaturesError: When something cannot be written, or another run writes there. What was written before is kept,
            and the same call resumes from there.
    """
    names = _chosen(products)
    if min(good, bad) < 0 or good + bad == 0 or good + bad > 9999 or workers < 1 or seed < 0 or size < SMALLEST_SIZE:
        raise InputError(
            f"Cannot make {good} good and {bad} bad parts of {size} pixels with seed {seed} and {workers} workers."
        )
    output = Path(output)
    settings = {"version": VERSION, "products": list(names), "good": good, "bad": bad, "size": size, "seed": seed}
    samples = [Sample.of(name, number, bad) for name in names for number in range(1, bad + good + 1)]
    with only_run_in(output, FOLDER):
        _claim(output, settings)
        missing = {sample: len(views) for sample in samples if (views := sample.missing(output))}
        written, total = sum(missing.values()), VIEWS * len(samples)
        with (
            progress(total=total, initial=total - written, unit="image") as bar,
            mapper(workers) as over,
        ):
            for count in over(partial(_write, output, size, seed), missing):
                bar.update(count)
        if written or not (output / SHEET).exists():
            save_picture(_sheet(output, names, good, bad), output / SHEET, quality=JPEG_QUALITY)
    return written


def _chosen(products: int | Sequence[str] | None) -> tuple[str, ...]:
    if products is None:
        return PRODUCTS
    if isinstance(products, int):
        if not 1 <= products <= len(PRODUCTS):
            raise InputError(f"There are 1 to {len(PRODUCTS)} products, not {products}.")
        return PRODUCTS[:products]
    for name in products:
        if name not in PRODUCTS:
            raise UnknownNameError(unknown("product", name, PRODUCTS))
    if not products or len(set(products)) != len(products):
        raise InputError(f"Name each product once, and at least one: {list(products)}.")
    return tuple(products)


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Leave settings and README in a new folder; refuse one that holds something else."""
    try:
        found = read_document(output / SETTINGS, dict[str, Any]) if os.path.lexists(output / SETTINGS) else None
    except DocumentError as error:
        message = f"{output} cannot be used: its {SETTINGS} cannot be read ({error}). Choose another folder."
        raise InputError(message) from error
    if found is None:
        if output.is_dir() and any(not path.name.startswith(".") for path in output.iterdir()):
            raise InputError(f"{output} is not empty and holds no {SETTINGS}. Choose a new folder.")
        with atomic_path(output / SETTINGS) as temporary:
            temporary.write_text(dumps(settings, indent=1), encoding="utf-8")
    elif found != settings:
        keys = [key for key in settings if found.get(key) != settings[key]]
        message = f"{output} holds a data set made with other settings ({', '.join(keys)}). "
        raise InputError(message + "Repeat those or choose another folder.")
    if not (output / README).exists():
        with atomic_path(output / README) as temporary:
            temporary.write_text(_note(**settings), encoding="utf-8")


def _note(*, products: Sequence[str], good: int, bad: int, size: int, seed: int, version: int) -> str:
    kinds = "\n".join(f"  {code}  {meaning}" for code, (meaning, _) in DEFECTS.items())
    return f"""\
Rendered by training/synthesize.py of the adfeatures project (format {version}), settings in {SETTINGS}:
  seed {seed}, {len(products)} products, {good} good and {bad} bad parts each, {size} pixels

No photograph or other work went into the images: everything is computed. They are under the license of the project,
MIT.

The layout is that of Real-IAD, below {FOLDER}/: <product>/OK/S<number>/ and <product>/NG/<defect>/S<number>/.
A folder S<number> holds the five views of one part: C1 from above, C2 to C5 from the sides. A mask (.png, 0 or 255)
lies beside the image of the same name. Where the defect cannot be seen there is none, and the image is that of a
normal part. A mask covers what the defect visibly changes, its shadow included.

Defects, under the codes of Real-IAD:
{kinds}

As in Real-IAD, do not trust names: some of {DOUBLE_UNDERSCORE} have two underscores before the number, and some
scratches of {WRONG_CODE} carry the code QS in the name. The folder is right.
"""


def _write(output: Path, size: int, seed: int, sample: Sample) -> int:
    """Write the images of a sample that are not there, each after its mask, and count them."""
    missing = sample.missing(output)
    tree = OK if sample.defect is None else NG
    specimen = Specimen.make(sample.product, (seed, tree, sample.number), sample.defect, size)
    for view in missing:
        (image, mask), path = specimen.photograph(view), output / sample.path(view)
        if mask is not None:
            save_picture(Image.fromarray(mask), path.with_suffix(".png"))
        save_picture(image, path, quality=JPEG_QUALITY)
    return len(missing)


def _sheet(output: Path, products: Sequence[str], good: int, bad: int) -> Image.Image:
    """Two normal pictures and up to four with outlined defects of each product."""
    tiles = []
    for index, name in enumerate(products):
        normal = [Sample.of(name, bad + 1, bad).path(view) for view in (1, 3)] if good else []
        numbers = [(4 * index + step) % bad + 1 for step in range(min(4, bad))]
        broken = [Sample.of(name, number, bad).path(1 + step % 2) for step, number in enumerate(numbers)]
        row = [_outlined(output / path) for path in normal + broken]
        ImageDraw.Draw(row[0]).text(
            (4, 2), name, "white", stroke_width=2, stroke_fill="black", font_size=max(10, row[0].height // 14)
        )
        tiles += row
    return contact_sheet(tiles, columns=2 * (2 * (good > 0) + min(4, bad)), tile_width=144)


def _outlined(path: Path) -> Image.Image:
    """An image with a thin line around its mask."""
    picture, mask = read_image(path), path.with_suffix(".png")
    if mask.exists():
        wide = read_image(mask).convert("L").filter(ImageFilter.MaxFilter(7))
        picture.paste((255, 0, 200), mask=ImageChops.difference(wide, wide.filter(ImageFilter.MinFilter(3))))
    return picture
