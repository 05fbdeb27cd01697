"""How photos are cut: a photo becomes views of the model's input size, and the maps of these become that of the photo.

A view is a part of the photo, resized. What lies beyond the photo, or outside of its region of interest, does not count
and is filled with the model's mean color, so that nothing that is there can change a feature.
"""

from __future__ import annotations

import base64
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .documents import Size
from .errors import ImageError, InputError
from .image_files import MAX_PIXELS, MAX_SIDE
from .images import ImageSource, ImageTransform, read_image

AUTO = "auto"
# A view of "auto" is scaled down at most this many times along a side.
_MOST_SHRUNK = 4
_MIN_TILE, _MAX_TILES, _MAX_ROI_BYTES = 16, 1024, 1 << 20


class Span(NamedTuple):
    """Pixels start to stop of a photo, along one of its sides, that are resized to pixels low to high of a view."""

    start: int
    stop: int
    low: int
    high: int


class View(NamedTuple):
    """What a model sees of a photo.

    Attributes:
        x: The model's input (3, H, W).
        counts: What counts of it, bool (H, W); None for all.
        size: Height and width of the view in pixels of the photo, of what lies beyond it too.
    """

    x: Tensor
    counts: Tensor | None
    size: tuple[float, float]


@dataclass(frozen=True)
class Region:
    """A region of interest.

    Attributes:
        size: Height and width of the photos that it belongs to.
        bits: The pixels that count, row after row, eight in a byte, packed by zlib, in base64.

    Raises:
        InputError: For bits that are damaged, or a region where nothing counts.
    """

    size: Size
    bits: str

    def __post_init__(self) -> None:
        if not self._unpacked().any():
            raise InputError("it has no white pixels: paint the area that matters white on black")

    @classmethod
    def read(cls, source: ImageSource) -> Region:
        """The region of a mask image: what is brighter than half of its brightest pixel, and not transparent.

        Raises:
            ImageError: As ``read_image``.
            InputError: For an image that is black, or too intricate to be kept with a bank.
        """
        gray = np.asarray(read_image(source, background=(0, 0, 0)).convert("L"))
        bits = zlib.compress(np.packbits(gray > gray.max() / 2).tobytes(), 9)
        try:
            if len(bits) > _MAX_ROI_BYTES:
                raise InputError("it has too many small parts. Draw it with smooth outlines, and save it as PNG")
            return cls((gray.shape[0], gray.shape[1]), base64.b64encode(bits).decode())
        except InputError as error:
            name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "given in memory"
            raise InputError(f"The region of interest {name} cannot be used: {error}.") from error

    @cached_property
    def mask(self) -> np.ndarray:
        """What counts, bool (H, W)."""
        return self._unpacked()

    def _unpacked(self) -> np.ndarray:
        height, width = self.size
        if height * width > MAX_PIXELS or len(self.bits) > 2 * _MAX_ROI_BYTES:
            raise InputError("the region of interest is larger than any photo")
        try:
            packer, length = zlib.decompressobj(), (height * width + 7) // 8
            packed = packer.decompress(base64.b64decode(self.bits, validate=True), length + 1)
        except (ValueError, zlib.error) as error:
            raise InputError(f"the region of interest is damaged ({error})") from error
        if len(packed) != length or not packer.eof:
            raise InputError("the region of interest is damaged")
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=height * width)
        return bits.reshape(height, width).astype(bool)

    def resized(self, size: tuple[int, int]) -> np.ndarray:
        """What counts of a photo at another size: every pixel with a part that does, bool (H, W)."""
        return _resized(self.mask, size)


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (np.arange(count) * length // count for count, length in zip(size, mask.shape, strict=True))
    return np.logical_or.reduceat(np.logical_or.reduceat(mask, rows), columns, axis=1)


@dataclass(frozen=True)
class Geometry:
    """How the photos of a product are cut. The default squashes the whole photo to the input size of the model.

    Attributes:
        tile: Side in pixels of the squares that photos are cut into, evenly spread, or "auto": the shorter side of the
            references, at most four times that of the model's input.
        overlap: Pixels that neighboring tiles share at least, at most half of the tile. The default is an eighth.
        keep_aspect: Whether to pad a photo, or one that is smaller than a tile, instead of squashing or refusing it.
        region: What counts of the photos, which must have its size then.

    Raises:
        InputError: For a tile of fewer than 16 pixels or more than any photo has, or an overlap of more than its half.
    """

    tile: int | str | None = None
    overlap: int | None = None
    keep_aspect: bool = False
    region: Region | None = None

    def __post_init__(self) -> None:
        if self.tile is None or self.tile == AUTO:
            if self.overlap is not None:
                raise InputError("An overlap needs tiles of a size in pixels.")
        elif not isinstance(self.tile, int) or not _MIN_TILE <= self.tile <= MAX_SIDE:
            raise InputError(f"A tile has a side of {_MIN_TILE} to {MAX_SIDE:,} pixels, or {AUTO}, not {self.tile}.")
        elif not 0 <= (self.tile // 8 if self.overlap is None else self.overlap) <= self.tile / 2:
            raise InputError(f"Tiles of {self.tile} pixels share 0 to {self.tile // 2} pixels, not {self.overlap}.")

    @property
    def is_plain(self) -> bool:
        """Whether photos are squashed and all of them counts."""
        return self == PLAIN

    def __str__(self) -> str:
        if self.is_plain:
            return "whole photos, squashed"
        words = ["whole photos" if self.tile is None else f"tiles of {self.tile} pixels, {self.overlap} shared"]
        words += ["padded"] if self.keep_aspect else []
        if self.region is not None:
            height, width = self.region.size
            words.append(f"{self.region.mask.mean():.0%} of {width} x {height} pixels count")
        return ", ".join(words)

    def resolved(self, sizes: Iterable[tuple[int, int]], img_size: tuple[int, int]) -> Geometry:
        """The same with numbers in place of what is taken from the sizes of the references."""
        if self.tile is None:
            return self
        tile = self.tile
        if not isinstance(tile, int):
            tile = max(_MIN_TILE, min(_MOST_SHRUNK * min(img_size), *map(min, sizes)))
        return replace(self, tile=tile, overlap=tile // 8 if self.overlap is None else self.overlap)

    def cut(self, size: tuple[int, int], img_size: tuple[int, int]) -> Cut:
        """The views of a photo of a height and width.

        Raises:
            ImageError: For a photo that is smaller than a tile, or of another size than the region, or that takes more
                than 1024 tiles.
        """
        (height, width), region = size, self.region
        if region is not None and region.size != size:
            raise ImageError(
                f"it has {width} x {height} pixels, and its region of interest {region.size[1]} x {region.size[0]}. "
                "Photos and mask must have the same size."
            )
        extents: tuple[float, float] = size
        if isinstance(self.tile, int):
            extents = (self.tile, self.tile)
            if self.tile > min(size) and not self.keep_aspect:
                raise ImageError(
                    f"a tile of {self.tile} x {self.tile} pixels is larger than its {width} x {height}. Fit with a "
                    "smaller --tile, or with --keep-aspect, which pads small photos."
                )
        elif self.keep_aspect:
            scale = max(height / img_size[0], width / img_size[1])
            extents = (scale * img_size[0], scale * img_size[1])
        rows, columns = (
            _spans(length, extent, self.overlap or 0, side)
            for length, extent, side in zip(size, extents, img_size, strict=True)
        )
        if len(rows) * len(columns) > _MAX_TILES:
            number = len(rows) * len(columns)
            raise ImageError(f"it takes {number:,} tiles of {self.tile} pixels. Fit with larger tiles.")
        places = [(row, column) for row in rows for column in columns]
        if region is not None:
            places = [(r, c) for r, c in places if region.mask[r.start : r.stop, c.start : c.stop].any()]
        return Cut(self, size, img_size, extents, rows, columns, places)


PLAIN = Geometry()


def _spans(length: int, extent: float, overlap: int, side: int) -> list[Span]:
    """What views show along a side of a photo: evenly spread parts of an extent, or all of it in the middle of one."""
    if length <= extent:
        shown = max(1, round(side * length / extent))
        low = (side - shown) // 2
        return [Span(0, length, low, low + shown)]
    tile = round(extent)
    count = math.ceil((length - overlap) / (tile - overlap))
    starts = np.linspace(0, length - tile, count).round().astype(int).tolist()
    return [Span(start, start + tile, 0, side) for start in starts]


class Cut(NamedTuple):
    """The views of a photo.

    Attributes:
        geometry: What they were cut by.
        size: Height and width of the photo.
        img_size: Height and width of the views.
        extents: Height and width of the views in pixels of the photo.
        rows: What they show along the height, from top to bottom.
        columns: What they show along the width, from left to right.
        places: Row and column of each view, without views in which nothing counts.
    """

    geometry: Geometry
    size: tuple[int, int]
    img_size: tuple[int, int]
    extents: tuple[float, float]
    rows: list[Span]
    columns: list[Span]
    places: list[tuple[Span, Span]]

    def join(self, maps: Iterable[Tensor], size: tuple[int, int]) -> np.ndarray:
        """The map of a photo at a size, float32 (H, W), of those of its views, which are faded into each other."""
        if self.geometry.is_plain:
            (own,) = maps
            return F.interpolate(own[None, None], size, mode="bilinear", align_corners=False)[0, 0].cpu().numpy()
        joined = torch.zeros(size)
        down, across = (
            _joints(spans, *lengths)
            for spans, *lengths in zip((self.rows, self.columns), self.size, size, self.img_size, strict=True)
        )
        for (row, column), own in zip(self.places, maps, strict=True):
            (top, rows), (left, columns) = down[row], across[column]
            joined[top, left] += rows @ own.cpu() @ columns.T
        if self.geometry.region is not None:
            joined *= torch.from_numpy(self.geometry.region.resized(size))
        return joined.numpy()


def _joints(spans: Sequence[Span], length: int, count: int, side: int) -> dict[Span, tuple[slice, Tensor]]:
    """Along a side: which of the pixels of a map lie in each view, and their share (n, side) of the pixels of the view.

    A share is linear interpolation, times the weight of the view among those that show the pixel.
    """
    centers = (torch.arange(count, dtype=torch.float64) + 0.5) * length / count
    nearness = torch.stack([torch.minimum(centers - span.start, span.stop - centers) for span in spans])
    weights = nearness.clamp_min(1e-6).where(nearness >= 0, 0)
    weights /= weights.sum(dim=0)
    joints = {}
    for span, weight in zip(spans, weights, strict=True):
        inside = weight.nonzero()[:, 0].tolist()
        shown = slice(inside[0], inside[-1] + 1) if inside else slice(0, 0)
        start, stop, low, high = span
        places = low + (centers[shown] - start) / (stop - start) * (high - low) - 0.5
        distances = places.clamp(low, high - 1)[:, None] - torch.arange(side)
        joints[span] = shown, ((1 - distances.abs()).clamp_min(0) * weight[shown, None]).float()
    return joints


@dataclass(frozen=True)
class Views(Sequence[View]):
    """The views of a photo, each made when it is asked for.

    Attributes:
        image: The photo, upright and in RGB.
        cut: Its views.
        transform: The way from a view to the model's input.
    """

    image: Image.Image
    cut: Cut
    transform: ImageTransform

    def __len__(self) -> int:
        return len(self.cut.places)

    def __getitem__(self, number: int) -> View:  # type: ignore[override]
        geometry, (row, column) = self.cut.geometry, self.cut.places[number]
        mean = tuple(round(255 * channel) for channel in self.transform.mean)
        part = self.image.crop((column.start, row.start, column.stop, row.stop))
        shown = np.ones((row.high - row.low, column.high - column.low), dtype=bool)
        if geometry.region is not None:
            mask = geometry.region.mask[row.start : row.stop, column.start : column.stop]
            part = Image.composite(part, Image.new("RGB", part.size, mean), Image.fromarray(mask))
            shown = _resized(mask, (shown.shape[0], shown.shape[1]))
        height, width = self.cut.img_size
        counts, view = np.zeros((height, width), dtype=bool), Image.new("RGB", (width, height), mean)
        counts[row.low : row.high, column.low : column.high] = shown
        view.paste(part.resize(shown.shape[::-1], Image.Resampling.BICUBIC), (column.low, row.low))
        needed = geometry.keep_aspect or geometry.region is not None
        return View(self.transform.normalized(view), torch.from_numpy(counts) if needed else None, self.cut.extents)


def views_of(image: Image.Image, transform: ImageTransform, geometry: Geometry) -> tuple[Cut, Sequence[View]]:
    """The views of a photo, upright and in RGB, and how their maps are joined. A single one holds the photo no longer.

    Raises:
        ImageError: As ``Geometry.cut`` and the transform.
    """
    cut = geometry.cut((image.height, image.width), transform.img_size)
    if geometry.is_plain:
        return cut, [View(transform.of_rgb(image), None, cut.extents)]
    views = Views(image, cut, transform)
    return cut, views if len(views) > 1 else [views[0]]
