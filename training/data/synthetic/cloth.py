"""Products that are soft sheets: woven, knitted, leather, foam.

Each function draws one part, a little different every time.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from .canvas import Builder, Color, Part, jitter
from .shapes import Map, Rng, grain, noise, pebbles, smooth
from .textures import assorted, fill, lay, warped


def weave(
    part: Part,
    rng: Rng,
    *,
    count: float,
    yarns: tuple[Color, Color],
    twill: tuple[int, int] = (1, 1),
    width: float = 1.0,
    uneven: float = 0.15,
    fuzz: float = 0.12,
    ply: tuple[float, float] = (2.2, 2.6),
    depth: float = 0.42,
    gloss: float = 0.0,
    metal: float = 0.0,
) -> None:
    """Threads of warp and weft that run over and under each other, each row one further; thinner ones leave gaps.

    ``twill`` is over and under how many, and ``ply`` counts the twists of the fibers along and across a thread.
    """
    x, y = lay(part, rng, 0.03)
    u = x * count + 0.10 * noise(rng, part.shape, 3, 2)
    v = y * count + 0.10 * noise(rng, part.shape, 3, 2)
    column, row = np.floor(u), np.floor(v)
    across, along = u - column - 0.5, v - row - 0.5
    first = int(min(column.min(), row.min()))
    number, line = column.astype(np.int64) - first, row.astype(np.int64) - first
    total = int(max(number.max(), line.max())) + 1
    widths = width * (1 + uneven * rng.standard_normal((2, total), dtype=np.float32).clip(-2, 1.4))

    def on_top(column: Map, row: Map) -> Map:
        """1 where the warp is on top at a crossing, -1 where the weft is."""
        return np.where((column + row) % sum(twill) < twill[0], 1, -1).astype(np.float32)

    # A thread is half way between its neighboring crossings where it changes sides.
    lift = on_top(column, row)
    below, beside = on_top(column, row + np.sign(along)), on_top(column + np.sign(across), row)
    warp_height = _thread(across, widths[0].take(number))
    warp_height += 0.16 * (lift + below + (lift - below) * np.cos(math.pi * along))
    weft_height = _thread(along, widths[1].take(line))
    weft_height -= 0.16 * (lift + beside + (lift - beside) * np.cos(math.pi * across))
    top = np.maximum(warp_height, weft_height)
    is_warp = warp_height > weft_height
    # Twisted fibers run slantwise over each thread.
    twist = np.sin(2 * math.pi * np.where(is_warp, ply[0] * along + ply[1] * across, ply[0] * across + ply[1] * along))
    fibers = 0.6 * twist + 0.5 * grain(rng, part.shape)
    shades = np.exp(0.5 * fuzz * rng.standard_normal((2, total), dtype=np.float32))
    shade = np.where(is_warp, shades[0].take(number), shades[1].take(line)) * np.exp(fuzz * fibers)
    color = np.where(is_warp, *(jitter(rng, yarn, 0.05) for yarn in yarns)) * shade
    open_ = top < -0.45
    color[:, open_] = 0.012
    fill(part, color, (depth * np.maximum(top, -1.2) + 0.05 * fuzz * fibers) / count, gloss * ~open_, metal)
    part.metal[open_] = 0


def _thread(across: Map, width: Map) -> Map:
    t = 1 - (2 * across / width) ** 2
    return np.where(t > 0, 0.5 * np.sqrt(np.maximum(t, 0)), -1.0)


def knit(part: Part, rng: Rng) -> None:
    """Wool: columns of V-shaped stitches."""
    x, y = lay(part, rng, 0.02)
    u = (x * 7 + 0.06 * noise(rng, part.shape, 4, 2)) % 1 - 0.5
    v = y * 8.5 + 0.08 * noise(rng, part.shape, 4, 2)
    side = 2 * np.abs(u)
    along = (v - 0.75 * side + 0.18 * np.sin(math.pi * side)) % 1 - 0.5
    across = side - 0.5
    height = np.sqrt(np.clip(1 - (1.9 * along) ** 2, 0, 1)) * np.sqrt(np.clip(1 - (1.75 * across) ** 2, 0, 1))
    strand = np.sin(2 * math.pi * (3 * along + 1.2 * across * np.sign(u)))
    fuzz = 0.35 * strand + 0.7 * noise(rng, part.shape, 130) + 0.5 * grain(rng, part.shape)
    shade = np.exp(0.14 * fuzz + 0.07 * noise(rng, part.shape, 9)) * (0.35 + 0.65 * height)
    fill(part, jitter(rng, (0.42, 0.07, 0.08)) * shade, 0.07 * height + 0.004 * fuzz)


def leather(part: Part, rng: Rng, *, color: Color, grains: float = 17, gloss: float = 0.42) -> None:
    """Pebbled hide with wrinkles."""
    x, y = warped(rng, *lay(part, rng, (0.36, 0.26, 0.18)), 0.03, 5)
    near, far, cell, total = pebbles(rng, x, y, grains, 0.9)
    crease = np.clip((far - near) * 2.6, 0, 1)
    height = np.sqrt(crease) * (0.8 + 0.2 * rng.standard_normal(total, dtype=np.float32)).take(cell)
    wrinkle = np.exp(-((noise(rng, part.shape, 5, 3) / 0.14) ** 2)) * smooth(noise(rng, part.shape, 2) + 0.2)
    height = height - 0.7 * wrinkle
    shade = np.exp(0.05 * noise(rng, part.shape, 4, 3)) * (0.78 + 0.22 * np.clip(height, 0, 1))
    fill(part, jitter(rng, color) * shade, 0.13 / grains * height + 0.0006 * grain(rng, part.shape), gloss)


def foam(part: Part, rng: Rng) -> None:
    """Sponge: round pores of many sizes."""
    color = (0.72, 0.50, 0.10)
    x, y = lay(part, rng, 0.6 * np.asarray(color))
    height, dark = 0.012 * noise(rng, part.shape, 10, 2), np.zeros(part.shape, np.float32)
    for count, share in ((5, 0.25), (11, 0.45), (24, 0.6)):
        near, _, cell, total = pebbles(rng, x + 0.1 / count * noise(rng, part.shape, 14), y, count)
        radius = np.where(rng.random(total) < share, rng.uniform(0.2, 0.5, total), -1).astype(np.float32).take(cell)
        void = smooth((radius - near) * 5)
        height -= 0.25 / count * void
        np.maximum(dark, void * (0.4 + 0.4 * (count < 20)), out=dark)
    fill(part, jitter(rng, color) * (1 - 0.75 * dark) * np.exp(0.07 * noise(rng, part.shape, 90, 2)), height)


def carpet(part: Part, rng: Rng) -> None:
    """Loop pile in rows."""
    x, y = warped(rng, *lay(part, rng, (0.25, 0.2, 0.15)), 0.012, 9)
    near, _, cell, total = pebbles(rng, x, 0.8 * y, 15, 0.55)
    palette = (0.16, 0.17, 0.20), (0.22, 0.23, 0.26), (0.10, 0.11, 0.14), (0.30, 0.12, 0.07)
    colors = assorted(rng, palette, cell, total, 0.06, 0.12)
    loop = np.sqrt(np.clip(1 - 1.5 * near * near, 0, 1))
    yarn = noise(rng, part.shape, (120, 220)) + grain(rng, part.shape)
    fill(part, colors * (0.25 + 0.75 * loop) * np.exp(0.13 * yarn), 0.05 * loop + 0.003 * yarn)


LINEN = (0.52, 0.44, 0.32), (0.58, 0.50, 0.38)
DENIM = (0.022, 0.042, 0.10), (0.30, 0.32, 0.36)
CARBON = (0.028, 0.028, 0.031), (0.014, 0.014, 0.016)
WIRE = (0.66, 0.66, 0.68), (0.66, 0.66, 0.68)
CLOTH: dict[str, Builder] = {
    "linen": partial(weave, count=15, yarns=LINEN, uneven=0.16),
    "denim": partial(weave, count=28, yarns=DENIM, twill=(3, 1), uneven=0.08, fuzz=0.2),
    "carbon_fibre": partial(
        weave, count=7, yarns=CARBON, twill=(2, 2), width=1.15, uneven=0.02, fuzz=0.3, ply=(0, 7), depth=0.08, gloss=0.8
    ),
    "wire_mesh": partial(weave, count=9, yarns=WIRE, width=0.42, uneven=0.03, fuzz=0.05, gloss=0.6, metal=1),
    "knit": knit,
    "leather": partial(leather, color=(0.20, 0.075, 0.03)),
    "vinyl": partial(leather, color=(0.035, 0.037, 0.04), grains=26, gloss=0.6),
    "carpet": carpet,
    "sponge": foam,
}
