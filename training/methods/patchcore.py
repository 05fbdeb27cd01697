"""PatchCore (Roth et al. 2022): the distance of every patch to the nearest of a coreset of normal patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adfeatures import scoring
from adfeatures.coreset import greedy_coreset
from adfeatures.errors import InputError, ReferencesError

from .base import Batch, Extractor, Loader, Predictions
from .patches import neighborhood_vectors
from .trained import feature_maps, gather

# In the search for the coreset a row's first distance is its mean distance to this many random rows.
STARTS = 10
QUERIES_PER_CHUNK, ROWS_PER_CHUNK = 1024, 4096
# Rows whose distance to a query is computed once more, from the difference of the vectors.
SHORTLIST = 8


@dataclass(eq=False)
class PatchCore:
    """Memorize a coreset of the normal patches; score patches by their squared distance to the nearest of them.

    Raises:
        InputError: For a setting out of its range.
    """

    extractor: Extractor  # of the features of a batch
    _: KW_ONLY
    levels: int = 3  # how many of the last levels to use, or all where there are fewer
    patch: int = 3  # side of the neighborhood that describes a patch, odd
    dim: int = 1024  # length of the vectors
    coreset: float = 0.1  # fraction of the patches to keep, in (0, 1]
    # Dimensions of the random projection in which the coreset is chosen. None chooses in all dimensions, which takes
    # longer and covers the patches more closely.
    projection: int | None = 128
    neighbors: int = 1  # how many nearest neighbors a score is the mean over
    seed: int = 42  # of the coreset; torch's and numpy's own generators are left alone
    sigma: float = scoring.SIGMA  # of the Gaussian smoothing, in pixels of the images

    def __post_init__(self) -> None:
        if not 0 < self.coreset <= 1:
            raise InputError(f"The coreset fraction must lie in (0, 1], got {self.coreset}.")
        for name in ("levels", "dim", "projection", "neighbors"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, got {value}.")
        self._rows = torch.empty(0, self.dim)
        self._images = torch.empty(0)  # (rows,), the image that each comes from
        self._numbers: dict[str | int, int] = {}  # of the images of the rows, by their paths

    @torch.no_grad()
    def fit(self, loader: Loader) -> PatchCore:
        """Memorize the patches of normal images.

        Raises:
            InputError: For no images, or features that are not finite.
        """
        self._rows, self._numbers = torch.empty(0, self.dim), {}
        rows, images = [], []
        for batch in loader:
            vectors = self._vectors(batch).flatten(1, 2)
            known = len(self._numbers)
            names = batch.get("path", range(known, known + len(vectors)))
            numbers = [self._numbers.setdefault(name, len(self._numbers)) for name in names]
            images.append(torch.tensor(numbers, device=vectors.device).repeat_interleave(vectors.shape[1]))
            rows.append(vectors.flatten(0, 1))
        if not rows:
            raise InputError("PatchCore learns from normal images, and the loader gives none.")
        kept = self._choose(rows)
        # Batch by batch: all rows side by side would take their memory twice.
        kept_of_batches = kept.split([len(of_batch) for of_batch in rows])
        self._rows = torch.cat([of_batch[own] for of_batch, own in zip(rows, kept_of_batches, strict=True)])
        self._images = torch.cat(images)[kept]
        return self

    @torch.no_grad()
    def predict(self, loader: Loader, *, leave_one_out: bool = False) -> Predictions:
        """Score the images of a loader.

        A score is the largest of the patches' distances, before these are resized and smoothed to the map.

        Args:
            loader: Images to score.
            leave_one_out: Compare each image with the patches of the others alone. The images are those of ``fit``,
                known by their paths. Otherwise most of their patches would find themselves, and a threshold taken from
                such scores would be far too low.

        Raises:
            ReferencesError: Before ``fit``, or if nothing is left to compare an image with.
            InputError: For no images, images of several sizes, features that are not finite, or, with
                ``leave_one_out``, an image that ``fit`` has not seen.
        """
        if not len(self._rows):
            raise ReferencesError("PatchCore has no patches to compare with yet: call fit first.")
        return gather(self._score(batch, leave_one_out) for batch in loader)

    def _score(self, batch: Batch, leave_one_out: bool) -> tuple[Tensor, Tensor]:
        vectors = self._vectors(batch)
        if leave_one_out:
            pairs = zip(vectors.flatten(1, 2), map(self._others, batch["path"]), strict=True)
            nearest = torch.stack([nearest_distances(own, others, self.neighbors) for own, others in pairs])
        else:
            nearest = nearest_distances(vectors.flatten(0, 2), self._rows, self.neighbors)
        patches = nearest.mean(dim=-1).view(vectors.shape[:3])
        size = batch["image"].shape[-2:]
        maps = F.interpolate(patches[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
        return scoring.smooth(maps, self.sigma), patches.amax(dim=(1, 2))

    def _vectors(self, batch: Batch) -> Tensor:
        """Vectors (B, h, w, dim) of the patches of a batch."""
        return neighborhood_vectors(feature_maps(self.extractor, batch, self.levels), self.dim, self.patch)

    def _choose(self, rows: Sequence[Tensor]) -> Tensor:
        """Which of all rows, one tensor a batch, are kept: (N,) bool."""
        total, device = sum(map(len, rows)), rows[0].device
        count = max(1, int(self.coreset * total))
        if count == total:
            return torch.ones(total, dtype=torch.bool, device=device)
        generator = torch.Generator().manual_seed(self.seed)
        starts = torch.randperm(total, generator=generator)[:STARTS].to(device)
        if self.projection is not None:
            # The default weights of torch's Linear, which the original projects with.
            bound = self.dim**-0.5
            weights = torch.empty(self.dim, self.projection).uniform_(-bound, bound, generator=generator).to(device)
            with torch.autocast(device.type, enabled=False):
                rows = [of_batch @ weights for of_batch in rows]
        kept = torch.zeros(total, dtype=torch.bool, device=device)
        kept[greedy_coreset(torch.cat(list(rows)), count, starts)] = True
        return kept

    def _others(self, path: str) -> Tensor:
        """The rows of all images but one."""
        if path not in self._numbers:
            raise InputError(f"{path} cannot be left out: it is none of the images that PatchCore was fitted to.")
        others = self._rows[self._images != self._numbers[path]]
        if not len(others):
            raise ReferencesError(
                f"Without {path} no patches are left to compare it with. Fit PatchCore to more images."
            )
        return others


def nearest_distances(queries: Tensor, rows: Tensor, count: int) -> Tensor:
    """Squared distances (Q, count) of queries (Q, d) to the nearest of the rows (N, d), ascending.

    Memory is bounded. Expanding the square makes the search a product of matrices, but loses the digits of small
    distances. So it only draws up a short list, about the mean of the rows, where the vectors are shortest; the
    distances themselves come from differences. Fewer rows than ``count`` give as many distances.
    """
    center = rows.mean(dim=0)
    count = min(count, len(rows))
    found = []
    for chunk in queries.split(QUERIES_PER_CHUNK):
        listed = _short_list(chunk - center, rows, center, min(count + SHORTLIST - 1, len(rows)))
        distances = torch.stack([(chunk - rows[column]).square().sum(dim=1) for column in listed.T], dim=1)
        found.append(distances.topk(count, largest=False).values)
    return torch.cat(found)


def _short_list(queries: Tensor, rows: Tensor, center: Tensor, count: int) -> Tensor:
    """Indices (Q, count) of the rows nearest to queries about the center, up to rounding."""
    values, indices = [], []
    for start in range(0, len(rows), ROWS_PER_CHUNK):
        chunk = rows[start : start + ROWS_PER_CHUNK] - center
        with torch.autocast(queries.device.type, enabled=False):
            partial = torch.addmm(chunk.square().sum(dim=1), queries, chunk.T, alpha=-2)
        found = partial.topk(min(count, len(chunk)), largest=False)
        values.append(found.values)
        indices.append(found.indices + start)
    return torch.cat(indices, dim=1).gather(1, torch.cat(values, dim=1).topk(count, largest=False).indices)
