"""Patch labels against those of the original implementation and against counting."""

from __future__ import annotations

import pytest
import torch
from helpers.golden_values import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adfeatures.errors import InputError
from training.pretraining.labels import angle_labels, norm_labels

GOLDEN = golden("masks")


def masks() -> Tensor:
    masks = torch.zeros(3, 1, 224, 224)
    masks[0, :, 30:36, 40:46] = masks[0, :, 100:140, 90:150] = 1
    masks[1, :, ::2, ::3] = 1
    masks[2, :, 13:15] = masks[2, :, 200:, 200:] = 1
    return masks


@pytest.mark.parametrize("patch", [14, 16])
def test_labels_are_the_original_ones(patch: int) -> None:
    grid = (224 // patch, 224 // patch)
    assert torch.equal(angle_labels(masks(), grid).flatten(1), GOLDEN[f"patchify{patch}"] > 0)
    assert torch.equal(norm_labels(masks(), grid), GOLDEN[f"nearest{grid[0]}"][:, 0] > 0)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([4, 8, 14, 16, 32]), st.floats(0.05, 0.4))
def test_angle_labels_count_pixels(seed: int, patch: int, density: float) -> None:
    masks = torch.rand(2, 1, 3 * patch, 2 * patch, generator=torch.Generator().manual_seed(seed)) < density
    limit = 32 if patch in (14, 16) else 32 / 196 * patch**2
    for image in range(2):
        for row in range(3):
            for column in range(2):
                pixels = masks[image, 0, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].sum()
                assert angle_labels(masks, (3, 2))[image, row, column] == (pixels > limit)


def test_a_grid_that_does_not_divide_the_mask() -> None:
    with pytest.raises(InputError, match="224"):
        angle_labels(masks(), (15, 16))
