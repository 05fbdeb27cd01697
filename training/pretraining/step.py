"""One step of the pretraining: residuals of two views, projectors, losses, optimizer (paper section 3)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adfeatures.errors import AdfeaturesError

from ..distributed import gather
from ..losses import angle_loss, norm_loss
from .config import PretrainConfig
from .labels import angle_labels, norm_labels
from .reference_store import ReferenceStore
from .residuals import batch_residuals

# Images to maps of the frozen backbone.
Encode = Callable[[Tensor], list[Tensor]]


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Any],
    encode: Encode,
    store: ReferenceStore | None,
    centers: Sequence[Tensor | None],
    config: PretrainConfig,
) -> dict[str, float]:
    """One step of the optimizer on this rank's share of a batch, wherever the batch lies.

    Returns:
        The losses of the global batch, summed over the levels, by name; {"skipped": 1} where it has no anomalous image.

    Raises:
        AdfeaturesError: If the loss is not finite. The parameters are as before then.
    """
    optimizer.zero_grad()
    tensors = on_device(batch, next(model.parameters()).device)
    if not gather(tensors["label"]).any():
        return {"skipped": 1.0}
    sums = {"angle": 0.0, "norm": 0.0}
    for number, micro in enumerate(_divide(tensors, config.accumulate), start=1):
        first, second = (view_features if config.no_residual else partial(view_residuals, store=store))(micro, encode)
        last = number == config.accumulate
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext():
            with torch.autocast(first[0].device.type, torch.bfloat16, enabled=config.precision == "autocast"):
                projected = model([torch.cat(pair) for pair in zip(first, second, strict=True)])
            one, other = zip(*(level.chunk(2) for level in projected), strict=True)
            angle, norm = losses(one, other, micro["mask"], centers, config)
            ((angle + norm) / config.accumulate).backward()
        sums["angle"] += angle.item() / config.accumulate
        sums["norm"] += norm.item() / config.accumulate
    if not all(map(math.isfinite, sums.values())):
        raise AdfeaturesError(
            f"The loss is not finite (angle {sums['angle']}, norm {sums['norm']}); what was saved before is kept. "
            "Begin another run with a lower --lr, or with --precision float32 if it is not that already."
        )
    optimizer.step()
    return {**sums, "loss": sums["angle"] + sums["norm"]}


@torch.no_grad()
def view_features(batch: dict[str, Tensor], encode: Encode) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Features of the first and of the second views, (B, C_l, h_l, w_l) per level, as they are."""
    first, second = zip(*(level.unbind(1) for level in _encoded(batch["views"], encode)), strict=True)
    return first, second


@torch.no_grad()
def view_residuals(
    batch: dict[str, Tensor], encode: Encode, store: ReferenceStore | None
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Residuals of the first and of the second views, (B, C_l, h_l, w_l) per level, against the same references."""
    features = _encoded(batch["views"], encode)
    if store is None:
        references = _encoded(batch["references"], encode)
    else:
        stored, one = store.read(batch["reference_indices"]), features[0]
        # Half the bytes go to the device.
        references = [level.to(one.device).to(one.dtype) for level in stored]
    # The views lie one above the other in one map, so that each row of the bank is normalized once.
    tall = batch_residuals([level.transpose(1, 2).flatten(2, 3) for level in features], references)
    first, second = zip(*(level.unflatten(2, (2, -1)).unbind(2) for level in tall), strict=True)
    return first, second


def _encoded(images: Tensor, encode: Encode) -> list[Tensor]:
    """Maps (B, N, C_l, h_l, w_l) of the N images of each sample."""
    return [level.unflatten(0, images.shape[:2]) for level in encode(images.flatten(0, 1))]


def losses(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    masks: Tensor,
    centers: Sequence[Tensor | None],
    config: PretrainConfig,
) -> tuple[Tensor, Tensor]:
    """Angle and norm loss of the global batch, summed over the levels.

    Args:
        first: Projected residual features of the first views, (B, C_l, h_l, w_l) per level.
        second: Those of the second views.
        masks: (B, 1, H, W) of 0 and 1.
        centers: (C_l,) per level, None for the origin.
        config: Settings of the losses.
    """
    masks = gather(masks)
    angle = norm = first[0].new_zeros((), dtype=torch.float32)
    for one, other, center in zip(first, second, centers, strict=True):
        grid = (one.shape[2], one.shape[3])
        view1, view2 = (gather(level.permute(0, 2, 3, 1)).flatten(0, 2) for level in (one, other))
        if config.losses != "norm":
            labels = angle_labels(masks, grid).flatten()
            angle = angle + angle_loss(view1, view2, labels, center, config.temperature, config.anchors)
        labels = norm_labels(masks, grid).flatten()
        for view in (view1, view2) if config.losses != "angle" else ():
            norm = norm + norm_loss(view, labels, config.radius, config.margin, config.pseudo_huber, view.dtype)
    return angle, norm


@torch.no_grad()
def encode_images(images: Tensor, backbone: nn.Module, device: torch.device, precision: str) -> list[Tensor]:
    """Maps of the frozen backbone for images (B, 3, H, W), in the precision of its weights."""
    dtype = next(backbone.parameters()).dtype
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
        maps = backbone(images.to(device, dtype, non_blocking=True))
    return [level.to(dtype) for level in maps]


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a batch; the indices of references stay where their store is."""
    return {
        key: value if key == "reference_indices" else value.to(device, non_blocking=True)
        for key, value in batch.items()
        if isinstance(value, Tensor)
    }


def _divide(batch: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """So many micro-batches."""
    tensors = {name: value.chunk(count) for name, value in batch.items()}
    return [{name: chunks[number] for name, chunks in tensors.items()} for number in range(count)]
