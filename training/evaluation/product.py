"""What a product is evaluated on: its images, and the masks and labels of those in the test."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from adfeatures.errors import InputError

from ..data.images import noticing, shared_masks
from ..data.items import ANOMALOUS, NORMAL, Item, items_digest
from ..data.tree import Tree
from .raw_features import RawFeatures


class Truth(NamedTuple):
    """Masks (N, H, W), uint8 of 0 and 1 at the size of the model's input, and labels (N,), with what is odd of them."""

    masks: Tensor
    labels: Tensor
    warnings: list[str]


class Product:
    """The images of one product in the folder of a data set. Nothing is read before it is asked for.

    Attributes:
        noticed: What is odd about its folders, and about training images that were encoded.

    Raises:
        InputError: If the data set is not complete, or has no normal training images.
    """

    def __init__(self, name: str, source: Tree, root: str | os.PathLike[str], raw: RawFeatures) -> None:
        self.name, self.raw = name, raw
        with noticing() as self.noticed:
            self.train = [item for item in source.find_items(root, "train", [name]) if item.label == NORMAL]
            self.test: list[Item] = source.find_items(root, "test", [name])
        self._truths: dict[str, Truth] = {}
        if not self.train:
            raise InputError(f"{name} has no normal training images in {root}.")

    @cached_property
    def digest(self) -> str:
        """Hash of what its images are: names, labels, and sizes of the files, wherever the data set lies."""
        paths = [path for item in (*self.train, *self.test) for path in (item.image, item.mask)]
        sizes = [os.path.getsize(path) if path and os.path.isfile(path) else None for path in paths]
        facts = [items_digest(self.train), items_digest(self.test), sizes]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def encode(self, preset: str) -> None:
        """Bring the features of all images in one geometry into the cache. Errors are those of ``truth``."""
        self.noticed += self.raw.encode(self.train, preset)
        self.truth(preset)

    def truth(self, preset: str) -> Truth:
        """Masks and labels of the test images in one geometry, whose features are in the cache after this.

        Raises:
            ImageError: For an image or mask that cannot be used.
            InputError: For no test images.
        """
        if not self.test:
            raise InputError("There are no test images.")
        if preset not in self._truths:
            masks, noticed = self.raw.masks(self.test, preset)
            labels = torch.tensor([item.label for item in self.test])
            odd = [*_oddities(self.test, masks), *shared_masks(self.test), *noticed]
            self._truths[preset] = Truth(masks, labels, odd)
        return self._truths[preset]


def _oddities(items: Sequence[Item], masks: Tensor) -> list[str]:
    """Warnings about anomalous images without a mask, or with one that resizing or cutting emptied."""
    unmasked = sum(item.label == ANOMALOUS and item.mask is None for item in items)
    vanished = sum(item.mask is not None and not mask.any() for item, mask in zip(items, masks, strict=True))
    texts = {
        "anomalous test images have no mask: their pixels count as normal.": unmasked,
        "masks are empty at the size of the model's input: their pixels count as normal.": vanished,
    }
    return [f"{count} {text}" for text, count in texts.items() if count]
