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
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adfeatures.checkpoints import atomic_path, is_finite, regular_file, sha256
from adfeatures.documents import DocumentError, read_document
from adfeatures.errors import CheckpointError, ImageError
from adfeatures.locks import remove_leftovers

from ..methods.base import Batch, Extractor
from ..methods.trained import feature_maps

IDENTITY, DAY = "identity.json", 24 * 60 * 60


def content_key(path: str) -> str:
    """The SHA-256 of an image file.

    Raises:
        ImageError: If there is no such file.
    """
    facts = regular_file(path, ImageError).stat()
    return _content_key(path, facts.st_size, facts.st_mtime_ns)


@cache
def _content_key(path: str, size: int, changed: int) -> str:
    return sha256(path)


def place_key(path: str) -> str:
    """A key of the content and the place of a file, for features that depend on the product as well."""
    return hashlib.sha256(f"{content_key(path)} {path}".encode(errors="surrogateescape")).hexdigest()


class CachedExtractor:
    """Features of another extractor, computed when they are first asked for and read from disk afterwards.

    Several processes may share the folder. Images without a path, such as augmented ones, are not kept.

    Args:
        extractor: What computes them.
        folder: Where features are kept; those of each identity have a folder of their own in it.
        identity: What they depend on besides the image: weights, input size, geometry.
        key: From the path of an image to the name of its file.
        device: Where the features shall be.
    """

    def __init__(
        self,
        extractor: Extractor,
        folder: str | os.PathLike[str],
        identity: Mapping[str, Any],
        key: Callable[[str], str] = content_key,
        device: torch.device | str = "cpu",
    ) -> None:
        self.extractor, self.key, self.device = extractor, key, device
        text = json.dumps(identity, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not (self.folder / IDENTITY).exists():
            with atomic_path(self.folder / IDENTITY) as temporary:
                temporary.write_text(text)

    def __call__(self, batch: Batch) -> Sequence[Tensor]:
        """Maps (B, C_l, h_l, w_l) of a batch, float32.

        Raises:
            InputError: For NaN or infinite values, which are not kept.
            AdfeaturesError: If the disk is full, or the folder cannot be written.
        """
        paths = batch["path"]
        if None in paths:
            return self.extractor(batch)
        maps = [self._read(path) for path in paths]
        if len({tuple(level.shape for level in found) for found in maps if found}) > 1:
            maps = [[] for _ in paths]  # At least one is damaged, and none says which.
        if missing := [index for index, found in enumerate(maps) if not found]:
            levels = feature_maps(self.extractor, _subset(batch, missing))
            for row, index in enumerate(missing):
                maps[index] = [level[row].contiguous().cpu() for level in levels]
                self._write(paths[index], maps[index])
        return [torch.stack(level).to(self.device) for level in zip(*maps, strict=True)]

    def holds(self, path: str) -> bool:
        """Whether the features of an image are there. A damaged file counts as none."""
        try:
            with safe_open(regular_file(self._file(path)), framework="pt"):
                return True
        except (CheckpointError, OSError, SafetensorError):
            return False

    def remove(self) -> None:
        """Delete everything of this identity."""
        _remove(self.folder)

    def _read(self, path: str) -> list[Tensor]:
        """The maps of an image, none where they are not there, or damaged."""
        try:
            maps = load_file(regular_file(self._file(path)))
            levels = [maps[str(index)] for index in range(len(maps))]
        except Exception:  # a damaged file makes its reader fail in any way
            return []
        sound = all(level.dtype == torch.float32 and level.ndim == 3 and is_finite(level) for level in levels)
        return levels if sound else []

    def _write(self, path: str, levels: Sequence[Tensor]) -> None:
        with atomic_path(self._file(path)) as temporary:
            save_file({str(index): level for index, level in enumerate(levels)}, temporary)

    def _file(self, path: str) -> Path:
        key = self.key(path)
        return self.folder / key[:2] / f"{key}.safetensors"


def remove_owned(folder: Path, owner: str) -> None:
    """Delete the caches of an owner from a folder of caches, and what anybody left half written there a day ago."""
    for identity in folder.glob(f"*/{IDENTITY}"):
        with suppress(DocumentError):
            if read_document(identity, dict[str, Any]).get("owner") == owner:
                _remove(identity.parent)
    remove_leftovers(folder.rglob(".*"), older_than=DAY)


def _remove(cache: Path) -> None:
    """Delete a cache, its description last: after an interruption the rest is still found."""
    for part in cache.glob("??"):
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(cache, ignore_errors=True)


def _subset(batch: Batch, members: Sequence[int]) -> dict[str, Any]:
    """Some of the images of a batch, with all that belongs to them."""
    return {
        name: value[members] if isinstance(value, Tensor) else [value[index] for index in members]
        for name, value in batch.items()
    }
