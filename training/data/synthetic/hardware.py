"""Products that are metal parts lying on a table.

Each function draws one, in another place and of another batch every time.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from .canvas import Builder, Color, Part, jitter, rgb
from .shapes import Map, Rng, box, disc, length, noise, polygon, ring, smooth

STEEL, ZINC, BLACK, BRASS = (0.62, 0.63, 0.65), (0.58, 0.55, 0.44), (0.045, 0.045, 0.05), (0.70, 0.50, 0.20)
# Leaves ground around everything, for the cameras that look from the side.
SCALE = 0.93
FLANGE_SCREWS, GEAR_TEETH = 6, 22


def table(part: Part, rng: Rng, color: Color, spread: float) -> Part:
    """Draw the ground. Returns the window of the product, turned and shifted a little, with coordinates up to 0.8."""
    cloud, fine = noise(rng, part.shape, 4, 3), noise(rng, part.shape, 110, 2)
    part.color[...] = jitter(rng, color, 0.05) * np.exp(0.04 * cloud + 0.021 * fine)
    part.height[...], part.gloss[...] = 0.0007 * fine, 0.1
    part.floor = part.maps.copy()
    window = part.near(rng.normal(0, 0.02), rng.normal(0, 0.02), 1.3, rng.normal(0, spread))
    return replace(window, x=window.x / SCALE, y=window.y / SCALE, texel=window.texel / SCALE)


def finish(part: Part, rng: Rng, amount: float = 0.04) -> None:
    """Small stains and wear that every real surface has."""
    wear = part.body * (noise(rng, part.shape, 6, 3) + 0.6 * noise(rng, part.shape, 60, 2))
    part.color *= np.exp(amount * wear)
    part.gloss[...] = np.clip(part.gloss - 0.5 * amount * wear, 0, 1)


def placed(
    draw: Builder, core: Color, ground: Color, spread: float, wear: float = 0.04, surface: bool = False
) -> Builder:
    """The builder of a product that ``draw`` puts on a table or covers it with."""

    def build(part: Part, rng: Rng) -> None:
        part.core, part.surface = core, surface
        window = table(part, rng, ground, spread)
        window.body[...] = surface
        draw(window, rng)
        finish(part, rng, wear)

    return build


def turning(part: Part, rng: Rng, cover: Map, depth: float = 0.0006) -> None:
    """Fine concentric marks of the lathe around the local origin."""
    marks = noise(rng, (1, 512), (1, 170))[0] + 0.7 * noise(rng, (1, 512), (1, 60))[0]
    marks = np.interp(length(part.x, part.y), np.linspace(0, 2, 512), marks).astype(np.float32)
    part.height += depth * cover * marks


def hex_nut(p: Part, rng: Rng) -> None:
    """A hexagon nut with its chamfer and thread."""
    radius, around = length(p.x, p.y), np.arctan2(p.y, p.x) / (2 * math.pi)
    top = 0.34 - 0.4 * np.clip(radius - 0.52, 0, 1)
    p.solid(polygon(p.x, p.y, 6, 0.56), top, jitter(rng, p.core, 0.04), bevel=0.02, gloss=0.55, metal=1)
    p.hole(radius - 0.30, 0.03)
    wall = smooth((0.315 - radius) / 0.03) * p.inside(0.22 - radius)
    thread = 0.30 - (0.315 - radius) * 3.2 + 0.02 * np.sin(2 * math.pi * (radius / 0.028 + around))
    p.paint(wall, 0.6 * rgb(p.core), height=thread, metal=1, gloss=0.5, body=1)
    turning(p, rng, p.inside(np.abs(radius - 0.43) - 0.1), 0.0008)


def gear(p: Part, rng: Rng) -> None:
    """A spur gear with hub, lightening holes and keyway."""
    radius, around = length(p.x, p.y), np.arctan2(p.y, p.x)
    color, look = jitter(rng, p.core, 0.04), {"bevel": 0.02, "gloss": 0.55, "metal": 1}
    p.solid(radius - 0.63, 0.17, color, **look)
    step = 2 * math.pi / GEAR_TEETH
    for index in range(GEAR_TEETH):
        with p.piece(0.7 * math.cos(index * step), 0.7 * math.sin(index * step), 0.14, index * step) as tooth:
            flank = smooth((0.33 - np.abs(np.arctan2(tooth.y, tooth.x + 0.7)) / step) / 0.17 + 0.5)
            tooth.solid(length(tooth.x + 0.7, tooth.y) - 0.63 - 0.13 * flank, 0.17, color, **look)
    p.paint(p.inside(ring(p.x, p.y, 0.28, 0.53)), height=0.11)
    for index in range(5):
        angle = index * 2 * math.pi / 5 + 0.4
        bore = p.near(0.42 * math.cos(angle), 0.42 * math.sin(angle), 0.12)
        bore.hole(disc(bore.x, bore.y, 0.085))
    hub = np.maximum(radius - 0.24, 0.13 - radius)
    p.solid(radius - 0.24, 0.27, bevel=0.03, base=0.11)
    p.hole(np.minimum(radius - 0.12, box(p.x - 0.12, p.y, 0.05, 0.035)), 0.02)
    turning(p, rng, p.inside(hub) + p.inside(radius - 0.66) * (radius > 0.26), 0.0007)
    p.color *= 1 + 0.02 * p.body * np.sin(3 * around)


def bushed_flange(part: Part, rng: Rng, *, wrong: int | None = None) -> None:
    """A turned steel flange with a brass bushing and socket screws on a ribbed mat.

    The screw of number ``wrong`` is of another kind. The flange is the sample of the package and not in HARDWARE, for
    the numbers of the products would change.
    """
    part.core = STEEL
    p = table(part, rng, (0.035, 0.055, 0.075), 0.05)
    part.height += 0.01 * np.clip(np.cos(70 * (part.x + part.y)) * np.cos(70 * (part.x - part.y)), -0.1, 0.3)
    radius, steel = length(p.x, p.y), jitter(rng, (0.50, 0.51, 0.53), 0.03)
    p.solid(radius - 0.58, 0.07, steel, bevel=0.03, gloss=0.68, metal=1)
    profile = ((0.15, 0.27, 0.30, 0.31, 0.325, 0.335, 0.345, 0.58), (0.15, 0.15, 0.08, 0.07, 0.062, 0.062, 0.07, 0.07))
    p.paint(p.inside(radius - 0.5), height=np.interp(radius, *profile).astype(np.float32))
    p.paint(p.inside(radius - 0.165), jitter(rng, BRASS, 0.03), height=0.14)
    turning(p, rng, p.body, 0.0014)
    p.hole(radius - 0.105)
    for index in range(FLANGE_SCREWS):
        angle, twist = index * 2 * math.pi / FLANGE_SCREWS, rng.uniform(0, 1)
        bore = p.near(0.42 * math.cos(angle), 0.42 * math.sin(angle), 0.1, twist)
        distance, hexagon = length(bore.x, bore.y), polygon(bore.x, bore.y, 6, 0.0)
        bore.paint(bore.inside(distance - 0.064), 0.5 * steel, height=0.04)
        if index == wrong:
            bore.solid(hexagon - 0.05, 0.105, (0.66, 0.50, 0.20), bevel=0.012, base=0.04, gloss=0.7, metal=1)
            continue
        bore.solid(distance - 0.052, 0.09, BLACK, bevel=0.012, base=0.04, gloss=0.55, metal=0)
        bore.paint(bore.inside(hexagon - 0.026), 0.015, height=0.05)
    finish(part, rng)


HARDWARE: dict[str, Builder] = {
    "hex_nut": placed(hex_nut, core=ZINC, ground=(0.05, 0.05, 0.055), spread=0.6),
    "gear": placed(gear, core=STEEL, ground=(0.04, 0.045, 0.05), spread=1.0),
}
