"""From pixel masks to labels of patches (paper section 3.4, in the form of the published code)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from adfeatures.errors import InputError

# A patch of 14 or 16 pixels counts as anomalous for the angle loss when it holds more than 32 mask pixels. The
# published code has no rule for other sizes; there it is the same fraction as of a patch of 14.
MASK_PIXELS = 32
MASK_FRACTION = 32 / 14**2


def angle_labels(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels for the angle loss: 1 where a patch holds enough anomalous pixels.

    Args:
        masks: (B, 1, H, W), anomalous where above 0.
        grid: Height and width of the feature map, divisors of H and W.

    Returns:
        (B, h, w) bool.

    Raises:
        InputError: If the grid does not divide the mask.
    """
    height, width = masks.shape[-2] // grid[0], masks.shape[-1] // grid[1]
    if (height * grid[0], width * grid[1]) != tuple(masks.shape[-2:]):
        raise InputError(
            f"Masks of {tuple(masks.shape[-2:])} pixels cannot be divided into {grid[0]} x {grid[1]} patches."
        )
    pixels = F.avg_pool2d((masks > 0).float(), (height, width), divisor_override=1)[:, 0]
    limit = MASK_PIXELS if (height, width) in ((14, 14), (16, 16)) else MASK_FRACTION * height * width
    return pixels > limit


def norm_labels(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels for the norm loss: the mask (B, 1, H, W) at the nearest pixel of each patch, (B, h, w) bool."""
    return F.interpolate((masks > 0).float(), size=grid, mode="nearest")[:, 0] > 0
