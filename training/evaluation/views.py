"""Parts that are photographed from several sides: scores of each side and of the part, as in Real-IAD's paper."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from math import nan

from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import roc_auc_score
from torch import Tensor

from .. import metrics
from ..data.items import Item
from ..methods.base import Predictions

PART_AUROC = "part_auroc"


def part_auroc(items: Sequence[Item], scores: Tensor, labels: Tensor) -> float:
    """AUROC of parts: the score of a part is the highest of its views, and one anomalous view makes it anomalous.

    Args:
        items: N images with the name of their part.
        scores: (N,).
        labels: (N,).

    Returns:
        A fraction, NaN where all parts are of one kind.
    """
    parts: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for item, score, label in zip(items, scores.tolist(), labels.tolist(), strict=True):
        parts[item.sample].append((score, label))
    highest, anomalous = zip(*(map(max, zip(*views, strict=True)) for views in parts.values()), strict=True)
    return float(roc_auc_score(anomalous, highest)) if len(set(anomalous)) == 2 else nan


def by_view(
    items: Sequence[Item], predictions: Predictions, masks: Tensor, labels: Tensor
) -> dict[str, dict[str, float]]:
    """The metrics of the images of each view, NaN where one is not defined; none where a data set has no views."""
    found = {}
    for view in sorted({item.view for item in items if item.view}):
        own = [index for index, item in enumerate(items) if item.view == view]
        with warnings.catch_warnings():
            # A side that never shows a defect is common, and has a dash in the tables.
            warnings.simplefilter("ignore", UndefinedMetricWarning)
            values = metrics.evaluate(predictions.maps[own], masks[own], labels[own], predictions.scores[own])
        found[view] = asdict(values)
    return found
