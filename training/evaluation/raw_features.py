"""The features of the frozen backbone: an image is encoded once, and kept on disk for all methods and references."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adfeatures.errors import InputError

from ..console import progress
from ..data.images import ImageDataset, loader, summarize
from ..data.items import Item
from ..methods.base import Batch
from .feature_cache import CachedExtractor
from .model import EvaluatedModel


class RawFeatures:
    """Features of the backbone in any of the geometries of `adfeatures.images.PRESETS`, all levels.

    Args:
        model: The model.
        folder: Where they are kept.
        workers: Processes that read images.
    """

    def __init__(self, model: EvaluatedModel, folder: Path, workers: int = 0) -> None:
        self.model, self.folder, self.workers = model, folder, workers
        self._by_preset: dict[str, CachedExtractor] = {}

    def identity(self, preset: str) -> dict[str, object]:
        """What the features depend on besides the image."""
        facts: dict[str, object] = {
            "backbone": self.model.fingerprint,
            "levels": list(getattr(self.model.backbone, "levels", ())),
            "img_size": self.model.img_size,
            "preset": preset,
            "mean": self.model.mean,
            "std": self.model.std,
        }
        # Features of before there was a choice have no bit depth.
        return facts if self.model.bit_depth == 16 else {**facts, "bit_depth": self.model.bit_depth}

    def of(self, preset: str) -> CachedExtractor:
        """The extractor of one geometry. For the blank images of `KnownImages` that it lacks, it raises InputError."""
        if preset not in self._by_preset:
            identity = self.identity(preset)
            self._by_preset[preset] = CachedExtractor(self._compute, self.folder, identity, device=self.model.device)
        return self._by_preset[preset]

    def encode(self, items: Sequence[Item], preset: str) -> list[str]:
        """Encode the images that are not in the cache yet, and tell what was noticed of them.

        Raises:
            ImageError: For an image that cannot be read.
        """
        missing = [item for item in items if not self.of(preset).holds(item.image)]
        noticed = [text for batch in self._encoded(missing, preset) for text in batch["noticed"]]
        return summarize(missing, map(str.splitlines, noticed))

    def masks(self, items: Sequence[Item], preset: str) -> tuple[Tensor, list[str]]:
        """The masks (N, H, W), uint8 of 0 and 1, of images, which are encoded as well, and what was noticed of both.

        Raises:
            ImageError: For an image or mask that cannot be read, or a mask of another size than its image.
        """
        masks, noticed = [], []
        for batch in self._encoded(items, preset):
            masks.append(batch["mask"][:, 0])
            noticed += batch["noticed"]
        return torch.cat(masks), summarize(items, map(str.splitlines, noticed))

    def _encoded(self, items: Sequence[Item], preset: str) -> Iterator[Batch]:
        if items:
            batches = loader(ImageDataset(items, self.model.transform(preset)), workers=self.workers)
            for batch in progress(batches, desc="encoding", leave=False):
                self.of(preset)(batch)
                yield batch

    @torch.no_grad()
    def _compute(self, batch: Batch) -> Sequence[Tensor]:
        images = batch["image"].to(self.model.device)
        finite = images.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            path = batch["path"][int(finite.int().argmin())]
            raise InputError(f"The features of {path} are no longer in the cache. Start the same command again.")
        return self.model.backbone(images)


class KnownImages(Dataset[dict[str, Any]]):
    """Images whose features are known, with entries as of `training.data.images.ImageDataset`; no file is read.

    Their pixels are NaN, so that nothing takes them for a picture. Masks are zero.
    """

    def __init__(self, items: Sequence[Item], size: tuple[int, int]) -> None:
        self.items, self.size = list(items), size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        image = torch.tensor(torch.nan).expand(3, *self.size)
        mask = torch.zeros((), dtype=torch.uint8).expand(1, *self.size)
        return {"image": image, "mask": mask, "label": item.label, "product": item.product, "path": item.image}
