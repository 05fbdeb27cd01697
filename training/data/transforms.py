"""Transforms of masks that keep them on the pixels of their images, and the two augmented views of the pretraining."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as F

from adfeatures.catalog import unknown
from adfeatures.errors import UnknownNameError
from adfeatures.images import PRESETS


@dataclass(frozen=True)
class MaskTransform:
    """The way from a mask to zeros and ones on the pixels that `adfeatures.images.ImageTransform` gives for its image.

    Resizing takes the nearest pixel, and binarizing comes after it, so that a mask keeps its area and no gray edge
    appears.

    Attributes:
        img_size: Height and width in pixels, as for the image; used by "squash" only.
        preset: One of `adfeatures.images.PRESETS`.

    Raises:
        UnknownNameError: For an unknown preset.
    """

    img_size: tuple[int, int]
    preset: str = "squash"

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UnknownNameError(unknown("preset", self.preset, PRESETS))

    def __call__(self, mask: Image.Image) -> Tensor:
        """Transform a mask of 8 bits into uint8 (1, H, W): 1 where any color is above 0, else 0."""
        if self.preset == "squash":
            mask = F.resize(mask, list(self.img_size), F.InterpolationMode.NEAREST)
        else:
            shorter_side, side = map(int, re.findall(r"\d+", self.preset))
            mask = F.center_crop(F.resize(mask, shorter_side, F.InterpolationMode.NEAREST), [side, side])
        defect = np.asarray(mask.convert("RGB")).any(axis=2)
        return torch.from_numpy(defect.astype(np.uint8))[None]


def two_views(image: Image.Image, seed: int) -> np.ndarray:
    """Two color-augmented views (2, H, W, 3) uint8 of an RGB image for the angle loss (paper section 3.3).

    Each has its own color jitter, grayscale and blur as in SimCLR (Chen et al., 2020). Nothing moves, so that one mask
    serves both. The blur is Pillow's, its radius the standard deviation in pixels.

    Equal seeds give equal views; torch's own generators stay as they are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        return np.stack([np.asarray(_augment(image).convert("RGB")) for _ in range(2)])


def _gray(image: Image.Image) -> Image.Image:
    """Of one band for the blur, in the place of three equal ones."""
    return image.convert("L") if torch.rand(1) < 0.2 else image


def _blur(image: Image.Image) -> Image.Image:
    """Band by band: of a whole image Pillow blurs a fourth one too, that no one sees."""
    blur = ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0)))
    return Image.merge(image.mode, [band.filter(blur) for band in image.split()])


_augment = transforms.Compose(
    [
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        _gray,
        transforms.RandomApply([_blur], p=0.5),
    ]
)
