"""The lists of references that the authors of ADPretrain published: for every test image ten training images.

``<data set>/<product>.json`` is an object of lists: the path of a test image to those of its references, absolute on
the machine that they were made on. What follows the folder of the product is the same everywhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from adfeatures.documents import DocumentError, read_document
from adfeatures.errors import InputError

from ..data.images import some
from ..data.items import NORMAL, Item
from ..data.tree import find_file
from .product import Product


def listed_references(folder: str, dataset: str, place: Path, product: Product) -> dict[str, list[Item]]:
    """The references of every test image of a product, by its path.

    Args:
        folder: The folder of the lists, ``<data set>/<product>.json`` or ``<product>.json``.
        dataset: Name of the data set.
        place: The folder of the product.
        product: The product.

    Raises:
        InputError: For a list that is missing or broken; that lacks test images; that names files that are not there,
            or test images as references.
    """
    files = [Path(folder, dataset, f"{product.name}.json"), Path(folder, f"{product.name}.json")]
    file = next(filter(Path.is_file, files), None)
    if file is None:
        raise InputError(f"There is no list of references of {product.name}: neither {files[0]} nor {files[1]}.")
    test = {item.image for item in product.test}
    found: dict[str, list[Item]] = {}
    missing: list[str] = []
    for image, references in _read(file).items():
        places = {name: _find(place, name, product.name) for name in (image, *references)}
        missing += [name for name, path in places.items() if path is None]
        items = [Item(path, NORMAL, product.name) for name in references if (path := places[name]) is not None]
        if tested := [item.image for item in items if item.image in test]:
            raise InputError(f"{file} names test images as references of {image}: {some(tested)}.")
        if (own := places[image]) is not None:
            found[own] = items
    if names := list(dict.fromkeys(missing)):
        raise InputError(f"{file} names {len(names)} files that are not below {place}: {some(names)}.")
    if bare := [item.image for item in product.test if not found.get(item.image)]:
        raise InputError(f"{file} has no references for {len(bare)} of {len(product.test)} test images: {some(bare)}.")
    return found


def _find(place: Path, name: str, product: str) -> str | None:
    """The file below the folder of a product that a path from elsewhere ends like."""
    parts = re.split(r"[/\\]", name)
    ends = (parts[index + 1 :] for index, part in enumerate(parts) if part == product)
    files = (find_file(place, os.path.join(*end)) for end in ends if end and ".." not in end)
    return next((str(file) for file in files if file.is_file()), None)


def _read(file: Path) -> dict[str, list[str]]:
    try:
        return dict(read_document(file, dict[str, list[str]]))
    except DocumentError as error:
        raise InputError(f"These are no lists of references: {error}. Fetch them again.") from error
