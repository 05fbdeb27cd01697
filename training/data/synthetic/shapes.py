"""What products are drawn with: distances of shapes, letters, noise.

Coordinates and lengths have one unit; distances are negative inside a shape. Maps are float32, which halves the time.
"""

from __future__ import annotations

import itertools
import math
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Map: TypeAlias = NDArray[np.floating]
Rng: TypeAlias = np.random.Generator


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


def noise(rng: Rng, shape: tuple[int, ...], cells: float | tuple[float, float], octaves: int = 1) -> Map:
    """Smooth noise of mean 0 and standard deviation about 1.

    It has ``cells`` bumps down and across; each further octave halves their size.
    """
    counts = (cells, cells) if isinstance(cells, int | float) else cells
    total, weight, power = np.zeros(shape, np.float32), 1.0, 0.0
    for octave in range(octaves):
        grid = [max(2, min(side, math.ceil(count * 2**octave) + 1)) for side, count in zip(shape, counts, strict=True)]
        coarse = Image.fromarray(rng.standard_normal(grid, dtype=np.float32))
        total += np.float32(weight) * np.asarray(coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
        power += weight * weight
        weight *= 0.55
    # Interpolation between independent values takes off about a quarter of their spread.
    return total * np.float32(1.33 / math.sqrt(power))


def grain(rng: Rng, shape: tuple[int, ...]) -> Map:
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
    cover, scale = np.asarray(picture, np.float32)[None] / 255, 2 * (bottom - top) / height
    return sample(cover, x * scale / picture.width, y * scale / picture.height, "zeros")[0]


def pebbles(rng: Rng, x: Map, y: Map, count: float, irregular: float = 1.0) -> tuple[Map, Map, NDArray[np.int64], int]:
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
    for down, right in itertools.product((-1, 0, 1), repeat=2):
        index = cell + (down * width + right)
        dx, dy = offset_x.take(index) + (right - inner_u), offset_y.take(index) + (down - inner_v)
        square = dx * dx + dy * dy
        np.minimum(second, np.maximum(first, square), out=second)
        closer = square < first
        np.copyto(first, square, where=closer)
        np.copyto(nearest, index, where=closer)
    return np.sqrt(first), np.sqrt(second), nearest, total
