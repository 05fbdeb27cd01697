"""Thresholds from the scores of normal images, and which of these images looks unlike the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from .errors import InputError

# How a threshold is taken from the scores of normal images: their own quantile, or that of the score of a next one.
Tail: TypeAlias = Literal["empirical", "lognormal"]
# The quantile where none is asked for.
QUANTILES: dict[Tail, float] = {"empirical": 0.99, "lognormal": 0.95}
# A standard deviation of the logarithms of normal scores with which about as many good pictures of the development
# products are flagged as promised, from 4 to 64 references; and how many scores that knowledge is worth.
SPREAD, SPREAD_WORTH = 0.12, 8
# How much higher than the next lower score that of an outlier is.
GAP = 1.2


def normal_quantile(scores: Sequence[float] | np.ndarray, quantile: float) -> float:
    """The threshold that the given fraction of normal scores stays below, interpolated linearly as by numpy.quantile.

    Raises:
        InputError: For a quantile outside (0, 1], no scores, or scores that are not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not 0 < quantile <= 1:
        raise InputError(f"The quantile must lie in (0, 1], got {quantile}.")
    if not values.size or not np.isfinite(values).all():
        raise InputError("A threshold needs at least one normal image, and finite scores.")
    return float(np.quantile(values, quantile))


def threshold_of(scores: Sequence[float] | np.ndarray, quantile: float, tail: Tail) -> float:
    """The threshold that the given fraction of normal images stays below. Errors as of the two ways to take it."""
    return (normal_quantile if tail == "empirical" else predictive_quantile)(scores, quantile)


def expectation(quantile: float, count: int) -> str:
    """In words, what to expect of a threshold from this many normal images."""
    return f"about 1 in {1 / max(1 - quantile, 1e-6):.0f} good parts flagged, from {count} photos"


def predictive_quantile(scores: Sequence[float] | np.ndarray, quantile: float) -> float:
    """The threshold that the score of a next normal image stays below with a probability, from few scores.

    The logarithms of scores are taken as normally distributed, with a prior on their variance (scaled inverse
    chi-squared, SPREAD and SPREAD_WORTH) and none on their mean, so that the next one follows Student's t.

    Raises:
        InputError: For a quantile outside (0, 1), no scores, or scores that are not finite.
    """
    largest = normal_quantile(scores, 1)
    if not 0 < quantile < 1:
        raise InputError(
            f"The quantile must lie between 0 and 1, got {quantile}. Give 0.99, say, to flag about 1 in 100 good parts."
        )
    if largest == 0:
        return 0.0
    logs = np.log(np.maximum(np.asarray(scores, dtype=np.float64), 1e-3 * largest))
    freedom = SPREAD_WORTH + len(logs) - 1
    variance = (SPREAD_WORTH * SPREAD**2 + np.square(logs - logs.mean()).sum()) / freedom
    return float(np.exp(logs.mean() + _student(quantile, freedom) * np.sqrt(variance * (1 + 1 / len(logs)))))


def _student(quantile: float, freedom: int) -> float:
    """The quantile of Student's t, whose density over the angle atan(t / sqrt(freedom)) is cos^(freedom - 1)."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, 100_001)
    density = np.cos(angles).clip(0) ** (freedom - 1)
    below = np.cumsum((density[1:] + density[:-1]) / 2)
    angle = np.interp(quantile * below[-1], np.concatenate([[0], below]), angles)
    return float(np.sqrt(freedom) * np.tan(angle))


def outliers(scores: Sequence[float] | np.ndarray) -> list[int]:
    """Indices of scores far above the others.

    Over 1.5 medians, 3.5 robust standard deviations from the median, and apart: parts that come in two kinds, both
    good, have no score that a gap of a fifth sets off from the next lower one.
    """
    values = np.asarray(scores, dtype=np.float64)
    median = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - median))
    ordered = np.sort(values)
    far = (ordered > 1.5 * median) & (ordered > median + 3.5 * spread)
    apart = ordered > GAP * np.concatenate([ordered[:1], ordered[:-1]])
    lowest = min(ordered[far & apart], default=np.inf)
    return [int(i) for i in np.flatnonzero(values >= lowest)]
