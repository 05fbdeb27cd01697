"""The data of the pretraining: two views of an image, its mask, and normal images of the same kind to compare with.

The sampler decides everything that is drawn as a function of the seed and of the position in the training. So the
batches are the same whatever the number of workers or processes, and a training that was interrupted resumes with the
very batches that it would have seen.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from adfeatures import catalog
from adfeatures.errors import ImageError, InputError
from adfeatures.images import ImageTransform, read_image

from ..data.images import ImageLoader, different_sizes, read_mask
from ..data.items import ANOMALOUS, Item
from ..data.transforms import MaskTransform, TwoViews
from ..distributed import rank, world_size
from .config import PretrainConfig
from .inputs import FrozenBackbone

# Unreadable files in a row after which the data set, not a file, must be at fault.
MAX_FAILURES = 10
# First words of the seeds, so that no two kinds of draw share their random numbers.
_PERMUTATION, _STEP, _ITEM, _REFERENCES = range(4)


def training_batches(
    config: PretrainConfig, backbone: FrozenBackbone, items: Sequence[Item], pool: Sequence[Item]
) -> tuple[StepSampler, ImageLoader]:
    """The batches of this process, and the sampler that decides which of them comes next.

    Raises:
        InputError: As of the sampler and of the data set, and for micro-batches that would not be equal.
    """
    share = config.batch_size // world_size()
    if share % config.accumulate:
        raise InputError(f"{share} images a device cannot be divided into {config.accumulate} equal micro-batches.")
    img_size = backbone.entry.img_size
    dataset = PretrainingDataset(
        items,
        pool,
        TwoViews(img_size, *view_statistics(config.view_statistics, backbone.entry)),
        backbone.transform,
        MaskTransform(img_size),
        load_references=config.pool is None,
        shots=config.shots,
    )
    sampler = StepSampler(
        len(dataset), config.batch_size, config.seed, shots=config.shots, rank=rank(), world=world_size()
    )
    pinned = backbone.device.type == "cuda"
    return sampler, ImageLoader(dataset, batch_sampler=sampler, num_workers=config.workers, pin_memory=pinned)


def view_statistics(choice: str, entry: catalog.Backbone) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for the augmented views: those of the "backbone", or the "original" ones.

    The published weights were made with CLIP's, for DINOv2 too.
    """
    return catalog.OPENAI_CLIP if choice == "original" and entry.family == "dinov2" else entry.normalization


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
        seed: Seed of everything drawn, not negative.
        shots: Numbers of references, one of which is drawn for every step.
        rank: This process.
        world: Number of processes.

    Raises:
        InputError: For a batch that cannot be divided among the processes or is larger than the data, and for senseless
            numbers.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        *,
        shots: Sequence[int] = PretrainConfig.shots,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world or seed < 0 or not shots or min(shots) < 1:
            raise InputError(
                "batch_size and shots must be at least 1, the seed not negative, and rank one of world: "
                f"got {batch_size}, {list(shots)}, {seed}, {rank} and {world}."
            )
        if batch_size % world:
            raise InputError(
                f"A batch of {batch_size} images cannot be divided among {world} processes. "
                f"Choose a multiple of {world}."
            )
        if count < batch_size:
            raise InputError(
                f"{count} images do not fill a batch of {batch_size}. Choose a smaller batch or add images."
            )
        self.count, self.batch_size, self.seed, self.shots = count, batch_size, seed, tuple(shots)
        # Every world-th image: the first micro-batches of all ranks then make up the first fraction of the batch.
        self.share = slice(rank, None, world)
        self.epoch = self.step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch."""
        return self.count // self.batch_size

    def set_position(self, epoch: int, step: int = 0) -> None:
        """Begin the next iteration at a step of an epoch, both counted from 0.

        Raises:
            InputError: For a step outside the epoch (its end, ``steps_per_epoch``, gives no batches).
        """
        if epoch < 0 or not 0 <= step <= self.steps_per_epoch:
            raise InputError(f"There is no step {step} of epoch {epoch}: an epoch has {self.steps_per_epoch} steps.")
        self.epoch, self.step = epoch, step

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
    """Images by ``Draw``, each a dict that the default collation makes batches of.

    ``views`` (2, 3, H, W) float32, the augmented views; ``mask`` (1, H, W) uint8 of 0 and 1, which both share;
    ``label`` of the item, which stays anomalous where the defect is too small to survive in the mask; ``references``
    (shots, 3, H, W) float32 without augmentation, or ``reference_indices`` (shots,) int64 into the pool; ``path`` of
    the image.

    The references are drawn with replacement from the pool's images of the same product and view. As in the original,
    the image itself may be among them, which then makes a residual of only the augmentation.

    An image that cannot be read is replaced by another one, a reference by another one of its group, both determined by
    the seed of the draw, with a warning for each such file. A mask that is missing or does not fit is an error, because
    nothing can stand in for it.

    Args:
        items: All images to train on, normal and anomalous.
        pool: Normal images that serve as references.
        views: ``TwoViews``, or what else makes ``views`` of an RGB image and a seed.
        reference_transform: For references, with the normalization of the backbone.
        mask_transform: Brings masks to the size of the views.
        load_references: False for reference features from a store: gives ``reference_indices`` and reads no references.
        shots: The numbers of references that will be drawn, to warn of groups that have fewer images.

    Raises:
        InputError: If the pool has no image of the product and view of some item, or an anomalous item has no mask.
    """

    def __init__(
        self,
        items: Sequence[Item],
        pool: Sequence[Item],
        views: Callable[[Image.Image, int], Tensor],
        reference_transform: ImageTransform,
        mask_transform: MaskTransform,
        *,
        load_references: bool = True,
        shots: Sequence[int] = PretrainConfig.shots,
    ) -> None:
        self.items, self.pool = list(items), list(pool)
        self.views, self.reference_transform, self.mask_transform = views, reference_transform, mask_transform
        self.load_references = load_references
        if bare := next((item.image for item in self.items if item.label == ANOMALOUS and item.mask is None), None):
            raise InputError(
                f"{bare} is anomalous without a mask, and the losses need one. Add the mask, or leave the image out."
            )
        self.groups = _groups(self.items, self.pool)
        small = [
            f"{' '.join(group).strip()} ({len(indices)})"
            for group, indices in self.groups.items()
            if len(indices) < max(shots)
        ]
        if small:
            warnings.warn(
                f"Fewer normal images than {max(shots)} references, so that some repeat: {', '.join(small)}.",
                stacklevel=2,
            )
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        item, image = self._readable(self._queries(draw))
        sample = {
            "views": self.views(image, draw.seed),
            "mask": self._mask(item, image),
            "label": item.label,
            "path": item.image,
        }
        group = self.groups[item.product, item.view]
        random = np.random.default_rng((_REFERENCES, draw.seed))
        indices = random.choice(group, draw.shots)
        if not self.load_references:
            return {**sample, "reference_indices": torch.from_numpy(indices)}
        images = [self._readable(self._references(index, group, random))[1] for index in indices]
        return {**sample, "references": torch.stack([self.reference_transform(image) for image in images])}

    def _mask(self, item: Item, image: Image.Image) -> Tensor:
        if item.mask is None:
            return torch.zeros(1, *self.mask_transform.img_size, dtype=torch.uint8)
        mask = read_mask(item.mask)
        if mask.size != image.size:
            raise ImageError(different_sizes(item, image.size, mask.size))
        return self.mask_transform(mask)

    def _queries(self, draw: Draw) -> Iterator[Item]:
        """The image drawn, then others that may take its place."""
        yield self.items[draw.index]
        random = np.random.default_rng((_ITEM, draw.seed))
        while True:
            yield self.items[random.integers(len(self.items))]

    def _references(self, index: int, group: np.ndarray, random: np.random.Generator) -> Iterator[Item]:
        """The reference drawn, then others of its group that may take its place."""
        yield self.pool[index]
        while True:
            yield self.pool[random.choice(group)]

    def _readable(self, candidates: Iterator[Item]) -> tuple[Item, Image.Image]:
        for item in islice(candidates, MAX_FAILURES):
            try:
                return item, read_image(item.image)
            except ImageError as error:
                self._warn(f"{error} Another image takes its place.")
        raise ImageError(
            f"{MAX_FAILURES} images in a row could not be read, {item.image} the last of them. Check the data set."
        )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)


def _groups(items: Sequence[Item], pool: Sequence[Item]) -> dict[tuple[str, str], np.ndarray]:
    """Indices into the pool by product and view, for every product and view of the items."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    wanted = dict.fromkeys((item.product, item.view) for item in items)
    for index, item in enumerate(pool):
        groups[item.product, item.view].append(index)
    if lonely := {" ".join(group).strip(): None for group in wanted if group not in groups}:
        raise InputError(
            f"No normal images can serve as references for {', '.join(lonely)}. Add some, or leave these products out."
        )
    return {group: np.array(groups[group]) for group in wanted}
