"""Patch vectors against loops over every position."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adfeatures.errors import InputError
from training.methods.patches import neighborhood_vectors


def adaptive_mean(values: Sequence[float], dim: int) -> list[float]:
    """Means of ``dim`` bins from floor(i n / dim) to ceil((i + 1) n / dim)."""
    n = len(values)
    return [
        sum(values[i * n // dim : math.ceil((i + 1) * n / dim)]) / (math.ceil((i + 1) * n / dim) - i * n // dim)
        for i in range(dim)
    ]


def naive_level(level: Tensor, dim: int) -> Tensor:
    channels, height, width = level.shape
    out = torch.zeros(dim, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            around = []
            for c in range(channels):
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        inside = 0 <= y + dy < height and 0 <= x + dx < width
                        around.append(float(level[c, y + dy, x + dx]) if inside else 0.0)
            out[:, y, x] = torch.tensor(adaptive_mean(around, dim), dtype=torch.float64)
    return out


def naive(levels: Sequence[Tensor], dim: int) -> Tensor:
    grid = levels[0].shape[1:]
    maps = [naive_level(level, dim) for level in levels]
    maps = [
        m if m.shape[1:] == grid else F.interpolate(m[None], grid, mode="bilinear", align_corners=False)[0]
        for m in maps
    ]
    out = torch.zeros(*grid, dim, dtype=torch.float64)
    for y in range(grid[0]):
        for x in range(grid[1]):
            out[y, x] = torch.tensor(
                adaptive_mean([float(v) for m in maps for v in m[:, y, x]], dim), dtype=torch.float64
            )
    return out


@pytest.mark.parametrize(
    ("shapes", "dim"),
    [
        ([(6, 4, 4), (6, 4, 4)], 6),
        ([(5, 3, 4), (7, 3, 4), (4, 3, 4)], 8),
        ([(3, 1, 1)], 4),
        ([(4, 4, 6), (5, 2, 3)], 5),
        ([(2, 3, 3)], 40),
    ],
    ids=["even", "odd-channels", "one-position", "pyramid", "more-than-there-is"],
)
def test_equals_the_naive_loops(shapes: Sequence[tuple[int, ...]], dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    vectors = neighborhood_vectors(levels, dim)
    assert vectors.shape == (2, *shapes[0][1:], dim)
    expected = torch.stack([naive([level[i] for level in levels], dim) for i in range(2)])
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("levels", "patch"), [([], 3), ([torch.zeros(1, 2, 3, 3)], 2)], ids=["no-levels", "even-patch"]
)
def test_refuses(levels: Sequence[Tensor], patch: int) -> None:
    with pytest.raises(InputError, match="at least one level and an odd neighborhood"):
        neighborhood_vectors(levels, 4, patch)
