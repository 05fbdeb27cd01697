"""Features on disk: an image is encoded once, in this run and in every later one.

One file per image holds the maps of all levels in half precision, which rounds each value by at most 1 part in 2048 and halves the size
(MVTec AD with a backbone of four levels of 16 x 16 x 768: 8.4 GB). Images are known by their content, so copies, moved folders and
renamed files are found again and changed ones are not. Any file, and the folder, may be deleted at any time between runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adfeatures.checkpoints import atomic_path, sha256
from adfeatures.errors import ImageError, InputError

from .methods.base import Batch, Extractor


class FeatureCache:
    """Feature maps by key, one safetensors file each, written atomically: several processes may share the folder.

    Args:
        folder: Where caches are.
        identity: What the features depend on besides the image: weights, input size, geometry. Each identity has a folder of its own.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not (self.folder / "identity.json").exists():
            with atomic_path(self.folder / "identity.json") as temporary:
                temporary.write_text(text)
        self._known: set[str] = set()

    def __contains__(self, key: str) -> bool:
        """Whether the maps are there. A damaged file counts as none, and is written anew."""
        if key not in self._known:
            try:
                with safe_open(self._path(key), framework="pt"):
                    self._known.add(key)
            except (OSError, SafetensorError):
                return False
        return True

    def write(self, key: str, levels: Sequence[Tensor]) -> None:
        """Keep the maps (C_l, h_l, w_l) of an image.

        Raises:
            InputError: For values that half precision cannot hold.
            AdfeaturesError: If the disk is full, or the folder cannot be written.
        """
        halves = {str(number): level.half().contiguous().cpu() for number, level in enumerate(levels)}
        if not all(level.isfinite().all() for level in halves.values()):
            raise InputError("Features are NaN, infinite or above 65504, the most that half precision holds. Check the weights.")
        with atomic_path(self._path(key)) as temporary:
            save_file(halves, temporary)

    def read(self, key: str) -> list[Tensor]:
        """The maps (C_l, h_l, w_l) of an image, float16."""
        maps = load_file(self._path(key))
        return [maps[str(number)] for number in range(len(maps))]

    def remove(self) -> None:
        """Delete everything of this identity."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._known.clear()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def content_key(path: str) -> str:
    """The SHA-256 of an image file.

    Raises:
        ImageError: If there is no such file.
    """
    try:
        facts = os.stat(path)
    except OSError as error:
        raise ImageError(f"There is no image file {path}.") from error
    return _digest(path, facts.st_size, facts.st_mtime_ns)


@cache
def _digest(path: str, size: int, changed: int) -> str:
    return sha256(path)


def place_key(path: str) -> str:
    """A key of the content and the place of a file, for features that depend on the product as well."""
    return hashlib.sha256(f"{content_key(path)} {path}".encode()).hexdigest()


class Kept:
    """Features of another extractor, computed for each image when they are first asked for and read from the cache afterwards.

    Always those of the cache, rounding included, so that the first pass over the images gives what later ones do. Images without a path,
    such as augmented ones, are neither looked up nor kept.

    Args:
        extractor: What computes them.
        cache: Where they are kept.
        key: From the path of an image to its key.
        device: Where the features shall be.
    """

    def __init__(
        self, extractor: Extractor, cache: FeatureCache, key: Callable[[str], str] = content_key, device: torch.device | str = "cpu"
    ) -> None:
        self.extractor, self.cache, self.key, self.device = extractor, cache, key, device

    def __call__(self, batch: Batch) -> Sequence[Tensor]:
        """Maps (B, C_l, h_l, w_l) of a batch, float32."""
        if None in batch["path"]:
            return self.extractor(batch)
        keys = [self.key(path) for path in batch["path"]]
        missing = [index for index, key in enumerate(keys) if key not in self.cache]
        if missing:
            levels = self.extractor(part(batch, missing))
            for row, index in enumerate(missing):
                self.cache.write(keys[index], [level[row] for level in levels])
        maps = [self.cache.read(key) for key in keys]
        return [torch.stack(level).to(self.device).float() for level in zip(*maps, strict=True)]

    def holds(self, path: str) -> bool:
        """Whether the features of an image are in the cache."""
        return self.key(path) in self.cache


def part(batch: Batch, members: Sequence[int]) -> dict[str, Any]:
    """Some of the images of a batch, with all that belongs to them."""
    return {name: value[members] if isinstance(value, Tensor) else [value[i] for i in members] for name, value in batch.items()}
