"""The plain forms that PatchCore and PaDiM are timed against give what they give, and the tables are made."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from adfeatures.coreset import greedy_coreset
from training.bench import padim as padim_bench
from training.bench import patchcore as patchcore_bench
from training.bench import timing


def test_the_plain_loop_chooses_the_same() -> None:
    points = torch.randn(60, 5, dtype=torch.float64)
    starts = torch.arange(10)
    chosen = patchcore_bench.plain_loop(points, 20, starts)
    assert torch.equal(chosen, greedy_coreset(points, 20, starts))
    assert patchcore_bench.cover_radius(points, chosen) == pytest.approx(
        cdist(points, points[chosen]).min(axis=1).max()
    )


@pytest.mark.parametrize("quick", [True, False])
def test_coreset_rows(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(300, patchcore_bench.DIM, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(patchcore_bench, "patches", lambda count: points)
    monkeypatch.setattr(patchcore_bench, "STEPS", 10)
    steps = 30 if quick else 10
    projected, whole = patchcore_bench.rows(quick=quick)
    for row in (projected, whole):
        assert row.ratio == pytest.approx(row.naive / row.ours)
        assert f"{steps} of {steps} steps alike" in row.note
        radius, naive = row.note.split(";")[0].removeprefix("cover radius ").split(", naive ")
        assert naive == (radius if quick else "not run to its end")


def test_the_plain_form_of_padim_gives_the_same() -> None:
    train, test = padim_bench.features(12, 8, 3).split([9, 3])
    distances = padim_bench.fit(train).distances(test)
    np.testing.assert_allclose(distances, padim_bench.plain_distances(padim_bench.plain_fit(train), test), rtol=1e-5)


def test_padim_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    features = padim_bench.features
    monkeypatch.setattr(padim_bench, "features", lambda count, channels, side: features(count, 24, 2))
    fit, score = islice(padim_bench.rows(quick=True), 2)
    assert fit.ratio == pytest.approx(fit.naive / fit.ours)
    assert score.ours > 0 and score.naive > 0
    assert float(score.note.split()[-1]) < 1e-5


def test_compared_rows_hold_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3, 6, 1, 10, 2, 2])
    monkeypatch.setattr(timing, "seconds", lambda function: function() or next(times))
    calls: list[str] = []
    row = timing.compare("what", lambda: calls.append("ours"), lambda: calls.append("naive"))
    assert (row.ours, row.naive, row.ratio) == (2, 6, 2)  # the ratios are 2, 10 and 1
    assert calls == ["ours", *["ours", "naive"] * 3]


def test_large_fit_measures() -> None:
    took, peak = padim_bench.large_fit(3, levels=2, channels=5, side=2)
    assert took > 0
    assert peak is None or peak > 50e6
