"""What users give as images: paths, folders, PIL images, arrays; and the photos that become of them."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .errors import ImageError
from .geometry import PLAIN, Cut, Geometry, View, views_of
from .image_files import IMAGE_SUFFIXES, open_image, refusing
from .images import ImageSource, ImageTransform, hash_of_pixels, shrunk

# What looks like a photo but is none of the formats, and what to do about it.
_PHONE_SUFFIXES = (".heic", ".heics", ".heif", ".heifs", ".hif")
_OTHER_SUFFIXES = (
    *(".arw", ".cr2", ".cr3", ".dng", ".eps", ".exr", ".ico", ".jxl", ".jxr", ".nef", ".orf", ".pcx", ".psd"),
    *(".raf", ".raw", ".rw2", ".sgi", ".svg", ".tga"),
)
# Pictures are the same where no field differs by this many gray levels: saving as JPEG changes less.
_FIELDS, _ALIKE = 16, 2.0
# A folder with these files was written by ``adfeatures score``, and what it has drawn there are no photos.
RESULTS_MARKS = frozenset({"scores.csv", "scores.jsonl"})
RESULTS = frozenset({"overlays", "worst.png", "demo.png"})
# Folder in which a new result waits until it is complete. While it takes the place of a former one, files are missing.
STAGING = ".adfeatures-new"
# Folders that storage and archives add, with thumbnails or what was thrown away.
OF_FILE_SYSTEMS = frozenset(
    {"@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)


def image_sources(images: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    """The images of a folder, a single image as a list of one, or the given ones.

    Raises:
        ImageError: For a folder without images.
    """
    if isinstance(images, (str, os.PathLike)):
        return list(list_images(images)) if os.path.isdir(images) else [images]
    if isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4):
        return [images]
    return list(images)


def name_of(source: ImageSource | None) -> str:
    """The file name as given, "" for images in memory."""
    return str(source) if isinstance(source, (str, os.PathLike)) else ""


class Photo(NamedTuple):
    """An image that was read for a model.

    Attributes:
        source: What the user gave, None for a transformed tensor.
        sha256: Hash of the image file, or of the shape and pixels of an image in memory; "" for a tensor.
        pixels: Hash of the shape and pixels, upright and in RGB: the same in whatever file they come; "" for a tensor.
        views: What the model sees of it.
        size: Height and width of the map that is wanted.
        cut: How the maps of the views become that one, None for a tensor.
        picture: The image itself, made smaller where it is large, where it was asked for.
    """

    source: ImageSource | None
    sha256: str
    pixels: str
    views: Sequence[View]
    size: tuple[int, int]
    cut: Cut | None = None
    picture: Image.Image | None = None


def read_photo(
    source: ImageSource, transform: ImageTransform, side: int | None = None, geometry: Geometry = PLAIN
) -> Photo:
    """Read an image for a model.

    Args:
        source: The image.
        transform: The model's.
        side: Longest side in pixels of picture and map. The default is no picture, and a map of the image's own size.
        geometry: How it is cut.

    Raises:
        ImageError: As `read_image` and `views_of`.
    """
    file = hashlib.sha256()
    image = transform.read(source, file)
    with refusing(name_of(source) or "an image in memory"):
        cut, views = views_of(image, transform, geometry)
    pixels = hash_of_pixels(image)
    sha256 = file.hexdigest() if isinstance(source, (str, os.PathLike)) else hash_of_pixels(source)
    picture = None if side is None else shrunk(image, side)
    width, height = (picture or image).size
    return Photo(source, sha256, pixels, views, (height, width), cut, picture)


def size_of(source: ImageSource) -> tuple[int, int]:
    """Height and width of an image in pixels, as they are stored.

    Raises:
        ImageError: For one that cannot be opened.
    """
    if isinstance(source, (str, os.PathLike)):
        with open_image(source) as image:
            return image.height, image.width
    with refusing("an image in memory"):
        if isinstance(source, Image.Image):
            return source.height, source.width
        return source.shape[0], source.shape[1]


def read_distinct(
    sources: Iterable[ImageSource],
    transform: ImageTransform,
    known: Collection[str],
    batch_size: int,
    geometry: Geometry = PLAIN,
) -> Iterator[list[Photo]]:
    """Read images in batches. Copies of each other, or of those whose hashes are known, are left out with a warning.

    Raises:
        ImageError: As `read_image`.
    """
    seen, batch = set(known), []
    small: dict[int, Tensor] = {}
    for source in sources:
        photo = read_photo(source, transform, geometry=geometry)
        name = name_of(source) or "An image given in memory"
        if seen & {photo.pixels, photo.sha256}:
            # A copy would be found by its twin, and make every threshold too low.
            warnings.warn(f"{name} is a copy of another normal image and is left out.", stacklevel=2)
            continue
        own = torch.cat([_small(view.x, transform) for view in photo.views], dim=1)
        others = small.get(own.shape[1], own[:0])
        if len(others) and torch.cdist(own, others, p=torch.inf).min() < _ALIKE:
            warnings.warn(
                f"{name} is almost the same picture as another normal image, perhaps saved again: that makes the "
                "threshold too low. Give photos of different parts.",
                stacklevel=2,
            )
        small[own.shape[1]] = torch.cat([others, own])
        seen.add(photo.pixels)
        batch.append(photo)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _small(x: Tensor, transform: ImageTransform) -> Tensor:
    """A transformed image as means of fields (1, 3 * _FIELDS^2), in gray levels of 0 to 255."""
    return (F.adaptive_avg_pool2d(x, _FIELDS) * torch.tensor(transform.std)[:, None, None] * 255).view(1, -1)


def list_images(folder: str | os.PathLike[str], *, recursive: bool = False) -> list[Path]:
    """The images of `walk_images`, with its errors, all at once."""
    return list(walk_images(folder, recursive=recursive))


def walk_images(folder: str | os.PathLike[str], *, recursive: bool = False) -> Iterator[Path]:
    """The image files in a folder, known by `IMAGE_SUFFIXES` in upper or lower case, sorted by path.

    Files and folders whose names begin with a dot are skipped, and so are the pictures drawn by an earlier
    ``adfeatures score``; links to folders are not followed. A warning names files that look like photos but cannot be
    read. No more is held at a time than one folder and those above it.

    Args:
        folder: Where to look.
        recursive: Whether to look in sub-folders as well.

    Raises:
        ImageError: If the folder is missing, no folder, unreadable, or holds no images.
    """
    root = Path(folder)
    if not os.path.isdir(root):
        problem = "is a file" if os.path.exists(root) else "does not exist"
        raise ImageError(f"{root} {problem}. Give a folder of images.")
    found, left_out, example, suffixes = 0, 0, Path(), set()
    for path in _walk(root, recursive):
        if _is_readable(path):
            found += 1
            yield path
        else:
            left_out, example = left_out + 1, path if not left_out else example
            suffixes.add(path.suffix.lower())
    hint = _advice(example, sorted(suffixes)) if left_out else ""
    if not found:
        deeper = 0 if recursive else sum(map(_is_readable, _walk(root, True)))
        if deeper:
            hint += f" Its sub-folders hold {deeper}: use --recursive, or recursive=True of list_images."
        raise ImageError(f"No images in {root} (looked for {' '.join(IMAGE_SUFFIXES)}).{hint}")
    if left_out:
        warnings.warn(f"{left_out} files in {root} are left out.{hint}", stacklevel=2)


def holds_results(folder: Path) -> bool:
    """Whether ``adfeatures score`` has written to a folder."""
    has_tables = all(os.path.isfile(folder / name) for name in RESULTS_MARKS)
    return has_tables or os.path.isdir(folder / STAGING)


def is_drawn(path: Path) -> bool:
    """Whether a picture is, or lies among, what ``adfeatures score`` has drawn."""
    return any(part.name in RESULTS and holds_results(part.parent) for part in (path, *path.parents))


def _is_readable(path: Path) -> bool:
    return path.name.lower().endswith(IMAGE_SUFFIXES)


def _advice(unread: Path, suffixes: Sequence[str]) -> str:
    install = ' For HEIC: pip install "adfeatures[heic]".' if set(suffixes) & set(_PHONE_SUFFIXES) else ""
    return f" {unread.name} cannot be read: convert {' '.join(suffixes)} to PNG.{install}"


def _walk(root: Path, recursive: bool) -> Iterator[Path]:
    """Photos in a folder or anywhere below it, also those that cannot be read, in the order of their paths as texts."""

    def refuse(error: OSError) -> None:
        raise ImageError(f"Cannot list {error.filename}: {error.strerror}.") from error

    photos = (*IMAGE_SUFFIXES, *_PHONE_SUFFIXES, *_OTHER_SUFFIXES)
    waiting = [f"{root.as_posix().rstrip('/')}/"]
    while waiting:
        path = waiting.pop()
        if not path.endswith("/"):
            yield Path(path)
            continue
        passed = OF_FILE_SYSTEMS | (RESULTS if holds_results(Path(path)) else frozenset())
        _, folders, names = next(os.walk(path, onerror=refuse))
        kept = [f"{name}/" for name in folders if recursive and not os.path.islink(path + name)]
        kept += [name for name in names if name.lower().endswith(photos)]
        kept = [path + name for name in kept if name[0] != "." and name.rstrip("/") not in passed]
        waiting += sorted(kept, reverse=True)
