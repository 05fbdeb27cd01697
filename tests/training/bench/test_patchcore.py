"""The plain loop that PatchCore's coreset is timed against chooses the same, and the table is made."""

from __future__ import annotations

import pytest
import torch
from scipy.spatial.distance import cdist

from adfeatures.coreset import greedy_coreset
from training.bench import patchcore as bench


def test_the_plain_loop_chooses_the_same() -> None:
    points = torch.randn(60, 5, dtype=torch.float64)
    starts = torch.arange(10)
    chosen = bench.plain_loop(points, 20, starts)
    assert torch.equal(chosen, greedy_coreset(points, 20, starts))
    assert bench.cover_radius(points, chosen) == pytest.approx(cdist(points, points[chosen]).min(axis=1).max())


@pytest.mark.parametrize("quick", [True, False])
def test_coreset_rows(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(300, bench.DIM, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(bench, "patches", lambda count: points)
    monkeypatch.setattr(bench, "STEPS", 10)
    steps = 30 if quick else 10
    projected, whole = bench.rows(quick=quick)
    for row in (projected, whole):
        assert row.ratio is not None and row.naive is not None and row.ours is not None
        assert row.ratio == pytest.approx(row.naive / row.ours)
        assert f"{steps} of {steps} steps alike" in row.note
        radius, naive = row.note.split(";")[0].removeprefix("cover radius ").split(", naive ")
        assert naive == (radius if quick else "not run to its end")
