"""PaDiM (Defard et al. 2021): the Mahalanobis distance of every patch from the normal patches at its position."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adfeatures import scoring
from adfeatures.errors import InputError, ReferencesError

from .base import Batch, Extractor, Loader, Predictions
from .trained import feature_maps, gather

# Positions are worked on together for as long as their matrices in float64 take no more than this.
CHUNK_BYTES = 8 * 2**20
# Of one level. Covariances that take more than this in float64 are kept in float32, as the original keeps all of them.
COVARIANCE_BYTES = 700 * 2**20


class PaDiM:
    """Fit a normal distribution to the patches at each position of each level; score patches by their Mahalanobis distances from them.

    As ADPretrain uses it: all channels of all levels, each level on its own, the mean of their maps. The original also rescales the maps by
    the extremes of the whole test set, which moves no ranking metric; here a map depends on its own image alone.

    Args:
        extractor: What gives the features of a batch.
        epsilon: What is added to the diagonal of the covariances, above 0.
        sigma: Gaussian smoothing in pixels of the images.
    """

    def __init__(self, extractor: Extractor, *, epsilon: float = 0.01, sigma: float = scoring.SIGMA) -> None:
        if not epsilon > 0:
            raise InputError(f"PaDiM needs epsilon above 0, got {epsilon}: with few images the covariances have no inverse without it.")
        self.extractor, self.epsilon, self.sigma = extractor, epsilon, sigma
        self._levels: list[Gaussians] = []

    def fit(self, loader: Loader) -> PaDiM:
        """Estimate the distributions from normal images, in one pass and with bounded memory. A single image will do.

        Raises:
            InputError: For no images, features that are not finite, or maps of changing shapes.
        """
        self._levels = []
        for batch in loader:
            features = feature_maps(self.extractor, batch)
            self._levels = self._levels or [Gaussians(level, self.epsilon) for level in features]
            for gaussians, level in zip(self._levels, features, strict=True):
                gaussians.add(level)
        if not self._levels:
            raise InputError("PaDiM learns from normal images, and the loader gives none.")
        for gaussians in self._levels:
            gaussians.finish()
        return self

    def predict(self, loader: Loader) -> Predictions:
        """Score the images of a loader. Their scores are the maxima of their smoothed maps.

        Raises:
            ReferencesError: Before ``fit``.
            InputError: For no images, images of another size than those of ``fit``, or features that are not finite.
        """
        if not self._levels:
            raise ReferencesError("PaDiM has no distributions to compare with yet: call fit first.")
        return gather(self._score(batch) for batch in loader)

    def _score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        height, width = batch["image"].shape[-2:]
        features = feature_maps(self.extractor, batch)
        distances = [gaussians.distances(level) for gaussians, level in zip(self._levels, features, strict=True)]
        maps = scoring.fuse(distances, (height, width), self.sigma)
        return maps, maps.amax(dim=(1, 2))


class Gaussians:
    """A normal distribution of C channels at each of P positions; mean, and covariance with N - 1 in the denominator plus epsilon I.

    Nothing is inverted. The squared distance of a deviation d from the mean comes from a Cholesky factor in float64, one of two:

    * of the covariance S: |L^-1 d|^2 with S = L L^T;
    * for few images, of the N x N matrix of inner products of the centred samples X (N, C), by the identity of Woodbury:
      (|d|^2 - |L^-1 X d|^2) / epsilon with X X^T + (N - 1) epsilon I = L L^T.

    The second costs N C numbers a position instead of C^2 / 2, so it is the one for up to C / 2 images.

    Args:
        example: A map (B, C, h, w), for its shape and device.
        epsilon: What is added to the diagonal of the covariances.
    """

    def __init__(self, example: Tensor, epsilon: float) -> None:
        _, self.channels, *self.grid = example.shape
        self.positions = self.grid[0] * self.grid[1]
        self.epsilon, self.device = epsilon, example.device
        self.count = 0  # of the images in mean and scatter
        self.mean = torch.zeros(self.positions, self.channels, dtype=torch.float64, device=self.device)
        self.scatter: Tensor | None = None  # sums of squared deviations from the mean, lower triangles (P, C (C + 1) / 2)
        self.samples: list[Tensor] = []  # (P, b, C) float32, not in mean and scatter
        self.factors: Tensor | None = None  # lower triangles

    def add(self, level: Tensor) -> None:
        """Take in the maps (B, C, h, w) of a batch."""
        self.samples.append(self._patches(level).clone(memory_format=torch.contiguous_format))
        # Before the scatter matrices take their memory, there is room for more samples than after.
        if sum(part.shape[1] for part in self.samples) > self.channels // (2 if self.scatter is None else 4):
            self._add_to_scatter()

    def finish(self) -> None:
        """Compute the factors: no images come after this."""
        if self.scatter is not None:
            if self.samples:
                self._add_to_scatter()
            self.factors, self.scatter = self.scatter, None
            for part in self._chunks(self.channels**2):
                covariances = _unpack(self.factors[part], self.channels) / max(self.count - 1, 1)
                self.factors[part] = self._factor(covariances, self.epsilon)
            return
        self.samples = [torch.cat(self.samples, dim=1)]
        self.count = self.samples[0].shape[1]
        size = self.count * (self.count + 1) // 2
        self.factors = torch.empty(self.positions, size, dtype=torch.float64, device=self.device)
        for part in self._chunks(self.count * self.channels):
            samples = self.samples[0][part].double()
            self.mean[part] = samples.mean(dim=1)
            samples -= self.mean[part, None]
            self.factors[part] = self._factor(samples @ samples.mT, max(self.count - 1, 1) * self.epsilon)

    def distances(self, level: Tensor) -> Tensor:
        """Mahalanobis distances (B, h, w), float32, of maps (B, C, h, w).

        Raises:
            InputError: For maps of another shape than those that came before.
        """
        patches = self._patches(level)
        squared = torch.empty(patches.shape[:2], dtype=torch.float64, device=self.device)
        for part in self._chunks(self.channels * (self.count if self.samples else self.channels)):
            squared[part] = self._squared_distances(patches[part].double() - self.mean[part, None], part)
        # Near the span of the samples both terms of a difference agree in most digits, and rounding may leave less than nothing.
        return squared.clamp_min(0).sqrt().float().T.unflatten(1, self.grid)

    def _squared_distances(self, deviations: Tensor, part: slice) -> Tensor:
        """Squared distances (p, B) of deviations (p, B, C) from the means at a part of the positions."""
        if not self.samples:
            factors = _unpack(self.factors[part], self.channels)
            return torch.linalg.solve_triangular(factors, deviations.mT, upper=False).square().sum(dim=1)
        products = (self.samples[0][part].double() - self.mean[part, None]) @ deviations.mT
        explained = torch.linalg.solve_triangular(_unpack(self.factors[part], self.count), products, upper=False)
        return (deviations.square().sum(dim=2) - explained.square().sum(dim=1)) / self.epsilon

    def _add_to_scatter(self) -> None:
        """Move the samples into mean and scatter (the pairwise update of Chan, Golub and LeVeque 1983)."""
        if self.scatter is None:
            size = self.channels * (self.channels + 1) // 2
            dtype = torch.float64 if 8 * self.positions * size <= COVARIANCE_BYTES else torch.float32
            self.scatter = torch.zeros(self.positions, size, dtype=dtype, device=self.device)
        new = sum(part.shape[1] for part in self.samples)
        for part in self._chunks(self.channels * max(self.channels, new)):
            samples = torch.cat([batch[part] for batch in self.samples], dim=1).double()
            mean = samples.mean(dim=1)
            step = mean - self.mean[part]
            between = step * (self.count * new / (self.count + new)) ** 0.5
            deviations = torch.cat([samples - mean[:, None], between[:, None]], dim=1)
            self.scatter[part] += _pack(deviations.mT @ deviations)
            self.mean[part] += step * (new / (self.count + new))
        self.samples, self.count = [], self.count + new

    def _patches(self, level: Tensor) -> Tensor:
        """Maps (B, C, h, w) as (P, B, C)."""
        if list(level.shape[1:]) != [self.channels, *self.grid]:
            raise InputError(
                f"PaDiM keeps a distribution per position, of maps (channels, height, width) {(self.channels, *self.grid)}, "
                f"and got maps {tuple(level.shape[1:])}. Give it images of one size."
            )
        return level.flatten(2).permute(2, 0, 1)

    def _factor(self, matrices: Tensor, ridge: float) -> Tensor:
        """Lower triangles of the Cholesky factors of matrices (p, n, n) + ridge I."""
        matrices.diagonal(dim1=1, dim2=2).add_(ridge)
        factors, failed = torch.linalg.cholesky_ex(matrices)
        if failed.any():
            raise InputError(f"The features vary too much for epsilon = {self.epsilon}: a covariance has no factor. Use a larger one.")
        return _pack(factors)

    def _chunks(self, numbers: int) -> Iterator[slice]:
        """Parts of the positions, for matrices of so many numbers per position."""
        step = max(1, CHUNK_BYTES // (8 * numbers))
        return (slice(start, start + step) for start in range(0, self.positions, step))


def _pack(matrices: Tensor) -> Tensor:
    """The lower triangles of matrices (p, n, n), row after row, (p, n (n + 1) / 2)."""
    return matrices.flatten(1)[:, _triangle(matrices.shape[-1], matrices.device)]


def _unpack(packed: Tensor, size: int) -> Tensor:
    """Lower triangular matrices (p, n, n) in float64."""
    matrices = torch.zeros(len(packed), size * size, dtype=torch.float64, device=packed.device)
    matrices[:, _triangle(size, packed.device)] = packed.double()
    return matrices.unflatten(1, (size, size))


def _triangle(size: int, device: torch.device) -> Tensor:
    rows, columns = torch.tril_indices(size, size, device=device)
    return rows * size + columns
