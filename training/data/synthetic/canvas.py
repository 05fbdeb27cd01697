"""What products are drawn on: a part as maps seen from above, and windows into it.

Lengths are in halves of the width of the canvas, so that coordinates run from -1 to 1; heights have the same unit.
Colors are linear reflectances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from .shapes import Map, Rng, rounded

# A gray, red green and blue, or a picture (3, H, W).
Color: TypeAlias = float | Sequence[float] | Map
HEIGHT, RED, BLUE, GLOSS, METAL, BODY = 0, 1, 3, 4, 5, 6


@dataclass
class Pieces:
    """Counts the pieces that a part is put together from, and leaves one out."""

    missing: int | None = None
    count: int = 0


@dataclass
class Part:
    """A physical part on its ground, as maps seen from above, or a window into one that shares its memory.

    Its attributes ``height``, ``color`` (linear, (3, H, W)), ``gloss`` (0 matt to 1 polished), ``metal`` (0 or 1) and
    ``body`` (1 where the product is) are views of the maps, to be changed in place.

    Attributes:
        maps: (7, H, W): height, red, green, blue, gloss, metal and body.
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
    core: Color = 0.2
    surface: bool = False
    pieces: Pieces = field(default_factory=Pieces)

    def __post_init__(self) -> None:
        self.shape = self.x.shape
        self.height, self.color, self.gloss = self.maps[HEIGHT], self.maps[RED : BLUE + 1], self.maps[GLOSS]
        self.metal, self.body = self.maps[METAL], self.maps[BODY]

    @classmethod
    def blank(cls, size: int, missing: int | None = None) -> Part:
        """A part of nothing, ``size`` texels wide, whose piece of number ``missing`` will be left out."""
        texel = 2 / size
        steps = (np.arange(size, dtype=np.float32) + 0.5) * texel - 1
        x, y = np.tile(steps, (size, 1)), np.tile(steps[:, None], (1, size))
        maps = np.zeros((7, size, size), np.float32)
        center = (size - 1) / 2
        return cls(maps, maps, x, y, texel, (center, center), pieces=Pieces(missing))

    def near(self, x: float, y: float, reach: float, turn: float = 0.0) -> Part:
        """The window of at least ``reach`` around a point, with that point as origin and axes turned by ``turn``."""
        x, y, turn = float(x), float(y), float(turn)
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        row = self.origin[0] + (sin * x + cos * y) / self.texel
        column = self.origin[1] + (cos * x - sin * y) / self.texel
        margin = 1.42 * reach / self.texel + 2
        rows, columns = (
            slice(min(max(0, int(at - margin)), side - 1), max(1, min(side, int(at + margin) + 1)))
            for at, side in zip((row, column), self.shape, strict=True)
        )
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
    def piece(self, *place: float) -> Iterator[Part]:
        """What one piece is drawn on: the window `near` a place, or all of the part.

        The drawing of the missing piece is undone, so that the random numbers after it stay the same.
        """
        before = self.maps.copy() if self.pieces.count == self.pieces.missing else None
        self.pieces.count += 1
        yield self.near(*place) if place else self
        if before is not None:
            self.maps[...] = before

    def inside(self, distance: Map) -> Map:
        """Share of each texel inside a shape, from its signed distances (negative inside)."""
        return np.clip(0.5 - distance / self.texel, 0, 1)

    def paint(self, cover: Map, color: Color | None = None, **maps: float | Map) -> None:
        """Blend in what is given, ``cover`` (0 to 1) of it: a color, and by its name height, gloss, metal or body."""
        if color is not None:
            self.color += cover * (rgb(color) - self.color)
        for name, new in maps.items():
            old = getattr(self, name)
            old += cover * (new - old)

    def solid(
        self,
        distance: Map,
        top: float | Map,
        color: Color | None = None,
        bevel: float = 0.03,
        base: float = 0,
        **maps: float,
    ) -> None:
        """A block of the product from ``base`` up to ``top``, rounded over ``bevel`` inwards from its outline."""
        # The color reaches a little further than the wall, which would take that of the ground at its foot.
        cover = self.inside(distance - 1.2 * self.texel)
        self.paint(cover, color, height=base + (top - base) * rounded(distance, bevel), body=1, **maps)

    def hole(self, distance: Map, wall: float = 0.02) -> None:
        """Cut down to the ground."""
        cover = self.inside(distance + 0.8 * wall)
        self.maps[RED:] += cover * (self.floor[RED:] - self.maps[RED:])
        deep = rounded(distance, wall)
        self.height += deep * (self.floor[HEIGHT] - self.height)


Builder: TypeAlias = Callable[[Part, Rng], None]


def rgb(color: Color) -> Map:
    """A color that goes with maps: (1, 1, 1), (3, 1, 1) or (3, H, W)."""
    color = np.asarray(color, np.float32)
    return color if color.ndim == 3 else color.reshape(-1, 1, 1)


def jitter(rng: Rng, color: Color, amount: float = 0.06) -> Map:
    """A color (3, 1, 1) of another batch: a little lighter or darker, a little off in hue."""
    return rgb(color) * rgb(np.exp(amount * (rng.standard_normal() + 0.4 * rng.standard_normal(3))))
