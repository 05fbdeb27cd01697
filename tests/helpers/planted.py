"""Images of normal noise, with or without a planted outlier, and an extractor whose features are normal noise too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_extractor(*channels: int, stride: int = 4) -> Callable[[Mapping[str, Any]], list[Tensor]]:
    """Fixed random projections of each ``stride`` x ``stride`` patch, one map per level."""
    generator = torch.Generator().manual_seed(0)
    kernels = [torch.randn(c, 3, stride, stride, generator=generator) / (3**0.5 * stride) for c in channels]
    return lambda batch: [F.conv2d(batch["image"], kernel, stride=stride) for kernel in kernels]


def batches(
    count: int,
    *,
    seed: int,
    planted: bool = False,
    size: tuple[int, int] = (32, 32),
    batch_size: int = 8,
    product: str = "noise",
) -> list[dict[str, Any]]:
    """Batches of ``count`` images; ``planted`` gives each a brighter square, a quarter as wide; masks show it."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, *size, generator=generator)
    masks = torch.zeros(count, 1, *size, dtype=torch.uint8)
    if planted:
        for image, mask in zip(images, masks, strict=True):
            side = min(size) // 4
            top, left = (int(torch.randint(length - side + 1, (), generator=generator)) for length in size)
            image[:, top : top + side, left : left + side] += 2
            mask[:, top : top + side, left : left + side] = 1
    return [
        {
            "image": images[i : i + batch_size],
            "mask": masks[i : i + batch_size],
            "label": torch.full((len(images[i : i + batch_size]),), int(planted)),
            "product": [product] * len(images[i : i + batch_size]),
            "path": [f"{product}/{number:03d}.png" for number in range(i, min(i + batch_size, count))],
        }
        for i in range(0, count, batch_size)
    ]


def labels(loader: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.cat([batch["label"] for batch in loader])
