"""The data of the pretraining: two views of an image, its mask, and normal images of the same kind to compare with.

The sampler decides everything that is drawn as a function of the seed and of the position in the training. So the
batches are the same whatever the number of workers or processes, and a training that was interrupted resumes with the
very batches that it would have seen.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from adfeatures import catalog
from adfeatures.errors import ImageError, InputError
from adfeatures.images import ImageTransform

from ..data.image_cache import ImageCache
from ..data.images import different_sizes, read_mask
from ..data.items import Item
from ..data.transforms import MaskTransform
from ..distributed import rank, world_size
from .config import PretrainConfig

# Unreadable files in a row after which the data set, not a file, must be at fault.
MAX_FAILURES = 10
# First words of the seeds, so that no two kinds of draw share their random numbers.
_PERMUTATION, _STEP, _ITEM, _REFERENCES = range(4)


def choose_pool(items: Sequence[Item], size: int, seed: int) -> list[Item]:
    """At most ``size`` of the items of each product and view, drawn without replacement, in the order of the items."""
    chosen: list[int] = []
    for key, members in sorted(_by_group(items).items()):
        digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
        random = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
        chosen += random.permutation(members)[:size].tolist()
    return [items[index] for index in sorted(chosen)]


def view_statistics(kind: str, entry: catalog.Backbone) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for the augmented views of a backbone.

    They are its own or, for the kind "original", CLIP's for DINOv2 too, as the published weights were made.
    """
    return catalog.OPENAI_CLIP if kind == "original" and entry.family == "dinov2" else entry.normalization


@dataclass(frozen=True)
class Draw:
    """What one element of a batch is made of: an image, the number of its references, the seed of all that is drawn."""

    index: int
    shots: int
    seed: int


class StepSampler(Sampler[list[Draw]]):
    """The batches of one process, from a position on: every epoch all images in another order, in full batches only.

    The global batch of a step, and the number of references that all its images get, depend on the seed, the epoch and
    the step only; the process takes its share of it. Iterating does not move the position, since loaders fetch batches
    that may never be trained on.

    Args:
        count: Number of images.
        batch_size: Images a step, of all processes together.
        seed: Seed of everything drawn.
        shots: Numbers of references, one of which is drawn for every step.
        micro_batches: Equal fractions that a process divides its share into.

    Attributes:
        epoch, step: Where the next iteration begins, both counted from 0.
        share: Which elements of a global batch are those of this process.

    Raises:
        InputError: For a batch that cannot be divided equally, or is larger than the data.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        shots: Sequence[int] = PretrainConfig.shots,
        micro_batches: int = 1,
    ) -> None:
        world = world_size()
        if batch_size % (world * micro_batches):
            raise InputError(
                f"A batch of {batch_size} images cannot be divided among {world} processes in {micro_batches} equal "
                f"micro-batches each. Choose a multiple of {world * micro_batches}."
            )
        if count < batch_size:
            raise InputError(
                f"{count} images do not fill a batch of {batch_size}. Choose a smaller batch or add images."
            )
        self.count, self.batch_size, self.seed, self.shots = count, batch_size, seed, tuple(shots)
        # Every world-th image: the first micro-batches of all ranks then make up the first fraction of the batch.
        self.share = slice(rank(), None, world)
        self.epoch = self.step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch."""
        return self.count // self.batch_size

    def __len__(self) -> int:
        return self.steps_per_epoch - self.step

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self.epoch
        order = np.random.default_rng((_PERMUTATION, self.seed, epoch)).permutation(self.count)
        for step in range(self.step, self.steps_per_epoch):
            random = np.random.default_rng((_STEP, self.seed, epoch, step))
            shots = int(random.choice(self.shots))
            seeds = random.integers(2**63, size=self.batch_size)
            indices = order[step * self.batch_size : (step + 1) * self.batch_size]
            batch = [Draw(int(index), shots, int(seed)) for index, seed in zip(indices, seeds, strict=True)]
            yield batch[self.share]


class PretrainingDataset(Dataset[dict[str, Any]]):
    """Images by ``Draw``, with two views, a mask, and normal images of the same product and view to compare with.

    An element is a dict: ``views`` (2, H, W, 3), what ``views`` makes of the image at the size of the input; ``mask``
    (1, H, W) of 0 and 1; ``label`` and ``path`` of the item; ``reference_indices`` (shots,) int64 into the pool, and
    the ``references`` (shots, H, W, 3) themselves. All pixels are uint8.

    References are drawn with replacement from the pool's images of the same product and view, the image itself
    included, as in the original. An image that cannot be read is replaced by another one, a reference by another one of
    its group, as the seed of the draw decides, with a warning for each such file. Nothing can stand in for a mask.

    Args:
        items: All images to train on, normal and anomalous.
        pool: Normal images that serve as references.
        views: What makes ``views`` of an RGB image and a seed.
        transform: Its geometry is that of images and masks, and its bit depth that of all images.
        cache: Where images and masks are looked up before their files are read.
        load_references: False gives ``reference_indices`` and reads no references.
        shots: The numbers of references that will be drawn, to warn of groups that have fewer images.

    Raises:
        InputError: If the pool has no image of the product and view of some item.
        ImageError: From an entry, for a mask that is missing or does not fit, or where image after image is unreadable.
    """

    def __init__(
        self,
        items: Sequence[Item],
        pool: Sequence[Item],
        views: Callable[[Image.Image, int], np.ndarray],
        transform: ImageTransform,
        cache: ImageCache | None = None,
        load_references: bool = True,
        shots: Sequence[int] = PretrainConfig.shots,
    ) -> None:
        self.items, self.pool, self.views, self.transform = list(items), list(pool), views, transform
        self.mask_transform = MaskTransform(transform.img_size, transform.preset)
        self.cache, self.load_references = cache, load_references
        self.groups = _by_group(self.pool)
        sizes = {" ".join(group).strip(): len(self.groups.get(group, ())) for group in _by_group(self.items)}
        if lonely := [group for group, size in sizes.items() if not size]:
            raise InputError(
                f"No normal images can serve as references for {', '.join(lonely)}. "
                "Add some, or leave these products out."
            )
        if small := [f"{group} ({size})" for group, size in sizes.items() if size < max(shots)]:
            warnings.warn(
                f"Fewer normal images than {max(shots)} references, so that some repeat: {', '.join(small)}.",
                stacklevel=2,
            )
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        random = np.random.default_rng((_ITEM, draw.seed))
        index, image, mask = self._read(self.items, draw.index, partial(random.integers, len(self.items)))
        item = self.items[index]
        sample = {
            "views": self.views(Image.fromarray(image), draw.seed),
            "mask": mask,
            "label": item.label,
            "path": item.image,
        }
        group = self.groups[item.product, item.view]
        random = np.random.default_rng((_REFERENCES, draw.seed))
        indices = random.choice(group, draw.shots)
        if not self.load_references:
            return {**sample, "reference_indices": indices}
        found, images, _ = zip(
            *(self._read(self.pool, index, partial(random.choice, group)) for index in indices), strict=True
        )
        return {**sample, "reference_indices": np.array(found), "references": np.stack(images)}

    def _read(
        self, items: Sequence[Item], index: int, another: Callable[[], Any]
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """The index drawn, or of another image in the place of those that cannot be read, with its image and mask."""
        for _ in range(MAX_FAILURES):
            item = items[index]
            if self.cache is not None and (cached := self.cache.get(item)) is not None:
                return index, *cached
            try:
                picture = self.transform.read(item.image)
                image = np.asarray(self.transform.resized(picture))
            except ImageError as error:
                message = f"{error} Another image takes its place."
                if message not in self._warned:
                    self._warned.add(message)
                    warnings.warn(message, stacklevel=2)
                index = another()
            else:
                return index, image, self._mask(item, picture.size, image.shape[:2])
        raise ImageError(
            f"{MAX_FAILURES} images in a row could not be read, {item.image} the last of them. Check the data set."
        )

    def _mask(self, item: Item, size: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
        if item.mask is None:
            return np.zeros((1, *shape), np.uint8)
        mask = read_mask(item.mask)
        if mask.size != size:
            raise ImageError(different_sizes(item, size, mask.size))
        return self.mask_transform(mask).numpy()


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of elements of ``PretrainingDataset``, in which each reference is held once, however often it was drawn.

    In the place of their indices into the pool, ``reference_indices`` (B, shots) are those into the ``references``
    (N, H, W, 3) of the batch, which ``pool_indices`` (N,) name, in the order in which they were first drawn.
    """
    drawn = np.stack([sample["reference_indices"] for sample in samples])
    known, first, places = np.unique(drawn, return_index=True, return_inverse=True)
    order = np.argsort(first)
    batch = {
        "views": np.stack([sample["views"] for sample in samples]),
        "mask": np.stack([sample["mask"] for sample in samples]),
        "label": np.array([sample["label"] for sample in samples]),
        "pool_indices": known[order],
        "reference_indices": np.argsort(order)[places].reshape(drawn.shape),
    }
    if "references" in samples[0]:
        shots = drawn.shape[1]
        batch["references"] = np.stack([samples[at // shots]["references"][at % shots] for at in first[order]])
    tensors: dict[str, Any] = {name: torch.from_numpy(value) for name, value in batch.items()}
    return {**tensors, "path": [sample["path"] for sample in samples]}


def _by_group(items: Sequence[Item]) -> dict[tuple[str, str], list[int]]:
    """Indices of items by product and view."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[item.product, item.view].append(index)
    return groups
