"""Tables that list the images of one's own data."""

from __future__ import annotations

import os
import re
from pathlib import Path
from unicodedata import normalize

import pytest
from helpers.models import photo, write_photos
from helpers.trees import write_manifest as write_manifest_of
from helpers.trees import write_mvtec
from PIL import Image

from adfeatures.errors import InputError, UnknownNameError
from training.data import dataset
from training.data.items import ANOMALOUS, NORMAL, Item
from training.data.manifest import TREE, read_manifest
from training.pretraining.config import PretrainConfig
from training.pretraining.inputs import read_split


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


class TestEvaluation:
    """What ``training.evaluate`` takes of a manifest."""

    def test_the_split_of_the_table(self, tmp_path: Path) -> None:
        root = write_mvtec(tmp_path, ("nut", "bolt"), good=3, test_good=2, bad=2, size=(12, 12))
        table = write_manifest_of(root, split=lambda image: image.parts[1])
        assert list(TREE.find_products(table)) == ["bolt", "nut"]
        for split in ("train", "test"):
            expected = dataset("folder").find_items(root, split, ["bolt"])
            found = TREE.find_items(table, split, ["bolt"])
            assert {(item.image, item.label, item.mask) for item in found} == {
                (item.image, item.label, item.mask) for item in expected
            }
        with pytest.raises(UnknownNameError, match="Did you mean 'nut'"):
            TREE.find_items(table, "test", ["nutt"])

    def test_without_a_split_it_is_what_training_pretrain_holds_out(self, tmp_path: Path) -> None:
        root = write_mvtec(tmp_path, ("nut",), good=30, test_good=0, bad=20, size=(8, 8))
        table = write_manifest_of(root)
        train, held_out = read_split(PretrainConfig(data="manifest", root=str(table)))
        assert TREE.find_items(table, "test") == held_out and len(held_out) == 5
        assert TREE.find_items(table, "train") == [item for item in train if item.label == NORMAL]

    def test_views_and_parts(self, tmp_path: Path) -> None:
        """Three views a part, of which the last never shows the defect."""
        root = write_mvtec(tmp_path, ("nut",), good=60, test_good=0, bad=40, size=(8, 8))

        def number(image: Path) -> int:
            return int(image.stem) + 60 * (image.parts[2] != "good")

        table = write_manifest_of(
            root, view=lambda image: f"side {number(image) % 3}", part=lambda image: f"part {number(image) // 3}"
        )
        lines = [line for line in table.read_text().splitlines()]
        table.write_text(
            "\n".join(re.sub("nut/ground_truth[^,]*", "", line) if "side 2" in line else line for line in lines)
        )
        items = read_manifest(table)
        assert {item.view for item in items} == {"side 0", "side 1", "side 2"}
        parts = [{item.sample for item in TREE.find_items(table, split)} for split in ("train", "test")]
        assert not parts[0] & parts[1]
        defective = {item.sample for item in items if item.label == ANOMALOUS}
        # The good side of a defective part is a normal image of the test, and no reference.
        assert not parts[0] & defective
        assert any(item.label == NORMAL for item in TREE.find_items(table, "test") if item.sample in defective)

    def test_a_table_that_changed_is_read_again(self, tmp_path: Path) -> None:
        root = write_mvtec(tmp_path, ("nut",), good=3, size=(8, 8))
        table = write_manifest_of(root, split=lambda image: image.parts[1])
        assert len(TREE.find_items(table, "train")) == 3
        text = table.read_text().splitlines()
        table.write_text("\n".join(line for line in text if "good/002" not in line))
        os.utime(table, ns=(1, 1))
        assert len(TREE.find_items(table, "train")) == 2

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        root = write_mvtec(tmp_path, ("nut",), good=3, size=(8, 8))
        table = write_manifest_of(root, split=lambda image: "train")
        with pytest.raises(InputError, match="lists no images of nut for test"):
            TREE.find_items(table, "test")
        with pytest.raises(InputError, match="gone.csv cannot be read"):
            TREE.choose(tmp_path / "gone.csv")
        text = table.read_text().splitlines()
        table.write_text("\n".join([text[0], text[1].replace(",train", ",")]))
        with pytest.raises(InputError, match="line 2: the split is ''; it must be train or test, or remove the column"):
            TREE.find_items(table, "train")
