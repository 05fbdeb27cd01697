"""VisA (Zou et al., ECCV 2022), split by its own table ``split_csv/1cls.csv``: training on normal images only."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from adfeatures.errors import InputError

from .items import ANOMALOUS, NORMAL, Item
from .tree import StrPath, Tree, find_file

PRODUCTS = (
    "candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb1", "pcb2", "pcb3", "pcb4",
    "pipe_fryum"
)  # fmt: skip
TABLE = Path("split_csv", "1cls.csv")
COLUMNS = ("object", "split", "label", "image", "mask")
LABELS = {"normal": NORMAL, "anomaly": ANOMALOUS}


class VisA(Tree):
    """A data set whose table names image, mask, split and label; paths are relative to the root."""

    def likeness(self, root: Path) -> float:
        """The table leaves no doubt."""
        return 2.0 if os.path.isfile(root / TABLE) else super().likeness(root)

    def walk(self, root: StrPath, product: str, split: str) -> Iterator[tuple[Path, list[Item]]]:
        """See ``Tree.walk``."""
        rows = [row for row in _rows(Path(root, TABLE)) if (row["object"], row["split"]) == (product, split)]
        if not rows:
            raise InputError(f"{Path(root, TABLE)} has no rows of the object {product!r} in the split {split!r}.")
        yield (
            Path(root, product),
            [_item(Path(root), row) for row in sorted(rows, key=lambda row: LABELS[row["label"]])],
        )


def _item(root: Path, row: dict[str, str]) -> Item:
    image, label = str(find_file(root, row["image"])), LABELS[row["label"]]
    if label == NORMAL:
        return Item(image, label, row["object"])
    if not row["mask"]:
        raise InputError(f"{root / TABLE} names no mask of {row['image']}, which is labeled anomaly.")
    return Item(image, label, row["object"], str(find_file(root, row["mask"])), row["label"])


def _rows(table: Path) -> list[dict[str, str]]:
    if not table.is_file():
        raise InputError(
            f"There is no {table}. It is part of the archive of VisA, and of github.com/amazon-science/spot-diff."
        )
    try:
        with table.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            header = reader.fieldnames or ["none"]
            rows = [{name: (row.get(name) or "").strip() for name in COLUMNS} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"Cannot read {table}: {error}. Extract it again.") from error
    if missing := [name for name in COLUMNS if name not in header]:
        raise InputError(f"{table} has no column {', '.join(missing)}; it has {', '.join(header)}.")
    if wrong := [number for number, row in enumerate(rows, 2) if row["label"] not in LABELS]:
        raise InputError(
            f"Line {wrong[0]} of {table} has the label {rows[wrong[0] - 2]['label']!r}, not {' or '.join(LABELS)}."
        )
    return rows


TREE = VisA("VisA", PRODUCTS, folders=("Data",), others=(TABLE.parent.name,))
