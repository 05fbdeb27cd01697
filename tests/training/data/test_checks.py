"""The checker says what is wrong with a data set, and nothing else."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.models import photo
from helpers.real_iad_tree import write_real_iad
from helpers.trees import WRITERS, write_manifest, write_mvtec
from PIL import Image, ImageOps

from adfeatures.errors import InputError, UnknownNameError
from training.data import DATASETS, checks, dataset, images, real_iad

PCB2 = "pcb2/Data/Masks/Anomaly/000.png"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Complete sets by name, to be copied before anything is changed."""
    root = tmp_path_factory.mktemp("whole")
    for name, write in WRITERS.items():
        write(root / name, dataset(name).products, good=2, test_good=1, bad=1, size=(12, 12))
    write_real_iad(root / "real_iad", real_iad.PRODUCTS, ok=1, ng=1, views=2, defects=("HS",), size=(12, 12))
    write_mvtec(root / "folder", ("shaft", "gear"), good=2, test_good=1, bad=1, size=(12, 12))
    write_manifest(root / "folder", split=lambda image: image.parts[1])
    return root


@pytest.mark.parametrize("name", DATASETS)
def test_nothing_is_said_of_a_whole_set_and_it_is_recognized(whole: Path, name: str) -> None:
    root = whole / "folder/all.csv" if name == "manifest" else whole / name
    assert checks.recognize(root) == name
    assert checks.check(root) == checks.check(root, name) == []
    text, code = checks.report(root)
    assert code == 0 and DATASETS[name].title in text and text.endswith("Nothing is missing or misnamed.")


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def gray(path: Path, size: tuple[int, int] = (12, 12), value: int = 7) -> None:
    canvas = Image.new("L", size)
    canvas.paste(value, (0, 0, 3, 3))
    canvas.save(path)


def compressed(mask: Image.Image) -> Image.Image:
    """What JPEG makes of a mask."""
    file = io.BytesIO()
    mask.save(file, "JPEG", quality=75)
    return Image.open(file)


def draw(path: Path, change: Callable[[Image.Image], Image.Image]) -> None:
    mask = Image.new("L", (12, 12))
    mask.paste(255, (2, 2, 7, 7))
    change(mask).save(path)


FAULTS = {
    "half extracted": ("mvtec", lambda r: remove(r / "wood"), ["lacks 1 of 15 products of MVTec AD: wood"], []),
    "misnamed product": (
        "mvtec",
        lambda r: (r / "wood").rename(r / "wod"),
        ["lacks 1 of 15 products of MVTec AD: wood"],
        ["wod is not read. Unknown product of MVTec AD 'wod'. Did you mean 'wood'"],
    ),
    "misnamed split": (
        "mpdd",
        lambda r: (r / "tubes/test").rename(r / "tubes/tests"),
        ["tubes/test is missing"],
        ["tubes/tests is not read. Unknown folder 'tests'. Did you mean 'test'"],
    ),
    "misnamed masks": (
        "folder",
        lambda r: (r / "gear/ground_truth").rename(r / "gear/groundtruth"),
        [],
        ["gear/groundtruth is not read. Unknown folder 'groundtruth'. Did you mean 'ground_truth'"],
    ),
    "misnamed kind": (
        "mvtec",
        lambda r: (r / "pill/test/broken").rename(r / "pill/test/broke"),
        [
            "pill has 1 images without their mask: .*test/broke/000.png "
            ".mask expected in .*ground_truth/broke/000_mask.png"
        ],
        ["ground_truth/broken is not read: test has no such folder. Unknown kind 'broken'. Did you mean 'broke'"],
    ),
    "empty folder": ("mvtec", lambda r: (r / "pill/test/crack").mkdir(), ["test/crack holds no images"], []),
    "no color images": (
        "mvtec3d",
        lambda r: remove(r / "rope/test/good/rgb"),
        ["test/good/rgb holds no images", "rope/test holds no normal"],
        [],
    ),
    "no normal images": (
        "btad",
        lambda r: remove(r / "03/train/ok"),
        ["03/train is missing or has no sub-folders"],
        [],
    ),
    "one normal image": (
        "btad",
        lambda r: remove(r / "03/train/ok/0000.bmp"),
        [],
        ["03/train holds a single normal image"],
    ),
    "no anomalies": (
        "folder",
        lambda r: remove(r / "gear/test/broken"),
        ["gear/test holds no images with defects"],
        ["Unknown kind 'broken'"],
    ),
    "image without mask": (
        "btad",
        lambda r: remove(r / "01/ground_truth/ko/0000.png"),
        [r"01 has 1 images without their mask: .*01/test/ko/0000.bmp .mask expected in .*01/ground_truth/ko/0000.png"],
        [],
    ),
    "mask without image": (
        "mvtec",
        lambda r: gray(r / "tile/ground_truth/broken/001_mask.png"),
        ["tile/ground_truth/broken has 1 files that belong to no image: 001_mask.png"],
        [],
    ),
    "misnamed mask": (
        "real_iad",
        lambda r: next(r.glob("realiad_512/pcb/NG/HS/*/*.png")).rename(r / "realiad_512/pcb/NG/HS/S0000/x_mask.png"),
        ["belong to no image: x_mask.png", "pcb holds no images with defects"],
        [],
    ),
    "other size": (
        "visa",
        lambda r: gray(r / PCB2, (9, 12), 255),
        ["000.png has 9 x 12 pixels, its image .* has 12 x 12"],
        [],
    ),
    "gray mask": ("visa", lambda r: gray(r / PCB2), [], ["pcb2 has 1 gray masks, .*000.png"]),
    "empty mask": ("visa", lambda r: gray(r / PCB2, value=0), [], ["pcb2 has 1 masks without a defect"]),
    "mask through JPEG": (
        "visa",
        lambda r: draw(r / PCB2, compressed),
        [],
        ["pcb2 has 1 masks with faint grays beside white, as JPEG leaves them.*000.png"],
    ),
    "inverted mask": (
        "visa",
        lambda r: draw(r / PCB2, ImageOps.invert),
        [],
        ["pcb2 has 1 masks that look inverted.*000.png"],
    ),
    "two images of one name": (
        "mvtec",
        lambda r: photo(0, (12, 12)).save(r / "pill/test/broken/000.jpg"),
        ["The mask .*broken/000_mask.png is that of several images: .*broken/000.jpg, .*broken/000.png. Rename them"],
        [],
    ),
    "full mask": (
        "visa",
        lambda r: Image.new("L", (12, 12), 255).save(r / PCB2),
        [],
        ["pcb2 has 1 masks in which every pixel is a defect"],
    ),
    "broken image": (
        "mpdd",
        lambda r: (r / "tubes/train/good/000.png").write_bytes(b""),
        [r"Cannot read .*train/good/000.png: the file is empty"],
        [],
    ),
    "broken mask": (
        "mpdd",
        lambda r: (r / "tubes/ground_truth/broken/000_mask.png").write_text("x" * 50),
        [r"Cannot read .*broken/000_mask.png"],
        [],
    ),
    "no table": ("visa", lambda r: remove(r / "split_csv/1cls.csv"), ["There is no .*split_csv/1cls.csv"], []),
    "missing image": (
        "visa",
        lambda r: remove(r / "fryum/Data/Images/Normal/0000.JPG"),
        ["fryum has 1 missing images: .*Normal/0000.JPG"],
        [],
    ),
    "image in no row": (
        "visa",
        lambda r: photo(0, (12, 12)).save(r / "fryum/Data/Images/Normal/77.JPG"),
        ["fryum/Data/Images/Normal has 1 files that belong to no image: 77.JPG"],
        [],
    ),
    "photos of a camera": (
        "folder",
        lambda r: (r / "gear/train/good/photo.cr2").write_bytes(b"photo"),
        [],
        ["1 files in .*gear/train/good are left out. photo.cr2 cannot be read"],
    ),
    "foreign folder": (
        "folder",
        lambda r: (r / "notes").mkdir(),
        [],
        ["notes is not read: it holds none of the folders train, test, ground_truth"],
    ),
    "no good parts": ("real_iad", lambda r: remove(r / "realiad_512/toy/OK"), ["toy/OK"], []),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checker_names_what_is_wrong_and_nothing_else(whole: Path, tmp_path: Path, fault: str) -> None:
    name, spoil, errors, mild = FAULTS[fault]
    root = shutil.copytree(whole / name, tmp_path / name)
    spoil(root)
    problems = checks.check(root)
    for serious, expected in ((True, errors), (False, mild)):
        found = [problem.text for problem in problems if problem.serious is serious]
        assert len(found) == len(expected), found
        for pattern in expected:
            assert any(re.search(pattern, text) for text in found), (pattern, found)
    text, code = checks.report(root, name)
    assert code == (1 if errors else 0) and text.endswith(f"errors: {len(errors)}, warnings: {len(mild)}")


def test_the_checker_names_three_of_many_files(whole: Path, tmp_path: Path) -> None:
    root = write_mvtec(tmp_path, ("shaft",), bad=5, size=(12, 12))
    for path in (root / "shaft/ground_truth/broken").iterdir():
        path.unlink()
    (problem,) = checks.check(root, "folder")
    assert "shaft has 5 images without their mask" in problem.text and problem.text.endswith("and 2 more.")
    assert problem.text.count("mask expected in") == 3


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "manifest"])
def test_the_checker_answers_a_wrong_root_with_the_right_one(whole: Path, tmp_path: Path, name: str) -> None:
    # The folders of other tests lie beside tmp_path, and the search looks two folders up.
    root = shutil.copytree(whole / name, tmp_path / "home" / "user" / "downloads" / name)
    for wrong in (root.parent, root.parents[1]):
        with pytest.raises(InputError, match=f"Give {root} instead"):
            checks.check(wrong)
        with pytest.raises(InputError, match=f"Give {root} instead"):
            checks.check(wrong, name)
    if name not in ("folder", "real_iad"):
        product = dataset(name).products[0]
        for wrong in (root / product, next(path for path in (root / product).iterdir() if path.is_dir())):
            with pytest.raises(InputError, match=f"Give {root} instead"):
                checks.check(wrong)


def test_a_manifest_is_checked_and_what_it_leaves_out_is_not_missed(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path, ("shaft",), good=2, test_good=1, bad=1, size=(12, 12))
    table = write_manifest(root, split=lambda image: image.parts[1])
    shutil.copy(root / "shaft/train/good/000.png", root / "shaft/train/good/unlisted.png")
    assert checks.check(table) == []
    gray(root / "shaft/ground_truth/broken/000_mask.png", (5, 5))
    assert "5 x 5" in checks.check(table)[0].text
    table.write_text(table.read_text().replace(",test", ",tset"))
    with pytest.raises(InputError, match="the split is 'tset'; it must be train or test"):
        checks.check(table)


def test_the_checker_refuses_what_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no folder"):
        checks.check(tmp_path / "nowhere")
    (tmp_path / "a/b/c").mkdir(parents=True)
    with pytest.raises(InputError, match="--dataset to see what is missed"):
        checks.check(tmp_path / "a/b/c")
    with pytest.raises(UnknownNameError, match="Did you mean 'btad'"):
        checks.check(tmp_path, "btat")


@pytest.mark.parametrize("name", ["mvtec", "folder"])
def test_folders_of_file_systems_are_no_data(whole: Path, tmp_path: Path, name: str) -> None:
    root = shutil.copytree(whole / name, tmp_path / name)
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        (folder / "@eaDir").mkdir()
        photo(0, (12, 12)).save(folder / "@eaDir/000.png@SynoEAStream.png")
    assert checks.check(root) == []


def test_what_reading_warns_of_is_told_by_file(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shutil.copytree(whole / "mpdd", tmp_path / "mpdd")

    def read(path: str, **_: object) -> Image.Image:
        if "train" in path:
            warnings.warn(f"{path} has two pages.", stacklevel=2)
        return Image.open(path).convert("RGB")

    monkeypatch.setattr(images, "read_image", read)
    found = [problem.text for problem in checks.check(root) if "tubes" in problem.text]
    (text,) = found
    assert re.fullmatch(r"tubes has 2 images with a warning \(an image has two pages\.\): .*000.png, .*001.png\.", text)


def test_images_that_use_fewer_bits_are_named_with_the_option(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path, ("shaft",), size=(12, 12))
    for path in (root / "shaft/train/good").iterdir():
        samples = np.asarray(Image.open(path).convert("L"), dtype=np.uint16) * 16
        samples[0, 0] = 4095
        Image.fromarray(samples).save(path)
    (problem,) = checks.check(root, "folder")
    assert not problem.serious and "use 12 of their bits" in problem.text and "--bit-depth 12" in problem.text
    assert "shaft has 4 images" in problem.text and "train/good/000.png" in problem.text


def run_check(root: Path, encoding: str, *, head: bool = False) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "training.evaluate", "--check", str(root), "--dataset", "folder"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None and process.stderr is not None
    if head:
        process.stdout.close()
        out = b""
    else:
        out = process.stdout.read()
    err = process.stderr.read()
    return subprocess.CompletedProcess(command, process.wait(), out, err)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode")
def test_names_that_no_console_can_show(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path / "\u5199\u771f", ("shaft",), size=(12, 12))
    odd = os.fsdecode(b"br\xfcche.png")
    shutil.copy(root / "shaft/test/broken/000.png", root / "shaft/test/broken" / odd)
    done = run_check(root, "cp1252")
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert rb"\u5199\u771f" in done.stdout and rb"br\udcfcche.png" in done.stdout
    assert done.stdout.strip().endswith(b"errors: 1, warnings: 0")


@pytest.mark.slow
def test_a_reader_that_has_left(tmp_path: Path) -> None:
    done = run_check(write_mvtec(tmp_path, ("shaft",), size=(12, 12)), "utf-8", head=True)
    assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr
