"""What can go wrong with a part, under the codes of Real-IAD. Each function damages the maps of a part in one place.

``strength`` runs from 0 (subtle) to 1 (obvious) and acts on contrast, depth and size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from scipy import ndimage

from .canvas import BODY, HEIGHT, Part, rgb
from .shapes import Map, Rng, box, grain, length, noise, sample, segment, smooth

Damage: TypeAlias = Callable[[Part, Rng, float], None]
# Colors of what does not belong to a product: soot, rust, mold, chalk and blood; ink, grease, brass, hair and paint.
DIRT = (0.012, 0.012, 0.013), (0.20, 0.07, 0.02), (0.10, 0.14, 0.05), (0.68, 0.67, 0.64), (0.33, 0.025, 0.02)
SPILLS = (0.02, 0.04, 0.20), (0.11, 0.085, 0.05), (0.60, 0.45, 0.16), (0.05, 0.028, 0.015), (0.04, 0.30, 0.28)
STRANGE = np.array(DIRT + SPILLS, np.float32)


def _spot(part: Part, rng: Rng, *, at_edge: bool = False) -> tuple[float, float]:
    """A point of the product that camera 1 sees, in coordinates of the canvas, near its outline where wished."""
    coarse = part.body[::4, ::4] > 0.5
    places = coarse
    if at_edge and not part.surface:
        places = coarse & ~ndimage.binary_erosion(coarse, iterations=2, border_value=1)
    limit = 0.62 if part.surface else 0.95
    places = places & (np.abs(part.x[::4, ::4]) < limit) & (np.abs(part.y[::4, ::4]) < limit)
    row, column = divmod(int(rng.choice(np.flatnonzero(places))), coarse.shape[1])
    return float(part.x[4 * row, 4 * column]), float(part.y[4 * row, 4 * column])


def _extent(rng: Rng, strength: float, small: float, large: float) -> float:
    """A size between two, log-uniform, rather large where the defect is strong."""
    return small * (large / small) ** (0.5 * strength + rng.uniform(0, 0.5))


def _contrast(window: Part, rng: Rng, strength: float) -> Map:
    """A color that differs from that of the place, the more the stronger the defect."""
    rows, columns = (side // 2 for side in window.shape)
    here = window.color[:, max(0, rows - 4) : rows + 5, max(0, columns - 4) : columns + 5].mean((1, 2))
    apart = np.abs(np.log(STRANGE + 0.03) - np.log(here + 0.03)).sum(1) + rng.uniform(0, 1.5, len(STRANGE))
    ranked = np.argsort(apart)
    return STRANGE[ranked[len(ranked) // 2 + int(rng.integers(len(ranked) // 2))]] * np.float32(0.85 + 0.3 * strength)


def _wander(rng: Rng, steps: int, reach: float, bend: float) -> Map:
    """Points (steps, 2) of a line through the origin that changes its direction a little at every step."""
    turns = np.cumsum(rng.normal(0, bend, steps)) + rng.normal(0, bend) * np.linspace(-2, 2, steps)
    points = np.cumsum(np.stack([np.cos(turns), np.sin(turns)], 1), 0) * (2 * reach / steps)
    return points - points.mean(0)


def _line(window: Part, points: Map) -> tuple[Map, Map]:
    """Distance from a line through points, and how far along it the nearest of its pieces is (0 to 1)."""
    nearest, along = np.full(window.shape, 9, np.float32), np.zeros(window.shape, np.float32)
    for index, (start, end) in enumerate(itertools.pairwise(points.tolist())):
        distance = segment(window.x, window.y, start, end)
        closer = distance < nearest
        np.copyto(nearest, distance, where=closer)
        np.copyto(along, np.float32(index / max(1, len(points) - 2)), where=closer)
    return nearest, along


def _blob(window: Part, rng: Rng, radius: float, stretch: float = 1.0, ragged: float = 0.25) -> Map:
    """Signed distance of an irregular patch around the local origin."""
    wobble = noise(rng, window.shape, max(2.0, 1.6 * window.shape[0] * window.texel / radius / 2), 3)
    return length(window.x / stretch, window.y) - radius * (1 + ragged * wobble)


def pit(part: Part, rng: Rng, strength: float) -> None:
    """A dent or small holes."""
    (dent if rng.random() < 0.5 else holes)(part, rng, strength)


def dent(part: Part, rng: Rng, strength: float) -> None:
    """A blow that pressed the surface in and threw up a rim."""
    radius = _extent(rng, strength, 0.045, 0.13)
    window = part.near(*_spot(part, rng), 2.2 * radius, rng.uniform(0, math.pi))
    ratio = length(window.x, window.y * rng.uniform(1, 1.4)) / radius
    press = np.exp(-(ratio**2) * 1.4) - 0.22 * np.exp(-(((ratio - 1.25) / 0.28) ** 2))
    window.height -= window.body * press * radius * (0.35 + 0.45 * strength)
    window.color *= 1 - window.body * (0.10 + 0.2 * strength) * np.exp(-(ratio**2) * 2)


def holes(part: Part, rng: Rng, strength: float) -> None:
    """A group of small holes."""
    spread = _extent(rng, strength, 0.02, 0.16)
    center = part.near(*_spot(part, rng), 0.3)
    for _ in range(1 + int(rng.integers(0, 2 + round(5 * spread / 0.16)))):
        radius = _extent(rng, strength, 0.016, 0.042)
        x, y = rng.normal(0, spread / 2, 2)
        hole = center.near(x, y, 2 * radius + 0.02)
        cover = smooth((radius - length(hole.x, hole.y)) / (0.5 * radius)) * hole.body
        hole.height -= cover * radius * (1.2 + strength)
        hole.color *= 1 - (0.45 + 0.4 * strength) * cover
        hole.gloss *= 1 - cover


def deformation(part: Part, rng: Rng, strength: float) -> None:
    """Material that was pushed aside or twisted, and bulges."""
    radius = _extent(rng, strength, 0.14, 0.34)
    window = part.near(*_spot(part, rng, at_edge=rng.random() < 0.7), radius * 1.1)
    inside = np.clip(1 - (length(window.x, window.y) / radius) ** 2, 0, 1) ** 2
    way = rng.uniform(0, 2 * math.pi)
    push = radius * (0.28 + 0.3 * strength)
    if rng.random() < 0.6:
        dx, dy = push * math.cos(way) * inside, push * math.sin(way) * inside
    else:
        twist = (0.7 + 0.8 * strength) * float(rng.choice((-1.0, 1.0))) * inside
        dx = window.x * (np.cos(twist) - 1) - window.y * np.sin(twist)
        dy = window.y * (np.cos(twist) - 1) + window.x * np.sin(twist)
    height, width = window.shape
    u = (2 * np.arange(width, dtype=np.float32)[None] + 1) / width - 1 + 2 * dx / (width * window.texel)
    v = (2 * np.arange(height, dtype=np.float32)[:, None] + 1) / height - 1 + 2 * dy / (height * window.texel)
    moved = sample(window.maps, u, v)
    touched = np.maximum(moved[BODY], window.body)
    window.maps += touched * (moved - window.maps)
    window.height += float(rng.choice((-0.5, 1.0))) * radius * (0.10 + 0.16 * strength) * inside * window.body


def abrasion(part: Part, rng: Rng, strength: float) -> None:
    """A rubbed patch: many fine parallel marks that take off color and shine."""
    radius = _extent(rng, strength, 0.07, 0.24)
    stretch = rng.uniform(1.2, 2.4)
    window = part.near(*_spot(part, rng), radius * stretch, rng.uniform(0, math.pi))
    patch = smooth(1 - _blob(window, rng, 0.7 * radius, stretch, 0.2) / (0.5 * radius) - 0.5)
    u = np.clip(window.x / (radius * stretch) / 1.5, -1, 1)
    v = np.clip(window.y / (radius * stretch) / 1.5, -1, 1)
    marks = sample(noise(rng, (256, 256), (150, 5))[None], u, v)[0]
    cover = patch * smooth(0.35 + 0.6 * marks) * window.body * (0.45 + 0.5 * strength)
    dark = float(window.color.mean()) > 0.33 and rng.random() < 0.6
    tone = 0.45 * window.color if dark else 0.5 * window.color + 0.5 * rgb(part.core) + 0.12
    window.paint(cover, tone, gloss=0.12)
    window.height -= 0.003 * cover * (1 + marks)


def scratch(part: Part, rng: Rng, strength: float) -> None:
    """One to four thin cuts, bright where the core shows, dark where they are deep."""
    reach = _extent(rng, strength, 0.10, 0.42)
    center = part.near(*_spot(part, rng), 1.5 * reach, rng.uniform(0, 2 * math.pi))
    bright = float(center.color.mean()) < 0.3 or rng.random() < 0.35
    for index in range(1 + int(rng.random() < 0.35) * int(rng.integers(1, 4))):
        x, y = rng.normal(0, 0.12 * reach, 2) * (index > 0)
        window = center.near(x, y, 1.3 * reach, rng.normal(0, 0.25) * (index > 0))
        distance, along = _line(window, _wander(rng, 9, reach * rng.uniform(0.6, 1.0), 0.06))
        width = _extent(rng, strength, 0.006, 0.015) * (0.55 + 0.9 * along * (1 - along) * 2)
        pressure = np.interp(along, np.linspace(0, 1, 7), rng.uniform(0.55, 1, 7)).astype(np.float32)
        cut = np.exp(-((distance / width) ** 2)) * pressure * window.body
        tone = 0.35 * window.color + 0.65 * rgb(part.core) + 0.25 if bright else 0.3 * window.color
        window.paint(cut * (0.45 + 0.5 * strength), tone, gloss=0.25)
        window.height -= cut * width * (0.5 + 1.1 * strength)


def damage(part: Part, rng: Rng, strength: float) -> None:
    """A crack, or a piece broken out: from the edge of an object, out of the face of a sheet."""
    if rng.random() < 0.4:
        reach = _extent(rng, strength, 0.12, 0.34)
        window = part.near(*_spot(part, rng), 1.5 * reach, rng.uniform(0, 2 * math.pi))
        points = _wander(rng, 14, reach, 0.42)
        branch = points[7] + np.vstack(((0, 0), _wander(rng, 5, 0.35 * reach, 0.5)))
        distance, along = _line(window, points)
        fork, _ = _line(window, branch)
        width = (0.005 + 0.008 * strength) * (1.2 - along)
        crack = np.maximum(smooth(1.5 - distance / width), 0.8 * smooth(1.4 - fork / (0.6 * width))) * window.body
        window.paint(crack, 0.12 * window.color, gloss=0)
        window.height -= crack * (0.02 + 0.03 * strength)
        return
    radius = _extent(rng, strength, 0.06, 0.17)
    window = part.near(*_spot(part, rng, at_edge=True), 1.8 * radius, rng.uniform(0, math.pi))
    hollow = _blob(window, rng, radius, rng.uniform(1, 1.6), 0.3)
    if part.surface:
        # Torn fibers and splinters.
        hollow += 0.16 * radius * noise(rng, window.shape, (14, 50))
    cover = window.inside(hollow) * window.body
    rough = noise(rng, window.shape, 12, 3) + 0.4 * grain(rng, window.shape)
    window.paint(cover, rgb(part.core) * np.exp(0.16 * rough), gloss=0.08, metal=0)
    depth = smooth(-hollow / radius * 1.6) * (0.5 + 0.4 * strength)
    base = window.height - 0.11 if part.surface else window.floor[HEIGHT]
    window.height += cover * (depth * (base - window.height) - 0.01 + 0.008 * rough)


def missing(part: Part, rng: Rng, strength: float) -> None:
    """A clean cut that took material away: a corner of an object, a strip or patch of a sheet.

    Parts made of pieces lack one of these instead.
    """
    window = part.near(*_spot(part, rng, at_edge=True), 0.6, rng.uniform(0, 2 * math.pi))
    if part.surface:
        size = _extent(rng, strength, 0.035, 0.10)
        shape = box(window.x, window.y, size * rng.uniform(1.2, 5), size) + 0.006 * noise(rng, window.shape, 14, 2)
        torn = rgb(part.core) * np.exp(0.08 * grain(rng, window.shape))
        window.paint(window.inside(shape), torn, gloss=0.05, metal=0)
        window.height -= smooth(-shape / 0.02) * (0.02 + 0.03 * strength)
        return
    size = _extent(rng, strength, 0.09, 0.26)
    ragged = 0.012 * noise(rng, window.shape, 10, 2)
    cut = box(window.x, window.y, size, size * rng.uniform(0.5, 1.0), 0.02) + ragged
    window.hole(np.maximum(cut, 0.5 - 9 * window.body), 0.025)


def foreign_body(part: Part, rng: Rng, strength: float) -> None:
    """Something that lies on the part: a fiber, a crumb, a metal shaving or a scrap of film."""
    kind = rng.choice(4, p=(0.35, 0.25, 0.2, 0.2))
    reach = _extent(rng, strength, *((0.10, 0.32), (0.035, 0.12), (0.06, 0.2), (0.04, 0.13))[kind])
    window = part.near(*_spot(part, rng), 2 * reach, rng.uniform(0, 2 * math.pi))
    tone = _contrast(window, rng, strength)
    below = ndimage.maximum_filter(window.height, 3)
    if kind == 0:
        distance, along = _line(window, _wander(rng, 18, reach, 0.28))
        width = (0.006 + 0.006 * strength) * (1 + 0.2 * np.sin(9 * along))
        top = below + 0.006 + 0.02 * np.sqrt(np.clip(1 - (distance / width / 1.5) ** 2, 0, 1))
        window.paint(window.inside(distance - width), tone, gloss=0.35, metal=0, height=top)
    elif kind == 1:
        shape = _blob(window, rng, 0.75 * reach, rng.uniform(1, 1.5), 0.3)
        lump = np.sqrt(np.clip(-shape / reach, 0, 1))
        rough = noise(rng, window.shape, 14, 2)
        top = below + reach * (0.6 + 0.1 * rough) * lump
        window.paint(window.inside(shape), rgb(tone) * np.exp(0.15 * rough), gloss=0.1, metal=0, height=top)
    elif kind == 2:
        curl = window.y - rng.uniform(0.2, 1.1) * window.x**2 / reach
        shape = box(window.x, curl, reach, 0.012 + 0.014 * strength, 0.008)
        shaving = (0.68, 0.66, 0.62) if float(window.color.mean()) < 0.4 else (0.16, 0.15, 0.15)
        top = below + 0.025 + 0.2 * np.abs(window.x) + 0.3 * curl
        window.paint(window.inside(shape), shaving, gloss=0.8, metal=1, height=top)
    else:
        shape = box(window.x, window.y, reach, reach * rng.uniform(0.4, 0.9)) + 0.01 * noise(rng, window.shape, 5, 2)
        lift = 0.008 + 0.03 * smooth(window.x / reach) + 0.004 * noise(rng, window.shape, 4)
        top = np.maximum(ndimage.gaussian_filter(window.height, 2), below - 0.01) + lift
        window.paint(window.inside(shape) * (0.55 + 0.4 * strength), tone, gloss=0.7, metal=0)
        window.paint(window.inside(shape), height=top)


def contamination(part: Part, rng: Rng, strength: float) -> None:
    """Dirt or discoloration: a dried stain, grease, a smear, or a spray of dots."""
    kind = rng.integers(4)
    radius = _extent(rng, strength, 0.06, 0.20)
    window = part.near(*_spot(part, rng), 2.2 * radius, rng.uniform(0, math.pi))
    tone = _contrast(window, rng, strength)
    opacity = 0.28 + 0.6 * strength
    if kind == 0:
        shape = _blob(window, rng, radius, rng.uniform(1, 1.5), 0.22)
        rim = np.exp(-(((shape + 0.06 * radius) / (0.13 * radius)) ** 2))
        cover = window.inside(shape) * (0.45 + 0.2 * noise(rng, window.shape, 6, 3)) + 0.55 * rim
        window.paint(np.clip(cover, 0, 1) * opacity * window.body, tone)
    elif kind == 1:
        cover = smooth(-_blob(window, rng, radius, rng.uniform(1, 1.4), 0.15) / (0.12 * radius)) * window.body
        window.color *= 1 - (0.30 + 0.45 * strength) * cover * rgb((0.8, 0.9, 1.0))
        window.paint(cover, gloss=np.maximum(0.72, window.gloss))
    elif kind == 2:
        stretch = rng.uniform(1.4, 2.2)
        along = window.x / (radius * stretch)
        lines, v = noise(rng, (window.shape[0], 1), (26, 1)), np.clip(window.y / (2.2 * radius), -1, 1)
        streaks = sample(np.tile(lines, (1, 4))[None], np.zeros_like(v), v)[0]
        fade = smooth(1.1 - np.abs(along)) * smooth(1.3 - np.abs(window.y) / (0.55 * radius))
        fade *= smooth(0.7 + 0.5 * streaks - 0.45 * along)
        window.paint(fade * opacity * window.body, tone, gloss=0.2)
    else:
        for _ in range(int(rng.integers(5, 22))):
            size = radius * rng.uniform(0.04, 0.19)
            x, y = rng.normal(0, 0.55 * radius, 2)
            dot = window.near(x, y, 1.5 * size + 0.01)
            cover = smooth(1.4 - length(dot.x, dot.y * rng.uniform(1, 1.5)) / size)
            dot.paint(cover * min(1.0, opacity + 0.2) * dot.body, tone)


def rust(part: Part, rng: Rng, strength: float) -> None:
    """A corroded patch, brown, dull and rough. No kind of Real-IAD: the sample images of the package show it."""
    radius = _extent(rng, strength, 0.04, 0.09)
    window = part.near(*_spot(part, rng), 2 * radius)
    rough = noise(rng, window.shape, 24, 3)
    cover = smooth(0.5 - _blob(window, rng, radius, rng.uniform(1, 1.5), 0.4) / radius + 0.25 * rough) * window.body
    brown = rgb((0.24, 0.085, 0.03)) * np.exp(0.35 * rough)
    window.paint(cover * (0.6 + 0.4 * strength), brown, gloss=0.05, metal=0)
    window.height += 0.004 * cover * rough


# What each code means, and what does it.
DEFECTS: dict[str, tuple[str, Damage]] = {
    "AK": ("pit: a dent with a raised rim, or a group of small holes", pit),
    "BX": ("deformation: material pushed aside or twisted, and bulging", deformation),
    "CH": ("abrasion: a rubbed patch of fine parallel marks", abrasion),
    "HS": ("scratch: one to four thin cuts", scratch),
    "PS": ("damage: a crack, a tear or a piece broken out", damage),
    "QS": ("missing part: a component, a print or a piece of material that is not there", missing),
    "YW": ("foreign body: a fiber, a crumb, a metal shaving or a scrap of film", foreign_body),
    "ZW": ("contamination: a stain, grease, a smear or a spray of dots", contamination),
}
