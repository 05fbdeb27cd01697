"""Features on disk: an image is encoded once, in this run and in every later one.

One file per image holds the maps of all levels in float32. Half of that would not do: near ties, rounding to half
precision changes which reference patch is the nearest, and with the residuals the coreset of PatchCore. On rendered
products that moved its metrics by up to 2.6 points, where a relative noise of 1e-6 moved them by less than 0.0001.

Images are known by their content, so copies, moved folders and renamed files are found again and changed ones are not.
Any file, and the folder, may be deleted at any time: what is missing is computed again.
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
from adfeatures.errors import ImageError

from ..methods.base import Batch, Extractor
from ..methods.trained import feature_maps


class FeatureCache:
    """Feature maps by key, one safetensors file each, written atomically: several processes may share the folder.

    Args:
        folder: Where caches are.
        identity: What the features depend on besides the image: weights, input size, geometry. Each identity has a
            folder of its own.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not (self.folder / "identity.json").exists():
            with atomic_path(self.folder / "identity.json") as temporary:
                temporary.write_text(text)

    def __contains__(self, key: str) -> bool:
        """Whether the maps are there. A damaged file counts as none."""
        try:
            with safe_open(self._path(key), framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def write(self, key: str, levels: Sequence[Tensor]) -> None:
        """Keep the maps (C_l, h_l, w_l) of an image.

        Raises:
            AdfeaturesError: If the disk is full, or the folder cannot be written.
        """
        with atomic_path(self._path(key)) as temporary:
            save_file({str(number): level.float().contiguous().cpu() for number, level in enumerate(levels)}, temporary)

    def read(self, key: str) -> list[Tensor] | None:
        """The maps (C_l, h_l, w_l) of an image, float32; None where they are not there, or damaged."""
        try:
            maps = load_file(self._path(key))
        except (OSError, SafetensorError):
            return None
        return [maps[str(number)] for number in range(len(maps))]

    def remove(self) -> None:
        """Delete everything of this identity."""
        shutil.rmtree(self.folder, ignore_errors=True)

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


class CachedExtractor:
    """Features of another extractor, computed when they are first asked for and read from the cache afterwards.

    Images without a path, such as augmented ones, are neither looked up nor kept.

    Args:
        extractor: What computes them.
        cache: Where they are kept.
        key: From the path of an image to its key.
        device: Where the features shall be.
    """

    def __init__(
        self,
        extractor: Extractor,
        cache: FeatureCache,
        key: Callable[[str], str] = content_key,
        device: torch.device | str = "cpu",
    ) -> None:
        self.extractor, self.cache, self.key, self.device = extractor, cache, key, device

    def __call__(self, batch: Batch) -> Sequence[Tensor]:
        """Maps (B, C_l, h_l, w_l) of a batch, float32.

        Raises:
            InputError: For NaN or infinite values, which are not kept.
        """
        if None in batch["path"]:
            return self.extractor(batch)
        keys = [self.key(path) for path in batch["path"]]
        maps = {key: found for key in keys if (found := self.cache.read(key)) is not None}
        missing = [index for index, key in enumerate(keys) if key not in maps]
        if missing:
            levels = feature_maps(self.extractor, _subset(batch, missing))
            for row, index in enumerate(missing):
                maps[keys[index]] = [level[row].cpu() for level in levels]
                self.cache.write(keys[index], maps[keys[index]])
        return [torch.stack(level).to(self.device) for level in zip(*(maps[key] for key in keys), strict=True)]

    def holds(self, path: str) -> bool:
        """Whether the features of an image are in the cache."""
        return self.key(path) in self.cache


def _subset(batch: Batch, members: Sequence[int]) -> dict[str, Any]:
    """Some of the images of a batch, with all that belongs to them."""
    return {
        name: value[members] if isinstance(value, Tensor) else [value[i] for i in members]
        for name, value in batch.items()
    }
