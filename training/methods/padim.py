"""PaDiM (Defard et al. 2021): the Mahalanobis distance of every patch from the normal patches at its position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from adfeatures import scoring
from adfeatures.errors import InputError, ReferencesError

from .base import Batch, Extractor, Loader, Predictions
from .trained import feature_maps, gather

# Images per block of samples: large, so that the allocator returns the memory of a freed block.
BLOCK = 64
# Samples that are added up together.
SUMMED = 128
# Positions are worked on together for as long as their matrices in float64 take no more than this.
CHUNK_BYTES = 4 * 2**20
# Of one level, in float64. Covariances that take more than this are kept in float32, as the original keeps all of them.
LEVEL_BYTES = 600 * 2**20


@dataclass(eq=False)
class PaDiM:
    """Fit a normal distribution to the patches at each position of each level; score by Mahalanobis distances from it.

    As ADPretrain uses it: all channels of all levels, each level on its own, the mean of their maps. The original also
    rescales the maps by the extremes of the whole test set, which moves no ranking metric; here a map depends on its
    own image alone.

    Raises:
        InputError: For an epsilon that is not above 0.
    """

    extractor: Extractor  # of the features of a batch
    _: KW_ONLY
    epsilon: float = 0.01  # what is added to the diagonal of the covariances, above 0
    sigma: float = scoring.SIGMA  # of the Gaussian smoothing, in pixels of the images
    _levels: list[Gaussians] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise InputError(
                f"PaDiM needs epsilon above 0, got {self.epsilon}: "
                "the covariances of few images have no inverse without it."
            )

    def fit(self, loader: Loader) -> PaDiM:
        """Estimate the distributions from normal images, in one pass and with bounded memory. A single image will do.

        Raises:
            InputError: For no images, features that are not finite, or maps of changing shapes.
        """
        self._levels = []
        levels: list[Gaussians] = []
        for batch in loader:
            features = feature_maps(self.extractor, batch)
            levels = levels or [Gaussians(level, self.epsilon) for level in features]
            for gaussians, level in zip(levels, features, strict=True):
                gaussians.add(level)
        if not levels:
            raise InputError("PaDiM learns from normal images, and the loader gives none.")
        for gaussians in levels:
            gaussians.finish()
        self._levels = levels
        return self

    def predict(self, loader: Loader) -> Predictions:
        """Score the images of a loader. Their scores are the maxima of their smoothed maps.

        Raises:
            ReferencesError: Before ``fit``.
            InputError: For no images, images of another size than those of ``fit``, or features that are not finite.
        """
        if not self._levels:
            raise ReferencesError("PaDiM has no distributions to compare with yet: call fit first.")
        return gather(map(self._score, loader))

    def _score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        features = feature_maps(self.extractor, batch)
        distances = [gaussians.distances(level) for gaussians, level in zip(self._levels, features, strict=True)]
        maps = scoring.fuse(distances, batch["image"].shape[-2:], self.sigma)
        return maps, maps.amax(dim=(1, 2))


class Gaussians:
    """A normal distribution of C channels at each of P positions: mean, and covariance plus epsilon I.

    Covariances have N - 1 in the denominator. Nothing is inverted. The squared distance of a deviation d from the mean
    comes from a Cholesky factor in float64, one of two:

    * of the covariance S: |L^-1 d|^2 with S = L L^T;
    * for few images, of the N x N matrix of inner products of the centered samples X (N, C), by the identity of
      Woodbury: (|d|^2 - |W d|^2) / epsilon with W = L^-1 X and X X^T + (N - 1) epsilon I = L L^T.

    The second is the one for up to 3 C / 8 images, where it takes less memory and time, unless W takes more than
    LEVEL_BYTES. More images are added up in scatter matrices.

    Args:
        example: A map (B, C, h, w), for its shape and device.
        epsilon: What is added to the diagonal of the covariances.
    """

    def __init__(self, example: Tensor, epsilon: float) -> None:
        _, self.channels, *self.grid = example.shape
        self.positions = self.grid[0] * self.grid[1]
        self.few = min(3 * self.channels // 8, LEVEL_BYTES // (8 * self.positions * self.channels))
        self.epsilon = epsilon
        self.count = 0  # of the images in mean and scatter
        self.mean = example.new_zeros(self.positions, self.channels, dtype=torch.float64)
        # Sums of squared deviations from the mean, lower triangles (P, C (C + 1) / 2), and later the factors.
        self.scatter = self.factors = torch.empty(0)
        self.blocks: list[Tensor] = []  # of samples that are not in mean and scatter, (P, BLOCK, C) float32 each
        self.waiting = 0  # how many samples these hold
        self.whitened = torch.empty(0)  # W for few images, (P, N, C) float64
        self._memory = self.mean.new_empty(0)
        rows, columns = torch.tril_indices(self.channels, self.channels, device=example.device)
        self._lower = rows * self.channels + columns  # places of the lower triangle in a matrix, row after row

    def add(self, level: Tensor) -> None:
        """Take in the maps (B, C, h, w) of a batch."""
        for image in self._patches(level).unbind(dim=1):
            if self.waiting == BLOCK * len(self.blocks):
                self.blocks.append(image.new_empty(self.positions, BLOCK, self.channels))
            self.blocks[-1][:, self.waiting % BLOCK] = image
            self.waiting += 1
            # Until the scatter matrices take their memory, there is room for all samples that might do without them.
            if self.waiting > (SUMMED if len(self.scatter) else max(SUMMED, self.few)):
                self._add_to_scatter()

    def finish(self) -> None:
        """Compute the factors: no images come after this."""
        if self.waiting and (len(self.scatter) or self.waiting > self.few):
            self._add_to_scatter()
        if len(self.scatter):
            self.factors = self.scatter
            for chunk in self._chunks(self.channels**2):
                covariances = self._unpack(self.factors[chunk]).div_(max(self.count - 1, 1))
                self.factors[chunk] = self._pack(self._factor(covariances, self.epsilon))
            return
        self.whitened = self.mean.new_empty(self.positions, self.waiting, self.channels)
        for chunk in self._chunks(self.waiting * self.channels):
            samples = self._samples(chunk)
            self.mean[chunk] = samples.mean(dim=1)
            samples -= self.mean[chunk, None]
            factors = self._factor(samples @ samples.mT, max(self.waiting - 1, 1) * self.epsilon)
            self.whitened[chunk] = torch.linalg.solve_triangular(factors, samples, upper=False)
        self.blocks, self.waiting, self.count = [], 0, self.waiting

    def distances(self, level: Tensor) -> Tensor:
        """Mahalanobis distances (B, h, w), float32, of maps (B, C, h, w).

        Raises:
            InputError: For maps of another shape than those that came before.
        """
        deviations = self._patches(level).double() - self.mean[:, None]
        squared = deviations.new_empty(deviations.shape[:2])
        for chunk in self._chunks(self.channels * (self.channels if len(self.factors) else self.count)):
            own = deviations[chunk]
            if len(self.factors):
                factors = self._unpack(self.factors[chunk])
                squared[chunk] = torch.linalg.solve_triangular(factors, own.mT, upper=False).square().sum(dim=1)
            else:
                explained = own @ self.whitened[chunk].mT
                squared[chunk] = (own.square().sum(dim=2) - explained.square().sum(dim=2)) / self.epsilon
        # Near the span of the samples both terms of a difference agree in most digits, and rounding may leave less than
        # nothing.
        return squared.clamp_min(0).sqrt().float().T.unflatten(1, self.grid)

    def _add_to_scatter(self) -> None:
        """Move the samples into mean and scatter (the pairwise update of Chan, Golub and LeVeque 1983)."""
        if not len(self.scatter):
            fits = 8 * self.positions * len(self._lower) <= LEVEL_BYTES
            dtype = torch.float64 if fits else torch.float32
            self.scatter = self.mean.new_zeros(self.positions, len(self._lower), dtype=dtype)
        total = self.count + self.waiting
        for chunk in self._chunks(self.channels * max(self.channels, self.waiting)):
            samples = self._samples(chunk)
            mean = samples.mean(dim=1)
            step = mean - self.mean[chunk]
            samples -= mean[:, None]
            between = step[:, None] * (self.count * self.waiting / total) ** 0.5
            self.scatter[chunk] += self._pack((between.mT @ between).baddbmm_(samples.mT, samples))
            self.mean[chunk] += step * (self.waiting / total)
        self.blocks, self.waiting, self.count = [], 0, total

    def _samples(self, chunk: slice) -> Tensor:
        """The samples (p, N, C) at a chunk of the positions, float64, in memory that the next call uses again."""
        samples = self._memory.resize_(len(self.mean[chunk]), self.waiting, self.channels)
        for own, block in zip(samples.split(BLOCK, dim=1), self.blocks, strict=True):
            own.copy_(block[chunk, : own.shape[1]])
        return samples

    def _patches(self, level: Tensor) -> Tensor:
        """Maps (B, C, h, w) as (P, B, C)."""
        if list(level.shape[1:]) != [self.channels, *self.grid]:
            raise InputError(
                "PaDiM keeps a distribution per position, of maps (channels, height, width) "
                f"{(self.channels, *self.grid)}, and got maps {tuple(level.shape[1:])}. Give it images of one size."
            )
        return level.flatten(2).permute(2, 0, 1)

    def _factor(self, matrices: Tensor, ridge: float) -> Tensor:
        """Lower Cholesky factors of matrices (p, n, n) + ridge I, of which the lower triangles will do."""
        matrices.diagonal(dim1=1, dim2=2).add_(ridge)
        factors, failed = torch.linalg.cholesky_ex(matrices)
        if failed.any():
            raise InputError(
                f"The features vary too much for epsilon = {self.epsilon}: a covariance has no factor. "
                "Use a larger one."
            )
        return factors

    def _chunks(self, numbers: int) -> Iterator[slice]:
        """Chunks of the positions, for matrices of this many numbers per position."""
        step = max(1, CHUNK_BYTES // (8 * numbers))
        return (slice(start, start + step) for start in range(0, self.positions, step))

    def _pack(self, matrices: Tensor) -> Tensor:
        """The lower triangles (p, C (C + 1) / 2) of matrices (p, C, C), row after row."""
        return matrices.flatten(1).index_select(1, self._lower)

    def _unpack(self, packed: Tensor) -> Tensor:
        """Matrices (p, C, C) of these lower triangles, float64, 0 above them."""
        matrices = self.mean.new_zeros(len(packed), self.channels**2)
        matrices.scatter_(1, self._lower.expand(len(packed), -1), packed.double())
        return matrices.unflatten(1, (self.channels, self.channels))
