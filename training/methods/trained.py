"""What the methods do alike: take features without gradient, draw from seeds of their own, gather predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from adfeatures.errors import InputError

from .base import Batch, Extractor, Loader, Predictions


def feature_maps(extractor: Extractor, batch: Batch, levels: int | None = None) -> list[Tensor]:
    """Feature maps of a batch, float32 and without gradient, one (B, C_l, h_l, w_l) for each of the last ``levels``.

    All levels where that is None, or more than there are.

    Raises:
        InputError: For NaN or infinite values, naming the image.
    """
    with torch.no_grad():
        maps = [level.float() for level in extractor(batch)][-(levels or 0) :]
    finite = torch.stack([level.isfinite().flatten(1).all(dim=1) for level in maps]).all(dim=0)
    if not finite.all():
        path = batch.get("path", ["an image"] * len(finite))[int(finite.int().argmin())]
        raise InputError(
            f"The features of {path or 'an augmented image'} hold NaN or infinite values. "
            "Check the weights and the image."
        )
    return maps


def first_maps(extractor: Extractor, loader: Loader, levels: int | None = None) -> list[Tensor]:
    """Feature maps of the loader's first batch, which tell channels, grids and device.

    Raises:
        InputError: If there is no batch, or as `feature_maps`.
    """
    for batch in loader:
        return feature_maps(extractor, batch, levels)
    raise InputError(
        "The loader of the training images gives no batch. With drop_last it needs at least batch_size images."
    )


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's global generators of the CPU and of ``device`` for a block of code, and put them back after it.

    For what can draw from those generators only: initializers and dropout.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def gather(scored: Iterable[tuple[Tensor, Tensor]]) -> Predictions:
    """Join the maps (B, H, W) and scores (B,) of batches.

    Raises:
        InputError: For no batch, or batches of images of different sizes.
    """
    pairs = [(maps.to("cpu", torch.float32), scores.to("cpu", torch.float32)) for maps, scores in scored]
    if not pairs:
        raise InputError("There is nothing to score: the loader gives no batch.")
    sizes = {tuple(maps.shape[1:]) for maps, _ in pairs}
    if len(sizes) > 1:
        raise InputError(
            f"Predictions need images of one size, got (height, width) {sorted(sizes)}. Give all images the same size."
        )
    return Predictions(*map(torch.cat, zip(*pairs, strict=True)))
