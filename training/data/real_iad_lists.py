"""The lists that go with Real-IAD: which images to keep, and the official splits.

An official list (``realiad_jsons`` of the archives, and its variants of one view, ``_sv``, or with anomalous images in
the training, ``_fuiad_0.1``) is ``<product>.json``: an object with ``meta`` (``normal_class``, ``prefix``), ``train``
and ``test``, the last two lists of objects with ``image_path`` below the folder of the product, ``anomaly_class``, and
``mask_path``, null where the photograph shows no defect.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from adfeatures.documents import DocumentError, read_document
from adfeatures.errors import InputError

from .images import some
from .items import ANOMALOUS, NORMAL, Item
from .tree import subfolders


class _Meta(TypedDict):
    normal_class: str


class _Entry(TypedDict):
    image_path: str
    anomaly_class: str
    mask_path: str | None


class _List(TypedDict):
    meta: _Meta
    train: list[_Entry]
    test: list[_Entry]


def split_items(folder: Path, product: str, split: str, items: Sequence[Item]) -> list[Item]:
    """The images of a split of a product, in the order and with the labels of the official list.

    All training images count as normal, as methods that see no label take them.

    Args:
        folder: Where ``<product>.json`` is.
        product: Name of the product.
        split: "train" or "test".
        items: What there is on disk.

    Raises:
        InputError: For a list that is missing, broken or of another product, or that names files that are missing.
    """
    file = folder / f"{product}.json"
    if not file.is_file():
        raise InputError(_no_list(folder, product))
    try:
        content = read_document(file, _List)
    except DocumentError as error:
        raise InputError(f"This has not the form of realiad_jsons: {error}. Extract it again.") from error
    normal, prefix = content["meta"]["normal_class"], content["meta"].get("prefix") or product
    # A Windows path, or one that begins with the folder of the product, names the same file.
    entries = [(_below(entry["image_path"], product), entry) for entry in content[split]]
    masks = [entry["mask_path"] and _below(entry["mask_path"], product) for _, entry in entries]
    labels = [ANOMALOUS if entry["anomaly_class"] != normal else NORMAL for _, entry in entries]
    if Path(str(prefix)).name != product:
        raise InputError(f"The official list {file} is of {prefix}, not of {product}. Extract it again.")
    known = {f"{item.sample}/{os.path.basename(item.image)}": item for item in items if item.product == product}
    if missing := [name for name, _ in entries if name not in known]:
        raise InputError(
            f"{file} names {len(missing)} of {len(entries)} images that are not there: {some(missing)}. "
            f"Extract the rest of {product}."
        )
    found = [known[name] for name, _ in entries]
    if split == "train":
        return [replace(item, label=NORMAL, mask=None) for item in found]
    tested = [_tested(item, label, mask) for item, label, mask in zip(found, labels, masks, strict=True)]
    if bare := [item.image for item in tested if item.label == ANOMALOUS and not _is_file(item.mask)]:
        raise InputError(f"{file} names images with a defect whose masks are not there: {some(bare)}.")
    return tested


def _tested(item: Item, label: int, mask: str | None) -> Item:
    if label == NORMAL:
        return replace(item, label=NORMAL, mask=None)
    root = item.image[: -len(f"{item.sample}/{os.path.basename(item.image)}")]
    return replace(item, label=ANOMALOUS, mask=f"{root}{mask}" if mask else item.mask)


def _is_file(path: str | None) -> bool:
    return path is not None and os.path.isfile(path)


def _below(path: str, product: str) -> str:
    return f"{product}/{path.replace(chr(92), '/').removeprefix(f'{product}/')}"


def _no_list(folder: Path, product: str) -> str:
    lists = sorted(path.stem for path in folder.glob("*.json"))
    if lists:
        return f"{folder} holds no list of {product}, but of {some(lists)}. Name the products that it splits."
    within = [str(folder / name) for name in subfolders(folder) if (folder / name / f"{product}.json").is_file()]
    return f"{folder} holds no list {product}.json. Give " + (
        f"one of {', '.join(within)}." if within else "the folder realiad_jsons of the archives, or a variant of it."
    )


def read_filter(path: Path, products: Sequence[str]) -> set[str]:
    """The NG images that a filter list keeps: a JSON list of paths, or a folder of such lists named ``<product>.json``.

    Raises:
        InputError: For a list that is missing or broken.
    """
    files = [path / f"{product}.json" for product in products] if path.is_dir() else [path]
    return {_untwist(entry) for file in files for entry in _read_list(file)}


def _read_list(file: Path) -> list[str]:
    try:
        return list(read_document(file, list[str]))
    except DocumentError as error:
        advice = "It must be a JSON list of paths like bottle_cap/NG/ZW/S0121/<name>.jpg"
        raise InputError(f"This is no filter list: {error}. {advice}.") from error


def _untwist(entry: str) -> str:
    """Undo the typo of the published list of wooden_beads, whose entries begin with ``wooden_beadswooden_beads/``."""
    return entry.removeprefix("wooden_beads") if entry.startswith("wooden_beadswooden_beads/") else entry
