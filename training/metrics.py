"""The seven numbers of a class: AUROC, AP and F1-max of its images and pixels, and AUPRO, exact or the original's.

A mask value above 0 is a defect pixel, whatever its gray. Scores keep their precision (half becomes float32), so ties
stay ties. Normal pixels are sorted in chunks, so that a call needs little beyond its arguments: a byte per pixel, and
100 MB or, if more, 130 bytes per defect pixel.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from math import nan
from typing import TypeAlias

import numpy as np
import torch
from scipy import ndimage
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from adfeatures.errors import InputError

Array: TypeAlias = np.ndarray | torch.Tensor

LIMIT = 0.3
# Of the original's AUPRO.
THRESHOLDS = 200
# Smaller chunks need less memory, but every threshold is looked up in each of them.
PIXELS_PER_CHUNK = 2**23
EIGHT_NEIGHBORS = np.ones((3, 3))


@dataclass(frozen=True)
class Metrics:
    """Results of one class as fractions; NaN where a metric is not defined."""

    image_auroc: float
    image_ap: float
    image_f1: float
    pixel_auroc: float
    pixel_ap: float
    pixel_f1: float
    aupro: float


@dataclass(frozen=True)
class Criterion:
    """A metric that selects checkpoints, and the names that it goes by."""

    key: str  # in the names of checkpoints and in logs
    field: str  # in `Metrics`
    stored: str  # in the files of weights, the authors' own as well
    title: str  # for people


CRITERIA = (
    Criterion("img", "image_auroc", "img_auc", "image AUROC"),
    Criterion("pix", "pixel_auroc", "pix_auc", "pixel AUROC"),
    Criterion("pro", "aupro", "pix_pro", "AUPRO"),
)
# The method that each kind of checkpoint is selected by: checkpoints_pro_norm has the best AUPRO of FeatureNorm.
SELECTED_BY = {"norm": "FeatureNorm", "angle": "PatchCore"}


def evaluate(maps: Array, masks: Array, labels: Array, scores: Array | None = None) -> Metrics:
    """The seven metrics of one class, pixels pooled over all its images.

    With images or pixels of one kind only, their metrics are NaN and an UndefinedMetricWarning names them.

    Args:
        maps: Anomaly maps (N, H, W) or (N, 1, H, W), higher meaning more anomalous.
        masks: Ground truth of the same shape; above 0 is defect.
        labels: (N,), above 0 for an anomalous image.
        scores: Image scores (N,); by default the maximum of each map.

    Raises:
        InputError: For shapes that do not fit each other, no image, or scores that are not finite.
    """
    maps, defect = _checked(maps, masks)
    anomalous = _array(labels) > 0
    scores = maps.max(axis=(1, 2)) if scores is None else _array(scores)
    if not anomalous.shape == scores.shape == maps.shape[:1]:
        raise InputError(
            f"{len(maps)} maps need as many labels and image scores, got shapes {anomalous.shape} and {scores.shape}."
        )
    if not np.isfinite(scores).all():
        raise InputError(
            "Image scores hold NaN or infinite values. Look for them in the features or in what made the scores."
        )
    images = _of_both_kinds("image_auroc, image_ap, image_f1", "image", anomalous)
    pixels = _of_both_kinds("pixel_auroc, pixel_ap, pixel_f1, aupro", "pixel", defect)
    of_images = _image_metrics(scores, anomalous) if images else [nan] * 3
    of_pixels = _pixel_metrics(maps, defect) if pixels else [nan] * 4
    return Metrics(*of_images, *of_pixels)


def aupro(maps: Array, masks: Array, limit: float = LIMIT) -> float:
    """Exact area under the per-region-overlap curve up to a false positive rate, divided by that rate: in [0, 1].

    Every distinct score is a threshold, equal scores being passed at once. PRO is the mean, over the 8-connected
    regions of all masks, of the fraction detected; FPR that of all other pixels. The curve starts at (0, 0),
    runs straight between neighboring thresholds, is interpolated at ``limit`` and integrated by the trapezoid rule. So
    maps of one value give limit / 2, the diagonal.

    Args:
        maps: As for ``evaluate``.
        masks: As for ``evaluate``.
        limit: False positive rate up to which to integrate, in (0, 1].

    Returns:
        The area; NaN, with an UndefinedMetricWarning, where no pixel or every pixel is defect.

    Raises:
        InputError: As ``evaluate``, and for a limit out of range.
    """
    if not 0 < limit <= 1:
        raise InputError(f"The limit of AUPRO is a false positive rate in (0, 1], got {limit}.")
    maps, defect = _checked(maps, masks)
    if not _of_both_kinds("aupro", "pixel", defect):
        return nan
    ranking = _Ranking(maps, defect)
    return ranking.area(ranking.overlap(defect), limit)


def aupro_original(maps: Array, masks: Array) -> float:
    """AUPRO as the original code approximates it, for comparison with published tables.

    200 thresholds lie evenly from the lowest score up to, and without, the highest; points with FPR < 0.3 are kept and
    their FPR is stretched to [0, 1]. Two points or fewer give 0.5. Where the original fails or divides by zero: maps of
    one value give 0.5, and kept points of one FPR give their mean PRO.

    Args, returns and raises as ``aupro``.
    """
    maps, defect = _checked(maps, masks)
    if not _of_both_kinds("aupro_original", "pixel", defect):
        return nan
    low, high = maps.min(), maps.max()
    step = maps.dtype.type((high - low) / THRESHOLDS)
    if step == 0:
        return 0.5
    # With the rounding of arange, whose first step is in the precision of the maps and which may add a threshold at the
    # highest score: it shows in the sixth decimal of the result, or where there are few pixels before.
    thresholds = np.arange(low, high, step)
    passed = thresholds.searchsorted(maps[defect], side="left")
    pro = np.bincount(passed, weights=_shares(defect), minlength=len(thresholds) + 1)[:0:-1].cumsum()[::-1]
    false = np.zeros(len(thresholds), dtype=np.int64)
    for normal in _sorted_normals(maps, defect):
        false += len(normal) - normal.searchsorted(thresholds, side="right")
    fpr = false / (defect.size - len(passed))
    kept = fpr < LIMIT
    fpr, pro = fpr[kept], pro[kept]
    if len(fpr) <= 2:
        return 0.5
    width = fpr.max() - fpr.min()
    return float(auc(fpr, pro) / width if width else pro.mean())


def curves(maps: Array, masks: Array, rates: Array) -> tuple[np.ndarray, np.ndarray]:
    """The ROC and the PRO curve of pixels: which fraction of defect pixels, and of a region on average, is detected.

    Args:
        maps: As for ``evaluate``.
        masks: As for ``evaluate``.
        rates: False positive rates (R,), 0 to 1.

    Returns:
        Two arrays (R,); NaN, with an UndefinedMetricWarning, where no pixel or every pixel is defect. Raises as
        ``evaluate``.
    """
    maps, defect = _checked(maps, masks)
    if not _of_both_kinds("curves", "pixel", defect):
        return np.full(len(rates), nan), np.full(len(rates), nan)
    ranking = _Ranking(maps, defect)
    roc, pro = ranking.curve(ranking.found / len(ranking.order)), ranking.curve(ranking.overlap(defect))
    return np.interp(_array(rates), *roc), np.interp(_array(rates), *pro)


def _image_metrics(scores: np.ndarray, anomalous: np.ndarray) -> list[float]:
    """AUROC, AP and F1-max of scores (N,)."""
    precision, recall, _ = precision_recall_curve(anomalous, scores)
    # Where both are 0 so is F1.
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    return [float(roc_auc_score(anomalous, scores)), float(average_precision_score(anomalous, scores)), float(f1.max())]


def _pixel_metrics(maps: np.ndarray, defect: np.ndarray) -> list[float]:
    """AUROC, AP, F1-max and AUPRO of the pixels of (N, H, W).

    From one ranking, for scikit-learn would sort all pixels three times and hold several float64 copies of them.
    """
    ranking = _Ranking(maps, defect)
    found, false, total = ranking.found, ranking.false, len(ranking.order)
    recall = found / total
    ap = float(np.diff(recall, prepend=0) @ (found / (found + false)))
    f1 = float((2 * found / (found + false + total)).max())
    return [ranking.area(recall, 1.0), ap, f1, ranking.area(ranking.overlap(defect), LIMIT)]


class _Ranking:
    """Pixels counted at the T distinct scores of defect pixels, from the highest down.

    No other threshold matters: between two of them nothing but false positives is added, which raises no metric and
    bends no curve.
    """

    def __init__(self, maps: np.ndarray, defect: np.ndarray) -> None:
        scores = maps[defect]
        # The defect pixels from the highest score down, as indices in the order of ``maps[defect]``.
        self.order = scores.argsort()[::-1]
        scores = scores[self.order]
        # Of each threshold (T,): defect pixels at or above it, normal pixels above it, normal pixels at or above it.
        self.found = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) + 1
        self.above, self.false = np.zeros_like(self.found), np.zeros_like(self.found)
        thresholds = scores[self.found - 1]
        for normal in _sorted_normals(maps, defect):
            self.above += len(normal) - normal.searchsorted(thresholds, side="right")
            self.false += len(normal) - normal.searchsorted(thresholds, side="left")
        self.normal = defect.size - len(scores)

    def overlap(self, defect: np.ndarray) -> np.ndarray:
        """PRO (T,) at each score."""
        return _shares(defect)[self.order].cumsum()[self.found - 1]

    def curve(self, detected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """FPR from 0 to 1, and ``detected`` (T,) over it.

        Level from each score to the next one of a defect pixel, and a slope where normal pixels share that.
        """
        x = np.stack([np.append(0, self.false), np.append(self.above, self.normal)], axis=1).ravel() / self.normal
        return x, np.append(0, detected).repeat(2)

    def area(self, detected: np.ndarray, limit: float) -> float:
        """Area under ``detected`` (T,) over FPR from 0 to ``limit``, divided by ``limit``."""
        x, y = self.curve(detected)
        outside = x.searchsorted(limit, side="right")
        x[outside:], y[outside:] = limit, np.interp(limit, x, y)
        return float(auc(x, y) / limit)


def _shares(defect: np.ndarray) -> np.ndarray:
    """What each defect pixel, in the order of ``maps[defect]``, adds to PRO: 1 / (pixels of its region * regions)."""
    areas, area_of_pixels = [], []
    for mask in defect[defect.any(axis=(1, 2))]:
        regions, _ = ndimage.label(mask, EIGHT_NEIGHBORS)
        region_of_pixels = regions[mask] - 1
        areas.append(np.bincount(region_of_pixels))
        area_of_pixels.append(areas[-1][region_of_pixels])
    return 1 / (np.concatenate(area_of_pixels) * sum(map(len, areas)))


def _sorted_normals(maps: np.ndarray, defect: np.ndarray) -> Iterator[np.ndarray]:
    """The scores of the normal pixels, ascending, in chunks of whole images."""
    images = max(1, PIXELS_PER_CHUNK // maps[0].size)
    for start in range(0, len(maps), images):
        chunk = maps[start : start + images][~defect[start : start + images]]
        chunk.sort()
        yield chunk


def _of_both_kinds(metrics: str, unit: str, positive: np.ndarray) -> bool:
    """Whether images or pixels of both kinds are there; warns, naming the metrics that are NaN, where not."""
    some, every = positive.any(), positive.all()
    if some and not every:
        return True
    warnings.warn(
        f"{metrics}: NaN, since {'every' if every else 'no'} {unit} is anomalous.", UndefinedMetricWarning, stacklevel=3
    )
    return False


def _checked(maps: Array, masks: Array) -> tuple[np.ndarray, np.ndarray]:
    """Maps (N, H, W), float32 or float64, and where they lie over defects, bool."""
    arrays = map(_array, (maps, masks))
    maps, masks = (array[:, 0] if array.ndim == 4 and array.shape[1] == 1 else array for array in arrays)
    if maps.ndim != 3 or not maps.size or maps.shape != masks.shape:
        raise InputError(
            f"Maps and masks must be of one shape (N, H, W), not empty, got {maps.shape} and {masks.shape}. "
            "Resize the masks."
        )
    maps = maps.astype(np.result_type(maps, np.float32), copy=False)
    # Both are NaN where any score is, and need no copy.
    if not np.isfinite([maps.min(), maps.max()]).all():
        raise InputError(
            "Maps hold NaN or infinite values. Look for them in the features or in the method that made the maps."
        )
    return maps, masks > 0


def _array(values: Array) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        # numpy has no bfloat16.
        values = (values.float() if values.dtype == torch.bfloat16 else values).detach().cpu()
    return np.asarray(values)
