"""One step of the pretraining: residuals of two views, projectors, losses, optimizer (paper section 3)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adfeatures.errors import AdfeaturesError
from adfeatures.images import normalized

from ..distributed import gather
from ..losses import angle_loss, norm_loss
from .config import PretrainConfig
from .labels import angle_labels, norm_labels
from .reference_store import ReferenceStore
from .residuals import batch_residuals

# Images (N, H, W, 3) of 8 bits to maps of the frozen backbone.
Encode = Callable[[Tensor], list[Tensor]]


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Any],
    encoders: tuple[Encode, Encode],
    centers: Sequence[Tensor | None],
    config: PretrainConfig,
) -> dict[str, float]:
    """One step of the optimizer on this rank's share of a batch, wherever the batch lies.

    The encoders are those of the views and of the references, which are normalized differently.

    Returns:
        The losses of the global batch, summed over the levels, by name; {"skipped": 1} where it has no anomalous image.

    Raises:
        AdfeaturesError: If the loss is not finite. The parameters are unchanged then.
    """
    optimizer.zero_grad()
    tensors = on_device(batch, next(model.parameters()).device)
    if not gather(tensors["label"]).any():
        return {"skipped": 1.0}
    sums = {"angle": 0.0, "norm": 0.0}
    for number, micro in enumerate(_divide(tensors, config.accumulate), start=1):
        first, second = view_features(micro, encoders[0]) if config.no_residual else view_residuals(micro, *encoders)
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
    batch: Mapping[str, Any], encode_views: Encode, encode_references: Encode
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Residuals of the first and of the second views, (B, C_l, h_l, w_l) per level, against the same references.

    Each reference is encoded once, however many images are compared with it.
    """
    features = _encoded(batch["views"], encode_views)
    used, places = batch["reference_indices"].unique(return_inverse=True)
    if "reference_maps" in batch:
        encoded = [level[used].to(features[0].dtype) for level in batch["reference_maps"]]
    else:
        encoded = encode_references(batch["references"][used])
    references = [level[places] for level in encoded]
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
def encode_images(
    images: Tensor,
    statistics: tuple[Sequence[float], Sequence[float]],
    backbone: nn.Module,
    device: torch.device,
    precision: str,
) -> list[Tensor]:
    """Maps of the frozen backbone for images (B, H, W, 3) uint8, which are normalized on the device.

    Args:
        images: The images, anywhere.
        statistics: Mean and standard deviation of each channel, for values in [0, 1].
        backbone: The backbone, on the device. The maps have the precision of its weights.
        device: Where to compute.
        precision: Products are of bfloat16 for "autocast".
    """
    dtype = next(backbone.parameters()).dtype
    inputs = normalized(images.to(device, non_blocking=True), *statistics).to(dtype)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
        maps = backbone(inputs)
    return [level.to(dtype) for level in maps]


def prepared(batch: Mapping[str, Any], store: ReferenceStore | None, pinned: bool) -> dict[str, Any]:
    """A batch with the maps of its references from the store, if there is one, in memory that a GPU can copy itself."""
    own = dict(batch)
    if store is not None:
        own["reference_maps"] = store.read(own["pool_indices"])
    return _each_tensor(own, Tensor.pin_memory) if pinned else own


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The tensors of a batch, alone or in lists."""
    return _each_tensor(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _each_tensor(batch: Mapping[str, Any], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    lists = {"reference_maps": list(map(function, batch["reference_maps"]))} if "reference_maps" in batch else {}
    return {name: function(value) for name, value in batch.items() if isinstance(value, Tensor)} | lists


def _divide(batch: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """So many micro-batches, which share the references."""
    own = {name: batch[name].chunk(count) for name in ("views", "mask", "label", "reference_indices")}
    for number in range(count):
        yield {**batch, **{name: chunks[number] for name, chunks in own.items()}}
