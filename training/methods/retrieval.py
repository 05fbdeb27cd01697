"""Retrieved references: each image is compared with the few training images that are most like it.

The published FeatureNorm numbers are of such references ("aligned" there), of which only the lists were published, not
how they were made. This is a retrieval of our own: k-means words of patch features, their histograms in the cells of a
coarse grid, and the Kullback-Leibler divergence between those, without the cells that differ most, which may hold the
defect. The words are of the first level of the model's own backbone, so that no second network is needed. Results
belong under a name of their own: all training images serve, not a few shots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor
from torch.utils.data import default_collate

from adfeatures.errors import InputError, ReferencesError
from adfeatures.references import ReferenceBank, residuals_of_images

from .base import Batch, Extractor
from .trained import feature_maps

COUNT = 10
WORDS = 12
# Cells per side of the grid, and how many of all cells count: those that differ least.
CELLS, COUNTED = 5, 20
# Weight of a uniform distribution in histograms: the divergence from a histogram without some word would be infinite.
UNIFORM = 0.05
# The words are found among about this many patches at most, drawn at random.
PATCHES = 20_000
BATCH = 8


class VisualWords:
    """Kinds of patches, found by k-means among patches (N, C) of training images.

    Attributes:
        centers: (words, C).
    """

    def __init__(self, patches: Tensor, seed: int = 0) -> None:
        kmeans = KMeans(min(WORDS, len(patches)), n_init=1, random_state=seed).fit(patches.float().cpu().numpy())
        self.centers = torch.from_numpy(kmeans.cluster_centers_).to(patches)

    def histograms(self, maps: Tensor) -> Tensor:
        """How often each word occurs in each cell, (N, cells, words), of maps (N, C, h, w); every cell adds up to 1.

        Where the grid of patches cannot be divided evenly, neighboring cells share a row or column of patches.
        """
        nearest = torch.cdist(patches_of(maps), self.centers).argmin(dim=1).view(len(maps), *maps.shape[2:])
        occurrence = F.one_hot(nearest, len(self.centers)).float().permute(0, 3, 1, 2)
        histograms = F.adaptive_avg_pool2d(occurrence, CELLS).flatten(2).transpose(1, 2)
        return (1 - UNIFORM) * histograms + UNIFORM / len(self.centers)


def patches_of(maps: Tensor) -> Tensor:
    """The patches (B * h * w, C) of maps (B, C, h, w)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def most_similar(test: Tensor, train: Tensor, count: int = COUNT) -> Tensor:
    """Indices (N, min(count, M)) of the training images of least divergence, the first of equal ones first.

    Args:
        test: Histograms of the test images, (N, cells, words).
        train: Those of the training images, (M, cells, words).
        count: How many to take.
    """
    indices = []
    for own in test:
        divergences = (own * (own / train).log()).sum(dim=2)
        distances = divergences.topk(min(COUNTED, divergences.shape[1]), largest=False).values.mean(dim=1)
        indices.append(distances.sort(stable=True).indices[:count])
    return torch.stack(indices)


class Entries(Protocol):
    """A data set: entries as in batches, without the batch dimension, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(eq=False)
class RetrievedReferences:
    """An extractor of residual features whose references are retrieved for each image.

    Nothing of the training images is kept but their histograms, for which they are read and encoded twice, batch by
    batch. Those retrieved are read and encoded again for each image. A cache in ``features`` saves all of that. A
    training image is not among its own references, as nothing else gives it the residuals of a normal image.

    Raises:
        InputError: For no training images.
    """

    features: Extractor  # of the backbone's features, all levels; of a `FeatureExtractor` its ``backbone_features``
    projector: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None  # of the residuals, None to take them as they are
    train: Entries  # normal training images of one product
    _: KW_ONLY
    count: int = COUNT  # references per image
    seed: int = 0  # of the words
    # Paths of the references of every image so far, by its path, most similar first.
    lists: dict[str, list[str]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not len(self.train):
            raise InputError("References are retrieved from training images, and there are none.")
        generator, share = torch.Generator().manual_seed(self.seed), math.ceil(PATCHES / len(self.train))
        drawn = [_draw(patches_of(maps), share * len(maps), generator) for _, maps in self._first_level()]
        self._words = VisualWords(torch.cat(drawn), self.seed)
        self._paths: list[str] = []
        histograms = []
        for paths, maps in self._first_level():
            self._paths += paths
            histograms.append(self._words.histograms(maps))
        self._histograms = torch.cat(histograms)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Sequence[Tensor]:
        """Maps (B, C_l, h_l, w_l) of a batch of images of the product.

        Raises:
            ReferencesError: For the only training image, which has no other to be compared with.
        """
        features = feature_maps(self.features, batch)
        ranking = most_similar(self._words.histograms(features[0]), self._histograms, self.count + 1)
        banks = []
        for path, indices in zip(batch["path"], ranking.tolist(), strict=True):
            others = [index for index in indices if self._paths[index] != path][: self.count]
            if not others:
                raise ReferencesError(
                    f"{path} is the only training image and has no other to be compared with. Add more of them."
                )
            self.lists[path], references = self._encode(others)
            banks.append(ReferenceBank.from_features(references))
        residuals = residuals_of_images(features, banks)
        return residuals if self.projector is None else self.projector(residuals)

    def _first_level(self) -> Iterator[tuple[list[str], Tensor]]:
        """Paths and first-level features of the training images, in batches."""
        indices = range(len(self.train))
        for start in indices[::BATCH]:
            paths, features = self._encode(indices[start : start + BATCH])
            yield paths, features[0]

    def _encode(self, indices: Sequence[int]) -> tuple[list[str], list[Tensor]]:
        """Paths and features of training images."""
        batch = default_collate([self.train[index] for index in indices])
        return batch["path"], feature_maps(self.features, batch)


def _draw(patches: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """All of the patches (N, C), or this many at random."""
    if len(patches) <= most:
        return patches
    return patches[torch.randperm(len(patches), generator=generator)[:most].to(patches.device)]
