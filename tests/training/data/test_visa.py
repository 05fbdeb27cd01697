"""VisA: its table decides, and is refused where it is damaged."""

from __future__ import annotations

import csv
from pathlib import Path
from unicodedata import normalize

import pytest
from helpers.trees import rows, write_visa

from adfeatures.errors import InputError
from training.data import visa
from training.data.items import ANOMALOUS, NORMAL


def test_visa(tmp_path: Path) -> None:
    root = write_visa(tmp_path, ("candle", "pcb1"), good=1, test_good=2, bad=1, size=(16, 16))
    assert rows(root, visa.TREE.find_items(root, "train", ["pcb1"])) == [
        ("pcb1/Data/Images/Normal/0000.JPG", NORMAL, None, "good")
    ]
    assert rows(root, visa.TREE.find_items(root, "test", ["pcb1"])) == [
        ("pcb1/Data/Images/Normal/0001.JPG", NORMAL, None, "good"),
        ("pcb1/Data/Images/Normal/0002.JPG", NORMAL, None, "good"),
        ("pcb1/Data/Images/Anomaly/000.JPG", ANOMALOUS, "pcb1/Data/Masks/Anomaly/000.png", "anomaly"),
    ]
    assert [item.product for item in visa.TREE.find_items(root, "test")] == ["candle"] * 3 + ["pcb1"] * 3


def test_visa_columns_are_found_by_name_and_rows_stay_in_order(tmp_path: Path) -> None:
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
    assert rows(root, visa.TREE.find_items(root, "test")) == [
        ("candle/Data/Images/Normal/0002.JPG", NORMAL, None, "good"),
        ("candle/Data/Images/Normal/0001.JPG", NORMAL, None, "good"),
        ("candle/Data/Images/Anomaly/1,1.JPG", ANOMALOUS, "candle/Data/Masks/Anomaly/001.png", "anomaly"),
        ("candle/Data/Images/Anomaly/000.JPG", ANOMALOUS, "candle/Data/Masks/Anomaly/000.png", "anomaly"),
    ]


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
def test_a_damaged_table_of_visa_is_refused(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    root = write_visa(tmp_path, size=(16, 16))
    table = root / "split_csv/1cls.csv"
    table.unlink()
    if content is not None:
        table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        visa.TREE.find_items(root, "test")


def test_names_whose_accents_are_written_in_two_ways(tmp_path: Path) -> None:
    """The table in one way, the files in the other."""
    root = write_visa(tmp_path, size=(16, 16))
    table = root / "split_csv/1cls.csv"
    table.write_text(normalize("NFC", table.read_text().replace("/000.", "/é.")), encoding="utf-8")
    for path in list(root.rglob("000.*")):
        path.rename(path.with_name(normalize("NFD", f"é{path.suffix}")))
    items = visa.TREE.find_items(root, "test")
    assert all(Path(path).is_file() for item in items for path in (item.image, item.mask) if path)
    assert sum("e\u0301" in item.image for item in items) == 1
