"""What a product is evaluated on: its images, their masks, and the raw features of both splits, encoded once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from adfeatures.errors import InputError

from ..data.images import ImageDataset, loader
from ..data.items import ANOMALOUS, NORMAL, Item, items_digest
from ..data.tree import Tree
from ..methods.base import Batch
from .extractors import Encoder
from .feature_cache import FeatureCache, Kept
from .subject import Subject

BATCH = 8


class Truth(NamedTuple):
    """What is right for N test images: ``masks`` (N, H, W) uint8 of 0 and 1, ``labels`` (N,) int64, and what is odd about them."""

    masks: Tensor
    labels: Tensor
    warnings: list[str]


class RawFeatures:
    """Features of the frozen backbone, in any of the geometries of `adfeatures.images.PRESETS`, encoded once and kept on disk.

    Args:
        subject: The model.
        folder: Where they are kept.
        workers: Processes that read images.
    """

    def __init__(self, subject: Subject, folder: Path, workers: int = 0) -> None:
        self.subject, self.folder, self.workers = subject, folder, workers
        self._by_preset: dict[str, Kept] = {}

    def identity(self, preset: str) -> dict[str, object]:
        """What the features depend on besides the image."""
        subject = self.subject
        levels = list(getattr(subject.backbone, "levels", ()))
        statistics = {"mean": subject.mean, "std": subject.std}
        return {
            "backbone": subject.fingerprint,
            "levels": levels,
            "img_size": subject.img_size,
            "preset": preset,
            **statistics,
        }

    def of(self, preset: str) -> Kept:
        """The extractor of one geometry."""
        if preset not in self._by_preset:
            cache = FeatureCache(self.folder, self.identity(preset))
            self._by_preset[preset] = Kept(
                Encoder(self.subject.backbone, self.subject.device), cache, device=self.subject.device
            )
        return self._by_preset[preset]

    def encode(self, items: Sequence[Item], preset: str) -> None:
        """Encode the images that are not in the cache yet.

        Raises:
            ImageError: For an image that cannot be read.
        """
        extractor = self.of(preset)
        missing = [item for item in items if not extractor.holds(item.image)]
        for batch in self._batches(missing, preset) if missing else ():
            extractor(batch)

    def read(self, items: Sequence[Item], preset: str) -> Truth:
        """Read test images and their masks, encoding what is not in the cache.

        Raises:
            ImageError: For an image or mask that cannot be read, or a mask of another size than its image.
            InputError: For no images.
        """
        if not items:
            raise InputError("There are no test images.")
        extractor, masks = self.of(preset), []
        for batch in self._batches(items, preset):
            extractor(batch)
            masks.append(batch["mask"][:, 0])
        truth = torch.cat(masks)
        return Truth(truth, torch.tensor([item.label for item in items]), _oddities(items, truth))

    def _batches(self, items: Sequence[Item], preset: str) -> Iterable[Batch]:
        batches = loader(ImageDataset(items, self.subject.transform(preset)), BATCH, workers=self.workers)
        return tqdm(batches, desc="encoding", leave=False, disable=None)


class Product:
    """The images of one product. Nothing is read before it is asked for.

    Args:
        name: Name of the product.
        source: The data set.
        root: Folder of the data set.
        raw: Encodes the images.

    Raises:
        InputError: If the data set is not complete, or has no normal training images.
    """

    def __init__(self, name: str, source: Tree, root: str | os.PathLike[str], raw: RawFeatures) -> None:
        self.name, self.raw = name, raw
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
        return hashlib.sha256(
            json.dumps([items_digest(self.train), items_digest(self.test), sizes]).encode()
        ).hexdigest()

    def encode(self, preset: str) -> None:
        """Bring the features of all images in one geometry into the cache.

        Raises:
            ImageError: For an image or mask that cannot be used.
            InputError: For no test images.
        """
        self.raw.encode(self.train, preset)
        self.truth(preset)

    def truth(self, preset: str) -> Truth:
        """Masks and labels of the test images in one geometry, whose features are in the cache after this."""
        if preset not in self._truths:
            self._truths[preset] = self.raw.read(self.test, preset)
        return self._truths[preset]


def _oddities(items: Sequence[Item], masks: Tensor) -> list[str]:
    """Warnings about anomalous images without a mask, or with one that resizing or cutting emptied."""
    empty = [not mask.any() for mask in masks]
    unmasked = sum(item.label == ANOMALOUS and item.mask is None for item in items)
    vanished = sum(item.mask is not None and none for item, none in zip(items, empty, strict=True))
    texts = [
        (unmasked, "anomalous test images have no mask: their pixels count as normal."),
        (vanished, "masks are empty at the size of the model's input: their pixels count as normal."),
    ]
    return [f"{count} {text}" for count, text in texts if count]
