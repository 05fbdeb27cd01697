"""From features to anomaly maps and image scores.

A scorer says how a model scores: what features it compares, what it takes from a reference bank when that is made, and
how residuals become anomaly maps. Models with a projector score by the norm of the projected residuals, models without
one by cosine distances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError, ReferencesError
from .reduction import reduce
from .thresholds import Tail

if TYPE_CHECKING:
    from .references import Exclude, ReferenceBank

# From residuals of all levels to features of all levels.
Project: TypeAlias = "Callable[[Sequence[Tensor]], Sequence[Tensor]]"

SIGMA = 4.0
# Zero padding reaches about this far into the maps of a convolutional backbone.
RINGS = 3
# The cosine distance of opposite features.
MAX_DISTANCE = 2


class AnomalyMap(NamedTuple):
    """Scores of a batch, >= 0 and unbounded: ``maps`` (B, H, W) at the input size, ``scores`` (B,) their maxima."""

    maps: Tensor
    scores: Tensor


class Scorer(Protocol):
    """How a model scores.

    Attributes:
        top: Top of the fixed color scale of maps where no threshold gives one.
        tail: How thresholds are taken from the scores of normal images.
        form: What is done to the maps of the backbone, by name, which banks keep; None where nothing else was ever.
        looks: Channels that ``described`` puts behind the features.
    """

    top: float
    tail: Tail
    form: str | None
    looks: int

    def prepare(self, bank: ReferenceBank) -> None:
        """Let a new bank match images as the scorer needs it."""

    def features(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The features to compare, of maps of the backbone (B, C_l, h_l, w_l)."""

    def described(self, features: list[Tensor], images: Tensor) -> list[Tensor]:
        """Features with what else is kept of their patches of transformed images (B, 3, H, W) behind them."""

    def compare(self, bank: ReferenceBank, patches: Sequence[Tensor], exclude: Exclude = None) -> list[Tensor]:
        """What is scored of patches as ``described``, one map (B, S_l, h_l, w_l) per level, before any projector."""

    def scales(self, left_out: Iterable[Sequence[Tensor]], levels: int, counts: Tensor | None = None) -> Tensor | None:
        """What a bank keeps for the maps of later images.

        Args:
            left_out: What is scored of its images, each against the others alone, in batches of one (B, S_l, h_l, w_l)
                map per level. None of a single image.
            levels: Number of levels.
            counts: What counts of all these images, bool (K, H, W); None for all.
        """

    def patch_scores(self, features: Sequence[Tensor], scales: Sequence[Tensor | None]) -> list[Tensor]:
        """Scores of patches, one (B, h_l, w_l) per level, of which ``fuse`` makes anomaly maps.

        Args:
            features: What ``compare`` gave, projected where the model has a projector, one (B, S_l, h_l, w_l) per
                level.
            scales: Of the bank of each image, or of the one of all.
        """

    def leveled(self, maps: Tensor, counts: Tensor | None = None) -> Tensor:
        """Smoothed maps (B, H, W) without what may differ everywhere, of the pixels (B, H, W) that count."""


class ResidualScorer:
    """What scorers of residuals have in common."""

    form: str | None = None
    looks = 0

    def described(self, features: list[Tensor], images: Tensor) -> list[Tensor]:
        """The features as they are."""
        return features

    def compare(self, bank: ReferenceBank, patches: Sequence[Tensor], exclude: Exclude = None) -> list[Tensor]:
        """The residuals."""
        return bank.residuals(patches, exclude)

    def leveled(self, maps: Tensor, counts: Tensor | None = None) -> Tensor:
        """The maps as they are."""
        return maps


class FeatureNormScorer(ResidualScorer):
    """The norm of projected residuals (FeatureNorm, paper section 3.5)."""

    # Training pushes anomalous patches above 0.4 + 0.75.
    top = 1.15
    tail: Tail = "empirical"

    def prepare(self, bank: ReferenceBank) -> None:
        """Nothing: images are matched with all rows."""

    def features(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps as they are."""
        return list(maps)

    def scales(self, left_out: Iterable[Sequence[Tensor]], levels: int, counts: Tensor | None = None) -> None:
        """Nothing: training has given all norms one scale."""

    def patch_scores(self, features: Sequence[Tensor], scales: Sequence[Tensor | None]) -> list[Tensor]:
        """See ``patch_norms``."""
        return [patch_norms(level) for level in features]


class CosineRingScorer(ResidualScorer):
    """Cosine distances, as multiples of what normal patches show at the same distance from the border of the map.

    Args:
        typical: Distances between two normal images per level and ring, the interior last, (levels, RINGS + 1). They
            serve banks of a single image, which cannot show any. The default takes distances as they are there.
    """

    # A multiple of what normal patches show.
    top = 4.0
    tail: Tail = "empirical"

    def __init__(self, typical: Sequence[Sequence[float]] | None = None) -> None:
        self.typical = typical

    def prepare(self, bank: ReferenceBank) -> None:
        """Nothing: images are matched with all rows."""

    def features(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Features of unit length per patch."""
        return [F.normalize(level, dim=1) for level in maps]

    def scales(self, left_out: Iterable[Sequence[Tensor]], levels: int, counts: Tensor | None = None) -> Tensor:
        """Typical distances (levels, RINGS + 1) of the images of the bank from each other, float32 on the CPU."""
        batches = [list(map(self.distances, compared)) for compared in left_out]
        if not batches:
            return torch.ones(levels, RINGS + 1) if self.typical is None else torch.tensor(self.typical)
        return ring_scales([torch.cat(level) for level in zip(*batches, strict=True)], counts).cpu()

    def patch_scores(self, features: Sequence[Tensor], scales: Sequence[Tensor | None]) -> list[Tensor]:
        """The distances divided by the scales of each image's bank. Errors as of ``normal``."""
        return [self.distances(level) / own for level, own in zip(features, self.normal(features, scales), strict=True)]

    def distances(self, compared: Tensor) -> Tensor:
        """Distances (B, h, w) of what ``compare`` gave of a level."""
        return cosine_distances(compared)

    def normal(self, features: Sequence[Tensor], scales: Sequence[Tensor | None]) -> list[Tensor]:
        """What is normal at every cell, (B, h_l, w_l) per level, or (1, h_l, w_l) where the images share a bank.

        Raises:
            ReferencesError: For a bank without scales, as a model with a projector makes it.
        """
        of_images = [own for own in scales if own is not None]
        if len(of_images) != len(scales):
            raise ReferencesError("The bank was made by a model that scores otherwise. Set the references again.")
        of_levels = torch.stack(of_images, dim=1)
        return [of_cells(own, level) for level, own in zip(features, of_levels, strict=True)]


class LocalCosineScorer(CosineRingScorer):
    """Cosine distances between means of neighboring patches, in units of what is normal where they match.

    Some patches of good parts are alike in all of them, others never twice the same. So the distance to a row of the
    bank counts by (own / mean of own)^EXPONENT, at least FLOOR before the power, where own is the distance of that row
    to those of the other reference images. At most ROWS rows of a level are matched with, whatever the number of
    references; of photos that are cut into more than TILES tiles as many more, up to MOST times.

    A photo that is everywhere a little farther from the references, by its focus or light, has its map divided by the
    root of its mean, a tile by that of its own. Values count in that mean as CEILING at most, so that what has changed
    everywhere still stands out.
    """

    tail: Tail = "lognormal"
    form: str | None = "binomial"
    ROWS, EXPONENT, FLOOR, CEILING = 4096, 0.35, 0.25, 1.5
    TILES, MOST = 12, 16

    def prepare(self, bank: ReferenceBank) -> None:
        """Reduce what images are matched with, and learn what is normal there."""
        more = min(max(bank.views_per_image / self.TILES, 1), self.MOST)
        reduce(bank, round(self.ROWS * more))
        if bank.num_images > 1:
            self.learn(bank, bank.own_distances())

    def learn(self, bank: ReferenceBank, distances: Sequence[Tensor]) -> None:
        """Keep what is normal, of the distances (M_l, G) of the rows of each level to groups of other images."""
        nearest = [level.amin(dim=1) for level in distances]
        own = [level / level.mean().clamp_min(torch.finfo(level.dtype).eps) for level in nearest]
        # Distances are half the squares of residuals.
        bank.units = [level.clamp_min(self.FLOOR) ** (self.EXPONENT / 2) for level in own]

    def features(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Means of 3 x 3 patches, weighted 1, 2, 1 along either side, of unit length."""
        return [F.normalize(local_mean(level), dim=1) for level in maps]

    def leveled(self, maps: Tensor, counts: Tensor | None = None) -> Tensor:
        """Each map divided by the root of its mean, over what counts."""
        weights = torch.ones_like(maps) if counts is None else counts.to(maps)
        sums = (maps.clamp_max(self.CEILING) * weights).sum(dim=(1, 2), keepdim=True)
        means = sums / weights.sum(dim=(1, 2), keepdim=True).clamp_min(1)
        return maps / means.clamp_min(self.FLOOR).sqrt()


def color_scale(threshold: float | None, top: float) -> tuple[float, float]:
    """The fixed range of colors of maps: the threshold in the middle, where there is one."""
    return 0.0, 2 * threshold if threshold else top


@torch.no_grad()
def image_scores(
    batches: Iterable[Sequence[Tensor]],
    scales: Tensor | None,
    scorer: Scorer,
    project: Project,
    reduction: int,
    counts: Tensor | None = None,
) -> list[float]:
    """Scores of images, of their residuals in batches.

    Args:
        batches: One (B, C_l, h_l, w_l) map per level.
        scales: Of the bank.
        scorer: How the model scores.
        project: From residuals of all levels to what the scorer takes.
        reduction: Input pixels per cell of the first level.
        counts: What counts of all these images, bool (K, H, W); None for all.
    """
    scores: list[float] = []
    for residuals in batches:
        count, _, height, width = residuals[0].shape
        own = None if counts is None else counts[len(scores) : len(scores) + count]
        size = (height * reduction, width * reduction)
        maps = anomaly_maps(scorer, project(residuals), [scales] * count, size, SIGMA, own)
        scores += maps.amax(dim=(1, 2)).tolist()
    return scores


def anomaly_maps(
    scorer: Scorer,
    features: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    size: tuple[int, int],
    sigma: float = SIGMA,
    counts: Tensor | None = None,
) -> Tensor:
    """Maps (B, H, W) as a scorer makes them. Arguments as of its ``patch_scores`` and of ``fuse``."""
    return scorer.leveled(fuse(scorer.patch_scores(features, scales), size, sigma, counts), counts)


def feature_norm_map(features: Sequence[Tensor], size: tuple[int, int], sigma: float = SIGMA) -> Tensor:
    """Anomaly maps from the norms of projected residual features (FeatureNorm, paper section 3.5).

    Args:
        features: One (B, C_l, h_l, w_l) map per level.
        size: Height and width of the result in pixels.
        sigma: Standard deviation of the Gaussian smoothing in pixels of the result; 0 for none.

    Returns:
        (B, H, W), the mean over the levels.
    """
    return fuse([patch_norms(level) for level in features], size, sigma)


def patch_norms(features: Tensor) -> Tensor:
    """Scores (B, h, w) of patches (B, C, h, w): sqrt(norm + 1) - 1.

    The paper writes the pseudo-Huber form with the squared norm under the root; the published code, and so the
    published weights, do not.
    """
    return (torch.linalg.vector_norm(features.float(), dim=1) + 1).sqrt() - 1


def cosine_distances(residuals: Tensor) -> Tensor:
    """Cosine distances (B, h, w) in [0, 2], from residuals (B, C, h, w) between features of unit length."""
    return residuals.float().square().sum(dim=1) / 2


def ring_scales(distances: Sequence[Tensor], counts: Tensor | None = None) -> Tensor:
    """Typical leave-one-out distances (levels, RINGS + 1) of normal patches, interior last, from maps (K, h_l, w_l).

    Patches of which nothing counts, by the pixels (K, H, W) that do, are left out.

    Zero padding makes the border of a map stand out: outer rings count by the square of their level over the
    interior's, never below 1.
    """
    scales = []
    for level in distances:
        ring = _rings(level.shape[-2], level.shape[-1], level.device).expand_as(level)
        if counts is not None:
            counted = cells_of(counts.to(level.device), (level.shape[1], level.shape[2]))
            level, ring = level[counted], ring[counted]
        means = torch.stack([level[ring == r].mean() if (ring == r).any() else level.mean() for r in range(RINGS + 1)])
        interior = means[-1].clamp_min(torch.finfo(means.dtype).eps)
        scales.append(interior * (means / interior).square().clamp_min(1))
    return torch.stack(scales)


def of_cells(scales: Tensor, maps: Tensor) -> Tensor:
    """Scales (B, RINGS + 1) of a level as one for every cell (B, h, w) of its maps (B, C, h, w)."""
    return scales.to(maps.device)[..., _rings(maps.shape[-2], maps.shape[-1], maps.device)]


def local_mean(level: Tensor) -> Tensor:
    """Means of 3 x 3 patches, weighted 1, 2, 1 along either side, of maps (B, C, h, w)."""
    # A mean of 2 x 2 of means of 2 x 2 has these weights.
    return F.avg_pool2d(F.avg_pool2d(F.pad(level, (1, 1, 1, 1), mode="replicate"), 2, 1), 2, 1)


def _rings(height: int, width: int, device: torch.device) -> Tensor:
    """Distance (h, w) of every cell from the border, at most RINGS."""
    rows = torch.minimum(torch.arange(height), torch.arange(height).flip(0))
    columns = torch.minimum(torch.arange(width), torch.arange(width).flip(0))
    return torch.minimum(rows[:, None], columns[None]).clamp_max(RINGS).to(device)


def cells_of(counts: Tensor, grid: tuple[int, int]) -> Tensor:
    """The cells of a grid that hold a pixel which counts, bool (B, h, w), of the pixels (B, H, W) that do."""
    return F.adaptive_max_pool2d(counts[:, None].float(), grid)[:, 0] > 0


def fuse(
    patch_scores: Sequence[Tensor], size: tuple[int, int], sigma: float = SIGMA, counts: Tensor | None = None
) -> Tensor:
    """Upsample the scores (B, h_l, w_l) of each level to ``size``, average the levels and smooth: (B, H, W).

    With the pixels that count, bool (B, H, W), averages are over the cells that hold such ones, and 0 elsewhere.
    """
    if counts is not None:
        counts = counts.to(patch_scores[0].device)
        cells = [cells_of(counts, (level.shape[1], level.shape[2])).to(level.dtype) for level in patch_scores]
        parts = fuse([level * own for level, own in zip(patch_scores, cells, strict=True)], size, sigma)
        wholes = fuse(cells, size, sigma)
        return torch.where(counts, parts / wholes.clamp_min(torch.finfo(wholes.dtype).eps), 0)
    levels = [
        F.interpolate(level[:, None], size=size, mode="bilinear", align_corners=True)[:, 0] for level in patch_scores
    ]
    return smooth(torch.stack(levels).mean(dim=0), sigma)


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian smoothing of (B, H, W) as scipy.ndimage.gaussian_filter does it: reflected borders, cut at 4 sigma.

    Raises:
        InputError: For a sigma that is negative or not finite.
    """
    if not 0 <= sigma < float("inf"):
        raise InputError(f"sigma must be a number of pixels, 0 or more, got {sigma}.")
    if sigma == 0:
        return maps
    height, width = maps.shape[-2:]
    rows, columns = _blurs(height, width, sigma).to(maps).split((height * height, width * width))
    with torch.autocast(maps.device.type, enabled=False):
        return rows.view(height, height) @ maps @ columns.view(width, width).T


@torch.compiler.assume_constant_result
def _blurs(height: int, width: int, sigma: float) -> Tensor:
    """The matrices of both axes in one vector, since torch.compile takes one constant of a function, not two."""
    return torch.from_numpy(np.concatenate([_blur_matrix(side, sigma).ravel() for side in (height, width)]))


@lru_cache(maxsize=8)
def _blur_matrix(side: int, sigma: float) -> np.ndarray:
    """The smoothing of one axis as a (side, side) matrix."""
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    sources = (np.arange(side)[:, None] + offsets) % (2 * side)
    matrix = np.zeros((side, side))
    np.add.at(matrix, (np.arange(side)[:, None], np.minimum(sources, 2 * side - 1 - sources)), weights / weights.sum())
    return matrix.astype(np.float32)


def auroc(scores: Sequence[float] | np.ndarray, labels: Sequence[int] | Sequence[bool] | np.ndarray) -> float:
    """Area under the ROC curve: how often an anomalous sample (label 1) scores above a normal one (0), ties half.

    Raises:
        InputError: If a score is not finite, or only one of the labels is there.
    """
    values, positive = np.asarray(scores, dtype=np.float64).ravel(), np.asarray(labels).ravel() > 0
    if values.shape != positive.shape or not np.isfinite(values).all() or positive.all() or not positive.any():
        raise InputError("AUROC needs finite scores and labels of both kinds, one label for each score.")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n_positive = int(positive.sum())
    return float(
        (ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * (positive.size - n_positive))
    )
