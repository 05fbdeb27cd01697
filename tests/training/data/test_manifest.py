"""Tables that list the images of one's own data."""

from __future__ import annotations

import os
from pathlib import Path
from unicodedata import normalize

import pytest
from helpers.models import photo, write_photos
from PIL import Image

from adfeatures.errors import InputError
from training.data.items import ANOMALOUS, NORMAL, Item
from training.data.manifest import read_manifest


def write_manifest(folder: Path, text: str) -> Path:
    write_photos(folder / "images", range(5))
    Image.new("L", (80, 60), 255).save(folder / "images/mask.png")
    (folder / "list.csv").write_text(text, encoding="utf-8")
    return folder / "list.csv"


def test_a_manifest_becomes_items(tmp_path: Path) -> None:
    lines = [
        "\ufeffimage, mask, product,remark",
        "images/000.png,,gasket,fine",
        "images/001.png, images/mask.png ,gasket,",
        "images/002.png,,,",
    ]
    path = write_manifest(tmp_path / "parts", "\n".join(lines))
    first, second, third = read_manifest(path)
    folder = path.parent / "images"
    assert first == Item(str(folder / "000.png"), NORMAL, "gasket", sample="images/000.png")
    assert second == Item(
        str(folder / "001.png"), ANOMALOUS, "gasket", str(folder / "mask.png"), "anomalous", sample="images/001.png"
    )
    assert third.product == "parts"


def test_manifests_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.csv")
    for path in (tmp_path / "list.csv", tmp_path, Path("/dev/zero"), tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="manifest .* cannot be read"):
            read_manifest(path)


def test_every_fault_of_a_manifest_is_named_with_its_line(tmp_path: Path) -> None:
    rows = [
        "images/000.png,,0",
        ",,0",
        "images/nowhere.png,,",
        "images/001.png,images/no_mask.png,1",
        "images/002.png,,1",
        "images/003.png,images/mask.png,0",
        "images/004.png,,bad",
        "images/000.png,images/mask.png,1",
        f"images/{'long' * 100}.png,,",
    ]
    path = write_manifest(tmp_path, "\n".join(["image,mask,label", *rows]))
    with pytest.raises(InputError) as caught:
        read_manifest(path)
    report = str(caught.value).splitlines()[1:]
    assert [line.strip().partition(":")[0] for line in report] == [f"line {n}" for n in (3, 4, 5, 6, 7, 8, 9, 10)]
    expected = [
        "no image",
        "nowhere.png",
        "no_mask.png",
        "without a mask",
        "normal but has a mask",
        "'bad'",
        "has a line already",
        "longlong",
    ]
    assert all(part in line for part, line in zip(expected, report, strict=True))


def test_a_null_in_a_name(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, "image,mask\nimages\0/null.png,\n")
    # until Python 3.10 its csv module refuses such files
    with pytest.raises(InputError, match="there is no file .*null.png|contains NUL"):
        read_manifest(path)


def test_a_long_report_is_cut(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, "image,mask\n" + "".join(f"gone{n}.png,\n" for n in range(25)))
    with pytest.raises(InputError, match="line 11.*\n  and 15 more$"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no column image and no mask"),
        (b"image;mask\n", "no column image and no mask. Its first line reads: image;mask"),
        (b"image,masks\na.png,\n", "no column mask"),
        (b"image,mask\n", "lists no images"),
        (b"image,mask\n\xff\xfe,\n", "UTF-8"),
    ],
)
def test_tables_that_are_no_manifest(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_manifest(tmp_path / "list.csv")
    with pytest.raises(InputError, match="missing.csv"):
        read_manifest(tmp_path / "missing.csv")


def test_names_whose_accents_are_written_in_two_ways(tmp_path: Path) -> None:
    for name in ("é.png", "é_mask.png"):
        photo(0, (12, 12)).save(tmp_path / normalize("NFD", name))
    table = tmp_path / "all.csv"
    table.write_text(normalize("NFC", "image,mask\né.png,é_mask.png\n"), encoding="utf-8")
    (item,) = read_manifest(table)
    assert Path(item.image).is_file() and item.mask is not None and Path(item.mask).is_file()
