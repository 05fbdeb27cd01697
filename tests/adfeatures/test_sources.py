"""What users give as images, and how an image is known again."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import photo, write_photos
from PIL import Image

from adfeatures import images
from adfeatures.errors import ImageError
from adfeatures.image_files import FORMATS, IMAGE_SUFFIXES
from adfeatures.images import ImageSource, build_transform, hash_of_pixels, read_image
from adfeatures.sources import Photo, image_sources, list_images, name_of, read_distinct, read_photo

TRANSFORM = build_transform((28, 28), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_one_image_or_several_or_a_folder(tmp_path: Path) -> None:
    paths = write_photos(tmp_path, range(3))
    picture, array = photo(0), np.zeros((4, 5, 3), np.uint8)
    assert image_sources(tmp_path) == image_sources(str(tmp_path)) == paths
    assert image_sources(paths[0]) == [paths[0]] and image_sources(str(paths[0])) == [str(paths[0])]
    assert image_sources(picture)[0] is picture and image_sources(array)[0] is array
    assert image_sources([picture, paths[1]]) == [picture, paths[1]]
    assert len(image_sources(np.zeros((2, 4, 5, 3), np.uint8))) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="No images"):
        image_sources(tmp_path / "empty")


def test_copies_are_left_out_with_a_warning_that_names_them(tmp_path: Path) -> None:
    def kept(sources: Sequence[ImageSource], known: Sequence[str] = ()) -> list[Photo]:
        return [photo for batch in read_distinct(sources, TRANSFORM, known, 2) for photo in batch]

    paths = write_photos(tmp_path, range(3))
    photo(0).save(tmp_path / "copy.bmp")
    photo(0).save(tmp_path / "copy.tif", compression="tiff_lzw")
    with pytest.warns(UserWarning, match=r"copy\.(bmp|tif) is a copy") as warned:
        found = kept([*paths, tmp_path / "copy.bmp", tmp_path / "copy.tif"])
    assert [photo.source for photo in found] == paths and len(warned) == 2
    for known in (hashlib.sha256(paths[1].read_bytes()).hexdigest(), hash_of_pixels(photo(1))):
        with pytest.warns(UserWarning, match=r"001\.png is a copy"):
            assert [photo.source for photo in kept(paths[:2], known=[known])] == paths[:1]
    with pytest.warns(UserWarning, match="given in memory is a copy"):
        kept([photo(5), np.asarray(photo(5))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(kept([photo(5), photo(6)])) == 2


def test_pictures_that_were_saved_anew_are_named(tmp_path: Path) -> None:
    paths = write_photos(tmp_path, range(3))
    photo(1).save(tmp_path / "again.jpg", quality=95, subsampling=0)
    sources = [*paths, tmp_path / "again.jpg"]
    with pytest.warns(UserWarning, match=r"again\.jpg is almost the same picture") as warned:
        (found,) = read_distinct(sources, TRANSFORM, (), 8)
    assert len(found) == 4 and len(warned) == 1


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind in Image.SAVE])
def test_the_hash_is_that_of_the_file_that_was_decoded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another file takes its name while it is read."""
    path = tmp_path / "a.png"
    photo(1).save(path, kind)
    bits = path.read_bytes()
    photo(2).save(tmp_path / "b.png")

    def decode(*arguments: Any) -> Image.Image:
        os.replace(tmp_path / "b.png", path)
        return original(*arguments)

    original = images._from_pillow
    expected = hash_of_pixels(read_image(path))
    monkeypatch.setattr(images, "_from_pillow", decode)
    found = read_photo(path, TRANSFORM)
    assert (found.sha256, found.pixels) == (hashlib.sha256(bits).hexdigest(), expected)
    assert path.read_bytes() != bits


def test_photos_hold_what_a_model_needs(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    photo(3).resize((300, 60)).save(path)
    whole, small = read_photo(path, TRANSFORM), read_photo(path, TRANSFORM, side=100)
    assert whole.picture is None and whole.size == (60, 300)
    assert small.picture is not None and small.picture.size == (100, 20) and small.size == (20, 100)
    for found in (whole, small):
        assert torch.equal(found.views[0].x, TRANSFORM(Image.open(path)))
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert found.pixels == hash_of_pixels(Image.open(path).convert("RGB"))
    exact = read_photo(path, TRANSFORM, side=300).picture
    assert exact is not None and np.array_equal(np.asarray(exact), np.asarray(Image.open(path)))


def test_names() -> None:
    assert name_of("a/b.png") == "a/b.png" and name_of(Path("a") / "b.png") == str(Path("a") / "b.png")
    assert name_of(Image.new("RGB", (2, 2))) == name_of(np.zeros((2, 2), np.uint8)) == ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "b.PNG",
        "a.jpg",
        "c.tiff",
        ".hidden.png",
        "notes.txt",
        "sub/z.bmp",
        "sub/.x.png",
        ".cache/y.png",
        "sub/deep/w.webp",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def test_listing(folder: Path) -> None:
    assert list_images(folder) == [folder / name for name in ("a.jpg", "b.PNG", "c.tiff")]
    assert list_images(str(folder)) == list_images(folder)
    expected = [folder / name for name in ("a.jpg", "b.PNG", "c.tiff", "sub/deep/w.webp", "sub/z.bmp")]
    assert list_images(folder, recursive=True) == expected


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_listed_suffix_can_be_read(tmp_path: Path, suffix: str) -> None:
    image = photo(0).convert({".pgm": "L", ".pbm": "1"}.get(suffix, "RGB"))
    path = tmp_path / f"image{suffix.upper()}"
    image.save(path)
    assert list_images(tmp_path) == [path]
    assert read_image(path).size == photo(0).size


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="missing does not exist. Give a folder"):
        list_images(tmp_path / "missing")
    (tmp_path / "file.png").touch()
    with pytest.raises(ImageError, match="file.png is a file"):
        list_images(tmp_path / "file.png")
    empty = tmp_path / "empty"
    (empty / "sub").mkdir(parents=True)
    with pytest.raises(ImageError, match=r"empty \(looked for .bmp .*webp\)\.$"):
        list_images(empty, recursive=True)
    (empty / "sub" / "x.png").touch()
    with pytest.raises(ImageError, match="sub-folders hold 1: use --recursive, or recursive=True"):
        list_images(empty)
    assert len(list_images(empty, recursive=True)) == 1


def test_what_pillow_reads_is_found_whatever_it_is_called(tmp_path: Path) -> None:
    names = ["a.jfif", "b.JPE", "c.mpo", "d.jp2", "e.avif", "f.dib", "g.pnm"]
    if ".avif" not in Image.registered_extensions():  # before Pillow 11.3
        names.remove("e.avif")
    formats = {".jfif": "JPEG", ".jpe": "JPEG", ".pnm": "PPM"}
    for name in names:
        photo(0).save(tmp_path / name, format=formats.get(Path(name).suffix.lower()))
    assert list_images(tmp_path) == [tmp_path / name for name in names]
    for name in names:
        assert read_image(tmp_path / name).size == photo(0).size


def test_photos_that_cannot_be_read_are_named_with_what_to_do(tmp_path: Path) -> None:
    photo(0).save(tmp_path / "a.png")
    for name in ("b.jxl", "c.CR2", "depth.pfm", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"2 files .* b\.jxl cannot be read: convert \.cr2 \.jxl to PNG\.$"):
        assert list_images(tmp_path) == [tmp_path / "a.png"]
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageError, match=r"No images .*b\.jxl cannot be read"):
        list_images(tmp_path)


def test_photos_of_phones_need_an_extra(tmp_path: Path) -> None:
    photo(0).save(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"x")
    code = (
        "import sys; sys.modules['pillow_heif'] = None; from adfeatures.sources import list_images; "
        "print(len(list_images(sys.argv[1])))"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert (
        result.stdout == "1\n" and "b.heic cannot be read: convert .heic to PNG. For HEIC: pip install" in result.stderr
    )
    pytest.importorskip("pillow_heif")
    photo(0).save(tmp_path / "b.heic", quality=95)
    assert list_images(tmp_path) == [tmp_path / "a.png", tmp_path / "b.heic"]
    read = np.asarray(read_image(tmp_path / "b.heic"), dtype=int)
    assert np.abs(read - np.asarray(photo(0), dtype=int)).mean() < 6


def test_drawings_of_a_former_run_are_no_photos(tmp_path: Path) -> None:
    photo(0).save(tmp_path / "a.png")
    for folder in (tmp_path, tmp_path / "old"):
        (folder / "overlays").mkdir(parents=True)
        photo(1).save(folder / "overlays" / "a.png")
        photo(1).save(folder / "worst.png")
    assert len(list_images(tmp_path, recursive=True)) == 5
    for name in ("scores.csv", "scores.jsonl"):
        (tmp_path / "old" / name).write_text("")
    assert [path.name for path in list_images(tmp_path, recursive=True)] == ["a.png", "a.png", "worst.png"]
    with pytest.raises(ImageError, match="No images"):
        list_images(tmp_path / "old", recursive=True)


def test_thumbnails_of_a_storage_are_no_photos(tmp_path: Path) -> None:
    for name in ("a.png", "@eaDir/a.png", "sub/__MACOSX/b.png", "sub/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo(0).save(tmp_path / name)
    assert list_images(tmp_path, recursive=True) == [tmp_path / "a.png", tmp_path / "sub/b.png"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    with open(path, "wb") as file:
        photo(0).save(file, "PNG")
    (found,) = list_images(tmp_path)
    assert os.fsencode(found) == path and read_image(found).size == photo(0).size
