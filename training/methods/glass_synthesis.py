"""Synthetic defects for GLASS: foreign textures in normal images under masks of Perlin noise (DRAEM, 2021)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from adfeatures.errors import ImageError, InputError
from adfeatures.images import read_image
from adfeatures.sources import list_images

from ..data.images import read_mask
from ..data.transforms import MaskTransform
from .base import Batch

Size = tuple[int, int]
# So many masks may miss a foreground before all of it is taken, since a very small one could be missed for ever.
MAX_DRAWS = 100


@dataclass(eq=False)
class DefectSynthesis:
    """Turns batches of normal images into images with one synthetic defect each.

    Raises:
        ImageError: For a folder without images.
    """

    # Folder of texture images (the original: DTD), searched with its sub-folders. None makes them of Perlin noise.
    textures: str | os.PathLike[str] | None
    # Folder of masks <product>/<file name of the training image>, above 0 where the object is. None: whole images.
    foregrounds: str | os.PathLike[str] | None
    mean: Sequence[float]  # that the images were normalized with, per channel
    std: Sequence[float]  # likewise
    preset: str  # of `adfeatures.images.PRESETS`: geometry of the images' transform, which foreground masks follow

    def __post_init__(self) -> None:
        self._files = [] if self.textures is None else list_images(self.textures, recursive=True)

    def __call__(self, batch: Batch, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draw a defect for every image.

        Returns:
            Normalized images (B, 3, H, W) float32 and the masks of their defects (B, 1, H, W) float32 of 0 and 1, none
            of them empty.

        Raises:
            ImageError: For a texture or foreground mask that is missing or cannot be read.
            InputError: For a foreground mask that is zero everywhere.
            UnknownNameError: For an unknown preset.
        """
        images = batch["image"].cpu()
        size = (images.shape[2], images.shape[3])
        names = zip(batch["product"], batch["path"], strict=True)
        drawn = np.stack([_mask(self._foreground(size, *name), rng) for name in names])
        masks = torch.from_numpy(drawn)[:, None].float()
        textures = torch.stack([self._texture(size, rng) for _ in images])
        kept = torch.tensor(rng.normal(0.5, 0.1, (len(images), 1, 1, 1)), dtype=torch.float32).clamp(0.2, 0.8)
        return torch.where(masks > 0, (1 - kept) * textures + kept * images, images), masks

    def _foreground(self, size: Size, product: str, path: str) -> np.ndarray:
        if self.foregrounds is None:
            return np.ones(size, dtype=bool)
        file = Path(self.foregrounds, product, Path(path).name)
        mask = MaskTransform(size, self.preset)(read_mask(str(file)))[0].numpy() > 0
        if mask.shape != size:
            raise ImageError(
                f"The foreground mask {file} becomes {mask.shape} pixels under {self.preset}, its image has {size}."
            )
        if not mask.any():
            raise InputError(
                f"The foreground mask {file} is zero everywhere, so no defect can be placed. Correct or remove it."
            )
        return mask

    def _texture(self, size: Size, rng: np.random.Generator) -> Tensor:
        """A changed texture, normalized, (3, H, W)."""
        if self._files:
            image = _cover(read_image(self._files[rng.integers(len(self._files))]), size)
        else:
            image = procedural_texture(size, rng)
        for index in rng.permutation(len(CHANGES))[:3]:
            image = CHANGES[index](image, rng)
        return F.normalize(F.to_tensor(F.center_crop(image, list(size))), list(self.mean), list(self.std))


def _mask(foreground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask (H, W) of bool, not empty, inside the foreground (H, W)."""
    for _ in range(MAX_DRAWS):
        first, second = perlin_mask(foreground.shape, rng), perlin_mask(foreground.shape, rng)
        mask = (first | second, first & second, first)[rng.integers(3)] & foreground
        if mask.any():
            return mask
    return foreground


def perlin_noise(size: Size, cells: Size, rng: np.random.Generator) -> np.ndarray:
    """Perlin noise (H, W) of roughly -1 to 1, smooth within each of (rows, columns) cells."""
    angles = rng.uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1))
    y, x = (np.arange(side) * (count / side) for side, count in zip(size, cells, strict=True))
    row, column = y.astype(int), x.astype(int)
    dy, dx = (y - row)[:, None], (x - column)[None]

    def corner(below: int, right: int) -> np.ndarray:
        angle = angles[np.ix_(row + below, column + right)]
        return np.cos(angle) * (dy - below) + np.sin(angle) * (dx - right)

    down, across = (6 * t**5 - 15 * t**4 + 10 * t**3 for t in (dy, dx))
    upper = corner(0, 0) * (1 - across) + corner(0, 1) * across
    lower = corner(1, 0) * (1 - across) + corner(1, 1) * across
    return math.sqrt(2) * (upper * (1 - down) + lower * down)


def perlin_mask(size: Size, rng: np.random.Generator) -> np.ndarray:
    """A mask (H, W) of bool: where turned Perlin noise of a random scale per axis is above 0.5. May be empty."""
    noise = perlin_noise(size, (2 ** int(rng.integers(6)), 2 ** int(rng.integers(6))), rng)
    return ndimage.rotate(noise, rng.uniform(-90, 90), reshape=False, order=1) > 0.5


def procedural_texture(size: Size, rng: np.random.Generator) -> Image.Image:
    """An image of two random colors mixed by three octaves of Perlin noise, with a little noise per pixel."""
    rows, columns = (2 ** rng.integers(1, 5, size=2)).tolist()
    octaves = [perlin_noise(size, (scale * rows, scale * columns), rng) / scale for scale in (1, 2, 4)]
    mixture = np.clip(0.5 + rng.uniform(0.5, 2) * sum(octaves), 0, 1)[..., None]
    first, second = rng.uniform(0, 255, (2, 3))
    pixels = first + (second - first) * mixture + rng.normal(0, 8, (*size, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _cover(image: Image.Image, size: Size) -> Image.Image:
    """Resize, keeping the aspect ratio, until both sides reach ``size``."""
    scale = max(size[0] / image.height, size[1] / image.width)
    target = [max(size[0], round(image.height * scale)), max(size[1], round(image.width * scale))]
    return F.resize(image, target, InterpolationMode.BILINEAR)


Change = Callable[[Image.Image, np.random.Generator], Image.Image]
# Of these, three different ones change every texture.
CHANGES: tuple[Change, ...] = (
    lambda image, rng: F.adjust_contrast(image, rng.uniform(0.8, 1.2)),
    lambda image, rng: F.adjust_brightness(image, rng.uniform(0.8, 1.2)),
    lambda image, rng: F.adjust_hue(F.adjust_saturation(image, rng.uniform(0.8, 1.2)), rng.uniform(-0.2, 0.2)),
    lambda image, rng: F.hflip(image),
    lambda image, rng: F.vflip(image),
    lambda image, rng: F.rgb_to_grayscale(image, num_output_channels=3),
    lambda image, rng: F.autocontrast(image),
    lambda image, rng: F.equalize(image),
    lambda image, rng: F.rotate(image, rng.uniform(-45, 45)),
)
