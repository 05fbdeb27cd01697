"""The coreset against the plain loop, which compares all points with each new one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.coreset import naive_coreset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from adfeatures import coreset
from adfeatures.coreset import greedy_coreset


@settings(max_examples=40)
@given(
    st.integers(1, 90), st.integers(1, 6), st.floats(0.01, 1), st.sampled_from([1, 2, 7, 512]), st.integers(0, 10_000)
)
def test_the_choice_is_that_of_the_plain_loop(count: int, dim: int, part: float, contenders: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    points = random.normal(size=(count, dim)) * random.uniform(0.1, 10, size=(count, 1)) + 3
    starts = random.permutation(count)[:10]
    most = max(1, int(part * count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coreset, "CONTENDERS", contenders)
        patch.setattr(coreset, "POINTS_PER_CHUNK", 16)
        found = greedy_coreset(torch.from_numpy(points), most, torch.from_numpy(starts))
    assert found.tolist() == naive_coreset(points, most, starts)


@settings(max_examples=30)
@given(st.integers(2, 60), st.integers(1, 5), st.integers(0, 1000))
def test_equal_points_are_chosen_at_most_once_each(count: int, distinct: int, seed: int) -> None:
    points = torch.from_numpy(np.random.default_rng(seed).integers(0, distinct, size=(count, 2))).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coreset, "CONTENDERS", 5)
        found = greedy_coreset(points, count, torch.arange(min(10, count)))
        first = greedy_coreset(points, len(points.unique(dim=0)), torch.arange(min(10, count)))
    assert sorted(found.tolist()) == list(range(count))
    # Each kind once before any comes twice, but for the first choice, whose distance counts before it is chosen.
    assert len(points[first].unique(dim=0)) == len(points.unique(dim=0))


def test_float32_covers_as_well_as_the_plain_loop() -> None:
    random = np.random.default_rng(0)
    points = (random.normal(size=(40, 128))[random.integers(0, 40, 3000)] * 3 + random.normal(size=(3000, 128))).astype(
        np.float32
    )
    starts = random.permutation(3000)[:10]
    chosen = greedy_coreset(torch.from_numpy(points), 300, torch.from_numpy(starts)).numpy()
    plain = naive_coreset(points.astype(np.float64), 300, starts)
    radius, expected = (cdist(points, points[rows]).min(axis=1).max() for rows in (chosen, plain))
    assert radius == pytest.approx(expected, rel=1e-5)
