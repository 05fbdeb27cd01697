"""Thresholds against numpy, scipy, and loops written out below."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student_t

from adfeatures import thresholds
from adfeatures.errors import InputError

scores = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40)


@given(scores, st.floats(1e-6, 1))
def test_normal_quantile(values: list[float], quantile: float) -> None:
    found = thresholds.normal_quantile(values, quantile)
    ordered, at = sorted(values), quantile * (len(values) - 1)
    below = ordered[int(at)]
    above = ordered[min(int(at) + 1, len(values) - 1)]
    assert found == pytest.approx(below + (above - below) * (at - int(at)), rel=1e-9, abs=1e-12)
    assert isinstance(found, float)
    assert found == np.quantile(np.array(values), quantile) == thresholds.normal_quantile(np.array(values), quantile)


def test_normal_quantile_of_all_is_the_largest() -> None:
    assert thresholds.normal_quantile([0.3, 0.7, 0.1], 1) == 0.7
    assert thresholds.normal_quantile([0.3], 0.99) == 0.3


@pytest.mark.parametrize(
    ("values", "quantile"),
    [
        ([1.0], 0),
        ([1.0], -0.1),
        ([1.0], 1.01),
        ([1.0], float("nan")),
        ([], 0.5),
        ([1.0, float("nan")], 0.5),
        ([float("inf")], 0.5),
    ],
)
def test_normal_quantile_refuses(values: list[float], quantile: float) -> None:
    with pytest.raises(InputError):
        thresholds.normal_quantile(values, quantile)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([1.0, 1.1, 0.9, 1.0, 5.0], [4]),
        ([9.0, 1.0, 1.1, 0.9, 1.0, 5.0, 1.05], [0, 5]),
        ([1.0, 1.1, 0.9, 1.0, 0.01], []),  # far below is no defect
        ([1.0, 1.001, 0.999, 1.0, 1.4], []),  # many deviations, yet little in itself
        ([0.5, 1.0, 1.5, 2.0, 3.5], []),  # much in itself, yet within the spread
        ([1.0, 1.0, 1.0, 1.6], [3]),
        ([2.0] * 5, []),
        ([3.0], []),
        ([0.0, 0.0, 0.0, 0.1], [3]),
        ([1.5, 1.6, 1.6, 1.6, 1.7, 2.4, 2.5, 2.6], []),  # two kinds of good parts
        ([1.5, 1.6, 1.6, 1.6, 1.7, 2.4, 2.5, 2.6, 3.5], [8]),  # and a bad one
    ],
)
def test_outliers(values: list[float], found: list[int]) -> None:
    assert thresholds.outliers(values) == thresholds.outliers(np.array(values)) == found


@given(scores)
def test_outliers_by_definition(values: list[float]) -> None:
    median = (
        sorted(values)[len(values) // 2]
        if len(values) % 2
        else sum(sorted(values)[len(values) // 2 - 1 : len(values) // 2 + 1]) / 2
    )
    deviations = sorted(abs(v - median) for v in values)
    half = len(values) // 2
    spread = 1.4826 * (deviations[half] if len(values) % 2 else (deviations[half - 1] + deviations[half]) / 2)
    far = [v for v in values if v > 1.5 * median and v > median + 3.5 * spread]
    apart = [v for v in far if v > 1.2 * max(w for w in values if w < v)]
    assert thresholds.outliers(values) == [i for i, v in enumerate(values) if apart and v >= min(apart)]


@given(
    st.lists(st.floats(0.5, 2), min_size=1, max_size=20),
    st.floats(0.5, 0.999),
)
def test_predictive_quantile_is_that_of_students_t(values: list[float], quantile: float) -> None:
    logs, worth = np.log(values), thresholds.SPREAD_WORTH
    freedom = worth + len(logs) - 1
    variance = (worth * thresholds.SPREAD**2 + len(logs) * logs.var()) / freedom
    expected = student_t(freedom, logs.mean(), np.sqrt(variance * (1 + 1 / len(logs)))).ppf(quantile)
    assert thresholds.predictive_quantile(values, quantile) == pytest.approx(np.exp(expected), rel=1e-3)


def test_predictive_quantile_keeps_its_promise_where_scores_are_as_the_model_says() -> None:
    rng = np.random.default_rng(0)
    for count in (4, 8, 16, 64):
        above = []
        for _ in range(300):
            spread = thresholds.SPREAD / np.sqrt(rng.chisquare(thresholds.SPREAD_WORTH) / thresholds.SPREAD_WORTH)
            threshold = thresholds.predictive_quantile(np.exp(rng.normal(1, spread, count)), 0.95)
            above.append(np.mean(np.exp(rng.normal(1, spread, 200)) > threshold))
        assert 0.025 < np.mean(above) < 0.1


@pytest.mark.parametrize("quantile", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_predictive_quantile_refuses(quantile: float) -> None:
    with pytest.raises(InputError, match="quantile"):
        thresholds.predictive_quantile([0.5, 0.6], quantile)
    with pytest.raises(InputError, match="finite scores"):
        thresholds.predictive_quantile([0.5, quantile * float("inf")], 0.9)


def test_predictive_quantile_of_copies_is_zero_and_of_one_copy_among_others_finite() -> None:
    assert thresholds.predictive_quantile([0.0, 0.0], 0.97) == 0
    assert 1 < thresholds.predictive_quantile([0.0, 1.0, 1.1], 0.97) < float("inf")


def test_expectation_in_words() -> None:
    assert thresholds.expectation(0.97, 8) == "about 1 in 33 good parts flagged, from 8 photos"
