"""Which images a run is about: order, names of pictures, lists of names, and memory that does not grow with them."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import write_photos

from adfeatures.errors import ImageError, InputError
from adfeatures.sources import walk_images
from adfeatures.worklist import Worklist, find_images


def test_a_file_that_is_named_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "new", range(3))
    monkeypatch.chdir(tmp_path)
    found = find_images(["new/001.png", "new", "./new/001.png", str(tmp_path / "new" / "002.png")], recursive=False)
    assert list(found) == ["new/001.png", "new/000.png", "new/002.png"] and len(found) == 3


def test_pictures_lie_as_their_images_below_the_folder_that_all_share(tmp_path: Path) -> None:
    names = ["a/b/1.jpg", "a/b/1.png", "a/c/1.png", "a/b/1.tiff", "a/b/1.tiff-2.jpg", "a/2.png"]
    work = Worklist(str(tmp_path / name) for name in names)
    pictures = ["b/1.png", "b/1.png-2.png", "c/1.png", "b/1.tiff-2.png", "b/1.tiff-2.jpg-2.png", "2.png"]
    assert [str(picture) for _, picture in work.since(0)] == [f"overlays/{name}" for name in pictures]
    assert list(work.since(4)) == list(work.since(0))[4:]


def test_a_folder_is_walked_in_the_order_of_its_paths(tmp_path: Path) -> None:
    moments = random.Random(0)
    for _ in range(150):
        parts = ["".join(moments.choices("a-./b0", k=moments.randint(1, 6))).strip("./") or "x" for _ in range(2)]
        path = tmp_path.joinpath(*parts, "c.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    hidden = [path for path in tmp_path.rglob("*.png") if "/." not in str(path.relative_to(tmp_path))]
    expected = sorted((str(path) for path in hidden if path.name != "x"), key=lambda path: path[len(str(tmp_path)) :])
    assert list(map(str, walk_images(tmp_path, recursive=True))) == expected and len(expected) > 50


def test_names_come_from_manifests_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "new", range(3))
    monkeypatch.chdir(tmp_path / "new")
    plain, table = tmp_path / "names.txt", tmp_path / "names.csv"
    plain.write_bytes(b"\xef\xbb\xbfnew/001.png\r\n\nnew\ngone \xe9.png")
    table.write_text('label,image\n0,new/002.png\n1,"new/a,b.png"\n', encoding="utf-8")
    new = str(tmp_path / "new")
    gone = os.fsdecode(b"gone \xe9.png")
    found = list(find_images([], False, plain))
    assert found == [f"{new}/001.png", f"{new}/000.png", f"{new}/002.png", str(tmp_path / gone)]
    assert list(find_images([], False, table)) == [f"{new}/002.png", f"{new}/a,b.png"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"000.png\n002.png")))
    assert list(find_images(["001.png", "-"], False)) == ["001.png", "000.png", "002.png"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\r", "not a list of file names"),
        (b"x" * 100_000, "not a list of file names"),
        (b"", "No images were named"),
        (b"file,mask\na.png,\n", "has no column 'image'"),
        (b'image\n"' + b"x\n" * 200_000, "It must be a CSV file"),
    ],
)
def test_what_is_no_list_of_names_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    manifest = tmp_path / f"names.{'csv' if b'image' in content or b'mask' in content else 'txt'}"
    manifest.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        find_images([], False, manifest)


def test_a_manifest_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Cannot open .*gone\.txt: No such file"):
        find_images([], False, tmp_path / "gone.txt")
    with pytest.raises(InputError, match="it is a folder"):
        find_images([], False, tmp_path)
    with pytest.raises(ImageError, match="No images were named"):
        find_images([], False)


def test_a_mistyped_folder_is_refused_at_once(tmp_path: Path) -> None:
    write_photos(tmp_path / "new", range(1))
    for name in ("neww", "neww/", "neww/part.json"):
        with pytest.raises(InputError, match=f"{tmp_path / name}/? does not exist. Give image files, or folders"):
            find_images([str(tmp_path / "new"), f"{tmp_path}/{name}"], False)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory of a process is read from /proc")
def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """Twenty thousand more names, and rows that say that there is no such file."""
    code = """
import sys
from adfeatures.inspection import inspect
from helpers.models import tiny_extractor, write_photos
from pathlib import Path
count, root = int(sys.argv[1]), Path(sys.argv[2])
model = tiny_extractor()
model.set_references(write_photos(root / "good", range(3)))
files = (f"{root}/a folder with a long name/{number:09d}.png" for number in range(count))
found = inspect(model, files, root / str(count))
assert found.summary["failed"] == count
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    peaks = [
        int(subprocess.run([*command, count, tmp_path], env=environment, capture_output=True, check=True).stdout)
        for count in ("2500", "22500")
    ]
    assert peaks[1] - peaks[0] < 12_000, peaks  # KiB; the names and rows alone would take more
