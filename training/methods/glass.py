"""GLASS (Chen et al. 2024): normal patches against anomalies that are made in images and, by gradients, in features."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfeatures import scoring
from adfeatures.catalog import IMAGENET
from adfeatures.errors import InputError

from ..console import progress
from .base import Batch, Extractor, Loader, Predictions
from .glass_synthesis import DefectSynthesis
from .patches import neighborhood_vectors
from .trained import feature_maps, first_maps, gather, seeded

LEVELS = 2
# Of the gradient ascent from normal features, and of its projections back between the inner and the outer radius around
# their center.
STEPS, STEP_SIZE, PROJECT_EVERY = 20, 0.001, 5
RADIUS_QUANTILE, ASCENT_RADII, DEFECT_RADII = 0.75, (1, 2), (2, 4)
HARD_QUANTILE = 0.5
FOCAL_GAMMA, FOCAL_SMOOTHING = 2, 1e-5
IMAGENET_MEAN, IMAGENET_STD = IMAGENET
TINY = 1e-10


@dataclass(eq=False)
class GLASS:
    """Train a discriminator of patch vectors; a patch's score is its probability of being anomalous.

    Local anomalies are textures blended into the training images; global ones are normal vectors with noise, moved by
    gradient ascent to where the discriminator calls them normal, yet kept off the center of the normal vectors of their
    position. Both lie on hyperspheres around that center, the form of the distribution that the original presets for
    all products here.

    A pixel's score is upsampled from the patches and smoothed; an image's score is that of its highest patch. The
    original's min-max over the test images, which changes no rank, is left out.

    Attributes:
        discriminator: The trained network, from vectors (N, dim) to logits (N, 1).
        center: Mean normal vector of each position, (h, w, dim). The original averages the means of batches, ours the
            images.

    Raises:
        ImageError: For a folder of textures without images.
    """

    # Of the features of a batch. In ``fit`` it is also called on augmented images: batches whose "path" is a list of
    # None, by which an extractor that keeps features knows not to, and whose "origin" are the paths of their originals.
    extractor: Extractor
    _: KW_ONLY
    adapter: bool = False  # train a linear layer before the discriminator, as for raw features, not for pretrained
    noise: float | None = None  # standard deviation on normal vectors; None: 0.015 with the adapter, 0.005 without
    # As in `DefectSynthesis`.
    textures: str | os.PathLike[str] | None = None
    foregrounds: str | os.PathLike[str] | None = None
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    preset: str = "squash"
    dim: int = 1536  # length of the patch vectors
    hidden: int = 1024  # width of the discriminator
    epochs: int = 640  # each in the order of the loader
    samples_per_epoch: int = 392  # an epoch ends with the batch that exceeds this number of images, or with the loader
    learning_rate: float = 2e-4  # of AdamW for the discriminator; that of Adam for the adapter is half of it
    seed: int = 0  # of the initial weights, the noise and the defects

    def __post_init__(self) -> None:
        self.synthesis = DefectSynthesis(self.textures, self.foregrounds, self.mean, self.std, self.preset)
        self.deviation = (0.015 if self.adapter else 0.005) if self.noise is None else self.noise
        self.adapt: nn.Module = nn.Identity()
        self.discriminator = nn.Sequential()
        self.center = torch.empty(0)

    def fit(self, loader: Loader, on_epoch: Callable[[int], None] | None = None) -> GLASS:
        """Train on normal images.

        Args:
            loader: Batches of training images (the paper: 8, shuffled).
            on_epoch: Called with the number of finished epochs after each of them, when ``predict`` can be called.

        Raises:
            InputError: For no images, a batch of a single patch, or NaN features; further errors as `DefectSynthesis`.
        """
        device = first_maps(self.extractor, loader, LEVELS)[0].device
        with seeded(self.seed):
            if self.adapter:
                self.adapt = _xavier(nn.Linear(self.dim, self.dim)).to(device)
            first, last = _xavier(nn.Linear(self.dim, self.hidden)), _xavier(nn.Linear(self.hidden, 1, bias=False))
            layers = (first, nn.BatchNorm1d(self.hidden), nn.LeakyReLU(0.2), last)
            self.discriminator = nn.Sequential(*layers).to(device)
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(self.discriminator.parameters(), lr=self.learning_rate, weight_decay=0.01)
        ]
        if self.adapter:
            optimizers.append(torch.optim.Adam(self.adapt.parameters(), lr=self.learning_rate / 2, weight_decay=1e-5))
        generator = torch.Generator(device).manual_seed(self.seed)
        rng = np.random.default_rng(self.seed)
        for epoch in progress(range(self.epochs), desc="GLASS", leave=False):
            # Without an adapter the vectors of the training images never change.
            if epoch == 0 or self.adapter:
                self.center = self._mean_vectors(loader)
            self.discriminator.train()
            seen = 0
            for batch in loader:
                loss = self._loss(batch, rng, generator)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                seen += len(batch["image"])
                if seen > self.samples_per_epoch:
                    break
            if on_epoch is not None:
                on_epoch(epoch + 1)
        return self

    @torch.no_grad()
    def predict(self, loader: Loader) -> Predictions:
        """Score images by probabilities of 0 to 1; higher is more anomalous.

        Raises:
            InputError: Before ``fit``, for no images, images of several sizes, or NaN features.
        """
        if not len(self.center):
            raise InputError("This GLASS is not trained yet; call fit first.")
        self.discriminator.eval()
        return gather(map(self._score, loader))

    def _score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        vectors = self._vectors(batch)
        patches = self.discriminator(vectors.flatten(0, 2)).sigmoid().view(vectors.shape[:3])
        maps = F.interpolate(patches[:, None], batch["image"].shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return scoring.smooth(maps, scoring.SIGMA), patches.flatten(1).amax(dim=1)

    def _vectors(self, batch: Batch) -> Tensor:
        """Adapted patch vectors (B, h, w, dim)."""
        return self.adapt(neighborhood_vectors(feature_maps(self.extractor, batch, LEVELS), self.dim))

    @torch.no_grad()
    def _mean_vectors(self, loader: Loader) -> Tensor:
        total, count = torch.zeros(()), 0
        for batch in loader:
            total = total + self._vectors(batch).sum(dim=0)
            count += len(batch["image"])
        return total / count

    def _loss(self, batch: Batch, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        """The loss of one batch: cross-entropy of normal and global anomalies, focal loss of local anomalies."""
        images, masks = self.synthesis(batch, rng)
        made = {"image": images.to(batch["image"]), "path": [None] * len(images), "origin": batch["path"]}
        normal, augmented = self._vectors(batch), self._vectors({**batch, **made})
        defective = F.adaptive_max_pool2d(masks, normal.shape[1:3]).flatten().to(normal.device) > 0
        center = self.center.expand_as(normal).flatten(0, 2)
        normal, augmented = normal.flatten(0, 2), augmented.flatten(0, 2)
        if len(normal) < 2:
            raise InputError(
                "GLASS trains on statistics of a batch, and a single image of one patch has none. "
                "Use larger images or batches."
            )
        offsets = torch.cat([augmented[~defective] - center[~defective], normal - center])
        radius = offsets.detach().norm(dim=1).quantile(RADIUS_QUANTILE)
        loss = self._ascent_loss(normal, center, radius, generator)
        augmented = torch.where(defective[:, None], project(augmented, center, radius, DEFECT_RADII), augmented)
        return loss + hard_focal_loss(self.discriminator(augmented)[:, 0].sigmoid(), defective.float())

    def _ascent_loss(self, normal: Tensor, center: Tensor, radius: Tensor, generator: torch.Generator) -> Tensor:
        """Cross-entropy of normal vectors (N, dim) and of the global anomalies that gradient ascent makes of them."""
        moved = normal + self.deviation * torch.randn(normal.shape, generator=generator, device=normal.device)
        if not moved.requires_grad:
            moved.requires_grad_()
        for step in range(1, STEPS + 1):
            # Batch norm takes its statistics over both, so both pass the discriminator in each step.
            logits = self.discriminator(torch.cat([normal, moved]))[len(normal) :]
            (gradient,) = torch.autograd.grad(_cross_entropy(logits, 1), moved)
            moved = moved + STEP_SIZE * gradient / (gradient.norm(dim=1, keepdim=True) + TINY)
            if step % PROJECT_EVERY == 0:
                moved = project(moved, center, radius, ASCENT_RADII)
        of_normal, of_moved = self.discriminator(torch.cat([normal, moved])).chunk(2)
        return _cross_entropy(of_normal, 0) + _cross_entropy(of_moved, 1)


def project(points: Tensor, center: Tensor, radius: Tensor, radii: tuple[int, int]) -> Tensor:
    """Move points (N, D) along the line to their centers until their distance is within ``radii`` times the radius."""
    offset = points - center
    distance = offset.norm(dim=1, keepdim=True)
    return center + offset * distance.clamp(radii[0] * radius, radii[1] * radius) / (distance + TINY)


def hard_focal_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Focal loss over the half of the patches whose scores (N,), 0 to 1, are farthest from their targets (N,)."""
    error = (scores - target).square()
    hard = error >= error.quantile(HARD_QUANTILE)
    scores, target = scores[hard], target[hard].clamp(FOCAL_SMOOTHING, 1 - FOCAL_SMOOTHING)
    likelihood = target * scores + (1 - target) * (1 - scores) + FOCAL_SMOOTHING
    return -((1 - likelihood) ** FOCAL_GAMMA * likelihood.log()).mean()


def _cross_entropy(logits: Tensor, label: int) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def _xavier(layer: nn.Linear) -> nn.Linear:
    nn.init.xavier_normal_(layer.weight)
    return layer
