"""Reference features of a fixed pool, encoded once and kept in half precision on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor

from adfeatures.checkpoints import atomic_path
from adfeatures.documents import read_document
from adfeatures.errors import AdfeaturesError, ImageError

from ..console import progress
from ..data.items import Item, items_digest
from ..distributed import barrier, rank

_Length: TypeAlias = Annotated[int, (1, 2**31)]
# Images that are encoded at once.
ENCODED_AT_ONCE = 16


class _Facts(TypedDict):
    identity: str
    done: Annotated[int, (0, 2**31)]
    shapes: list[tuple[_Length, _Length, _Length]]


class ReferenceStore:
    """Feature maps of the images of a pool, one memory-mapped float16 array (N, C_l, h_l, w_l) per level.

    Args:
        folder: Where the arrays are or shall be.
        items: The pool.
        identity: What the features depend on besides the images: backbone, weights, input size. A store of another
            identity or pool, or one whose arrays were cut or deleted, is encoded anew.
    """

    def __init__(self, folder: str | Path, items: Sequence[Item], identity: str) -> None:
        self.folder, self.items = Path(folder), list(items)
        self._identity = hashlib.sha256(json.dumps([identity, items_digest(items)]).encode()).hexdigest()
        self._levels: list[np.ndarray] = []

    def encode(self, read: Callable[[str], Tensor], backbone: Callable[[Tensor], Sequence[Tensor]]) -> None:
        """Encode what is not there yet, on rank 0, and map all of it into memory, on every rank.

        An interrupted call resumes where it was.

        Args:
            read: File to image (H, W, 3).
            backbone: Images (B, H, W, 3) to maps.

        Raises:
            ImageError: If an image cannot be read.
            AdfeaturesError: If the store cannot be written, as on a full disk, or features exceed half precision. What
                was encoded is kept.
        """
        if rank() == 0:
            try:
                self._encode(read, backbone)
            except ImageError as error:
                raise ImageError(
                    f"{error} It belongs to the pool of references: restore it, or take it out of the data set."
                ) from error
            except OSError as error:
                raise AdfeaturesError(
                    f"Cannot write the references to {self.folder}: {error}. Free some space or lower --pool."
                ) from error
        barrier()
        shapes = [(len(self.items), *shape) for shape in self._facts()["shapes"]]
        self._levels = [
            np.memmap(self._path(index), np.float16, "r", shape=shape) for index, shape in enumerate(shapes)
        ]

    def read(self, indices: Tensor) -> list[Tensor]:
        """The maps (..., C_l, h_l, w_l) float16 per level, of images by their index in the pool, (...) on the CPU."""
        return [torch.from_numpy(level[indices.numpy()]) for level in self._levels]

    def _encode(self, read: Callable[[str], Tensor], backbone: Callable[[Tensor], Sequence[Tensor]]) -> None:
        facts = self._facts()
        if not facts:
            # Else an interruption would leave facts of another store beside the first features of this one.
            (self.folder / "store.json").unlink(missing_ok=True)
        starts = range(int(facts.get("done", 0)), len(self.items), ENCODED_AT_ONCE)
        for start in progress(starts, desc="references", unit="batches"):
            batch = torch.stack([read(item.image) for item in self.items[start : start + ENCODED_AT_ONCE]])
            maps = [level.half().cpu().numpy() for level in backbone(batch)]
            if not all(np.isfinite(level).all() for level in maps):
                raise AdfeaturesError("Reference features do not fit into half precision. Leave out --pool.")
            for index, level in enumerate(maps):
                self._write(index, start, level)
            shapes = [level.shape[1:] for level in maps]
            facts = {"identity": self._identity, "done": start + len(batch), "shapes": shapes}
            with atomic_path(self.folder / "store.json") as temporary:
                temporary.write_text(json.dumps(facts))

    def _facts(self) -> dict[str, Any]:
        """What the arrays hold; nothing where they are of another store, or shorter than they should be."""
        try:
            facts: dict[str, Any] = read_document(self.folder / "store.json", _Facts)
            if facts["identity"] != self._identity:
                return {}
            sizes = [facts["done"] * math.prod(shape) * np.dtype(np.float16).itemsize for shape in facts["shapes"]]
            whole = all(self._path(index).stat().st_size >= size for index, size in enumerate(sizes))
        except (OSError, ValueError):
            return {}
        return facts if whole else {}

    def _write(self, index: int, start: int, level: np.ndarray) -> None:
        # Not through the memory map, which would end the process, instead of raising, on a full disk.
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path(index).touch()
        with self._path(index).open("r+b") as file:
            file.seek(start * level[0].nbytes)
            file.write(level.tobytes())

    def _path(self, index: int) -> Path:
        return self.folder / f"level{index + 1}.f16"
