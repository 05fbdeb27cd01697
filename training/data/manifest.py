"""Your own images, listed in a table: one line for each image, with its mask and its product."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from adfeatures.checkpoints import regular_file
from adfeatures.errors import InputError

from .items import ANOMALOUS, NORMAL, Item
from .tree import find_file

COLUMNS = ("image", "mask")
# How many faulty rows a message names.
_NAMED = 10


def read_manifest(path: str | os.PathLike[str]) -> list[Item]:
    """Read a CSV table with a header; paths are relative to its folder.

    Columns: ``image``; ``mask``, empty for normal images; ``product``, where it is missing or empty the name of the
    table's folder; ``label``, optional, 0 or 1, which must agree with the mask. Others are ignored.

    Raises:
        InputError: For a table that is missing, empty, no text or without these columns; for rows without an image,
            with files that do not exist, of an image that has one already, or whose label and mask disagree, by their
            line numbers.
    """
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
    return [_item(path.parent, row) for _, row in rows]


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


def _item(folder: Path, row: Mapping[str, str | None]) -> Item:
    image, mask = _cell(row, "image"), _cell(row, "mask")
    return Item(
        image=str(find_file(folder, image)),
        label=ANOMALOUS if mask else NORMAL,
        product=_cell(row, "product") or folder.resolve().name,
        mask=str(find_file(folder, mask)) if mask else None,
        defect="anomalous" if mask else "good",
        sample=image,
    )


def _cell(row: Mapping[str, str | None], column: str) -> str:
    return (row.get(column) or "").strip()
