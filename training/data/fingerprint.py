"""A fingerprint of images: by the content of its file it tells whether an image is among them.

Of the SHA-256 of each file the first 40 bits are kept, sorted, as compressed differences. That takes some 4 bytes an
image as text (400 kB for 100,000), says neither names nor order, and finds an image wherever it lies and whatever it is
called, but not where its file was written anew. None of the images is ever missed. Another one passes for one of them
with a probability of their number in 2^40: 1e-7 for 100,000.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

import numpy as np

from adfeatures.checkpoints import regular_file, sha256
from adfeatures.documents import parse
from adfeatures.errors import CheckpointError

from ..console import progress

# Entry of the header of a checkpoint that holds the fingerprint of the images that it was trained on.
TRAINED_ON = "trained_on"
BITS = 40
_KIND = f"sha256/{BITS}"
_BYTES = BITS // 8


class _Facts(TypedDict):
    kind: str
    images: int
    differences: str


class Fingerprint:
    """The digests of some images.

    Args:
        digests: SHA-256 of their files, in hexadecimal digits.
    """

    def __init__(self, digests: Iterable[str]) -> None:
        self._numbers = np.unique(np.fromiter(map(_number, digests), np.uint64))

    @classmethod
    def of(cls, paths: Iterable[str], workers: int = 0) -> Fingerprint:
        """Read files, by several threads. Those that cannot be read are left out: nothing was learned from them."""
        return cls(digests(paths, workers).values())

    @classmethod
    def union(cls, parts: Iterable[Fingerprint]) -> Fingerprint:
        """That of the images of all."""
        found = cls(())
        found._numbers = np.unique(np.concatenate([part._numbers for part in parts]))
        return found

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, digest: str) -> bool:
        number = np.uint64(_number(digest))
        place = int(np.searchsorted(self._numbers, number))
        return place < len(self) and bool(self._numbers[place] == number)

    def known(self, paths: Iterable[str]) -> list[str]:
        """Those of some files that are among the images. A file that cannot be read is not."""
        return [path for path in paths if len(self) and (digest := _digest(path)) is not None and digest in self]

    def to_text(self) -> str:
        """The fingerprint as JSON, the same for the same images in any order."""
        differences = np.diff(self._numbers, prepend=np.uint64(0)).astype(">u8")
        # Byte by byte, since the high ones are mostly 0.
        planes = differences.view(np.uint8).reshape(-1, 8)[:, 8 - _BYTES :].T.tobytes()
        packed = base64.b85encode(zlib.compress(planes, 9)).decode()
        return json.dumps({"kind": _KIND, "images": len(self), "differences": packed})

    @classmethod
    def from_text(cls, text: str) -> Fingerprint:
        """Read what ``to_text`` wrote.

        Raises:
            ValueError: For anything else.
        """
        facts = parse(text, _Facts)
        packed, count = base64.b85decode(facts["differences"]), facts["images"]
        if facts["kind"] != _KIND:
            raise ValueError(f"it is no fingerprint of the kind {_KIND}")
        # More than a byte of what is packed goes to each image, so that a wrong number cannot fill the memory.
        if not 0 <= count <= len(packed):
            raise ValueError(f"it cannot hold {count} images")
        try:
            planes = zlib.decompressobj().decompress(packed, _BYTES * count + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        if len(planes) != _BYTES * count:
            raise ValueError(f"it does not hold its {count} images")
        differences = np.zeros((count, 8), np.uint8)
        differences[:, 8 - _BYTES :] = np.frombuffer(planes, np.uint8).reshape(_BYTES, count).T
        found = cls(())
        found._numbers = np.cumsum(differences.view(">u8")[:, 0].astype(np.uint64), dtype=np.uint64)
        return found


def digests(paths: Iterable[str], workers: int = 0) -> dict[str, str]:
    """The SHA-256 of files, read by several threads, by their paths. Those that cannot be read are left out."""
    files = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = progress(pool.map(_digest, files), total=len(files), desc="fingerprint", unit="files", leave=False)
        return {path: digest for path, digest in zip(files, found, strict=True) if digest is not None}


def _number(digest: str) -> int:
    return int(digest[: BITS // 4], 16)


def _digest(path: str) -> str | None:
    try:
        return sha256(regular_file(path))
    except (CheckpointError, OSError):
        return None
