"""A step of the pretraining against its published form, written here anew from the paper's equations, plainly.

The published form encodes the references of every image in every step, projects the learnable references to keys and
values again for every image, materializes the attention weights, takes the views one after the other, and computes all
pairs of patches for the angle loss.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from adfeatures.backbones import create_backbone
from adfeatures.catalog import IMAGENET
from adfeatures.images import normalized
from adfeatures.measuring import Measurement, seconds
from adfeatures.projector import ResidualProjector
from adfeatures.published import naive_projection, naive_residuals

from ..data.items import NORMAL, Item
from ..losses import norm_loss
from ..pretraining.config import PretrainConfig
from ..pretraining.labels import angle_labels, norm_labels
from ..pretraining.reference_store import ReferenceStore
from ..pretraining.step import encode_images, losses, prepared, train_step, view_residuals
from . import throughput


@dataclass(frozen=True)
class StepSizes:
    """What a step is made of."""

    width: int = 768
    depth: int = 12
    keys: int = 2048
    batch: int = 4
    shots: int = 4
    side: int = 224
    pool: int = 64
    repeats: int = 2


FULL, QUICK = StepSizes(), StepSizes(width=192, depth=12, keys=1024, repeats=1)


def naive_angle_loss(first: Tensor, second: Tensor, labels: Tensor, center: Tensor, temperature: float) -> Tensor:
    """The angle loss from all pairs of patches at once."""
    units = F.normalize(torch.cat([first, second]) - center, dim=1)
    labels = labels.repeat(2)
    similarity = (units @ units.T / temperature).exp()
    positives = (units * units.roll(len(first), 0)).sum(1) / temperature
    return -(positives.exp() / (similarity * (labels[:, None] != labels)).sum(1)).log().mean()


class BenchedStep:
    """One training step in three forms, on the same batch and from the same weights.

    The encoded pool of references is kept in a folder.
    """

    def __init__(self, sizes: StepSizes, folder: str) -> None:
        torch.manual_seed(0)
        self.config = PretrainConfig(precision="float32")
        self.backbone = create_backbone("dinov2_base", img_size=sizes.side, embed_dim=sizes.width, depth=sizes.depth)
        self.projector = ResidualProjector(self.backbone.channels, num_keys=sizes.keys)
        self.naive_projector = copy.deepcopy(self.projector)
        adam = partial(torch.optim.Adam, lr=1e-4, weight_decay=5e-4)
        self.optimizer = adam(self.projector.parameters(), fused=True)
        self.naive_optimizer = adam(self.naive_projector.parameters())
        self.centers = [torch.randn(channels) for channels in self.backbone.channels]
        mask = torch.zeros(sizes.batch, 1, sizes.side, sizes.side, dtype=torch.uint8)
        mask[::2, :, : sizes.side // 3, : sizes.side // 3] = 1
        images = partial(torch.randint, 256, dtype=torch.uint8)
        pool, views = (images((*count, sizes.side, sizes.side, 3)) for count in ((sizes.pool,), (sizes.batch, 2)))
        indices = torch.randint(sizes.pool, (sizes.batch, sizes.shots))
        known, places = indices.unique(return_inverse=True)
        self.batch = {
            "views": views,
            "mask": mask,
            "label": torch.tensor([1, 0] * (sizes.batch // 2)),
            "references": pool[known],
            "pool_indices": known,
            "reference_indices": places,
        }
        self.naive_batch = normalized(views, *IMAGENET), normalized(pool[indices], *IMAGENET)
        self.encode = partial(
            encode_images,
            statistics=IMAGENET,
            backbone=self.backbone,
            device=torch.device("cpu"),
            precision="float32",
        )
        items = [Item(str(number), NORMAL, "product") for number in range(sizes.pool)]
        self.store = ReferenceStore(folder, items, "bench")
        self.store.encode(lambda number: pool[int(number)], self.encode)

    def ours(self, store: ReferenceStore | None = None) -> float:
        """Take a step, with references from the store if one is given, and return its loss."""
        batch, encoders = prepared(self.batch, store, pinned=False), (self.encode, self.encode)
        return train_step(self.projector, self.optimizer, batch, encoders, self.centers, self.config)["loss"]

    def naive(self) -> float:
        """The same in the published form."""
        loss = self.naive_losses(self.naive_view_residuals())
        self.naive_optimizer.zero_grad()
        loss.backward()
        self.naive_optimizer.step()
        return loss.item()

    @torch.no_grad()
    def naive_view_residuals(self) -> list[list[Tensor]]:
        """Residuals of both views, every image against its own references."""
        residuals = []
        for views, references in zip(*self.naive_batch, strict=True):
            banks = [level.permute(0, 2, 3, 1).flatten(0, 2) for level in self.backbone(references)]
            residuals.append(naive_residuals(self.backbone(views), banks))
        levels = [torch.stack(level, dim=1) for level in zip(*residuals, strict=True)]
        return [list(view) for view in zip(*levels, strict=True)]

    def naive_losses(self, residuals: Sequence[Sequence[Tensor]]) -> Tensor:
        """Both losses, summed over the levels."""
        total = torch.zeros(())
        views = [naive_projection(self.naive_projector, view) for view in residuals]
        for *levels, center in zip(*views, self.centers, strict=True):
            grid = levels[0].shape[2:]
            first, second = (level.permute(0, 2, 3, 1).flatten(0, 2) for level in levels)
            angle, norm = (function(self.batch["mask"], grid).flatten() for function in (angle_labels, norm_labels))
            total = total + naive_angle_loss(first, second, angle, center, self.config.temperature)
            total = total + norm_loss(first, norm) + norm_loss(second, norm)
        return total


def rows(quick: bool = False, device: torch.device | None = None) -> Iterator[Measurement]:
    """A whole step with references encoded on the fly and from a store, where the time of each form goes, and reading.

    With a device instead: whole steps of the command there, images from the cache and from files.
    """
    if device is not None:
        yield from throughput.steps(device, quick)
        return
    sizes = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        step = BenchedStep(sizes, folder)
        first = f"first losses {step.ours():.5f} and {step.naive():.5f}"
        note = f"batch {sizes.batch}, {sizes.shots} references each; {first}"
        forms = (step.ours, partial(step.ours, step.store), step.naive)
        rounds = [[seconds(form) for form in forms] for _ in range(sizes.repeats)]
        fly, stored, naive = zip(*rounds, strict=True)
        what = f"step of dinov2_base ({sizes.width}), references"
        yield Measurement.of_runs(f"{what} encoded", fly, naive, note=f"target 1.7; {note}")
        yield Measurement.of_runs(f"{what} of a pool of {sizes.pool}", stored, naive, note=f"target 3.0; {note}")
        yield from _split(step)
    yield from throughput.readings(quick)


def _split(step: BenchedStep) -> Iterator[Measurement]:
    """Seconds of the two halves of a step."""

    def encode(store: ReferenceStore | None) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return view_residuals(prepared(step.batch, store, pinned=False), step.encode, step.encode)

    first, second = encode(step.store)

    def ours() -> None:
        joined = step.projector([torch.cat(views) for views in zip(first, second, strict=True)])
        one, other = zip(*(level.chunk(2) for level in joined), strict=True)
        angle, norm = losses(one, other, step.batch["mask"], step.centers, step.config)
        (angle + norm).backward()

    naive = seconds(step.naive_view_residuals)
    for what, store in (("", None), (", from the pool", step.store)):
        taken = [seconds(partial(encode, store))]
        yield Measurement.of_runs(f"  of it: encoding and matching{what}", taken, [naive])
    naive = seconds(lambda: step.naive_losses([first, second]).backward())
    yield Measurement.of_runs("  of it: projector, losses, backward", [seconds(ours)], [naive])
