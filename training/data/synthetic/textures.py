"""Products that are hard sheets: metal, wood, stone, plastic and print.

Each function draws one part, a little different every time.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .canvas import Builder, Color, Part, jitter, mix, rgb
from .shapes import Map, Rng, box, disc, grain, length, lettering, noise, pebbles, polygon, rounded, segment, smooth


def lay(part: Part, rng: Rng, core: Color, skew: float = 0.02) -> tuple[Map, Map]:
    """Make the part a sheet; coordinates of its pattern, shifted and turned at random."""
    part.surface, part.core, part.floor = True, core, part.maps.copy()
    part.body[...] = 1
    turn = rng.normal(0, skew)
    cos, sin = math.cos(turn), math.sin(turn)
    x, y = part.x + rng.uniform(0, 1), part.y + rng.uniform(0, 1)
    return cos * x + sin * y, cos * y - sin * x


def warped(rng: Rng, x: Map, y: Map, amount: float, cells: float, octaves: int = 2) -> tuple[Map, Map]:
    """Coordinates moved by noise."""
    return x + amount * noise(rng, x.shape, cells, octaves), y + amount * noise(rng, x.shape, cells, octaves)


def fill(part: Part, color: Map, height: Map | float = 0.0, gloss: Map | float = 0.0, metal: float = 0.0) -> None:
    """Cover a whole part with one material."""
    part.color[...], part.height[...], part.gloss[...], part.metal[...] = color, height, gloss, metal


def assorted(
    rng: Rng, palette: tuple[Color, ...], cell: NDArray[np.int64], total: int, amount: float, spread: float
) -> Map:
    """Colors (3, H, W) of numbered cells, each drawn from a palette and made a little lighter or darker."""
    colors = np.concatenate([jitter(rng, color, amount) for color in palette], 1)[
        :, rng.integers(len(palette), size=total)
    ]
    return (colors[..., 0] * np.exp(spread * rng.standard_normal(total, dtype=np.float32)))[:, cell]


def brushed(part: Part, rng: Rng, *, color: Color, gloss: float = 0.62) -> None:
    """Metal ground in one direction."""
    lay(part, rng, 0.7 * np.asarray(color))
    streaks = noise(rng, part.shape, (340, 3)) + 0.45 * noise(rng, part.shape, (150, 9))
    streaks += 0.4 * noise(rng, part.shape, (380, 24))
    tone = np.exp(0.07 * streaks + 0.05 * noise(rng, part.shape, 3, 2))
    fill(part, jitter(rng, color, 0.03) * tone, 0.0009 * streaks, gloss, 1)


def galvanised(part: Part, rng: Rng) -> None:
    """Zinc coating with its crystals, each of which mirrors another direction."""
    x, y = warped(rng, *lay(part, rng, (0.35, 0.2, 0.12)), 0.04, 6, 3)
    near, far, cell, total = pebbles(rng, x, y, 4.5)
    along = rng.uniform(0, math.pi, total).astype(np.float32).take(cell)
    feathers = np.sin(130 * (x * np.cos(along) + y * np.sin(along)) + 2 * noise(rng, part.shape, 25))
    shade = np.exp(0.22 * rng.standard_normal(total, dtype=np.float32)).take(cell) * np.exp(0.06 * feathers)
    shade *= 1 - 0.10 * np.clip(1 - 9 * (far - near), 0, 1)
    fill(part, rgb((0.50, 0.53, 0.56)) * shade, 0.00035 * feathers + 0.003 * noise(rng, part.shape, 5), 0.5, 1)


def wood(
    part: Part, rng: Rng, *, light: Color, dark: Color, rings: float, boards: int = 0, gloss: float = 0.25
) -> None:
    """Grain of yearly rings cut lengthwise, with pores; ``boards`` beside each other where not 0."""
    x, y = lay(part, rng, 0.8 * np.asarray(light), 0.012)
    board = np.floor(y * boards / 2).astype(np.int64)
    offsets, slants = rng.uniform(0, 9, 12).astype(np.float32), rng.normal(0, 0.18, 12).astype(np.float32)
    tones = np.exp(rng.normal(0, 0.12, 12)).astype(np.float32)
    bend = 0.16 * noise(rng, part.shape, (2.5, 1.6), 2) + 0.012 * noise(rng, part.shape, (30, 3))
    ring = (y + offsets.take(board) + slants.take(board) * x + bend) * rings % 1
    late = smooth(ring * 1.15 - 0.1) * (1 - smooth((ring - 0.92) * 14))
    pores = np.clip(noise(rng, part.shape, (240, 14)) - 1.1, 0, 1.5) * (0.45 + 0.55 * late)
    fiber = noise(rng, part.shape, (300, 8))
    share = np.clip(0.62 * late + 0.10 * fiber + 0.22 * noise(rng, part.shape, 3), 0, 1)
    color = mix(jitter(rng, light), jitter(rng, dark), share) * tones.take(board) * (1 - 0.38 * pores)
    height = -0.004 * pores - 0.0012 * late + 0.0008 * fiber
    if boards:
        gap = smooth((np.abs((y * boards / 2) % 1 - 0.5) * 2 - 0.94) / 0.05)
        color, height = color * (1 - 0.85 * gap), height - 0.02 * gap
    fill(part, color, height, np.clip(gloss - 0.15 * pores, 0, 1))


def granules(
    part: Part,
    rng: Rng,
    *,
    count: float,
    palette: tuple[Color, ...],
    matrix: Color,
    gloss: float,
    relief: float,
    filling: float = 1.0,
    pores: float = 0.0,
) -> None:
    """Grains of several colors pressed or set together: cork, terrazzo, granite.

    A ``filling`` of 1 leaves no matrix.
    """
    x, y = warped(rng, *lay(part, rng, matrix, 0.2), 0.10 / count, 2 * count)
    near, far, cell, total = pebbles(rng, x, y, count)
    colors = assorted(rng, palette, cell, total, 0.05, 0.13)
    size = (0.25 + 0.75 * rng.random(total, dtype=np.float32)).take(cell)
    seam = (far - near - 0.75 * (1 - filling) * size) * 9 + 0.5 if filling < 1 else (far - near) * 7 + 0.35
    chip, fine = smooth(seam), noise(rng, part.shape, 120, 2)
    color = mix(jitter(rng, matrix, 0.04), colors, chip) * np.exp(0.06 * fine)
    height = relief * (chip + 0.3 * fine)
    if pores:
        void = smooth((noise(rng, part.shape, 40, 2) - 2.3 + pores) * 3)
        color, height = color * (1 - 0.7 * void), height - 3 * relief * void
    fill(part, color, height, gloss)


def tiles(part: Part, rng: Rng, *, count: float, color: Color, grout: Color, gloss: float = 0.9) -> None:
    """Glazed tiles in mortar."""
    x, y = lay(part, rng, (0.55, 0.3, 0.2), 0.015)
    v = y * count
    u = x * count + 0.5 * (np.floor(v) % 2)
    cell = (np.floor(u) + 31 * np.floor(v)).astype(np.int64) % 97
    distance = box(u % 1 - 0.5, v % 1 - 0.5, 0.455, 0.455, 0.05) / count
    tile = part.inside(distance)
    tones = np.exp(rng.normal(0, 0.07, 97)).astype(np.float32).take(cell)
    slope = rng.normal(0, 0.008, 97).astype(np.float32).take(cell) * (u % 1)
    glaze = jitter(rng, color, 0.05) * tones * np.exp(0.03 * noise(rng, part.shape, 20, 3))
    sand = noise(rng, part.shape, 150)
    mortar = jitter(rng, grout, 0.05) * np.exp(0.12 * sand)
    height = 0.035 * rounded(distance, 0.022) + tile * (slope + 0.0012 * noise(rng, part.shape, 14))
    fill(part, mix(mortar, glaze, tile), height + 0.002 * (1 - tile) * sand, gloss * tile)


def concrete(part: Part, rng: Rng) -> None:
    """Cast concrete with air holes."""
    x, y = lay(part, rng, (0.25, 0.24, 0.22))
    cloud, sand = noise(rng, part.shape, 4, 4), noise(rng, part.shape, 110, 2)
    height, shade = 0.002 * sand + 0.004 * cloud, np.exp(0.10 * cloud + 0.09 * sand)
    for count, share in ((5, 0.35), (14, 0.3)):
        near, _, cell, total = pebbles(rng, x, y, count)
        radius = np.where(rng.random(total) < share, rng.uniform(0.05, 0.16, total), -1).astype(np.float32)
        void = smooth((radius.take(cell) - near) * 14)
        height, shade = height - 0.12 / count * void, shade * (1 - 0.45 * void)
    fill(part, jitter(rng, (0.40, 0.39, 0.37)) * shade, height, 0.05)


def tread_plate(part: Part, rng: Rng) -> None:
    """Rolled metal with raised lozenges that point two ways."""
    color, count = (0.60, 0.61, 0.63), 3.2
    x, y = lay(part, rng, color, 0.015)
    rolled = noise(rng, part.shape, (8, 70), 2) + 0.4 * grain(rng, part.shape)
    shade = jitter(rng, color, 0.04) * np.exp(0.06 * rolled + 0.06 * noise(rng, part.shape, 4))
    u, v = (x + y) * count * 0.7071, (x - y) * count * 0.7071
    flip = (np.floor(u) + np.floor(v)) % 2 == 0
    a, b = np.where(flip, (u % 1 - 0.5, v % 1 - 0.5), (v % 1 - 0.5, u % 1 - 0.5))
    lozenge = (length(np.abs(a) * 0.42, np.abs(b) + 0.42) - 0.52) / count
    fill(part, shade, 0.0012 * rolled + 0.028 * smooth(-lozenge / 0.05), 0.55 + 0.15 * smooth(-lozenge / 0.04), 1)


def cardboard(part: Part, rng: Rng) -> None:
    """Printed kraft liner over the waves of corrugated board."""
    _, y = lay(part, rng, (0.30, 0.19, 0.10), 0.015)
    fiber = 0.5 * noise(rng, part.shape, (120, 70), 2) + 0.8 * noise(rng, part.shape, 80, 2)
    wave = np.cos(2 * math.pi * (y * 9 + 0.02 * noise(rng, part.shape, 4)))
    fleck = np.clip(noise(rng, part.shape, 150) - 2.2, 0, 1)
    shade = np.exp(0.05 * fiber + 0.015 * wave + 0.03 * noise(rng, part.shape, 3, 3)) * (1 - 0.4 * fleck)
    fill(part, jitter(rng, (0.47, 0.31, 0.17)) * shade, 0.0028 * wave + 0.0008 * fiber, 0.08)
    sheet = part.near(rng.normal(0, 0.02), rng.normal(0, 0.02), 1.4, rng.normal(0, 0.015))
    worn, ink = 0.86 - 0.25 * np.clip(noise(rng, sheet.shape, 60, 2) - 0.8, 0, 1), (0.05, 0.035, 0.03)
    for row, (text, size) in enumerate((("THIS SIDE UP", 0.15), ("LOT 2207-31", 0.09))):
        with sheet.piece():
            sheet.paint(worn * lettering(text, sheet.x, sheet.y - 0.36 - 0.22 * row, size), ink)
    for side in (-0.3, 0.3):
        with sheet.piece():
            x, y = sheet.x - side, sheet.y + 0.3
            arrow = np.minimum(box(x, y - 0.08, 0.045, 0.2), np.maximum(np.abs(x) * 0.8 + (-y - 0.36) * 0.6, y + 0.08))
            sheet.paint(worn * sheet.inside(np.minimum(arrow, box(x, y - 0.38, 0.2, 0.025))), ink)


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


def perforated(part: Part, rng: Rng) -> None:
    """Painted sheet metal with staggered round holes."""
    x, y = lay(part, rng, (0.5, 0.5, 0.52), 0.01)
    peel = noise(rng, part.shape, 90, 2)
    v = y * 5 * 1.1547
    u = x * 5 + 0.5 * (np.floor(v) % 2)
    hole = disc(u % 1 - 0.5, (v % 1 - 0.5) * 0.866, 0.30 + 0.004 * rng.standard_normal()) / 5
    fill(part, jitter(rng, (0.55, 0.56, 0.54)) * np.exp(0.02 * peel), 0.001 * peel, 0.5)
    part.paint(part.inside(hole), (0.012, 0.012, 0.014), gloss=0)
    part.height -= 0.07 * smooth(-hole / 0.02) + 0.006 * smooth(1 - hole / 0.02)


def marble(part: Part, rng: Rng) -> None:
    """Polished stone with veins."""
    ground = (0.018, 0.055, 0.04)
    x, y = lay(part, rng, 0.8 * np.asarray(ground), 0.3)
    cloud = noise(rng, part.shape, 3, 4)
    bend = x * 1.6 + y * 0.9 + 0.55 * noise(rng, part.shape, 2.5, 4)
    veins = np.exp(-((np.sin(2.6 * bend) / 0.09) ** 2)) * smooth(0.5 + 0.7 * noise(rng, part.shape, 3))
    fine = np.sin(5.7 * (bend + 0.5 * y + 0.2 * noise(rng, part.shape, 4, 3)))
    veins = np.maximum(veins, 0.55 * np.exp(-((fine / 0.06) ** 2)) * smooth(0.3 + noise(rng, part.shape, 4, 2)))
    share = np.clip(0.75 * veins + 0.13 * cloud + 0.08, 0, 1)
    fill(part, mix(jitter(rng, ground, 0.04), jitter(rng, (0.45, 0.52, 0.46)), share), 0.0004 * cloud, 0.92)


def solar_cell(part: Part, rng: Rng) -> None:
    """Polycrystalline silicon under silver fingers and bus bars."""
    x, y = lay(part, rng, (0.2, 0.2, 0.22), 0.008)
    _, _, cell, total = pebbles(rng, *warped(rng, x, y, 0.02, 12), 4)
    tones = np.exp(0.33 * rng.standard_normal(total, dtype=np.float32)).take(cell)
    fill(part, rgb((0.018, 0.05, 0.17)) * tones * np.exp(0.05 * noise(rng, part.shape, 60)), gloss=0.8)
    finger = part.inside(np.abs((y * 11) % 1 - 0.5) / 11 - 0.0065)
    bar = part.inside(np.abs((x * 1.6) % 1 - 0.5) / 1.6 - 0.028)
    part.paint(np.maximum(0.85 * finger, bar), (0.58, 0.58, 0.60), gloss=0.45)
    part.height += 0.003 * finger + 0.006 * bar + 0.00004 * noise(rng, part.shape, 60)


def flakes(part: Part, rng: Rng) -> None:
    """Oriented strand board: long chips of wood glued over each other."""
    lay(part, rng, (0.36, 0.22, 0.10))
    fill(part, rgb((0.30, 0.18, 0.08)) * np.exp(0.2 * noise(rng, part.shape, 40, 2)), -0.012)
    tones = (0.56, 0.38, 0.19), (0.47, 0.29, 0.12), (0.62, 0.46, 0.27), (0.40, 0.24, 0.11)
    for layer in range(130):
        half, breadth = rng.uniform(0.16, 0.36), rng.uniform(0.04, 0.10)
        x, y, turn = rng.uniform(-1.05, 1.05), rng.uniform(-1.05, 1.05), rng.normal(0, 0.55)
        chip = part.near(x, y, half, turn + (rng.random() < 0.25) * 1.5)
        edge = 0.008 * noise(rng, chip.shape, (2, 3))
        distance = box(chip.x, chip.y + rng.normal(0, 0.12) * chip.x * chip.x, half, breadth) + edge
        streak = np.sin(chip.y * rng.uniform(90, 160) + 300 * edge) * 0.05
        tone = rgb(tones[rng.integers(4)]) * math.exp(rng.normal(0, 0.10))
        tone = tone * (1 + streak + 0.08 * grain(rng, chip.shape)) * (1 - 0.25 * np.clip(1 + distance / 0.012, 0, 1))
        chip.paint(chip.inside(distance), tone, height=0.0001 * layer + rng.uniform(-0.004, 0.004) * chip.x / half)
    part.gloss[...] = 0.12


def studs(part: Part, rng: Rng) -> None:
    """Rubber flooring with round studs."""
    color = (0.035, 0.06, 0.075)
    x, y = lay(part, rng, 0.8 * np.asarray(color), 0.015)
    distance = disc(x * 3.4 % 1 - 0.5, y * 3.4 % 1 - 0.5, 0.33) / 3.4
    skin = noise(rng, part.shape, 130, 2)
    top = smooth(-distance / 0.03)
    shade = jitter(rng, color) * np.exp(0.05 * skin + 0.05 * noise(rng, part.shape, 4, 2)) * (1 + 0.15 * top)
    fill(part, shade, 0.055 * top + 0.0012 * skin, 0.36)


CORK = (0.50, 0.31, 0.15), (0.40, 0.23, 0.10), (0.30, 0.16, 0.07)
TERRAZZO = (0.65, 0.62, 0.56), (0.14, 0.15, 0.16), (0.45, 0.20, 0.13), (0.30, 0.36, 0.30)
GRANITE = (0.50, 0.47, 0.45), (0.32, 0.30, 0.30), (0.04, 0.04, 0.045), (0.52, 0.38, 0.33)
TEXTURES: dict[str, Builder] = {
    "brushed_steel": partial(brushed, color=(0.62, 0.63, 0.65)),
    "brushed_brass": partial(brushed, color=(0.72, 0.52, 0.22), gloss=0.7),
    "galvanised_sheet": galvanised,
    "oak": partial(wood, light=(0.55, 0.36, 0.18), dark=(0.30, 0.16, 0.07), rings=11),
    "walnut_floor": partial(wood, light=(0.24, 0.13, 0.065), dark=(0.09, 0.045, 0.025), rings=14, boards=5, gloss=0.5),
    "cork": partial(granules, count=13, palette=CORK, matrix=(0.22, 0.12, 0.05), gloss=0.06, relief=0.003, pores=0.6),
    "terrazzo": partial(
        granules, count=5.5, palette=TERRAZZO, matrix=(0.56, 0.54, 0.50), gloss=0.75, relief=0.0002, filling=0.55
    ),
    "granite": partial(granules, count=20, palette=GRANITE, matrix=(0.35, 0.33, 0.32), gloss=0.7, relief=0.0003),
    "ceramic_tiles": partial(tiles, count=2.2, color=(0.06, 0.22, 0.26), grout=(0.50, 0.48, 0.45)),
    "mosaic": partial(tiles, count=5, color=(0.55, 0.57, 0.58), grout=(0.20, 0.20, 0.21), gloss=0.7),
    "concrete": concrete,
    "tread_plate": tread_plate,
    "cardboard": cardboard,
    "label": label,
    "perforated_sheet": perforated,
    "marble": marble,
    "solar_cell": solar_cell,
    "strand_board": flakes,
    "rubber_studs": studs,
}
