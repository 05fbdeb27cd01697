"""A step of the pretraining against its published form, written here anew from the paper's equations, plainly.

The published form encodes the references of every image in every step, projects the learnable references to keys and
values again for every image, materializes the attention weights, takes the views one after the other, and computes all
pairs of patches for the angle loss.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfeatures.backbones import create_backbone
from adfeatures.bench import naive_residuals
from adfeatures.projector import ResidualProjector

from ..data.items import NORMAL, Item
from ..losses import norm_loss
from ..pretraining.config import PretrainConfig
from ..pretraining.labels import angle_labels, norm_labels
from ..pretraining.reference_store import ReferenceStore
from ..pretraining.step import encode_images, losses, train_step, view_residuals
from .timing import Row, seconds


@dataclass(frozen=True)
class Sizes:
    """What a step is made of."""

    width: int = 768
    depth: int = 12
    keys: int = 2048
    batch: int = 4
    shots: int = 4
    side: int = 224
    pool: int = 64
    repeats: int = 2


FULL, QUICK = Sizes(), Sizes(width=192, depth=12, keys=1024, repeats=1)


class NaiveProjector(nn.Module):
    """The projector in its published form, with the initial weights of ours."""

    def __init__(self, ours: ResidualProjector) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            _NaiveLevel(level.state_dict(), heads) for level, heads in zip(ours.children(), ours.num_heads, strict=True)
        )

    def forward(self, residuals: Sequence[Tensor]) -> list[Tensor]:
        return [level(residual) for level, residual in zip(self.levels, residuals, strict=True)]


class _NaiveLevel(nn.Module):
    def __init__(self, state: dict[str, Tensor], num_heads: int) -> None:
        super().__init__()
        channels, hidden, squeezed = state["x_ref"].shape[2], *reversed(state["layers.0.mlp.se.fc1.weight"].shape)
        self.x_ref = nn.Parameter(state["x_ref"].clone())
        self.ref_proj = nn.Conv1d(channels, channels, 1)
        self.attention = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.squeeze, self.excite = nn.Linear(hidden, squeezed), nn.Linear(squeezed, hidden)
        names = {
            "ref_proj": "ref_proj.project",
            "attention": "layers.0.cross_attn",
            "fc1": "layers.0.mlp.fc1",
            "fc2": "layers.0.mlp.fc2",
            "squeeze": "layers.0.mlp.se.fc1",
            "excite": "layers.0.mlp.se.fc2",
        }
        for own, name in names.items():
            part = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            getattr(self, own).load_state_dict(part)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        references = self.ref_proj(self.x_ref.expand(len(x), -1, -1).transpose(1, 2)).transpose(1, 2)
        tokens = tokens - self.attention(tokens, references, references)[0]
        hidden = self.fc1(tokens)
        hidden = hidden * torch.sigmoid(self.excite(F.relu(self.squeeze(hidden.mean(1, keepdim=True)))))
        return (tokens + self.fc2(F.gelu(hidden))).transpose(1, 2).reshape(x.shape)


def naive_angle_loss(first: Tensor, second: Tensor, labels: Tensor, center: Tensor, temperature: float) -> Tensor:
    """The angle loss from all pairs of patches at once."""
    units = F.normalize(torch.cat([first, second]) - center, dim=1)
    labels = labels.repeat(2)
    similarity = (units @ units.T / temperature).exp()
    positives = (units * units.roll(len(first), 0)).sum(1) / temperature
    return -(positives.exp() / (similarity * (labels[:, None] != labels)).sum(1)).log().mean()


class Step:
    """One training step in three forms, on the same batch and from the same weights."""

    def __init__(self, sizes: Sizes) -> None:
        torch.manual_seed(0)
        self.config = PretrainConfig(precision="float32")
        self.backbone = create_backbone("dinov2_base", img_size=sizes.side, embed_dim=sizes.width, depth=sizes.depth)
        self.projector = ResidualProjector(self.backbone.channels, num_keys=sizes.keys)
        self.naive_projector = NaiveProjector(self.projector)
        recipe = {"lr": 1e-4, "weight_decay": 5e-4}
        self.optimizer = torch.optim.Adam(self.projector.parameters(), fused=True, **recipe)
        self.naive_optimizer = torch.optim.Adam(self.naive_projector.parameters(), **recipe)
        self.centers = [torch.randn(channels) for channels in self.backbone.channels]
        mask = torch.zeros(sizes.batch, 1, sizes.side, sizes.side, dtype=torch.uint8)
        mask[::2, :, : sizes.side // 3, : sizes.side // 3] = 1
        pool = torch.randn(sizes.pool, 3, sizes.side, sizes.side)
        indices = torch.randint(sizes.pool, (sizes.batch, sizes.shots))
        views = torch.randn(sizes.batch, 2, 3, sizes.side, sizes.side)
        self.batch = {
            "views": views,
            "mask": mask,
            "label": torch.tensor([1, 0] * (sizes.batch // 2)),
            "references": pool[indices],
        }
        self.stored = {**self.batch, "reference_indices": indices}
        self.pool = pool
        self.encoder = partial(encode_images, backbone=self.backbone, device=torch.device("cpu"), precision="float32")

    def open_store(self, folder: str) -> None:
        """Encode the pool."""
        self.store = ReferenceStore(
            folder, [Item(str(number), NORMAL, "product") for number in range(len(self.pool))], "bench"
        )
        self.store.encode(lambda number: self.pool[int(number)], self.encoder)

    def ours(self, store: ReferenceStore | None = None) -> dict[str, float]:
        batch = self.batch if store is None else self.stored
        return train_step(self.projector, self.optimizer, batch, self.encoder, store, self.centers, self.config)

    def naive(self) -> float:
        residuals = self.naive_view_residuals()
        loss = self.naive_losses(residuals)
        self.naive_optimizer.zero_grad()
        loss.backward()
        self.naive_optimizer.step()
        return loss.item()

    @torch.no_grad()
    def naive_view_residuals(self) -> list[list[Tensor]]:
        """Residuals of both views, every image against its own references."""
        residuals = []
        for image in range(len(self.batch["views"])):
            references = self.backbone(self.batch["references"][image])
            banks = [level.permute(0, 2, 3, 1).flatten(0, 2) for level in references]
            residuals.append(naive_residuals(self.backbone(self.batch["views"][image]), banks))
        return [[torch.stack([image[level][view] for image in residuals]) for level in range(4)] for view in range(2)]

    def naive_losses(self, residuals: Sequence[Sequence[Tensor]]) -> Tensor:
        total = torch.zeros(())
        views = [self.naive_projector(view) for view in residuals]
        for *levels, center in zip(*views, self.centers, strict=True):
            grid = levels[0].shape[2:]
            first, second = (level.permute(0, 2, 3, 1).flatten(0, 2) for level in levels)
            angle, norm = (function(self.batch["mask"], grid).flatten() for function in (angle_labels, norm_labels))
            total = total + naive_angle_loss(first, second, angle, center, self.config.temperature)
            total = total + norm_loss(first, norm) + norm_loss(second, norm)
        return total


def rows(quick: bool = False) -> Iterator[Row]:
    """A whole step with references encoded on the fly and from a store, and where the time of each form goes."""
    sizes = QUICK if quick else FULL
    step = Step(sizes)
    with tempfile.TemporaryDirectory() as folder:
        step.open_store(folder)
        ours, naive = step.ours()["loss"], step.naive()
        note = f"batch {sizes.batch}, {sizes.shots} references each; first losses {ours:.5f} and {naive:.5f}"
        forms: dict[str, Callable[[], Any]] = {
            "fly": step.ours,
            "store": partial(step.ours, step.store),
            "naive": step.naive,
        }
        taken = [{name: seconds(form) for name, form in forms.items()} for _ in range(sizes.repeats)]
        for name, what, target in (
            ("fly", "references encoded", 1.7),
            ("store", f"references of a pool of {sizes.pool}", 3.0),
        ):
            ratio = median(each["naive"] / each[name] for each in taken)
            times = (median(each[form] for each in taken) for form in (name, "naive"))
            yield Row(f"step of dinov2_base ({sizes.width}), {what}", *times, ratio, f"target {target}; {note}")
        yield from _split(step)


def _split(step: Step) -> Iterator[Row]:
    """Seconds of the two halves of a step."""
    fly, naive = seconds(lambda: view_residuals(step.batch, step.encoder, None)), seconds(step.naive_view_residuals)
    yield Row("  of it: encoding and matching", fly, naive, naive / fly)
    store = seconds(lambda: view_residuals(step.stored, step.encoder, step.store))
    yield Row("  of it: encoding and matching, from the pool", store, naive, naive / store)
    first, second = view_residuals(step.stored, step.encoder, step.store)

    def ours() -> None:
        projected = [
            level.chunk(2) for level in step.projector([torch.cat(pair) for pair in zip(first, second, strict=True)])
        ]
        sum(
            losses(
                *([level[view] for level in projected] for view in range(2)),
                step.batch["mask"],
                step.centers,
                step.config,
            )
        ).backward()

    own, other = seconds(ours), seconds(lambda: step.naive_losses([first, second]).backward())
    yield Row("  of it: projector, losses, backward", own, other, other / own)
