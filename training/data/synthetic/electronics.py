"""Electrical products. Each function draws one, in another place and of another batch every time."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np

from .canvas import Builder, Color, Part, jitter, rgb
from .hardware import STEEL, ZINC, lying, placed, turning
from .shapes import Rng, box, disc, length, lettering, noise, polygon, ring, segment, smooth

GOLD, TIN, INK, BOARD = (0.75, 0.52, 0.18), 0.66, (0.03, 0.03, 0.035), (0.45, 0.42, 0.25)


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


def pcb(p: Part, rng: Rng, *, mask: Color = (0.012, 0.13, 0.055)) -> None:
    """A populated circuit board: copper tracks under varnish, chips, resistors, capacitors and plated holes."""
    p.solid(box(p.x, p.y, 0.76, 0.70, 0.04), 0.06, jitter(rng, mask), bevel=0.012, gloss=0.7)
    board, copper = p.inside(box(p.x, p.y, 0.74, 0.68)), 2.0 * rgb(mask) + 0.02
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


def terminal_block(p: Part, rng: Rng) -> None:
    """A row of screw terminals in a plastic housing."""
    plastic = jitter(rng, (0.02, 0.26, 0.09))
    p.solid(box(p.x, p.y, 0.76, 0.30, 0.02), 0.36, plastic, bevel=0.025, gloss=0.45)
    for index in range(6):
        x, turn, deep = -0.625 + 0.25 * index, rng.uniform(0, 3.1), rng.normal(0, 0.008)
        cell = p.near(x, -0.06, 0.2)
        cell.paint(cell.inside(disc(cell.x, cell.y, 0.095)), (0.01, 0.05, 0.02), height=0.10)
        with cell.piece(0, 0, 0.12, turn) as screw:
            screw.solid(disc(screw.x, screw.y, 0.082), 0.25 + deep, STEEL, bevel=0.03, base=0.12, gloss=0.65, metal=1)
            screw.paint(screw.inside(box(screw.x, screw.y, 0.08, 0.013)), 0.2, height=0.19)
        gap = p.near(x, 0.22, 0.12)
        gap.paint(gap.inside(box(gap.x, gap.y, 0.085, 0.05, 0.01)), (0.01, 0.04, 0.02), height=0.12)
        wall = p.near(x + 0.125, 0, 0.32)
        wall.paint(0.8 * wall.inside(box(wall.x, wall.y, 0.006, 0.29)), height=0.33)
        cell.paint(lettering(str(index + 1), cell.x, cell.y + 0.17, 0.07), (0.7, 0.72, 0.7))


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


def button_cell(p: Part, rng: Rng) -> None:
    """A lithium coin cell with stamped marking."""
    radius = length(p.x, p.y)
    nickel = jitter(rng, 0.60, 0.03)
    p.solid(radius - 0.72, 0.10, (0.20, 0.20, 0.21), bevel=0.03, gloss=0.5, metal=1)
    p.solid(radius - 0.685, 0.17, nickel, bevel=0.035, base=0.08, gloss=0.68, metal=1)
    turning(p, rng, p.inside(radius - 0.63), 0.0004)
    for row, (text, size) in enumerate((("+", 0.20), ("CR2032", 0.16), ("3V LITHIUM", 0.085))):
        with p.piece():
            stamp = lettering(text, p.x, p.y + 0.26 - 0.25 * row, size)
            p.height -= 0.006 * stamp
            p.color *= 1 - 0.45 * stamp


def sim_card(p: Part, rng: Rng) -> None:
    """A plastic card with gold contacts and print."""
    outline = np.maximum(box(p.x, p.y, 0.74, 0.50, 0.05), 0.7071 * (p.x - p.y) - 0.80)
    p.solid(outline, 0.05, jitter(rng, (0.64, 0.65, 0.66), 0.03), bevel=0.012, gloss=0.5)
    p.paint(p.inside(np.maximum(outline + 0.02, 0.36 - p.y + 0.06 * np.sin(4 * p.x))), jitter(rng, (0.42, 0.05, 0.18)))
    pad = p.near(-0.30, -0.10, 0.4)
    edge = box(pad.x, pad.y, 0.27, 0.22, 0.07)
    pad.paint(pad.inside(edge), jitter(rng, GOLD, 0.04), gloss=0.7, metal=1)
    cuts = np.minimum(np.abs(np.abs(pad.x) - 0.10), np.maximum(np.abs(np.abs(pad.y) - 0.075), 0.10 - np.abs(pad.x)))
    cuts = np.minimum(cuts, np.abs(box(pad.x, pad.y, 0.10, 0.13, 0.04)))
    pad.paint(pad.inside(np.maximum(cuts - 0.007, edge)), (0.25, 0.22, 0.18), metal=0, height=0.046)
    for row, (text, size) in enumerate((("mobil", 0.14), ("8949 0200", 0.075), ("0014 7738", 0.075))):
        with p.piece():
            p.paint(lettering(text, p.x - 0.36, p.y + 0.22 - 0.19 * row - 0.03 * (row > 0), size), (0.08, 0.08, 0.10))


def resistor(p: Part, rng: Rng) -> None:
    """A resistor with its leads and color code."""
    at = (-0.46, -0.44, -0.36, -0.26, -0.20, 0.20, 0.26, 0.36, 0.44, 0.46)
    radius = (0.03, 0.14, 0.20, 0.20, 0.165, 0.165, 0.20, 0.20, 0.14, 0.03)
    lying(p, ((-0.80, 0.030), (0.80, 0.030)), TIN, gloss=0.65)
    p.height += 0.08 * p.body
    cover = lying(p, np.stack((at, radius), 1), jitter(rng, (0.48, 0.33, 0.18), 0.05), metal=0)
    bands: tuple[tuple[float, Color], ...]
    bands = (-0.31, (0.30, 0.02, 0.02)), (-0.13, (0.10, 0.03, 0.18)), (0.02, 0.02), (0.31, (0.55, 0.38, 0.08))
    for x, color in bands:
        off = rng.normal(0, 0.006)
        with p.piece():
            p.paint(cover * p.inside(np.abs(p.x - x - off) - 0.035), color)


def keyboard(p: Part, rng: Rng) -> None:
    """Keys of a keyboard."""
    cap = jitter(rng, (0.56, 0.55, 0.50), 0.03)
    for index, letter in enumerate("QWERTYASDFGHZXCVBN12345."):
        row, column = divmod(index, 6)
        off = rng.normal(0, 0.003, 2)
        with p.piece(-1.0 + 0.42 * column + 0.1 * row - 0.1 + off[0], -0.68 + 0.42 * row + off[1], 0.23) as key:
            key.solid(box(key.x, key.y, 0.19, 0.19, 0.04), 0.20, cap, bevel=0.075, gloss=0.35)
            key.height -= 0.03 * smooth(-box(key.x, key.y, 0.11, 0.11, 0.05) / 0.1) * key.body
            key.paint(lettering(letter, key.x + 0.05, key.y + 0.04, 0.09), (0.05, 0.05, 0.055))
    p.height += 0.0004 * noise(rng, p.shape, 110, 2)


def socket(p: Part, rng: Rng) -> None:
    """A wall socket: frame, round well, contacts and screw."""
    white = jitter(rng, (0.70, 0.69, 0.64), 0.03)
    p.solid(box(p.x, p.y, 0.74, 0.74, 0.06), 0.12, white, bevel=0.05, gloss=0.7)
    p.paint(p.inside(np.abs(box(p.x, p.y, 0.58, 0.58, 0.04)) - 0.008), height=0.095)
    well = disc(p.x, p.y, 0.50)
    p.height -= 0.26 * smooth(-well / 0.05) - 0.02 * smooth(1 - np.abs(well) / 0.03)
    for side in (-1, 1):
        with p.piece(0.22 * side, 0, 0.1) as eye:
            eye.paint(eye.inside(disc(eye.x, eye.y, 0.06)), 0.02, height=-0.2, gloss=0)
        with p.piece(0, 0.44 * side, 0.12) as clip:
            clip.solid(box(clip.x, clip.y, 0.045, 0.07, 0.01), 0.06, STEEL, bevel=0.02, base=-0.12, gloss=0.7, metal=1)
    with p.piece(0, 0, 0.1, rng.uniform(0, 3)) as screw:
        screw.solid(disc(screw.x, screw.y, 0.062), -0.07, ZINC, bevel=0.02, base=-0.14, gloss=0.6, metal=1)
        cross = np.minimum(box(screw.x, screw.y, 0.045, 0.011), box(screw.x, screw.y, 0.011, 0.045))
        screw.paint(screw.inside(cross), 0.1, height=-0.12)


ELECTRONICS: dict[str, Builder] = {
    "circuit_board": placed(pcb, core=BOARD, ground=(0.45, 0.45, 0.44), spread=0.06, wear=0.025),
    "circuit_board_blue": placed(
        partial(pcb, mask=(0.012, 0.05, 0.20)), core=BOARD, ground=(0.10, 0.10, 0.105), spread=0.06, wear=0.025
    ),
    "terminal_block": placed(terminal_block, core=(0.02, 0.22, 0.08), ground=(0.5, 0.49, 0.47), spread=0.12, wear=0.03),
    "connector_plug": placed(plug, core=STEEL, ground=(0.06, 0.075, 0.10), spread=0.12),
    "button_cell": placed(button_cell, core=STEEL, ground=(0.04, 0.04, 0.045), spread=0.5, wear=0.05),
    "sim_card": placed(sim_card, core=0.6, ground=(0.09, 0.07, 0.06), spread=0.12, wear=0.015),
    "resistor": placed(resistor, core=(0.5, 0.4, 0.3), ground=(0.55, 0.56, 0.58), spread=0.4, wear=0.02),
    "keyboard": placed(keyboard, core=0.3, ground=(0.03, 0.03, 0.033), spread=0.012, wear=0.02, surface=True),
    "wall_socket": placed(
        socket, core=(0.6, 0.6, 0.58), ground=(0.35, 0.33, 0.29), spread=0.03, wear=0.015, rough=0.002, gloss=0
    ),
}
