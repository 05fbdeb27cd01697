"""Stand-ins for the photographs that the protocol fetches: noise of the right kind under any name."""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path

import numpy as np
from scipy import ndimage

from training.judging.packages import Photographs


class Noise(Photographs):
    """Photographs (512, 512, 3) of smooth noise, and ellipses (90, 120, 4) cut out of it, the same each time."""

    def __init__(self) -> None:
        super().__init__(Path())

    def photo(self, package: str, name: str) -> np.ndarray:
        """Smooth colors, of standard deviation 0.15."""
        return _noise(name)

    def cutout(self, package: str, name: str) -> np.ndarray:
        """The same, opaque in the ellipse."""
        rows, columns = np.mgrid[-1:1:90j, -1:1:120j]
        opaque = (np.hypot(rows, columns) < 1)[..., None]
        return np.concatenate([self.photo(package, name)[:90, :120], opaque], axis=2).astype(np.float32)


@cache
def _noise(name: str) -> np.ndarray:
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=(512, 512, 3))
    smooth = ndimage.gaussian_filter(noise, (3, 3, 0))
    return np.clip(0.5 + 0.15 * smooth / smooth.std(), 0, 1).astype(np.float32)
