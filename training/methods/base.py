"""What all methods share: the form of a batch, of an extractor and of predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor

# A batch of a loader: "image" (B, 3, H, W) float32, "mask" (B, 1, H, W) uint8 of 0 and 1, "label" (B,) int64, and the
# lists "product" and "path" of B strings.
Batch: TypeAlias = Mapping[str, Any]
Loader: TypeAlias = Iterable[Batch]


class CountedLoader(Protocol):
    """A loader whose number of batches is known."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


# Anything that maps a batch to feature maps, one (B, C_l, h_l, w_l) per level: raw or pretrained features go through
# the same code.
Extractor: TypeAlias = Callable[[Batch], Sequence[Tensor]]


class Predictions(NamedTuple):
    """Scores of N images, float32 on the CPU: ``maps`` (N, H, W) at the size of the images and ``scores`` (N,)."""

    maps: Tensor
    scores: Tensor
