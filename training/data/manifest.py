"""Your own images, listed in a table: one line for each image, with its mask and its product."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from adfeatures.checkpoints import regular_file
from adfeatures.errors import InputError

from .items import ANOMALOUS, NORMAL, Item
from .real_iad import GOOD, default_split, reference_pool
from .tree import SPLITS, StrPath, Tree, find_file

COLUMNS = ("image", "mask")
# How many faulty rows a message names.
_NAMED = 10


def read_manifest(path: StrPath) -> list[Item]:
    """Read a CSV table with a header; paths are relative to its folder.

    Columns: ``image``; ``mask``, empty for normal images; ``product``, where it is missing or empty the name of the
    table's folder. Optional are ``label``, 0 or 1, which must agree with the mask; ``view``, the camera position, which
    an image shares with its references; ``part``, the physical part, which all images of it share; ``split``, train or
    test, which an evaluation takes. Others are ignored.

    Raises:
        InputError: For a table that is missing, empty, no text or without these columns; for rows without an image,
            with files that do not exist, of an image that has one already, or whose label and mask disagree, by their
            line numbers.
    """
    return [item for item, _ in _read(path)]


@dataclass(frozen=True)
class Manifest(Tree):
    """A table in the place of a folder. Without the column ``split`` it is split as ``training.pretrain`` does."""

    def likeness(self, root: Path) -> float:
        """No other data set is a file."""
        return 2.0 * os.path.isfile(root)

    def find_products(self, root: StrPath) -> dict[str, Path]:
        """The products of the table; errors as of ``read_manifest``."""
        return {item.product: Path(root) for item, _ in _known(root)}

    def walk(self, root: StrPath, product: str, split: str) -> Iterator[tuple[Path, list[Item]]]:
        """See ``Tree.walk``."""
        rows = [(item, named) for item, named in _known(root) if item.product == product]
        if any(named for _, named in rows):
            items = [item for item, named in rows if named == split]
        else:
            train, held_out = default_split([item for item, _ in rows])
            items = reference_pool(train) if split == "train" else held_out
        if not items:
            raise InputError(f"The manifest {root} lists no images of {product} for {split}. Add some.")
        yield Path(root), items


TREE = Manifest("images listed in a table", folders=())


def _known(path: StrPath) -> list[tuple[Item, str]]:
    # An evaluation asks again for each product and split, and a table may have very many lines.
    return _read_once(os.fspath(path), os.stat(path).st_mtime_ns if os.path.exists(path) else 0)


@lru_cache(maxsize=1)
def _read_once(path: str, changed: int) -> list[tuple[Item, str]]:
    return _read(path)


def _read(path: StrPath) -> list[tuple[Item, str]]:
    """The items with their splits, "" where the table has none."""
    path = Path(path)
    try:
        with open(regular_file(path, InputError), encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, skipinitialspace=True)
            header = table.fieldnames or ()
            rows = [(table.line_num, row) for row in table]
    except (InputError, OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"The manifest {path} cannot be read: {error}. It must be a CSV file in UTF-8.") from error
    if absent := [column for column in COLUMNS if column not in header]:
        raise InputError(
            f"The manifest {path} has no column {' and no '.join(absent)}. Its first line reads: {', '.join(header)}"
        )
    if not rows:
        raise InputError(f"The manifest {path} lists no images.")
    seen: set[str] = set()
    problems = [f"line {line}: {problem}" for line, row in rows for problem in _problems(path.parent, row, seen)]
    if problems:
        more = f"\n  and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise InputError(f"The manifest {path} cannot be used:\n  " + "\n  ".join(problems[:_NAMED]) + more)
    anomalous = {_part(row) for _, row in rows if _cell(row, "mask")}
    return [(_item(path.parent, row, _part(row) in anomalous), _cell(row, "split")) for _, row in rows]


def _problems(folder: Path, row: Mapping[str, str | None], seen: set[str]) -> Iterator[str]:
    image, mask, label = (_cell(row, column) for column in ("image", "mask", "label"))
    if not image:
        yield "no image is named."
    elif image in seen:
        yield f"{image} has a line already. Draw all its defects into one mask."
    seen.add(image)
    yield from (
        f"there is no file {folder / name}."
        for name in (image, mask)
        if name and not os.path.isfile(find_file(folder, name))
    )
    if label not in ("", "0", "1"):
        yield f"the label is {label!r}; it must be 0 (normal), 1 (anomalous) or empty."
    elif label == "1" and not mask:
        yield f"{image} is anomalous without a mask. The pretraining needs one: draw it, or remove the line."
    elif label == "0" and mask:
        yield f"{image} is normal but has a mask. Leave the mask empty, or make the label 1."
    if "split" in row and _cell(row, "split") not in SPLITS:
        yield f"the split is {_cell(row, 'split')!r}; it must be train or test, or remove the column."


def _item(folder: Path, row: Mapping[str, str | None], is_of_anomalous_part: bool) -> Item:
    image, mask = _cell(row, "image"), _cell(row, "mask")
    return Item(
        image=str(find_file(folder, image)),
        label=ANOMALOUS if mask else NORMAL,
        product=_cell(row, "product") or folder.resolve().name,
        mask=str(find_file(folder, mask)) if mask else None,
        # As in Real-IAD the part decides: it is held out as a whole, and no reference where one of its sides is bad.
        defect="anomalous" if is_of_anomalous_part else GOOD,
        view=_cell(row, "view"),
        sample=_part(row)[1],
    )


def _part(row: Mapping[str, str | None]) -> tuple[str, str]:
    return _cell(row, "product"), _cell(row, "part") or _cell(row, "image")


def _cell(row: Mapping[str, str | None], column: str) -> str:
    return (row.get(column) or "").strip()
