"""What users give as images, and how an image is known again."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers.models import photo, write_photos
from PIL import Image

from adfeatures.errors import ImageError
from adfeatures.sources import digest, distinct, image_sources, name_of


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


def test_files_are_known_by_their_bytes_and_images_by_their_pixels(tmp_path: Path) -> None:
    (path,) = write_photos(tmp_path, range(1))
    assert digest(path) == digest(str(path)) == hashlib.sha256(path.read_bytes()).hexdigest()
    pixels = np.asarray(photo(0))
    assert digest(photo(0)) == digest(pixels) == digest(np.asfortranarray(pixels))
    assert digest(pixels) != digest(pixels[:, :, ::-1]) and digest(pixels) != digest(pixels.reshape(60, -1))
    with pytest.raises(ImageError, match=r"no image file .*gone\.png"):
        digest(tmp_path / "gone.png")


def test_copies_are_left_out_with_a_warning_that_names_them(tmp_path: Path) -> None:
    paths = write_photos(tmp_path, range(2))
    (tmp_path / "copy.png").write_bytes(paths[0].read_bytes())
    with pytest.warns(UserWarning, match=r"copy\.png is a copy"):
        kept = distinct([*paths, tmp_path / "copy.png"])
    assert list(kept.values()) == paths and list(kept) == [digest(path) for path in paths]
    with pytest.warns(UserWarning, match=r"001\.png is a copy"):
        assert list(distinct(paths, known=[digest(paths[1])]).values()) == paths[:1]
    with pytest.warns(UserWarning, match="given in memory is a copy"):
        distinct([photo(5), photo(5)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(distinct([photo(5), photo(6)])) == 2


def test_names() -> None:
    assert name_of("a/b.png") == "a/b.png" and name_of(Path("a") / "b.png") == str(Path("a") / "b.png")
    assert name_of(Image.new("RGB", (2, 2))) == name_of(np.zeros((2, 2), np.uint8)) == ""
