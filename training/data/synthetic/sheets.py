"""Products that are sheets: cloth, leather, metal, print.

Each function draws one part, a little different every time.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from .canvas import Builder, Color, Part, jitter
from .shapes import Map, Rng, disc, grain, lettering, noise, pebbles, polygon, segment, smooth


def lay(part: Part, rng: Rng, core: Color, skew: float = 0.02) -> tuple[Map, Map]:
    """Make the part a sheet; coordinates of its pattern, shifted and turned at random."""
    part.surface, part.core, part.floor = True, core, part.maps.copy()
    part.body[...] = 1
    turn = rng.normal(0, skew)
    cos, sin = math.cos(turn), math.sin(turn)
    x, y = part.x + rng.uniform(0, 1), part.y + rng.uniform(0, 1)
    return cos * x + sin * y, cos * y - sin * x


def fill(part: Part, color: Map, height: Map | float = 0.0, gloss: Map | float = 0.0, metal: float = 0.0) -> None:
    """Cover a whole part with one material."""
    part.color[...], part.height[...], part.gloss[...], part.metal[...] = color, height, gloss, metal


def weave(
    part: Part,
    rng: Rng,
    *,
    count: float,
    yarns: tuple[Color, Color],
    twill: tuple[int, int] = (1, 1),
    uneven: float = 0.15,
    fuzz: float = 0.12,
) -> None:
    """Threads of warp and weft that run over and under each other, each row one further; thinner ones leave gaps.

    ``twill`` is over and under how many.
    """
    x, y = lay(part, rng, 0.03)
    u = x * count + 0.10 * noise(rng, part.shape, 3, 2)
    v = y * count + 0.10 * noise(rng, part.shape, 3, 2)
    column, row = np.floor(u), np.floor(v)
    across, along = u - column - 0.5, v - row - 0.5
    first = int(min(column.min(), row.min()))
    number, line = column.astype(np.int64) - first, row.astype(np.int64) - first
    total = int(max(number.max(), line.max())) + 1
    widths = 1 + uneven * rng.standard_normal((2, total), dtype=np.float32).clip(-2, 1.4)

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
    twist = np.sin(2 * math.pi * np.where(is_warp, 2.2 * along + 2.6 * across, 2.2 * across + 2.6 * along))
    fibers = 0.6 * twist + 0.5 * grain(rng, part.shape)
    shades = np.exp(0.5 * fuzz * rng.standard_normal((2, total), dtype=np.float32))
    shade = np.where(is_warp, shades[0].take(number), shades[1].take(line)) * np.exp(fuzz * fibers)
    color = np.where(is_warp, *(jitter(rng, yarn, 0.05) for yarn in yarns)) * shade
    open_ = top < -0.45
    color[:, open_] = 0.012
    fill(part, color, (0.42 * np.maximum(top, -1.2) + 0.05 * fuzz * fibers) / count)


def _thread(across: Map, width: Map) -> Map:
    t = 1 - (2 * across / width) ** 2
    return np.where(t > 0, 0.5 * np.sqrt(np.maximum(t, 0)), -1.0)


def leather(part: Part, rng: Rng, *, color: Color, grains: float = 17, gloss: float = 0.42) -> None:
    """Pebbled hide with wrinkles."""
    x, y = lay(part, rng, (0.36, 0.26, 0.18))
    x, y = x + 0.03 * noise(rng, x.shape, 5, 2), y + 0.03 * noise(rng, x.shape, 5, 2)
    near, far, cell, total = pebbles(rng, x, y, grains, 0.9)
    crease = np.clip((far - near) * 2.6, 0, 1)
    height = np.sqrt(crease) * (0.8 + 0.2 * rng.standard_normal(total, dtype=np.float32)).take(cell)
    wrinkle = np.exp(-((noise(rng, part.shape, 5, 3) / 0.14) ** 2)) * smooth(noise(rng, part.shape, 2) + 0.2)
    height = height - 0.7 * wrinkle
    shade = np.exp(0.05 * noise(rng, part.shape, 4, 3)) * (0.78 + 0.22 * np.clip(height, 0, 1))
    fill(part, jitter(rng, color) * shade, 0.13 / grains * height + 0.0006 * grain(rng, part.shape), gloss)


def brushed(part: Part, rng: Rng) -> None:
    """Steel ground in one direction."""
    color = (0.62, 0.63, 0.65)
    lay(part, rng, 0.7 * np.asarray(color))
    streaks = noise(rng, part.shape, (340, 3)) + 0.45 * noise(rng, part.shape, (150, 9))
    streaks += 0.4 * noise(rng, part.shape, (380, 24))
    tone = np.exp(0.07 * streaks + 0.05 * noise(rng, part.shape, 3, 2))
    fill(part, jitter(rng, color, 0.03) * tone, 0.0009 * streaks, 0.62, 1)


def label(part: Part, rng: Rng) -> None:
    """A printed label: band, brand, lines of text, pictogram and bar code, each print a little out of register."""
    lay(part, rng, (0.62, 0.60, 0.55))
    fiber, paper, black = noise(rng, part.shape, 160, 2), (0.80, 0.79, 0.75), (0.02, 0.02, 0.022)
    fill(part, jitter(rng, paper, 0.03) * np.exp(0.018 * fiber), 0.0007 * fiber, 0.3)
    sheet = part.near(rng.normal(0, 0.015), rng.normal(0, 0.015), 1.4, rng.normal(0, 0.015))
    ink = jitter(rng, (0.05, 0.10, 0.33), 0.08)
    sheet.paint(sheet.inside(np.abs(sheet.y + 0.62) - 0.17), ink)
    sheet.paint(sheet.inside(np.abs(sheet.y + 0.42) - 0.012), (0.75, 0.35, 0.04))
    with sheet.piece():
        sheet.paint(lettering("NORDWERK", sheet.x, sheet.y + 0.62, 0.17), paper)
    for row, text in enumerate(("TYPE 7-40 HD", "230 V  50 Hz", "IP 44  KL. II", "MAX. 16 A")):
        with sheet.piece(-0.35, -0.26 + 0.15 * row, 0.5) as line:
            line.paint(lettering(text, line.x, line.y, 0.075), black)
    bars, left = 0.009 * rng.integers(1, 4, 26), 0.0
    with sheet.piece(-0.30, 0.55, 0.55) as code:
        lines = np.zeros(code.shape, np.float32)
        for index, bar in enumerate(bars.tolist()):
            if index % 2 == 0:
                lines += code.inside(np.abs(code.x + 0.46 - left - bar) - bar)
            left += 2 * bar
        code.paint(np.clip(lines, 0, 1) * code.inside(np.abs(code.y) - 0.15), black)
    with sheet.piece(0.52, 0.02, 0.3) as sign:
        sign.paint(sign.inside(np.abs(polygon(sign.y, sign.x, 3, 0.11)) - 0.016), black)
        mark = np.minimum(segment(sign.x, sign.y, (0, -0.09), (0, 0.02)), disc(sign.x, sign.y - 0.065, 0.0))
        sign.paint(sign.inside(mark - 0.017), black)
    with sheet.piece(0.50, 0.52, 0.3) as seal:
        seal.paint(seal.inside(np.abs(disc(seal.x, seal.y, 0.15)) - 0.014), ink)
        seal.paint(lettering("CE", seal.x, seal.y, 0.12), ink)


LINEN = (0.52, 0.44, 0.32), (0.58, 0.50, 0.38)
DENIM = (0.022, 0.042, 0.10), (0.30, 0.32, 0.36)
SHEETS: dict[str, Builder] = {
    "linen": partial(weave, count=15, yarns=LINEN, uneven=0.16),
    "denim": partial(weave, count=28, yarns=DENIM, twill=(3, 1), uneven=0.08, fuzz=0.2),
    "leather": partial(leather, color=(0.20, 0.075, 0.03)),
    "vinyl": partial(leather, color=(0.035, 0.037, 0.04), grains=26, gloss=0.6),
    "brushed_steel": brushed,
    "label": label,
}
