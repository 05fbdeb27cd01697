"""Products that are metal parts lying on a table.

Each function draws one, in another place and of another batch every time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from .canvas import Builder, Color, Part, jitter, rgb
from .shapes import Map, Rng, box, disc, length, noise, polygon, ring, rounded, smooth

STEEL, ZINC, BLACK, BRASS = (0.62, 0.63, 0.65), (0.58, 0.55, 0.44), (0.045, 0.045, 0.05), (0.70, 0.50, 0.20)
# Leaves ground around everything, for the cameras that look from the side.
SCALE = 0.93
FLANGE_SCREWS = 6


def table(part: Part, rng: Rng, color: Color, spread: float, rough: float = 0.0007, gloss: float = 0.1) -> Part:
    """Draw the ground. Returns the window of the product, turned and shifted a little, with coordinates up to 0.8."""
    cloud, fine = noise(rng, part.shape, 4, 3), noise(rng, part.shape, 110, 2)
    part.color[...] = jitter(rng, color, 0.05) * np.exp(0.04 * cloud + 30 * rough * fine)
    part.height[...], part.gloss[...] = rough * fine, gloss
    part.floor = part.maps.copy()
    window = part.near(rng.normal(0, 0.02), rng.normal(0, 0.02), 1.3, rng.normal(0, spread))
    return replace(window, x=window.x / SCALE, y=window.y / SCALE, texel=window.texel / SCALE)


def finish(part: Part, rng: Rng, amount: float = 0.04) -> None:
    """Small stains and wear that every real surface has."""
    wear = part.body * (noise(rng, part.shape, 6, 3) + 0.6 * noise(rng, part.shape, 60, 2))
    part.color *= np.exp(amount * wear)
    part.gloss[...] = np.clip(part.gloss - 0.5 * amount * wear, 0, 1)


def placed(
    draw: Builder, core: Color, ground: Color, spread: float, wear: float = 0.04, surface: bool = False, **cloth: float
) -> Builder:
    """The builder of a product that ``draw`` puts on a table (see `table` for what cloth changes) or covers it with."""

    def build(part: Part, rng: Rng) -> None:
        part.core, part.surface = core, surface
        window = table(part, rng, ground, spread, **cloth)
        window.body[...] = surface
        draw(window, rng)
        finish(part, rng, wear)

    return build


def turning(part: Part, rng: Rng, cover: Map, depth: float = 0.0006) -> None:
    """Fine concentric marks of the lathe around the local origin."""
    marks = noise(rng, (1, 512), (1, 170))[0] + 0.7 * noise(rng, (1, 512), (1, 60))[0]
    marks = np.interp(length(part.x, part.y), np.linspace(0, 2, 512), marks).astype(np.float32)
    part.height += depth * cover * marks


def lying(
    part: Part, axis: ArrayLike, color: Color, gloss: float = 0.6, metal: float = 1, thread: tuple[float, ...] = ()
) -> Map:
    """A turned body that lies along x, its radius given at points along the axis. Returns its cover.

    ``thread`` is (start, end, pitch, depth) of a helix cut into it.
    """
    at, radius = np.asarray(axis, np.float32).T
    profile = np.interp(part.x, at, radius, left=-1, right=-1).astype(np.float32)
    if thread:
        start, end, pitch, depth = thread
        around = np.arcsin(np.clip(part.y / np.maximum(profile, 1e-3), -1, 1)) / (2 * math.pi)
        tooth = np.abs((part.x / pitch + around) % 1 - 0.5) * 2
        profile -= depth * tooth * smooth((part.x - start) / 0.05) * smooth((end - part.x) / 0.05)
    distance = np.abs(part.y) - profile
    cover = part.inside(distance - 1.2 * part.texel)
    rise = np.sqrt(np.clip(profile * profile - part.y * part.y, 0, None)) * (profile > 0)
    part.paint(cover, color, gloss=gloss, metal=metal, body=1)
    part.paint(part.inside(distance), height=float(radius.max()) * 0.5 + rise)
    return cover


def machine_screw(p: Part, rng: Rng) -> None:
    """A hexagon bolt on its side."""
    color = jitter(rng, p.core, 0.03)
    lying(p, ((-0.5, 0.145), (0.70, 0.145), (0.74, 0.11)), color, thread=(-0.12, 0.76, 0.062, 0.036))
    head = p.near(-0.58, 0, 0.35)
    cover = head.inside(box(head.x, head.y, 0.10, 0.27, 0.015))
    side = 0.40 - 0.9 * np.maximum(np.abs(head.y + rng.uniform(-0.05, 0.05)) - 0.135, 0)
    head.paint(cover, color, gloss=0.55, metal=1, height=side - 0.06 * smooth((np.abs(head.x) - 0.06) / 0.04), body=1)


def wood_screw(p: Part, rng: Rng) -> None:
    """A yellow countersunk screw on its side."""
    color = jitter(rng, (0.66, 0.50, 0.20), 0.05)
    axis = ((-0.74, 0.235), (-0.70, 0.25), (-0.55, 0.12), (-0.50, 0.10), (-0.1, 0.10), (0.55, 0.135), (0.80, 0.015))
    lying(p, axis, color, gloss=0.65, thread=(-0.15, 0.80, 0.115, 0.06))


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


def washer(p: Part, rng: Rng) -> None:
    """A flat washer."""
    _washer(p, rng, ring(p.x, p.y, 0.29, 0.70), 0.085)


def spring_washer(p: Part, rng: Rng) -> None:
    """A washer with a split, whose ends stand apart."""
    split = 0.025 - np.abs(p.y * 0.9 + p.x * 0.4) * np.where(p.x > 0, 1, 9)
    top = 0.16 + 0.035 * np.arctan2(p.y, p.x) / math.pi
    _washer(p, rng, np.maximum(ring(p.x, p.y, 0.40, 0.68), split), top)


def _washer(p: Part, rng: Rng, distance: Map, top: float | Map) -> None:
    p.solid(distance, top, jitter(rng, p.core, 0.03), bevel=0.035, gloss=0.6, metal=1)
    p.height += 0.0008 * p.body * noise(rng, p.shape, 40, 2)
    turning(p, rng, p.body, 0.0005)


def gear(p: Part, rng: Rng, *, teeth: int = 22, holes: int = 5, metal: float = 1.0, gloss: float = 0.55) -> None:
    """A spur gear with hub, lightening holes and keyway."""
    radius, around = length(p.x, p.y), np.arctan2(p.y, p.x)
    color, look = jitter(rng, p.core, 0.04), {"bevel": 0.02, "gloss": gloss, "metal": metal}
    p.solid(radius - 0.63, 0.17, color, **look)
    step = 2 * math.pi / teeth
    for index in range(teeth):
        with p.piece(0.7 * math.cos(index * step), 0.7 * math.sin(index * step), 0.14, index * step) as tooth:
            flank = smooth((0.33 - np.abs(np.arctan2(tooth.y, tooth.x + 0.7)) / step) / 0.17 + 0.5)
            tooth.solid(length(tooth.x + 0.7, tooth.y) - 0.63 - 0.13 * flank, 0.17, color, **look)
    p.paint(p.inside(ring(p.x, p.y, 0.28, 0.53)), height=0.11)
    for index in range(holes):
        angle = index * 2 * math.pi / holes + 0.4
        bore = p.near(0.42 * math.cos(angle), 0.42 * math.sin(angle), 0.12)
        bore.hole(disc(bore.x, bore.y, 0.085))
    hub = np.maximum(radius - 0.24, 0.13 - radius)
    p.solid(radius - 0.24, 0.27, bevel=0.03, base=0.11)
    p.hole(np.minimum(radius - 0.12, box(p.x - 0.12, p.y, 0.05, 0.035)), 0.02)
    turning(p, rng, p.inside(hub) + p.inside(radius - 0.66) * (radius > 0.26), 0.0007 * metal)
    p.color *= 1 + 0.02 * p.body * np.sin(3 * around)


def bearing(p: Part, rng: Rng) -> None:
    """A ball bearing without shields."""
    steel = jitter(rng, STEEL, 0.02)
    p.solid(ring(p.x, p.y, 0.24, 0.76), 0.10, (0.06, 0.055, 0.05), bevel=0.02, gloss=0.3, metal=0)
    p.paint(p.inside(ring(p.x, p.y, 0.45, 0.56)), (0.55, 0.42, 0.18), height=0.15, metal=1, gloss=0.5)
    for inner, outer in ((0.24, 0.41), (0.60, 0.76)):
        p.solid(ring(p.x, p.y, inner, outer), 0.28, steel, bevel=0.03, gloss=0.78, metal=1)
    turn = rng.uniform(0, 1)
    for index in range(9):
        angle = turn + index * 2 * math.pi / 9
        with p.piece(0.505 * math.cos(angle), 0.505 * math.sin(angle), 0.12) as ball:
            ball.solid(disc(ball.x, ball.y, 0.092), 0.25, steel, bevel=0.092, base=0.12, gloss=0.95, metal=1)
    turning(p, rng, p.inside(ring(p.x, p.y, 0.25, 0.40)) + p.inside(ring(p.x, p.y, 0.61, 0.75)), 0.0004)


def bracket(p: Part, rng: Rng) -> None:
    """A stamped and painted plate with holes, a slot and a bent edge."""
    paint = jitter(rng, (0.055, 0.16, 0.30), 0.06)
    outline = np.minimum(box(p.x, p.y, 0.68, 0.36, 0.10), box(p.x + 0.38, p.y - 0.2, 0.28, 0.40, 0.08))
    p.solid(outline, 0.07, paint, bevel=0.025, gloss=0.6, metal=0)
    p.solid(box(p.x, p.y + 0.33, 0.60, 0.035, 0.02), 0.26, paint, bevel=0.03, base=0.07)
    for x, y, radius in ((-0.48, 0.0, 0.10), (0.50, 0.0, 0.10), (-0.38, 0.42, 0.075)):
        with p.piece(x, y, 0.16) as bore:
            distance = disc(bore.x, bore.y, radius)
            bore.hole(distance)
            bore.height -= 0.02 * smooth(1 - distance / 0.05) * bore.body
    with p.piece():
        p.hole(box(p.x - 0.02, p.y, 0.22, 0.06, 0.06))
    p.height += 0.0003 * p.body * noise(rng, p.shape, 60, 2)


def flange(p: Part, rng: Rng) -> None:
    """A turned brass flange bolted down with six black screws."""
    brass = jitter(rng, BRASS, 0.04)
    p.solid(disc(p.x, p.y, 0.74), 0.14, brass, bevel=0.035, gloss=0.68, metal=1)
    p.solid(disc(p.x, p.y, 0.34), 0.36, brass, bevel=0.09, base=0.14)
    turning(p, rng, p.body, 0.0009)
    p.hole(disc(p.x, p.y, 0.19))
    for index in range(6):
        angle, twist = index * math.pi / 3, rng.uniform(0, 1)
        bore = p.near(0.54 * math.cos(angle), 0.54 * math.sin(angle), 0.14)
        bore.paint(bore.inside(disc(bore.x, bore.y, 0.055)), (0.05, 0.035, 0.02), height=0.02, gloss=0)
        with bore.piece() as head:
            head.solid(disc(head.x, head.y, 0.095), 0.25, BLACK, bevel=0.02, base=0.14, gloss=0.55, metal=0)
            socket = head.near(0, 0, 0.1, twist)
            socket.paint(socket.inside(polygon(socket.x, socket.y, 6, 0.048)), 0.015, height=0.17)


def heat_sink(p: Part, rng: Rng) -> None:
    """An anodised block with fins."""
    black = jitter(rng, (0.05, 0.05, 0.055), 0.1)
    p.solid(box(p.x, p.y, 0.66, 0.62, 0.03), 0.08, black, bevel=0.02, gloss=0.5, metal=0)
    for index in range(9):
        lean = rng.normal(0, 0.003)
        with p.piece(-0.60 + 0.15 * index, 0, 0.66) as fin:
            fin.solid(box(fin.x + lean * fin.y, fin.y, 0.028, 0.62, 0.01), 0.30, black, bevel=0.018, base=0.08)
    p.height += 0.0007 * p.body * noise(rng, p.shape, (6, 160))


def key(p: Part, rng: Rng) -> None:
    """A nickel-plated key; all are cut alike."""
    nickel = jitter(rng, (0.60, 0.57, 0.50), 0.03)
    depths = (0.10, 0.045, 0.075, 0.02, 0.06, 0.03, 0.085, 0.05, -0.02)
    cuts = np.interp(p.x, np.linspace(-0.05, 0.75, 9), depths).astype(np.float32)
    blade = np.maximum(box(p.x - 0.30, p.y, 0.46, 0.13, 0.03), -p.y - cuts - 0.02)
    bow = disc(p.x + 0.48, p.y * 0.92, 0.30)
    p.solid(np.minimum(blade, bow), 0.07, nickel, bevel=0.025, gloss=0.72, metal=1)
    p.paint(smooth(-(box(p.x - 0.30, p.y - 0.055, 0.42, 0.02)) / 0.012), height=0.045)
    p.paint(smooth(-(np.abs(bow + 0.07) - 0.012) / 0.01), height=0.058)
    p.hole(disc(p.x + 0.62, p.y, 0.065))
    p.height += 0.0004 * p.body * noise(rng, p.shape, (20, 160))


def rivets(p: Part, rng: Rng) -> None:
    """Two overlapping sheets of aluminum, riveted."""
    sheen = noise(rng, p.shape, (6, 300))
    p.metal[...], p.gloss[...] = 1, 0.6
    p.color *= np.exp(0.05 * sheen)
    p.height[...] = 0.035 * smooth((p.y + 0.05) / 0.03) + 0.0006 * sheen + 0.01 * noise(rng, p.shape, 3)
    for row, column in np.ndindex(3, 6):
        x, y = (-0.95 + 0.38 * column, (-0.55, 0.18, 0.62)[row]) + rng.normal(0, 0.006, 2)
        with p.piece(x, y, 0.11) as rivet:
            distance = disc(rivet.x, rivet.y, 0.075)
            rivet.height += 0.055 * rounded(distance, 0.06) - 0.006 * smooth(1 - distance / 0.02)
            rivet.paint(rivet.inside(distance), (0.58, 0.58, 0.60), gloss=0.72)


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
    "hex_bolt": placed(machine_screw, core=STEEL, ground=(0.035, 0.04, 0.05), spread=0.35),
    "wood_screw": placed(wood_screw, core=STEEL, ground=(0.62, 0.62, 0.60), spread=0.35),
    "hex_nut": placed(hex_nut, core=ZINC, ground=(0.05, 0.05, 0.055), spread=0.6),
    "washer": placed(washer, core=STEEL, ground=(0.10, 0.16, 0.24), spread=1.0, wear=0.06),
    "spring_washer": placed(spring_washer, core=(0.20, 0.20, 0.21), ground=(0.55, 0.55, 0.53), spread=1.0, wear=0.06),
    "gear": placed(gear, core=STEEL, ground=(0.04, 0.045, 0.05), spread=1.0),
    "plastic_gear": placed(
        partial(gear, teeth=16, holes=4, metal=0, gloss=0.4),
        core=(0.70, 0.67, 0.60),
        ground=(0.16, 0.05, 0.05),
        spread=1,
    ),
    "bearing": placed(bearing, core=STEEL, ground=(0.50, 0.50, 0.48), spread=1.0, wear=0.03),
    "bracket": placed(bracket, core=STEEL, ground=(0.42, 0.30, 0.18), spread=0.2, wear=0.03),
    "flange": placed(flange, core=BRASS, ground=(0.13, 0.14, 0.15), spread=1.0),
    "heat_sink": placed(heat_sink, core=(0.6, 0.6, 0.62), ground=(0.55, 0.54, 0.52), spread=0.12),
    "key": placed(key, core=BRASS, ground=(0.07, 0.10, 0.075), spread=0.3, wear=0.06),
    "riveted_sheet": placed(
        rivets, core=(0.6, 0.6, 0.62), ground=(0.5, 0.5, 0.52), spread=0.02, wear=0.05, surface=True
    ),
}
