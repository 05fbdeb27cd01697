"""Batches of images and masks, decoded in the workers of a loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler

from adfeatures.errors import ImageError
from adfeatures.images import ImageTransform, read_image

from .items import Item
from .transforms import MaskTransform


class ImageDataset(Dataset[dict[str, Any]]):
    """Images and masks of items, each read when it is asked for. Can be pickled.

    An entry is a dict: "image" (3, H, W) float32 as the transform gives it, "mask" (1, H, W) uint8 of 0 and 1 on the same pixels, "label"
    (NORMAL or ANOMALOUS), "product" and "path". Where an item has no mask, the mask is zero.

    Args:
        items: What to read.
        transform: The way from an image to a model's input; it decides the geometry of the masks as well.

    Raises:
        ImageError: From an entry: an image or mask cannot be read, or its mask is of another size (both upright) than the image.
    """

    def __init__(self, items: Sequence[Item], transform: ImageTransform) -> None:
        self.items = list(items)
        self.transform = transform
        self.mask_transform = MaskTransform(transform.img_size, transform.preset)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        picture = read_image(item.image)
        image = self.transform(picture)
        if item.mask is None:
            mask = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        else:
            drawn = read_image(item.mask)
            if drawn.size != picture.size:
                raise ImageError(different_sizes(item, picture.size, drawn.size))
            mask = self.mask_transform(drawn)
        return {"image": image, "mask": mask, "label": item.label, "product": item.product, "path": item.image}


def different_sizes(item: Item, image: tuple[int, int], mask: tuple[int, int]) -> str:
    """The message for a mask that does not fit its image, sizes as (width, height)."""
    return (
        f"The mask {item.mask} has {mask[0]} x {mask[1]} pixels, its image {item.image} has {image[0]} x {image[1]}. "
        "Make the mask again at the size of the image."
    )


class ImageLoader(DataLoader[dict[str, Any]]):
    """A loader whose workers' errors read as those of the main process, without the worker's traceback."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except ImageError as error:
            # Its frames hold it and the workers: processes forked later would inherit these, and fail in ending what is not theirs.
            error.__traceback__ = None
            raise ImageError(str(error).rpartition("ImageError: ")[2].strip()) from None


def loader(
    dataset: Dataset[dict[str, Any]],
    batch_size: int = 8,
    *,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
) -> DataLoader[dict[str, Any]]:
    """Load a data set in batches of the form that `training.methods.base` describes.

    The batches depend on neither the number of workers nor the state of torch's own generator.

    Args:
        dataset: What to load.
        batch_size: Images per batch.
        shuffle: Draw a new order in each pass, from the seed.
        seed: Seed of the order.
        workers: Processes that decode; 0 decodes in this one.
        drop_last: Leave out a last batch of fewer images.
    """
    order = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed)) if shuffle else SequentialSampler(dataset)  # type: ignore[arg-type]
    return ImageLoader(
        dataset,
        batch_size,
        sampler=order,
        num_workers=workers,
        drop_last=drop_last,
        # The loader draws a seed for its workers in each pass, which must not move the generator of the order or torch's own.
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=workers > 0,
    )
