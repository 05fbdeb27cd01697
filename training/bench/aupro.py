"""AUPRO, exact and as the original approximates it, against the original algorithm as a plain loop; and the cost of a large class."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
from scipy import ndimage
from skimage import measure
from sklearn.metrics import auc

from ..metrics import aupro, aupro_original, evaluate
from .timing import Row, compare, seconds


def rows(quick: bool = False) -> Iterator[Row]:
    """Rows of the table: both AUPROs on 100 maps of 224 x 224 (quick: 20), all seven metrics on 1000 (quick: 100)."""
    maps, masks = example(20 if quick else 100)
    expected = naive(maps, masks)
    for name, function in (("exact", aupro), ("as the original", aupro_original)):
        yield compare(
            f"AUPRO {name}, {len(maps)} maps of 224 x 224",
            lambda function=function: function(maps, masks),
            lambda: naive(maps, masks),
            repeats=1,
            note=f"AUPRO {function(maps, masks):.6f}, naive {expected:.6f}",
        )

    maps, masks = example(100 if quick else 1000)
    labels = masks.any(axis=(1, 2))
    ours = seconds(lambda: evaluate(maps, masks, labels))
    tracemalloc.start()
    evaluate(maps, masks, labels)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    note = f"peak {peak / 1e6:.0f} MB beyond maps and masks of {(maps.nbytes + masks.nbytes) / 1e6:.0f} MB, {masks.mean():.1%} defect"
    yield Row(f"all seven metrics, {len(maps)} maps of 224 x 224", ours, note=note)


def example(count: int, side: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """Maps (count, side, side) float32, smooth as those of a method, and masks of 0 and 1: every second image has two round defects."""
    random = np.random.default_rng(0)
    masks = np.zeros((count, side, side), np.uint8)
    y, x = np.ogrid[:side, :side]
    for mask in masks[::2]:
        for row, column, radius in random.uniform((0, 0, side / 40), (side, side, side / 10), size=(2, 3)):
            mask |= (y - row) ** 2 + (x - column) ** 2 <= radius**2
    noise = random.standard_normal(masks.shape, dtype=np.float32)
    sigma = (0, side / 56, side / 56)
    return ndimage.gaussian_filter(noise + 0.3 * masks, sigma, output=np.float32), masks


def naive(maps: np.ndarray, masks: np.ndarray) -> float:
    """The original's approximate AUPRO by its plain algorithm: the regions of every mask are found anew at each of the 200 thresholds."""
    low, high = maps.min(), maps.max()
    normal = masks == 0
    pros, rates = [], []
    for threshold in np.arange(low, high, (high - low) / 200):
        detected = maps > threshold
        overlaps = []
        for found, mask in zip(detected, masks, strict=True):
            for region in measure.regionprops(measure.label(mask)):
                overlaps.append(found[tuple(region.coords.T)].sum() / region.area)
        pros.append(np.mean(overlaps))
        rates.append((detected & normal).sum() / normal.sum())
    pro, fpr = np.array(pros), np.array(rates)
    kept = fpr < 0.3
    if kept.sum() <= 2:
        return 0.5
    fpr = fpr[kept] - fpr[kept].min()
    return float(auc(fpr / fpr.max(), pro[kept]))
