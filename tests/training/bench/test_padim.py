"""The plain form that PaDiM is timed against gives the same, and the table is made."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from training.bench import padim as bench


def test_the_plain_form_of_padim_gives_the_same() -> None:
    train, test = bench.features(12, 8, 3).split([9, 3])
    distances = bench.fit(train).distances(test)
    np.testing.assert_allclose(distances, bench.plain_distances(bench.plain_fit(train), test), rtol=1e-5)


def test_padim_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    features = bench.features
    monkeypatch.setattr(bench, "features", lambda count, channels, side: features(count, 24, 2))
    fit, score = islice(bench.rows(quick=True), 2)
    assert fit.ours is not None and fit.naive is not None and score.ours is not None and score.naive is not None
    assert fit.ratio == pytest.approx(fit.naive / fit.ours)
    assert score.ours > 0 and score.naive > 0
    assert float(score.note.split()[-1]) < 1e-5


@pytest.mark.slow
def test_the_row_of_a_large_fit_says_whether_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    features = bench.features
    monkeypatch.setattr(bench, "features", lambda count, channels, side: features(count, 4, 1))
    for measured, ours, note in (
        ((2.0, 1500.0), 2.0, "1.50 GB"),
        ((2.0, None), 2.0, "not measured"),
        (None, None, "not"),
    ):
        monkeypatch.setattr(bench, "in_child", lambda function, count, measured=measured: measured)
        *_, large = bench.rows(quick=True)
        assert large.what == "PaDiM fit, 40 images, 4 levels of 1024 channels, 16 x 16"
        assert large.ours == ours and large.naive is None and note in large.note


def test_large_fit_measures() -> None:
    took, peak = bench.large_fit(3, levels=2, channels=5, side=2)
    assert took > 0
    assert peak is None or peak > 50
