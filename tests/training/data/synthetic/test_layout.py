"""Folders and files: names, masks, determinism, resuming, refusals."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.synthesis import run_entry
from PIL import Image

from adfeatures.errors import InputError, UnknownNameError
from training.data import real_iad
from training.data.synthetic import DEFECTS, PRODUCTS, VIEWS, render, synthesize

PATH = re.compile(
    r"realiad_512/(?P<product>[a-z0-9_]+?)/(?:OK|NG/(?P<defect>[A-Z]{2}))/S(?P<folder>\d{4})/"
    r"(?P=product)(?P<gap>_{1,2})(?P<number>\d{4})_(?:OK|NG_(?P<code>[A-Z]{2}))_C(?P<view>[1-5])_(?P<time>\d{14})\.(?:jpg|png)"
)
SMALL: dict[str, Any] = {"products": 3, "good": 2, "bad": 8, "size": 48, "seed": 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("synthetic") / "set"
    assert synthesize(output, **SMALL) == 3 * 10 * VIEWS
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def images(folder: Path) -> list[str]:
    return sorted(name for name in contents(folder) if name.startswith("realiad_512"))


def test_enough_products_and_defects() -> None:
    assert len(PRODUCTS) == len(set(PRODUCTS)) == 12
    assert set(DEFECTS) == {"AK", "BX", "CH", "HS", "PS", "QS", "YW", "ZW"}
    # The reader takes a folder with one of the thirty for Real-IAD itself, and looks for the view anywhere in a name.
    assert not set(PRODUCTS) & set(real_iad.PRODUCTS)
    assert not any(re.search(r"C[1-5]|[^a-z0-9_]", name) for name in PRODUCTS)


def test_render_refuses() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'gear'"):
        render("gaer", 0)
    with pytest.raises(UnknownNameError, match="Unknown defect 'XX'"):
        render("gear", 0, "XX")
    for arguments in ({"view": 6}, {"view": 0}, {"size": 16}, {"seed": -1}):
        with pytest.raises(InputError):
            render(**{"product": "gear", "seed": 0, **arguments})  # type: ignore[arg-type]


def test_layout(dataset: Path) -> None:
    parts, gaps = defaultdict(list), Counter[tuple[str, str]]()
    wrong = 0
    for name in images(dataset):
        match = PATH.fullmatch(name)
        assert match, name
        assert match["folder"] == match["number"]
        wrong += match["code"] != match["defect"]
        gaps[match["product"], match["gap"]] += 1
        if name.endswith(".png"):
            assert (dataset / name).with_suffix(".jpg").exists()
        else:
            parts[match["product"], match["defect"], match["folder"]].append(match["view"])
    assert len(parts) == 3 * 10
    assert all(sorted(views) == list("12345") for views in parts.values())
    # Numbers belong to one part of a product, whatever tree it is in.
    assert len({(product, folder) for product, _, folder in parts}) == len(parts)
    kinds = Counter((product, defect) for product, defect, _ in parts)
    assert kinds == {
        (product, defect): 2 if defect is None else 1 for product in PRODUCTS[:3] for defect in (None, *DEFECTS)
    }
    # One product mixes single and double underscores.
    both = {product for product, gap in gaps if gap == "__"}
    assert len(both) == 1 and all(gaps[product, "_"] for product in both)
    assert wrong == 0


def test_some_scratches_carry_another_code(tmp_path: Path) -> None:
    synthesize(tmp_path / "set", products=PRODUCTS[2:3], good=0, bad=12, size=32)
    codes = {
        match["code"]
        for name in images(tmp_path / "set")
        if (match := PATH.fullmatch(name)) and match["defect"] == "HS"
    }
    assert codes == {"HS", "QS"}


def test_masks_lie_beside_their_images(dataset: Path) -> None:
    masks = [dataset / name for name in images(dataset) if name.endswith(".png")]
    ng = [name for name in images(dataset) if name.endswith(".jpg") and "/NG/" in name]
    assert masks and not any("/OK/" in mask.as_posix() for mask in masks)
    # Some views do not show the defect; the one from above always does.
    assert 0.5 < len(masks) / len(ng) < 1
    assert sum("_C1_" in mask.name for mask in masks) == 3 * 8
    for path in masks:
        with Image.open(path) as mask, Image.open(path.with_suffix(".jpg")) as image:
            assert mask.size == image.size == (48, 48) and mask.mode == "L" and image.mode == "RGB"
            assert set(np.unique(np.asarray(mask))) == {0, 255}


def test_the_reader_of_real_iad_reads_it(dataset: Path) -> None:
    items = real_iad.read(dataset)
    files = images(dataset)
    assert {item.image for item in items} == {str(dataset / name) for name in files if name.endswith(".jpg")}
    assert {item.mask for item in items} - {None} == {str(dataset / name) for name in files if name.endswith(".png")}


def test_a_sheet_and_a_note_come_with_it(dataset: Path) -> None:
    with Image.open(dataset / "contact_sheet.jpg") as sheet:
        assert sheet.width > sheet.height > 2 * 144
        assert np.asarray(sheet.convert("L"), float).std() > 20
    note = (dataset / "README.txt").read_text()
    assert (
        "MIT" in note
        and "training/synthesize.py" in note
        and "seed 3" in note
        and all(f"\n  {code}  {meaning}\n" in note for code, (meaning, _) in DEFECTS.items())
    )


def test_nothing_else_is_written(dataset: Path) -> None:
    assert {os.fspath(path.relative_to(dataset)) for path in dataset.iterdir()} == {
        "README.txt",
        "contact_sheet.jpg",
        "realiad_512",
        "synthetic.json",
    }


@pytest.mark.slow
def test_the_same_bytes_with_more_workers(dataset: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "set", **SMALL, workers=2)
    assert contents(tmp_path / "set") == contents(dataset)


def test_another_seed_gives_other_images(dataset: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "set", **{**SMALL, "seed": 4, "products": ("linen",)})
    before, after = contents(dataset), contents(tmp_path / "set")
    same = [name for name in images(tmp_path / "set") if name.endswith(".jpg") and before[name] == after[name]]
    assert not same


def test_what_is_missing_is_made_again_and_the_rest_kept(dataset: Path, tmp_path: Path) -> None:
    synthesize(tmp_path, **SMALL)
    before = contents(tmp_path)
    for view in ("_C1_", "_C4_"):
        (victim,) = tmp_path.glob(f"realiad_512/linen/NG/HS/S*/*{view}*.jpg")
        victim.unlink()
    leftover = victim.with_name(".linen_0004_NG.adfeatures-01234567")
    leftover.mkdir()
    (leftover / victim.name).write_bytes(b"half an image")
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}
    assert synthesize(tmp_path, **SMALL) == 2
    assert contents(tmp_path) == before
    changed = [path.name for path in times if path.exists() and path.stat().st_mtime_ns != times[path]]
    assert changed == ["contact_sheet.jpg"]
    assert synthesize(tmp_path, **SMALL) == 0


@pytest.mark.slow
def test_a_killed_run_goes_on(dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    arguments = (
        "--output",
        str(output),
        "--products",
        "3",
        "--images-per-product",
        "10",
        "40",
        "--size",
        "48",
        "--seed",
        "3",
    )
    process = run_entry(*arguments)
    deadline = time.monotonic() + 60
    while len(list(output.glob("realiad_512/*/*/*/*/*.jpg"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 0 < synthesize(output, **SMALL) < 150
    assert contents(output) == contents(dataset)


@pytest.mark.parametrize("change", [{"seed": 5}, {"good": 3}, {"size": 64}, {"products": ("linen",)}])
def test_a_folder_of_other_settings_is_refused(dataset: Path, change: dict[str, object]) -> None:
    before = contents(dataset)
    with pytest.raises(InputError, match=f"other settings .*{next(iter(change))}"):
        synthesize(dataset, **{**SMALL, **change})
    assert contents(dataset) == before


@pytest.mark.parametrize("place", ["realiad_512", "realiad_512/gear", "realiad_512/gear/OK"])
def test_nothing_is_written_through_a_link(tmp_path: Path, place: str) -> None:
    link, elsewhere = tmp_path / "out" / place, tmp_path / "elsewhere"
    elsewhere.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    with pytest.raises(InputError, match=f"{link} is a link"):
        synthesize(tmp_path / "out", **SMALL)
    assert not any(elsewhere.iterdir())


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(InputError, match="not empty"):
        synthesize(tmp_path, **SMALL)
    (tmp_path / "synthetic.json").write_text("{broken")
    with pytest.raises(InputError, match="synthetic.json cannot be read"):
        synthesize(tmp_path, **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.jpg", "synthetic.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"good": 0, "bad": 0},
        {"good": -1},
        {"workers": 0},
        {"seed": -1},
        {"size": 8},
        {"products": 0},
        {"products": 999},
        {"products": ()},
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        synthesize(tmp_path / "set", **{**SMALL, **change})
    assert not (tmp_path / "set").exists()
