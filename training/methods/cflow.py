"""CFLOW-AD (Gudovskiy et al. 2022): the likelihood of every patch under a normalizing flow that knows its position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfeatures.catalog import unknown
from adfeatures.errors import InputError, UnknownNameError

from ..console import progress
from .base import Batch, CountedLoader, Extractor, Loader, Predictions
from .flows import ConditionalFlow, position_code
from .trained import feature_maps, first_maps, gather, seeded

CONDITION = 128
WARMUP_EPOCHS = 2
LEVEL_REFERENCES = ("train", "test")


@dataclass(eq=False)
class CFLOW:
    """One conditional flow per level, trained on the patches of normal images.

    A pixel's score is minus the sum over the levels of its likelihood, each level relative to a reference and at most
    1, so it lies between minus the number of levels (as likely as the reference) and 0. No smoothing; an image's score
    is the maximum of its map. The original subtracts the sum from the largest one among the test images, which changes
    no rank but would cost float32 its resolution.

    Raises:
        UnknownNameError: For another level_reference.
    """

    extractor: Extractor  # of the features of a batch
    _: KW_ONLY
    levels: int = 3  # how many of the last levels to model
    blocks: int = 8  # coupling blocks per flow
    # Patches per optimization step. What a batch holds beyond whole chunks is left out of that pass, as in the
    # original; a batch of fewer patches is a chunk by itself.
    chunk: int = 4096
    meta_epochs: int = 25  # number of learning rates and of evaluations
    sub_epochs: int = 8  # passes through the training images per meta-epoch
    learning_rate: float = 2e-4  # of Adam, at the start of its cosine decay
    # What the likelihoods of a level are relative to: the largest of the training images ("train"), or as in the
    # original of the very images that are predicted ("test"), which makes each score depend on the other images.
    level_reference: str = "train"
    seed: int = 0  # of the initial weights, the rotations and the order of patches
    flows: list[ConditionalFlow] = field(default_factory=list, init=False)  # after ``fit``, one per level
    # Largest log-likelihood of the training patches, one per level, float64.
    reference: list[Tensor] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.level_reference not in LEVEL_REFERENCES:
            raise UnknownNameError(unknown("level_reference", self.level_reference, LEVEL_REFERENCES))

    def fit(self, loader: CountedLoader, on_epoch: Callable[[int], None] | None = None) -> CFLOW:
        """Train on normal images.

        Args:
            loader: Batches of training images (the paper: 32, shuffled), of known length.
            on_epoch: Called with the number of finished meta-epochs after each of them, when ``predict`` can be called.

        Raises:
            InputError: For no images, NaN features, or levels of a single channel.
        """
        first = first_maps(self.extractor, loader, self.levels)
        with seeded(self.seed):
            self.flows = [ConditionalFlow(level.shape[1], CONDITION, self.blocks).to(level.device) for level in first]
        optimizer = torch.optim.Adam(nn.ModuleList(self.flows).parameters(), lr=self.learning_rate)
        generator = torch.Generator().manual_seed(self.seed)
        steps = self.sub_epochs * len(loader)
        for epoch in progress(range(self.meta_epochs), desc="CFLOW", leave=False):
            batches = (batch for _ in range(self.sub_epochs) for batch in loader)
            for step, batch in enumerate(batches):
                optimizer.param_groups[0]["lr"] = self._learning_rate(epoch, step / steps)
                self._train(batch, optimizer, generator)
            # With or without a callback, so that a shuffled loader goes through the same orders.
            self.reference = _maxima(self._log_likelihoods(batch) for batch in loader)
            if on_epoch is not None:
                on_epoch(epoch + 1)
        return self

    def predict(self, loader: Loader) -> Predictions:
        """Score images; higher is more anomalous.

        Raises:
            InputError: Before ``fit``, for no images, images of several sizes, or NaN features.
        """
        if not self.reference:
            raise InputError("This CFLOW is not trained yet; call fit first.")
        scored = [(batch["image"].shape[-2:], self._log_likelihoods(batch)) for batch in loader]
        reference = self.reference if self.level_reference == "train" else _maxima(levels for _, levels in scored)
        maps = (_anomaly_maps(levels, reference, size) for size, levels in scored)
        return gather((m, m.amax(dim=(1, 2))) for m in maps)

    def _learning_rate(self, epoch: int, progress: float) -> float:
        """Linear warm-up, batch after batch by the fraction of its meta-epoch done, then a cosine per meta-epoch."""
        if epoch >= WARMUP_EPOCHS:
            return self._cosine(epoch)
        start, end = self.learning_rate / 10, self._cosine(WARMUP_EPOCHS)
        return start + (end - start) * (epoch + progress) / WARMUP_EPOCHS

    def _cosine(self, epoch: int) -> float:
        lowest = self.learning_rate / 1000
        return lowest + (self.learning_rate - lowest) * (1 + math.cos(math.pi * epoch / self.meta_epochs)) / 2

    def _train(self, batch: Batch, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        """One optimization step per level and chunk of patches in random order."""
        for flow, level in zip(self.flows, feature_maps(self.extractor, batch, self.levels), strict=True):
            patches, codes = _patches(level)
            order = torch.randperm(len(patches), generator=generator).to(patches.device)
            size = min(self.chunk, len(patches))
            for rows in order[: len(order) // size * size].split(size):
                loss = -F.logsigmoid(flow.log_likelihood(patches[rows], codes[rows])).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    @torch.no_grad()
    def _log_likelihoods(self, batch: Batch) -> list[Tensor]:
        """Log-likelihoods per channel of all patches, one (B, h_l, w_l) per level, float64 on the CPU."""
        levels = []
        for flow, level in zip(self.flows, feature_maps(self.extractor, batch, self.levels), strict=True):
            chunks = zip(*(rows.split(self.chunk) for rows in _patches(level)), strict=True)
            scores = torch.cat([flow.log_likelihood(patches, codes) for patches, codes in chunks])
            levels.append(scores.double().cpu().unflatten(0, (len(level), *level.shape[2:])))
        return levels


def _patches(level: Tensor) -> tuple[Tensor, Tensor]:
    """Patches (B h w, C) of a level (B, C, h, w), image after image, and the position code (B h w, 128) of each."""
    height, width = level.shape[2:]
    codes = position_code(height, width, CONDITION).to(level.device)
    return level.permute(0, 2, 3, 1).flatten(0, 2), codes.repeat(len(level), 1)


def _maxima(batches: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """The largest value of each level."""
    per_level = zip(*([level.amax() for level in levels] for levels in batches), strict=True)
    return [torch.stack(values).amax() for values in per_level]


def _anomaly_maps(levels: Sequence[Tensor], reference: Sequence[Tensor], size: torch.Size) -> Tensor:
    """Anomaly maps (B, H, W) from the log-likelihoods (B, h_l, w_l) of the levels."""
    # Patches may be likelier than all of training by any factor, which would hide what is beside them, and overflow.
    total = torch.zeros((), dtype=torch.float64)
    for level, top in zip(levels, reference, strict=True):
        likelihoods = (level - top).clamp(max=0).exp()[:, None]
        total = total + F.interpolate(likelihoods, size, mode="bilinear", align_corners=True)[:, 0]
    return -total
