"""AUPRO, exact and as the original approximates it, against the original's plain loop; the cost of a large class."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from functools import partial

import numpy as np
from scipy import ndimage
from skimage import measure
from sklearn.metrics import auc

from adfeatures.measuring import Measurement, compare, seconds

from ..metrics import aupro, aupro_original, evaluate


def rows(quick: bool = False) -> Iterator[Measurement]:
    """Both AUPROs on 100 maps of 224 x 224 (quick: 20), all seven metrics on 1000 (quick: 100)."""
    maps, masks = example(20 if quick else 100)
    plain, expected = partial(naive, maps, masks), naive(maps, masks)
    for name, function in (("exact", aupro), ("as the original", aupro_original)):
        what = f"AUPRO {name}, {len(maps)} maps of 224 x 224"
        note = f"AUPRO {function(maps, masks):.6f}, naive {expected:.6f}"
        yield compare(what, partial(function, maps, masks), plain, repeats=1, note=note)
    maps, masks = example(100 if quick else 1000)
    everything = partial(evaluate, maps, masks, masks.max(axis=(1, 2)))
    taken = seconds(everything)
    tracemalloc.start()
    everything()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    megabytes = (maps.nbytes + masks.nbytes) / 1e6
    note = f"peak {peak / 1e6:.0f} MB beyond maps and masks of {megabytes:.0f} MB, {masks.mean():.1%} defect"
    yield Measurement.of_runs(f"all seven metrics, {len(maps)} maps of 224 x 224", [taken], note=note)


def example(count: int, side: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """Maps (count, side, side) float32, smooth as those of a method, and masks of 0 and 1.

    Every second image has two round defects.
    """
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
    """The original's approximate AUPRO by its plain algorithm: all regions found anew at each of the 200 thresholds."""
    low, high = maps.min(), maps.max()
    normal = masks == 0
    pros, rates = [], []
    # NumPy 1 would divide in float64 and compare in float32.
    for threshold in np.arange(low, high, (high - low) / low.dtype.type(200)):
        detected = maps > np.asarray([threshold])
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
