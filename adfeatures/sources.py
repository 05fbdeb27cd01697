"""What users give as images: paths, folders, PIL images, arrays; and how an image is known again."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from .errors import ImageError
from .images import list_images

ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"


def image_sources(images: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """The images of a folder, a single image as a list of one, or the given ones.

    Raises:
        ImageError: For a folder without images.
    """
    if isinstance(images, (str, os.PathLike)):
        return list(list_images(images)) if Path(images).is_dir() else [images]
    if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
        return [images]
    return list(images)


def distinct(sources: Sequence[ImageSource], known: Sequence[str] = ()) -> dict[str, ImageSource]:
    """The images by digest; those whose digest is known, or came before, are left out with a warning."""
    kept: dict[str, ImageSource] = {}
    for source in sources:
        key = digest(source)
        if key in kept or key in known:
            # A copy would be found by its twin when it is left out, and make every threshold too low.
            warnings.warn(
                f"The reference {name_of(source) or 'given in memory'} is a copy of another one and is left out.",
                stacklevel=2,
            )
        else:
            kept[key] = source
    return kept


def digest(source: ImageSource) -> str:
    """SHA-256 of an image file, or of the shape and pixels of an image in memory.

    Raises:
        ImageError: If there is no such file.
    """
    if isinstance(source, (str, os.PathLike)):
        if not Path(source).is_file():
            raise ImageError(f"There is no image file {source}.")
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()
    pixels = np.ascontiguousarray(source)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def name_of(source: ImageSource) -> str:
    """The file name as given, "" for images in memory."""
    return str(source) if isinstance(source, (str, os.PathLike)) else ""
