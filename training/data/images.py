"""Batches of images and masks, decoded in the workers of a loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from adfeatures.errors import ImageError
from adfeatures.images import FORMATS, ImageTransform, read_image

from .items import Item
from .transforms import MaskTransform


class ImageDataset(Dataset[dict[str, Any]]):
    """Images and masks of items, each read when it is asked for. Can be pickled.

    An entry is a dict: "image" (3, H, W) float32 as the transform gives it, "mask" (1, H, W) uint8 of 0 and 1 on the
    same pixels, "label" (NORMAL or ANOMALOUS), "product" and "path". Where an item has no mask, the mask is zero.

    Args:
        items: What to read.
        transform: The way from an image to a model's input; it decides the geometry of the masks as well.

    Raises:
        ImageError: From an entry: an image or mask cannot be read, or its mask is of another size (both upright) than
            the image.
    """

    def __init__(self, items: Sequence[Item], transform: ImageTransform) -> None:
        self.items = list(items)
        self.transform = transform
        self.mask_transform = MaskTransform(transform.img_size, transform.preset)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        picture = read_image(item.image, bit_depth=self.transform.bit_depth)
        image = self.transform(picture)
        if item.mask is None:
            mask = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        else:
            drawn = read_mask(item.mask)
            if drawn.size != picture.size:
                raise ImageError(different_sizes(item, picture.size, drawn.size))
            mask = self.mask_transform(drawn)
        return {"image": image, "mask": mask, "label": item.label, "product": item.product, "path": item.image}


def read_mask(path: str) -> Image.Image:
    """Read a mask as `read_image` reads an image, but with transparent pixels black, and no 16-bit sample rounded to 0.

    So a defect that is drawn on nothing does not fill the whole mask, and instances that are numbered from 1 are not
    lost.

    Raises:
        ImageError: As `read_image`.
    """
    mask = read_image(path)
    with Image.open(path, formats=FORMATS) as file:  # It is sound, since it has been read.
        if file.mode.startswith("I"):
            defect = np.asarray(ImageOps.exif_transpose(file)) > 0
        elif "A" in file.getbands() or "transparency" in file.info:
            colors = np.asarray(ImageOps.exif_transpose(file).convert("RGBA"))
            defect = colors[..., :3].any(axis=2) & (colors[..., 3] > 0)
        else:
            return mask
    return Image.fromarray(defect).convert("RGB")


def different_sizes(item: Item, image: tuple[int, int], mask: tuple[int, int]) -> str:
    """The message for a mask that does not fit its image, sizes as (width, height)."""
    return (
        f"The mask {item.mask} has {mask[0]} x {mask[1]} pixels, its image {item.image} has {image[0]} x {image[1]}. "
        "Make the mask again at the size of the image."
    )


class Shuffled(Sampler[int]):
    """All indices, in an order that is drawn anew at the beginning of each pass.

    torch's own draws at the end of a pass too, so that after one that was broken off the order depends on how far
    workers had read ahead.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size, generator=self.generator).tolist())

    def __len__(self) -> int:
        return self.size


class ImageLoader(DataLoader[dict[str, Any]]):
    """A loader whose workers' errors read as those of the main process, without the worker's traceback."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except ImageError as error:
            # Its frames hold it and the workers: processes forked later would inherit these, and fail in ending what is
            # not theirs.
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
    return ImageLoader(
        dataset,
        batch_size,
        sampler=Shuffled(len(dataset), seed) if shuffle else SequentialSampler(dataset),  # type: ignore[arg-type]
        num_workers=workers,
        drop_last=drop_last,
        # The loader draws a seed for its workers in each pass, which must not move the generator of the order or
        # torch's own.
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=workers > 0,
    )
