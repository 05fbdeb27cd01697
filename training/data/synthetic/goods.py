"""Products of plastic, wood, paper and food.

Each function draws one, in another place and of another batch every time.
"""

from __future__ import annotations

import math

import numpy as np

from .canvas import Builder, Part, jitter, mix, rgb
from .hardware import BRASS, STEEL, lying, placed
from .shapes import Rng, box, disc, grain, length, lettering, noise, rounded, segment, smooth


def tablet(p: Part, rng: Rng) -> None:
    """A white tablet with score line and imprint."""
    radius, fine = length(p.x, p.y), noise(rng, p.shape, 120, 2)
    top = 0.34 - 0.20 * np.clip(radius, 0, 1) ** 2
    p.solid(radius - 0.66, top, jitter(rng, (0.72, 0.70, 0.66), 0.04), bevel=0.05, gloss=0.22)
    with p.piece():
        p.height -= 0.045 * smooth(1 - np.abs(p.y) / 0.035) * p.body
    for text, y in (("PX", -0.27), ("40", 0.27)):
        with p.piece():
            p.height -= 0.022 * lettering(text, p.x, p.y - y, 0.20)
    p.height += 0.0009 * p.body * fine
    p.color *= 1 - 0.15 * (np.clip(noise(rng, p.shape, 170) - 2.3, 0, 1) * p.body)


def capsule(p: Part, rng: Rng) -> None:
    """A hard capsule of two colors, printed."""
    cap, base = jitter(rng, (0.42, 0.03, 0.025)), jitter(rng, (0.66, 0.55, 0.20))
    at = np.linspace(-0.72, 0.72, 41)
    radius = np.sqrt(np.clip(0.25**2 - np.clip(np.abs(at) - 0.47, 0, None) ** 2, 0, None)) + 0.016 * (at < 0.05)
    cover = lying(p, np.stack((at, radius), 1), base, gloss=0.85, metal=0)
    p.paint(cover * (p.x < 0.05), cap)
    for text, x, ink in (("AZ 250", -0.28, (0.7, 0.7, 0.68)), ("250", 0.34, (0.15, 0.03, 0.03))):
        with p.piece():
            p.paint(0.9 * cover * lettering(text, p.x - x, p.y, 0.11), ink)


def blister(p: Part, rng: Rng) -> None:
    """A blister pack: clear domes over pills on aluminum foil."""
    crimp = np.maximum(np.sin(55 * (p.x + p.y)), np.sin(55 * (p.x - p.y)))
    p.solid(box(p.x, p.y, 0.78, 0.52, 0.06), 0.03, (0.60, 0.60, 0.61), bevel=0.01, gloss=0.5, metal=1)
    p.height += p.body * (0.0016 * crimp + 0.004 * noise(rng, p.shape, 4))
    pill = jitter(rng, (0.62, 0.20, 0.16), 0.04)
    for row, column in np.ndindex(2, 5):
        turn, off = rng.uniform(0, 3), rng.normal(0, 0.008, 2)
        dome = p.near(-0.58 + 0.29 * column, -0.23 + 0.46 * row, 0.2)
        cover = disc(dome.x, dome.y, 0.118)
        dome.paint(0.65 * dome.inside(cover), (0.45, 0.45, 0.47))
        with dome.piece(off[0], off[1], 0.12, turn) as inner:
            inner.paint(inner.inside(disc(inner.x, inner.y, 0.092)), pill, metal=0)
            inner.paint(inner.inside(box(inner.x, inner.y, 0.085, 0.008)), 0.6 * pill)
        dome.paint(dome.inside(cover), height=0.03 + 0.12 * rounded(cover, 0.07), gloss=0.92)


def crown_cap(p: Part, rng: Rng) -> None:
    """A printed crown cork with its crimped skirt."""
    radius, around = length(p.x, p.y), np.arctan2(p.y, p.x)
    red = jitter(rng, (0.38, 0.02, 0.025), 0.05)
    flute = np.cos(21 * around)
    p.solid(radius - 0.70 - 0.035 * flute, 0.10, red, bevel=0.05, gloss=0.7)
    skirt = smooth((0.70 - radius) / 0.17)
    p.height += p.body * (0.14 * skirt + 0.025 * flute * skirt * (1 - skirt) * 4)
    p.paint(p.inside(np.abs(radius - 0.475) - 0.012), (0.70, 0.60, 0.30))
    line = p.inside(box(p.x, p.y + 0.01, 0.36, 0.012))
    for print_ in (lettering("BRAU", p.x, p.y + 0.14, 0.17), lettering("1894", p.x, p.y - 0.12, 0.17), line):
        with p.piece():
            p.paint(print_, (0.72, 0.66, 0.48))


def screw_cap(p: Part, rng: Rng) -> None:
    """A plastic bottle cap with grip ribs and a molded mark."""
    radius, around = length(p.x, p.y), np.arctan2(p.y, p.x)
    blue = jitter(rng, (0.025, 0.12, 0.42), 0.05)
    rib = np.clip(1.6 * np.cos(48 * around), -1, 1)
    p.solid(radius - 0.66 - 0.012 * rib, 0.34, blue, bevel=0.07, gloss=0.55)
    p.height -= 0.025 * smooth((0.50 - radius) / 0.03)
    for index in range(3):
        with p.piece(0, 0, 0.4, index * 2 * math.pi / 3 + 0.5) as mark:
            bent = segment(mark.x, mark.y, (0.08, 0.05), (0.30, 0.05)) - 0.03
            arrow = np.minimum(bent, segment(mark.x, mark.y, (0.30, 0.05), (0.22, 0.14)) - 0.03)
            mark.height += 0.018 * smooth(-arrow / 0.015)
    p.height += 0.0003 * p.body * noise(rng, p.shape, 70, 2)


def button(p: Part, rng: Rng) -> None:
    """A four-hole button of horn."""
    radius, swirl = length(p.x, p.y), noise(rng, p.shape, (3, 7), 4)
    horn = mix(jitter(rng, (0.30, 0.15, 0.055)), jitter(rng, (0.07, 0.035, 0.02)), smooth(0.5 + 0.6 * swirl))
    top = 0.15 - 0.06 * smooth((0.50 - radius) / 0.08) + 0.02 * np.clip(radius - 0.5, 0, 1)
    p.solid(radius - 0.68, top, horn, bevel=0.06, gloss=0.8)
    for index in range(4):
        angle = math.pi / 4 + index * math.pi / 2
        with p.piece(0.17 * math.cos(angle), 0.17 * math.sin(angle), 0.12) as eye:
            eye.hole(disc(eye.x, eye.y, 0.062), 0.015)


def toy_brick(p: Part, rng: Rng) -> None:
    """A building brick with eight studs."""
    yellow = jitter(rng, (0.62, 0.40, 0.015), 0.04)
    p.solid(box(p.x, p.y, 0.68, 0.34, 0.015), 0.30, yellow, bevel=0.018, gloss=0.85)
    for row, column in np.ndindex(2, 4):
        with p.piece(-0.51 + 0.34 * column, -0.17 + 0.34 * row, 0.15) as stud:
            stud.solid(disc(stud.x, stud.y, 0.105), 0.37, bevel=0.02, base=0.30)
            stud.height += 0.006 * lettering("toy", stud.x, stud.y, 0.06)
    p.height += 0.001 * p.body * noise(rng, p.shape, 5)


def biscuit(p: Part, rng: Rng) -> None:
    """A butter biscuit with scalloped edge and pricked dots."""
    outline = box(p.x, p.y, 0.66, 0.46, 0.06) - 0.018 * np.cos(42 * p.x) - 0.018 * np.cos(42 * p.y)
    bake, crumb = noise(rng, p.shape, 4, 3), noise(rng, p.shape, 90, 2)
    brown = smooth(1 + outline / 0.16 + 0.22 * bake)
    dough = mix(jitter(rng, (0.62, 0.43, 0.19), 0.05), jitter(rng, (0.36, 0.17, 0.05), 0.05), brown)
    p.solid(outline, 0.13 + 0.008 * bake, dough * np.exp(0.05 * crumb), bevel=0.06, gloss=0.12)
    p.height += 0.0022 * p.body * crumb
    for row, column in np.ndindex(4, 7):
        off = rng.normal(0, 0.006, 2)
        with p.piece(-0.51 + 0.17 * column + off[0], -0.31 + 0.205 * row + off[1], 0.05) as dot:
            press = smooth(1 - length(dot.x, dot.y) / 0.034)
            dot.height -= 0.05 * press
            dot.color *= 1 - 0.35 * press


def zipper(p: Part, rng: Rng) -> None:
    """A closed zip fastener on its woven tape."""
    slant = np.where((p.y * 8) % 1 < 0.5, 1, -1) * p.y * 0.7
    herring = np.sin(2 * math.pi * 20 * (p.x + slant)) + 0.5 * grain(rng, p.shape)
    p.height[...] = 0.005 * herring + 0.012 * np.cos(2 * math.pi * p.y * 1.2)
    p.color *= np.exp(0.09 * herring)
    seam = np.abs(np.abs(p.y) - 0.36) - 0.012
    p.paint(p.inside(seam) * (0.5 + 0.5 * np.sin(90 * p.x)), (0.20, 0.24, 0.40), height=0.02)
    p.height += 0.07 * smooth((0.2 - np.abs(p.y)) / 0.08)
    brass = jitter(rng, BRASS, 0.05)
    for index in range(22):
        side, off = (-1) ** index, rng.normal(0, 0.003, 2)
        with p.piece(-1.05 + 0.1 * index + off[0], 0.055 * side + off[1], 0.2) as tooth:
            shape = np.minimum(box(tooth.x, tooth.y, 0.036, 0.12, 0.02), disc(tooth.x, tooth.y + 0.07 * side, 0.052))
            tooth.solid(shape, 0.17, brass, bevel=0.035, base=0.06, gloss=0.7, metal=1)


def brush(p: Part, rng: Rng) -> None:
    """The head of a toothbrush with its tufts."""
    outline = np.minimum(box(p.x + 0.12, p.y, 0.60, 0.27, 0.24), box(p.x - 0.75, p.y, 0.35, 0.10, 0.05))
    p.solid(outline, 0.10, jitter(rng, (0.03, 0.30, 0.34), 0.05), bevel=0.05, gloss=0.7)
    blue, white = jitter(rng, (0.04, 0.18, 0.50), 0.05), rgb((0.72, 0.73, 0.72))
    for row, column in np.ndindex(4, 9):
        lean, tall = rng.normal(0, 0.006, 2), rng.normal(0, 0.008)
        edges = (row in (0, 3)) + (column in (0, 8))
        # Corners are round.
        if edges == 2:
            continue
        with p.piece(-0.60 + 0.12 * column + lean[0], -0.165 + 0.11 * row + lean[1], 0.08) as tuft:
            bristles = grain(rng, tuft.shape)
            color, top = (blue if edges else white) * np.exp(0.16 * bristles), 0.36 + tall + 0.012 * bristles
            tuft.solid(disc(tuft.x, tuft.y, 0.046), top, color, bevel=0.02, base=0.10, gloss=0.3)


def pencils(p: Part, rng: Rng) -> None:
    """A set of colored pencils side by side."""
    warm = (0.45, 0.02, 0.02), (0.62, 0.22, 0.01), (0.65, 0.50, 0.02)
    cold = (0.03, 0.28, 0.06), (0.02, 0.10, 0.40), (0.18, 0.03, 0.25)
    for index, color in enumerate(warm + cold):
        shade, push = jitter(rng, color, 0.04), rng.normal(0, 0.012)
        with p.piece(push, -0.475 + 0.19 * index, 0.8) as stick:
            body = ((-0.74, 0.088), (0.42, 0.088), (0.70, 0.016), (0.72, 0.012))
            cover = lying(stick, body, shade, gloss=0.8, metal=0)
            stick.height += cover * (0.018 * np.cos(2 * math.pi * np.clip(stick.y / 0.088, -1, 1)))
            cut = stick.x - 0.42 + 0.04 * np.cos(40 * stick.y)
            stick.paint(cover * stick.inside(-cut), jitter(rng, (0.55, 0.38, 0.20), 0.04), gloss=0.1)
            stick.paint(cover * stick.inside(0.61 - stick.x), shade, gloss=0.3)
            stick.paint(0.9 * cover * lettering("ATELIER", stick.x + 0.2, stick.y, 0.055), (0.72, 0.60, 0.30))


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


def gasket(p: Part, rng: Rng) -> None:
    """A rubber gasket."""
    frame = np.abs(box(p.x, p.y, 0.58, 0.40, 0.22)) - 0.065
    ears = np.minimum(disc(np.abs(p.x) - 0.66, p.y, 0.12), disc(p.x, np.abs(p.y) - 0.47, 0.12))
    p.solid(np.minimum(frame, ears), 0.11, jitter(rng, (0.03, 0.03, 0.033), 0.1), bevel=0.045, gloss=0.35)
    p.height += 0.03 * smooth(1 - np.abs(frame + 0.065) / 0.025)
    for x, y in ((-0.66, 0), (0.66, 0), (0, -0.47), (0, 0.47)):
        with p.piece(x, y, 0.1) as eye:
            eye.hole(disc(eye.x, eye.y, 0.055))
    p.height += 0.0006 * p.body * noise(rng, p.shape, 120)


def beads(p: Part, rng: Rng) -> None:
    """Wooden beads on a cord."""
    cord = np.abs(p.y - 0.12 * np.sin(2.2 * p.x)) - 0.022
    p.solid(np.maximum(cord, np.abs(p.x) - 0.92), 0.12, jitter(rng, (0.50, 0.44, 0.33)), bevel=0.03)
    p.height += 0.012 * p.body * np.sin(70 * p.x + 60 * p.y)
    tones = ((0.42, 0.22, 0.09), (0.55, 0.36, 0.17), (0.16, 0.07, 0.035))
    for index in range(6):
        x = -0.70 + 0.28 * index + rng.normal(0, 0.008)
        tone, turn = jitter(rng, tones[index * 2 % 3]), rng.uniform(0, 3)
        with p.piece(x, 0.12 * math.sin(2.2 * x), 0.2, turn) as bead:
            rings = np.sin(46 * bead.x + 3 * noise(rng, bead.shape, (2, 5)))
            shade = tone * np.exp(0.12 * rings + 0.05 * grain(rng, bead.shape))
            bead.solid(disc(bead.x, bead.y, 0.135), 0.26, shade, bevel=0.13, base=0.08, gloss=0.55)


GOODS: dict[str, Builder] = {
    "tablet": placed(tablet, core=(0.62, 0.60, 0.55), ground=(0.05, 0.13, 0.22), spread=0.8, wear=0.015),
    "capsule": placed(capsule, core=(0.6, 0.58, 0.5), ground=(0.60, 0.60, 0.58), spread=0.5, wear=0.01),
    "blister_pack": placed(blister, core=0.6, ground=(0.16, 0.17, 0.18), spread=0.1, wear=0.02),
    "crown_cap": placed(crown_cap, core=STEEL, ground=(0.30, 0.22, 0.14), spread=1.5, wear=0.02),
    "screw_cap": placed(screw_cap, core=(0.1, 0.2, 0.45), ground=(0.58, 0.57, 0.55), spread=1.5, wear=0.02),
    "button": placed(
        button, core=(0.3, 0.2, 0.1), ground=(0.56, 0.54, 0.48), spread=1.5, wear=0.02, rough=0.0015, gloss=0
    ),
    "building_brick": placed(toy_brick, core=(0.5, 0.36, 0.02), ground=0.52, spread=0.3, wear=0.01),
    "biscuit": placed(biscuit, core=(0.55, 0.38, 0.18), ground=(0.52, 0.55, 0.56), spread=0.2, wear=0.03),
    "zip_fastener": placed(
        zipper, core=(0.05, 0.05, 0.06), ground=(0.03, 0.05, 0.13), spread=0.015, wear=0.03, surface=True
    ),
    "dental_brush": placed(brush, core=0.6, ground=(0.30, 0.32, 0.34), spread=0.12, wear=0.01),
    "pencils": placed(pencils, core=(0.55, 0.36, 0.18), ground=(0.60, 0.59, 0.55), spread=0.1, wear=0.02),
    "coffee_beans": placed(
        coffee_beans, core=(0.05, 0.025, 0.012), ground=(0.02, 0.012, 0.008), spread=0.0, wear=0.03, surface=True
    ),
    "gasket": placed(gasket, core=0.06, ground=(0.58, 0.58, 0.56), spread=0.3, wear=0.05),
    "bead_string": placed(
        beads, core=(0.45, 0.28, 0.12), ground=(0.13, 0.15, 0.13), spread=0.3, wear=0.03, rough=0.0015, gloss=0
    ),
}
