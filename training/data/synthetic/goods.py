"""Products that are put together from pieces, and coffee beans.

Each function draws one, in another place and of another batch every time.
"""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np

from .canvas import Builder, Color, Part, jitter, rgb
from .hardware import STEEL, ZINC, placed
from .shapes import Rng, box, disc, grain, lettering, noise, polygon, ring, segment, smooth

GOLD, TIN, INK, VARNISH = (0.75, 0.52, 0.18), 0.66, (0.03, 0.03, 0.035), (0.012, 0.13, 0.055)


def _chip(
    p: Part, rng: Rng, x: float, y: float, size: tuple[float, float, float], color: Color, legs: int = 0, text: str = ""
) -> None:
    """A component of a half width, half height and thickness soldered to a board, with legs on each long side."""
    (width, height, tall), off = size, rng.normal(0, 0.004, 2)
    with p.piece(x + off[0], y + off[1], max(width, height) + 0.06) as chip:
        for leg, side in np.ndindex(legs, 2):
            pin = chip.near(-width + (leg + 0.5) * 2 * width / legs, (2 * side - 1) * (height + 0.02), 0.04)
            shape = box(pin.x, pin.y, 0.35 * width / legs + 0.006, 0.035)
            pin.solid(shape, 0.085, TIN, bevel=0.02, base=0.06, gloss=0.6, metal=1)
        shape = box(chip.x, chip.y, width, height, 0.008)
        chip.solid(shape, 0.06 + tall, color, bevel=0.015, base=0.06, gloss=0.3, metal=0)
        if text:
            chip.paint(0.8 * lettering(text, chip.x, chip.y, 0.42 * height), 0.45)
            chip.paint(chip.inside(disc(chip.x + 0.8 * width, chip.y - 0.55 * height, 0.018)), height=0.05 + tall)
        else:
            along = chip.x / width if width > height else chip.y / height
            ends = (np.abs(along) > 0.62) * chip.inside(box(chip.x, chip.y, width, height))
            chip.paint(ends, TIN, gloss=0.5, metal=1)


def pcb(p: Part, rng: Rng) -> None:
    """A populated circuit board: copper tracks under varnish, chips, resistors, capacitors and plated holes."""
    p.solid(box(p.x, p.y, 0.76, 0.70, 0.04), 0.06, jitter(rng, VARNISH), bevel=0.012, gloss=0.7)
    board, copper = p.inside(box(p.x, p.y, 0.74, 0.68)), 2.0 * rgb(VARNISH) + 0.02
    for index in range(12):
        y0, y1 = -0.55 + 0.1 * index, -0.5 + 0.09 * ((index * 5) % 12)
        for (left, start), (right, end) in itertools.pairwise(((-0.7, y0), (-0.35, y0), (0.0, y1), (0.7, y1))):
            across, down = (right - left) / 2, (end - start) / 2
            line = p.near((left + right) / 2, (start + end) / 2, max(across, abs(down)) + 0.04)
            track = segment(line.x, line.y, (-across, -down), (across, down))
            line.paint(0.55 * line.inside(track - 0.011), copper, height=0.063)
    for x, y in itertools.product((-0.68, 0.68), (-0.6, 0.6)):
        eye = p.near(x, y, 0.1)
        eye.paint(eye.inside(ring(eye.x, eye.y, 0.035, 0.07)), GOLD, gloss=0.6, metal=1)
        eye.hole(disc(eye.x, eye.y, 0.037), 0.01)
    for index in range(10):
        with p.piece(-0.45 + 0.1 * index, 0.61, 0.06) as pad:
            pad.paint(pad.inside(box(pad.x, pad.y, 0.036, 0.036)), GOLD, gloss=0.6, metal=1)
            pad.solid(disc(pad.x, pad.y, 0.024), 0.16, GOLD, bevel=0.02, base=0.06, gloss=0.7, metal=1)
    chip = partial(_chip, p, rng)
    chip(-0.28, -0.12, (0.22, 0.13, 0.07), INK, 8, "AT-328P")
    chip(0.34, 0.20, (0.13, 0.10, 0.06), INK, 4, "LM358")
    chip(0.40, -0.42, (0.11, 0.14, 0.10), (0.55, 0.55, 0.56), 0, "16.000")
    for index in range(5):
        chip(-0.52 + 0.12 * index, 0.22, (0.038, 0.02, 0.03), (0.05, 0.05, 0.055))
    for index in range(6):
        chip(0.05 + 0.11 * index, -0.12, (0.02, 0.04, 0.04), (0.42, 0.30, 0.17))
    for index in range(4):
        chip(-0.55 + 0.14 * index, -0.42, (0.04, 0.022, 0.03), (0.05, 0.05, 0.055))
    for x in (0.10, -0.12):
        with p.piece(x, 0.42, 0.12) as can:
            can.solid(disc(can.x, can.y, 0.085), 0.30, (0.58, 0.58, 0.6), bevel=0.02, base=0.06, gloss=0.6, metal=1)
            can.paint(can.inside(disc(can.x, can.y, 0.07)) * (can.x < -0.03), INK, metal=0, gloss=0.3)
    p.paint(board * lettering("CTRL-7 REV B", p.x - 0.24, p.y + 0.62, 0.055), (0.62, 0.64, 0.60))


def plug(p: Part, rng: Rng) -> None:
    """A D-sub plug: metal shell, insulator, two rows of gold pins and two nuts."""
    shell = jitter(rng, STEEL, 0.03)
    p.solid(box(p.x, p.y, 0.78, 0.34, 0.06), 0.08, shell, bevel=0.02, gloss=0.6, metal=1)
    outline = box(p.x * (1 + 0.12 * p.y / 0.25), p.y, 0.50, 0.235, 0.12)
    p.solid(outline, 0.30, shell, bevel=0.02, base=0.08, gloss=0.65, metal=1)
    p.paint(p.inside(outline + 0.03), jitter(rng, (0.03, 0.06, 0.20)), height=0.14, metal=0, gloss=0.35)
    for index in range(9):
        x, y = (0.17 * (index - 2), -0.085) if index < 5 else (0.17 * (index - 6.5), 0.085)
        off = rng.normal(0, 0.004, 2)
        with p.piece(x + off[0], y + off[1], 0.07) as pin:
            pin.solid(disc(pin.x, pin.y, 0.033), 0.27, GOLD, bevel=0.03, base=0.14, gloss=0.75, metal=1)
    for side in (-1, 1):
        with p.piece(0.63 * side, 0, 0.13, rng.uniform(0, 1)) as nut:
            nut.solid(polygon(nut.x, nut.y, 6, 0.085), 0.22, ZINC, bevel=0.02, base=0.08, gloss=0.6, metal=1)
            nut.paint(nut.inside(disc(nut.x, nut.y, 0.045)), 0.05, height=0.12)


def toy_brick(p: Part, rng: Rng) -> None:
    """A building brick with eight studs."""
    yellow = jitter(rng, (0.62, 0.40, 0.015), 0.04)
    p.solid(box(p.x, p.y, 0.68, 0.34, 0.015), 0.30, yellow, bevel=0.018, gloss=0.85)
    for row, column in np.ndindex(2, 4):
        with p.piece(-0.51 + 0.34 * column, -0.17 + 0.34 * row, 0.15) as stud:
            stud.solid(disc(stud.x, stud.y, 0.105), 0.37, bevel=0.02, base=0.30)
            stud.height += 0.006 * lettering("toy", stud.x, stud.y, 0.06)
    p.height += 0.001 * p.body * noise(rng, p.shape, 5)


def coffee_beans(p: Part, rng: Rng) -> None:
    """Roasted coffee beans, many deep."""
    for index in range(190):
        x, y, size = rng.uniform(-1.08, 1.08), rng.uniform(-1.08, 1.08), rng.uniform(0.105, 0.135)
        bean = p.near(x, y, 0.19, rng.uniform(0, 6.3))
        tone = jitter(rng, (0.105, 0.046, 0.02), 0.16)
        inside = 1 - (bean.x / size) ** 2 - (bean.y / (0.72 * size)) ** 2
        lift = 0.0005 * index + 0.075 * np.sqrt(np.clip(inside, 0, 1))
        crease = smooth(1 - np.abs(bean.y + 0.012 * np.sin(14 * bean.x)) / 0.016) * (rng.random() < 0.6)
        tone = tone * (np.exp(0.10 * grain(rng, bean.shape)) * (1 - 0.55 * crease))
        bean.paint((inside > 0) * (lift > bean.height), tone, height=lift - 0.022 * crease, gloss=0.35)


GOODS: dict[str, Builder] = {
    "circuit_board": placed(pcb, core=(0.45, 0.42, 0.25), ground=(0.45, 0.45, 0.44), spread=0.06, wear=0.025),
    "connector_plug": placed(plug, core=STEEL, ground=(0.06, 0.075, 0.10), spread=0.12),
    "building_brick": placed(toy_brick, core=(0.5, 0.36, 0.02), ground=0.52, spread=0.3, wear=0.01),
    "coffee_beans": placed(
        coffee_beans, core=(0.05, 0.025, 0.012), ground=(0.02, 0.012, 0.008), spread=0.0, wear=0.03, surface=True
    ),
}
