"""How photographs of one scene differ: as those of a phone or a line camera do."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy import ndimage

# Scenes are larger than pictures, so that what a shifted and turned camera sees is there.
SCENE, PICTURE = 368, 320


class Shot:
    """One exposure, the same for the scene and for the mask of its defect."""

    def __init__(self, rng: np.random.Generator) -> None:
        angle, zoom = np.deg2rad(rng.uniform(-3, 3)), rng.uniform(0.97, 1.03)
        self.matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / zoom
        self.shift = rng.uniform(-8, 8, 2)
        self.gain = rng.uniform(0.88, 1.12) * rng.uniform(0.97, 1.03, 3)
        self.blur = rng.uniform(0, 0.8)
        self.noise = rng.uniform(0.003, 0.012)
        self.quality = int(rng.integers(80, 97))
        self.rng = rng

    def picture(self, scene: np.ndarray, *, gray: bool) -> Image.Image:
        """The picture of a scene (SCENE, SCENE, 3); of a gray camera with ``gray``."""
        seen = np.stack([self._seen(channel, 1) for channel in np.moveaxis(scene, 2, 0)], axis=2)
        seen = ndimage.gaussian_filter(seen, (self.blur, self.blur, 0)) * self.gain.astype(np.float32)
        if gray:
            seen = seen.mean(axis=2, keepdims=True).repeat(3, axis=2)
        noise = self.rng.normal(0, self.noise, seen.shape[:2] + (1 if gray else 3,))
        file = io.BytesIO()
        Image.fromarray(to_bytes(seen + noise)).save(file, "JPEG", quality=self.quality)
        return Image.open(file).convert("RGB")

    def mask(self, scene: np.ndarray) -> np.ndarray:
        """Where a mask (SCENE, SCENE) is seen: bool (PICTURE, PICTURE)."""
        return self._seen(scene.astype(np.float32), 1) > 0.5

    def _seen(self, channel: np.ndarray, order: int) -> np.ndarray:
        middle = np.array(channel.shape) / 2 - 0.5
        offset = middle + self.shift - self.matrix @ np.full(2, PICTURE / 2 - 0.5)
        size = (PICTURE, PICTURE)
        return ndimage.affine_transform(channel, self.matrix, offset, size, order=order, mode="reflect")


def to_bytes(image: np.ndarray) -> np.ndarray:
    """Float colors in [0, 1] as uint8."""
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
