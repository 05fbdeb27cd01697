"""Patch vectors of locally aware features, as PatchCore (Roth et al. 2022, section 3.1) and GLASS make them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adfeatures.errors import InputError


def neighborhood_vectors(levels: Sequence[Tensor], dim: int, patch: int = 3) -> Tensor:
    """Describe every position by its neighborhood in all levels.

    Per level the ``patch`` x ``patch`` values of all channels around a position (zeros outside the map, the neighbors
    of one channel side by side) are averaged down to ``dim`` numbers. Levels of another grid than the first are resized
    to it bilinearly; then the levels, concatenated, are averaged down to ``dim`` numbers once more.

    Args:
        levels: Feature maps (B, C_l, h_l, w_l), at least one.
        dim: Length of the vectors.
        patch: Side of the neighborhood, odd.

    Returns:
        Vectors (B, h, w, dim) on the grid of the first level.

    Raises:
        InputError: For no levels, or an even ``patch``.
    """
    if not levels or patch % 2 == 0:
        raise InputError(
            f"Patch vectors need at least one level and an odd neighborhood, got {len(levels)} levels and {patch}."
        )
    grid = levels[0].shape[2:]
    resized = []
    for level in levels:
        neighbors = F.unfold(level, patch, padding=patch // 2).transpose(1, 2)
        pooled = F.adaptive_avg_pool1d(neighbors, dim).transpose(1, 2).unflatten(2, level.shape[2:])
        resized.append(F.interpolate(pooled, grid, mode="bilinear", align_corners=False))
    vectors = torch.cat(resized, dim=1).flatten(2).transpose(1, 2)
    return F.adaptive_avg_pool1d(vectors, dim).unflatten(1, grid)
