"""What products are drawn on: a part as maps seen from above, windows into it, distances of shapes, and noise.

Lengths are in halves of the width of the canvas, so that coordinates run from -1 to 1; heights have the same unit.
Colors are linear reflectances. Maps are float32, which halves the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Map: TypeAlias = NDArray[np.floating]
Color = Sequence[float] | Map
HEIGHT, RED, BLUE, GLOSS, METAL, BODY = 0, 1, 3, 4, 5, 6


@dataclass
class Pieces:
    """Counts the pieces that a part is put together from, and leaves one out."""

    missing: int | None = None
    count: int = 0


@dataclass
class Part:
    """A physical part on its ground, as maps seen from above, or a window into one that shares its memory.

    Attributes:
        maps: (7, H, W): height, red, green, blue, gloss (0 matt to 1 polished), metal (0 or 1) and body (1 where the
            product is).
        floor: What is there without the product, in the same form.
        x, y: Local coordinates of each texel, (H, W).
        texel: Size of a texel.
        origin: Row and column of the local origin.
        turn: Angle of the local axes on the canvas.
        core: Color inside the material, where it is broken.
        surface: Whether the product is a sheet that fills every view, not an object.
        pieces: Shared count of pieces.
    """

    maps: Map
    floor: Map
    x: Map
    y: Map
    texel: float
    origin: tuple[float, float]
    turn: float = 0.0
    core: Color = (0.2, 0.2, 0.2)
    surface: bool = False
    pieces: Pieces = field(default_factory=Pieces)

    @classmethod
    def blank(cls, size: int, missing: int | None = None) -> Part:
        """A part of nothing, ``size`` texels wide, whose piece of number ``missing`` will be left out."""
        texel = 2 / size
        steps = (np.arange(size, dtype=np.float32) + 0.5) * texel - 1
        x, y = np.tile(steps, (size, 1)), np.tile(steps[:, None], (1, size))
        maps = np.zeros((7, size, size), np.float32)
        center = (size - 1) / 2
        return cls(maps, maps, x, y, texel, (center, center), pieces=Pieces(missing))

    @property
    def height(self) -> Map:
        """Height of each texel."""
        return self.maps[HEIGHT]

    @property
    def color(self) -> Map:
        """Linear colors (3, H, W)."""
        return self.maps[RED : BLUE + 1]

    @property
    def gloss(self) -> Map:
        """From 0, matt, to 1."""
        return self.maps[GLOSS]

    @property
    def metal(self) -> Map:
        """From 0 to 1, which is metal."""
        return self.maps[METAL]

    @property
    def body(self) -> Map:
        """Where there is material."""
        return self.maps[BODY]

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in texels."""
        height, width = self.x.shape
        return height, width

    def near(self, x: float, y: float, reach: float, turn: float = 0.0) -> Part:
        """The window of at least ``reach`` around a point, with that point as origin and axes turned by ``turn``."""
        x, y, turn = float(x), float(y), float(turn)
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        row = self.origin[0] + (sin * x + cos * y) / self.texel
        column = self.origin[1] + (cos * x - sin * y) / self.texel
        margin = 1.42 * reach / self.texel + 2
        (height, width), (top, left) = self.shape, (int(row - margin), int(column - margin))
        rows = slice(min(max(0, top), height - 1), max(1, min(height, int(row + margin) + 1)))
        columns = slice(min(max(0, left), width - 1), max(1, min(width, int(column + margin) + 1)))
        dx, dy = self.x[rows, columns] - x, self.y[rows, columns] - y
        cos, sin = math.cos(turn), math.sin(turn)
        return replace(
            self,
            maps=self.maps[:, rows, columns],
            floor=self.floor[:, rows, columns],
            x=cos * dx + sin * dy,
            y=cos * dy - sin * dx,
            origin=(row - rows.start, column - columns.start),
            turn=self.turn + turn,
        )

    @contextmanager
    def piece(self) -> Iterator[None]:
        """Around the drawing of one piece.

        That of the missing piece is undone, so that the random numbers after it stay the same.
        """
        before = self.maps.copy() if self.pieces.count == self.pieces.missing else None
        self.pieces.count += 1
        yield
        if before is not None:
            self.maps[...] = before

    def inside(self, distance: Map) -> Map:
        """Share of each texel inside a shape, from its signed distances (negative inside)."""
        return np.clip(0.5 - distance / self.texel, 0, 1)

    def paint(
        self,
        cover: Map,
        color: Color | None = None,
        *,
        gloss: float | None = None,
        metal: float | None = None,
        height: float | Map | None = None,
        body: float | None = None,
    ) -> None:
        """Blend in what is given, ``cover`` (0 to 1) of it. A color has the shape (3,) or (3, H, W)."""
        if color is not None:
            target = np.asarray(color, np.float32)
            self.color[...] += cover * ((target if target.ndim == 3 else target[:, None, None]) - self.color)
        for old, new in ((self.gloss, gloss), (self.metal, metal), (self.height, height), (self.body, body)):
            if new is not None:
                old += cover * (new - old)

    def solid(
        self,
        distance: Map,
        height: float | Map,
        color: Color | None = None,
        *,
        bevel: float = 0.03,
        base: float = 0.0,
        gloss: float | None = None,
        metal: float | None = None,
    ) -> None:
        """A block of the product from ``base`` up to ``height``, rounded over ``bevel`` inwards from its outline."""
        # The color reaches a little further than the wall, which would take that of the ground at its foot.
        cover = self.inside(distance - 1.2 * self.texel)
        self.paint(
            cover, color, gloss=gloss, metal=metal, height=base + (height - base) * rounded(distance, bevel), body=1
        )

    def hole(self, distance: Map, wall: float = 0.02) -> None:
        """Cut down to the ground."""
        cover = self.inside(distance + 0.8 * wall)
        self.maps[RED:] += cover * (self.floor[RED:] - self.maps[RED:])
        deep = rounded(distance, wall)
        self.height[...] += deep * (self.floor[HEIGHT] - self.height)

    def keep_floor(self) -> None:
        """Remember the present state as what is there without the product."""
        self.floor = self.maps.copy()


Builder: TypeAlias = Callable[[Part, np.random.Generator], None]


def rounded(distance: Map, bevel: float) -> Map:
    """0 outside a shape to 1 further inside than ``bevel``, a quarter circle between."""
    depth = np.clip(1 + distance / bevel, 0, 1)
    return np.sqrt(1 - depth * depth)


def smooth(t: Map) -> Map:
    """0 below 0 to 1 above 1, without corners."""
    t = np.clip(t, 0, 1)
    return t * t * (3 - 2 * t)


def length(x: Map, y: Map) -> Map:
    """Length of the vectors (x, y)."""
    return np.sqrt(x * x + y * y)


def disc(x: Map, y: Map, radius: float | Map) -> Map:
    """Distance from the edge of a disc, negative inside."""
    return length(x, y) - radius


def ring(x: Map, y: Map, inner: float, outer: float) -> Map:
    """Distance from the edge of a ring, negative inside."""
    return np.abs(length(x, y) - (inner + outer) / 2) - (outer - inner) / 2


def box(x: Map, y: Map, width: float, height: float, radius: float = 0.0) -> Map:
    """Signed distance of a rectangle of half sizes ``width`` and ``height`` with rounded corners."""
    dx, dy = np.abs(x) - (width - radius), np.abs(y) - (height - radius)
    return length(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - radius


def polygon(x: Map, y: Map, sides: int, radius: float) -> Map:
    """Distance of a regular polygon of this inradius (exact inside and along its sides)."""
    step = 2 * math.pi / sides
    angle = np.arctan2(y, x) % step - step / 2
    return length(x, y) * np.cos(angle) - radius


def segment(x: Map, y: Map, start: tuple[float, float], end: tuple[float, float]) -> Map:
    """Distance from a straight line between two points."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / max(dx * dx + dy * dy, 1e-12), 0, 1)
    return length(x - start[0] - along * dx, y - start[1] - along * dy)


def noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: float | tuple[float, float], octaves: int = 1
) -> Map:
    """Smooth noise of mean 0 and standard deviation about 1.

    It has ``cells`` bumps down and across; each further octave halves their size.
    """
    down, across = (cells, cells) if isinstance(cells, int | float) else cells
    total, weight, power = np.zeros(shape, np.float32), 1.0, 0.0
    for octave in range(octaves):
        grid = [
            max(2, min(side, math.ceil(count * 2**octave) + 1))
            for side, count in zip(shape, (down, across), strict=True)
        ]
        coarse = Image.fromarray(rng.standard_normal(grid, dtype=np.float32))
        total += np.float32(weight) * np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC))
        power += weight * weight
        weight *= 0.55
    # Interpolation between independent values takes off about a quarter of their spread.
    return total * np.float32(1.33 / math.sqrt(power))


def grain(rng: np.random.Generator, shape: tuple[int, int]) -> Map:
    """White noise of standard deviation 1."""
    return rng.standard_normal(shape, dtype=np.float32)


def sample(maps: Map, x: Map, y: Map, padding: str = "reflection") -> Map:
    """Maps (C, H, W) read at coordinates from -1 to 1 of their own width and height, bilinearly."""
    grid = torch.from_numpy(np.stack((x, y), -1).astype(np.float32, copy=False))[None]
    source = torch.from_numpy(np.ascontiguousarray(maps, np.float32))[None]
    return F.grid_sample(source, grid, mode="bilinear", padding_mode=padding, align_corners=False)[0].numpy()


def lettering(text: str, x: Map, y: Map, height: float) -> Map:
    """Cover of a line of text of this height, centered on the local origin, its reading direction along x."""
    pixels = 48
    font = ImageFont.load_default(pixels)
    left, top, right, bottom = font.getbbox(text)
    picture = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
    ImageDraw.Draw(picture).text((4 - left, 4 - top), text, 255, font)
    scale = 2 * (bottom - top) / height
    return sample(
        np.asarray(picture, np.float32)[None] / 255, x * scale / picture.width, y * scale / picture.height, "zeros"
    )[0]


def mix(first: Color, second: Color, share: Map) -> Map:
    """Colors (3, H, W) between two, by the share (0 to 1) of the second."""
    start, end = (np.asarray(color, np.float32) for color in (first, second))
    start, end = (color if color.ndim == 3 else color[:, None, None] for color in (start, end))
    return start + share * (end - start)


def jitter(rng: np.random.Generator, color: Color, amount: float = 0.06) -> Map:
    """A color of another batch: a little lighter or darker, a little off in hue."""
    return np.asarray(color, np.float32) * np.exp(
        amount * (rng.standard_normal() + 0.4 * rng.standard_normal(3))
    ).astype(np.float32)


def pebbles(
    rng: np.random.Generator, x: Map, y: Map, count: float, irregular: float = 0.9
) -> tuple[Map, Map, NDArray[np.int64], int]:
    """Cells around points scattered on the plane, ``count`` of them per unit of length.

    Returns:
        Distances to the nearest and the second nearest point in widths of a cell, number of the nearest, and how many
        points there are.
    """
    u, v = (x - float(x.min())) * count + 1, (y - float(y.min())) * count + 1
    column, row = u.astype(np.int64), v.astype(np.int64)
    width = int(column.max()) + 2
    total = width * (int(row.max()) + 2)
    offset_x, offset_y = (0.5 + irregular * (rng.random(total, dtype=np.float32) - 0.5) for _ in range(2))
    first, second = np.full(x.shape, 9, np.float32), np.full(x.shape, 9, np.float32)
    nearest = np.zeros(x.shape, np.int64)
    inner_u, inner_v, cell = u - column, v - row, row * width + column
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            index = cell + (down * width + right)
            dx, dy = offset_x.take(index) + (right - inner_u), offset_y.take(index) + (down - inner_v)
            square = dx * dx + dy * dy
            np.minimum(second, np.maximum(first, square), out=second)
            closer = square < first
            np.copyto(first, square, where=closer)
            np.copyto(nearest, index, where=closer)
    return np.sqrt(first), np.sqrt(second), nearest, total
