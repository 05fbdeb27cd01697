"""Batches of images and masks, decoded in the workers of a loader."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from threading import Thread
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler, default_collate

from adfeatures.errors import ImageError
from adfeatures.image_files import open_image
from adfeatures.images import ImageTransform, read_image

from .items import Item
from .transforms import MaskTransform

S = TypeVar("S")
T = TypeVar("T")
# How many files a text names that many files share.
NAMED = 3
# Entries that each worker has made, or is making, before they are asked for.
AHEAD = 4
# Calls that a worker makes before it gives away what came of them.
_CALLS = 16
_END = object()
# Above it a mask is bright, and far below it is what JPEG leaves around what is bright.
_BRIGHT, _FAINT = 128, 32


class ImageDataset(Dataset[dict[str, Any]]):
    """Images and masks of items, each read when it is asked for. Can be pickled.

    An entry is a dict: "image" (3, H, W) float32 as the transform gives it, "mask" (1, H, W) uint8 of 0 and 1 on the
    same pixels, "label" (NORMAL or ANOMALOUS), "product", "path", and what ``read_item`` "noticed", a line each. Where
    an item has no mask, the mask is zero.

    Args:
        items: What to read.
        transform: The way from an image to a model's input; it decides the geometry of the masks as well.

    Raises:
        ImageError: From an entry, as ``read_item``.
    """

    def __init__(self, items: Sequence[Item], transform: ImageTransform) -> None:
        self.items = list(items)
        self.transform = transform
        self.mask_transform = MaskTransform(transform.img_size, transform.preset)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        picture, drawn, noticed = read_item(item, self.transform.bit_depth)
        image = self.transform.of_rgb(picture)
        blank = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        return {
            "image": image,
            "mask": blank if drawn is None else self.mask_transform(drawn),
            "label": item.label,
            "product": item.product,
            "path": item.image,
            "noticed": "\n".join(noticed),
        }


def read_item(item: Item, bit_depth: int = 16) -> tuple[Image.Image, Image.Image | None, list[str]]:
    """The image and the mask of an item, and what is odd about them, for ``summarize``.

    Args:
        item: What to read.
        bit_depth: Bits in use of 16-bit images, see `adfeatures.images.read_image`. Masks are not concerned.

    Raises:
        ImageError: For an image or mask that cannot be read, or a mask of another size (both upright) than its image.
    """
    with noticing() as texts:
        image = read_image(item.image, bit_depth=bit_depth)
    noticed = [f"images with a warning ({text.replace(item.image, 'an image')})" for text in texts]
    if item.mask is None:
        return image, None, noticed
    mask = read_mask(item.mask)
    if mask.size != image.size:
        raise ImageError(different_sizes(item, image.size, mask.size))
    pixels = np.asarray(mask)
    return image, mask, noticed + [kind for kind, is_odd in ODD_MASKS.items() if is_odd(pixels)]


@contextmanager
def noticing() -> Iterator[list[str]]:
    """The texts of what a block of code warns of, instead of the warnings; they are there after it."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield texts
    texts += dict.fromkeys(str(warning.message) for warning in caught if issubclass(warning.category, UserWarning))


def summarize(items: Iterable[Item], noticed: Iterable[Iterable[str]]) -> list[str]:
    """What was noticed of items, a text for each kind, with the number of its files and the names of some."""
    files: dict[str, list[str]] = defaultdict(list)
    for item, kinds in zip(items, noticed, strict=True):
        for kind in kinds:
            files[kind].append(str(item.mask if kind in ODD_MASKS else item.image))
    return [f"{len(paths)} {kind}: {some(paths)}." for kind, paths in files.items()]


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def shared_masks(items: Iterable[Item]) -> list[str]:
    """A text for each mask that several images have, as 000.png and 000.jpg may."""
    images: dict[str, list[str]] = defaultdict(list)
    for item in items:
        if item.mask is not None:
            images[item.mask].append(item.image)
    shared = {mask: of_mask for mask, of_mask in images.items() if len(of_mask) > 1}
    return [
        f"The mask {mask} is that of several images: {some(of_mask)}. Rename them, and give each a mask of its own."
        for mask, of_mask in shared.items()
    ]


def _defect(mask: np.ndarray) -> np.ndarray:
    # Many times as fast as mask.any(axis=2).
    return np.asarray((mask[..., 0] | mask[..., 1] | mask[..., 2]) > 0)


def _is_inverted(mask: np.ndarray) -> bool:
    defect = _defect(mask)
    edges = np.concatenate([defect[0], defect[-1], defect[:, 0], defect[:, -1]])
    return bool(edges.mean() > 0.95 and 0.5 < defect.mean() < 1)


def _is_compressed(mask: np.ndarray) -> bool:
    return bool(mask.max() >= _BRIGHT and np.any((mask > 0) & (mask < _FAINT)))


def _is_gray(mask: np.ndarray) -> bool:
    return bool(np.any((mask > 0) & (mask < 255))) and not _is_compressed(mask)


# What may be wrong with a mask of 8 bits (H, W, 3), whose pixels count as defect where any color is above 0.
ODD_MASKS: dict[str, Callable[[np.ndarray], bool]] = {
    "masks without a defect": lambda mask: not mask.any(),
    "masks in which every pixel is a defect": lambda mask: bool(_defect(mask).all()),
    "masks that look inverted, a defect all around the edge of the image": _is_inverted,
    "masks with faint grays beside white, as JPEG leaves them, which all count as defect": _is_compressed,
    "gray masks, in which all above 0 counts as defect": _is_gray,
}


def read_mask(path: str) -> Image.Image:
    """Read a mask as `read_image` reads an image, but with transparent pixels black, and no 16-bit sample rounded to 0.

    So a defect that is drawn on nothing does not fill the whole mask, and instances that are numbered from 1 are not
    lost.

    Raises:
        ImageError: As `read_image`.
    """
    with noticing():  # What it says of photos is not about masks.
        mask = read_image(path)
    with noticing(), open_image(path) as file:
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


class Batches(Protocol):
    """The indices of each batch: a list of lists, or a sampler of batches."""

    def __iter__(self) -> Iterator[Sequence[Any]]: ...

    def __len__(self) -> int: ...


class ImageLoader:
    """Batches of a data set, whose entries workers make while the batch before is in use.

    Entries travel one by one, through pipes, and become batches in this process. So no more than `AHEAD` entries of
    each worker and two batches are on the way, and none of it lies in shared memory, of which a container has little.
    Errors of workers read as those of this process, without the worker's traceback.

    Args:
        dataset: What to load.
        batches: The indices of each batch.
        workers: Processes that make the entries; 0 makes them in this one, when they are asked for.
        collate: Makes a batch of its entries.
        prepare: Makes of each batch what is given in its place, before it is asked for where there are workers.
        keep: Let the workers live on for the next pass.
    """

    def __init__(
        self,
        dataset: Dataset[dict[str, Any]],
        batches: Batches,
        *,
        workers: int = 0,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]] = default_collate,
        prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda batch: batch,
        keep: bool = False,
    ) -> None:
        self.dataset, self._batches, self._collate, self._prepare = dataset, batches, collate, prepare
        self._indices = _Indices(batches)
        self._entries: DataLoader[dict[str, Any]] = DataLoader(
            dataset,
            batch_size=None,
            sampler=self._indices,
            collate_fn=_as_arrays,  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            # A seed for the workers is drawn in each pass, which must not move torch's own generator.
            generator=torch.Generator(),
            persistent_workers=keep and workers > 0,
            worker_init_fn=_end_with_parent,
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        entries = iter(self._entries)  # Not in the thread, where it is not safe to fork.
        batches = self._collated(entries, self._indices.lengths)
        return ahead(batches) if self._entries.num_workers else batches

    def _collated(self, entries: Iterator[dict[str, Any]], lengths: deque[int]) -> Iterator[dict[str, Any]]:
        with _errors_of_workers():
            try:
                for first in entries:
                    yield self._prepare(self._collate([first, *islice(entries, lengths.popleft() - 1)]))
            finally:
                del entries


@contextmanager
def _errors_of_workers() -> Iterator[None]:
    """Have an ImageError of a worker read as one of this process, and hold nothing."""
    try:
        yield
    except ImageError as error:
        # Its frames hold it and the workers: processes forked later would inherit these, and fail in ending what is not
        # theirs.
        error.__traceback__ = None
        raise ImageError(str(error).rpartition("ImageError: ")[2].strip()) from None


class _Indices(Sampler[Any]):
    """The indices of all batches one after the other; ``lengths`` are those of the batches that were begun."""

    def __init__(self, batches: Iterable[Sequence[Any]]) -> None:
        self.batches = batches
        self.lengths: deque[int] = deque()

    def __iter__(self) -> Iterator[Any]:
        self.lengths = lengths = deque[int]()

        def indices() -> Iterator[Any]:
            for batch in self.batches:
                lengths.append(len(batch))
                yield from batch

        return indices()


def _end_with_parent(worker: int) -> None:
    """Have this worker end when its parent was killed, although nobody empties the pipe that it may be writing to."""

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    Thread(target=wait, daemon=True).start()


def _as_arrays(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry without tensors, which would travel through shared memory."""
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in entry.items()}


def in_parallel(function: Callable[[S], T], values: Sequence[S], workers: int = 0) -> Iterator[T]:
    """What a function returns for each value, in order, in this many worker processes; 0 computes in this one."""
    chunks = [values[at : at + _CALLS] for at in range(0, len(values), _CALLS)]
    with _errors_of_workers():
        yield from chain.from_iterable(
            DataLoader(
                _Calls(function, chunks),
                batch_size=None,
                collate_fn=list,
                # Where there is little to do it takes longer to start them.
                num_workers=workers if len(chunks) > 1 else 0,
                generator=torch.Generator(),
                worker_init_fn=_end_with_parent,
            )
        )


class _Calls(Dataset[list[Any]]):
    def __init__(self, function: Callable[[Any], Any], chunks: Sequence[Sequence[Any]]) -> None:
        self.function, self.chunks = function, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> list[Any]:
        return list(map(self.function, self.chunks[index]))


def ahead(values: Iterator[T]) -> Iterator[T]:
    """The same values, of which a thread makes the next one while one is in use."""
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        following = thread.submit(next, values, _END)
        try:
            while (value := following.result()) is not _END:
                following = thread.submit(next, values, _END)
                yield value  # type: ignore[misc]
        finally:
            del following  # An error would hold itself by it.


def loader(
    dataset: Dataset[dict[str, Any]],
    batch_size: int = 8,
    *,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
) -> ImageLoader:
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
    order = Shuffled(len(dataset), seed) if shuffle else SequentialSampler(dataset)  # type: ignore[arg-type]
    return ImageLoader(dataset, BatchSampler(order, batch_size, drop_last), workers=workers, keep=True)
