"""Images and masks at the size of a model's input, in one file for each geometry, which is mapped into memory.

A row is an image (H, W, 3) of 8 bits and its mask, a bit for each pixel. It is found by the content of both files,
wherever they lie. Rows are only ever appended, and each counts once its key has been written after it: whatever ends a
process, what was finished before stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from adfeatures.checkpoints import regular_file
from adfeatures.errors import AdfeaturesError, ImageError
from adfeatures.images import ImageTransform
from adfeatures.locks import only_run_for, refuse_links

from ..console import progress
from ..distributed import agreed, rank
from .images import ODD_MASKS, in_parallel, read_item, some, summarize
from .items import Item
from .transforms import MaskTransform

_KEY_BYTES = 32
# Rows that are written at once.
_WRITTEN_AT_ONCE = 256
_GIGABYTE = 1e9


class ImageCache:
    """Images and masks as they are before they are augmented or normalized.

    Args:
        folder: Where the file of this geometry is, or shall be; those of other geometries may be there as well.
        transform: Its geometry and bit depth are those of the rows.
        digests: SHA-256 of image and mask files by their paths. What has none is not cached.

    Raises:
        AdfeaturesError: For a file in the folder that cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], transform: ImageTransform, digests: Mapping[str, str]) -> None:
        self.transform, self.digests = transform, digests
        width, height = transform.resized(Image.new("RGB", (1, 1))).size
        # Another Pillow may decode and resize to other bits.
        facts = [transform.img_size, transform.preset, transform.bit_depth, PIL.__version__]
        name = f"{height}x{width}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]}"
        self.file = Path(folder) / f"{name}.rows"
        self._shape = (height, width, 3)
        self._image_bytes = height * width * 3
        self._row_bytes = self._image_bytes + -(-height * width // 8)
        self._open()

    def get(self, item: Item) -> tuple[np.ndarray, np.ndarray] | None:
        """The image (H, W, 3) and the mask (1, H, W) of 0 and 1 of an item, uint8; None where they are not cached."""
        place = self._places.get(self._key(item))
        if place is None:
            return None
        row = _mapped(self.file, self._count, self._row_bytes)[place]
        height, width, _ = self._shape
        mask = np.unpackbits(row[self._image_bytes :], count=height * width)
        return row[: self._image_bytes].reshape(self._shape), mask.reshape(1, height, width)

    def fill(self, items: Sequence[Item], workers: int = 0) -> None:
        """Cache what is not there yet, on rank 0; the others wait for it, or its error. A call resumes an earlier one.

        Images and masks that cannot be read, or do not fit each other, are left out: to use them is to hear of it.

        Raises:
            AdfeaturesError: If the folder cannot be written, the disk is full, or another run fills the same file.
            InputError: For a link in the place of a file.
        """
        agreed(lambda: self._fill(items, workers) if rank() == 0 and self._missing(items) else None)
        self._open()

    def _fill(self, items: Sequence[Item], workers: int) -> None:
        refuse_links(self.file.parent, self.file.name, self._keys.name)
        with only_run_for(self.file):
            self._open()
            missing = self._missing(items)
            try:
                self._announce(items, len(missing))
                self._append(missing, workers)
            except OSError as error:
                raise AdfeaturesError(
                    f"Cannot write the cache {self.file}: {error}. What was cached is kept: free some space and "
                    "start the same command again, or choose another --cache."
                ) from error

    def _key(self, item: Item) -> bytes:
        digests = [self.digests.get(path) for path in (item.image, item.mask) if path is not None]
        return hashlib.sha256(json.dumps(digests).encode()).digest() if None not in digests else b""

    def _missing(self, items: Sequence[Item]) -> dict[bytes, Item]:
        """The items that are not cached, one for each key."""
        keyed = {self._key(item): item for item in items}
        return {key: item for key, item in keyed.items() if key and key not in self._places}

    @property
    def _keys(self) -> Path:
        return self.file.with_suffix(".keys")

    def _open(self) -> None:
        """Find the rows that are whole: of a truncated file, those before the end."""
        # Another file may have come in the place of the one that is mapped.
        _mapped.cache_clear()
        self._count, self._places = 0, dict[bytes, int]()
        if self.file.exists() and self._keys.exists():
            keys = regular_file(self._keys, AdfeaturesError).read_bytes()
            whole = regular_file(self.file, AdfeaturesError).stat().st_size // self._row_bytes
            self._count = min(len(keys) // _KEY_BYTES, whole)
            # Of those that a lost power turned into zeros several may be equal.
            self._places = {keys[at * _KEY_BYTES : (at + 1) * _KEY_BYTES]: at for at in range(self._count)}

    def _announce(self, items: Sequence[Item], missing: int) -> None:
        """Say what else the folder holds, and refuse to begin what cannot end."""
        others = sorted(path.name for path in self.file.parent.glob("*.rows") if path != self.file)
        unused = len(self._places.keys() - {self._key(item) for item in items})
        found = [f"{unused} other images in {self.file.name}"] * bool(unused) + others
        if found:
            warnings.warn(
                f"{missing} images are cached anew. {self.file.parent} also holds {some(found)}, of other images, "
                "sizes or versions: remove what nothing needs any more, each with its .keys.",
                stacklevel=2,
            )
        needed, free = missing * self._row_bytes, shutil.disk_usage(self.file.parent).free
        if needed > free:
            raise OSError(f"{missing} images take {needed / _GIGABYTE:.1f} GB, {free / _GIGABYTE:.1f} GB are free")

    def _append(self, missing: Mapping[bytes, Item], workers: int) -> None:
        items = list(missing.values())
        rows = in_parallel(partial(_row, self.transform), items, workers)
        keyed = zip(missing, progress(rows, total=len(items), desc="caching", unit="images"), strict=True)
        noticed: list[list[str]] = []
        for path in (self.file, self._keys):
            path.touch()
        # Not through the memory map, which would end the process, instead of raising, on a full disk.
        with open(self.file, "r+b") as rows_file, open(self._keys, "r+b") as keys_file:
            keys_file.truncate(self._count * _KEY_BYTES)
            keys_file.seek(0, os.SEEK_END)
            rows_file.seek(self._count * self._row_bytes)
            while together := list(islice(keyed, _WRITTEN_AT_ONCE)):
                whole = [(key, row.tobytes()) for key, (row, _) in together if row is not None]
                rows_file.write(b"".join(row for _, row in whole))
                rows_file.flush()
                os.fsync(rows_file.fileno())
                keys_file.write(b"".join(key for key, _ in whole))
                keys_file.flush()
                noticed += [kinds for _, (_, kinds) in together]
        for text in summarize(items, noticed):
            warnings.warn(f"In the training data: {text}", stacklevel=2)


def _row(transform: ImageTransform, item: Item) -> tuple[np.ndarray | None, list[str]]:
    """The row of an item, None where it cannot be read, and what was noticed of the image."""
    try:
        picture, drawn, noticed = read_item(item, transform.bit_depth)
        image = np.asarray(transform.resized(picture))
    except ImageError:
        return None, []
    to_mask = MaskTransform(transform.img_size, transform.preset)
    mask = np.zeros(image.shape[:2], np.uint8) if drawn is None else to_mask(drawn).numpy()
    row = np.concatenate([image.ravel(), np.packbits(mask)])
    # Training on such masks has already warned.
    return row, [kind for kind in noticed if kind not in ODD_MASKS]


@lru_cache
def _mapped(file: Path, count: int, row_bytes: int) -> np.ndarray:
    """The rows of a file, mapped once in each process: a map that is sent to another one would be sent as a copy."""
    try:
        return np.asarray(np.memmap(file, np.uint8, "r", shape=(count, row_bytes)))
    except (OSError, ValueError) as error:
        raise ImageError(
            f"The cache {file} was removed or changed while in use: {error}. Start the same command again."
        ) from error
