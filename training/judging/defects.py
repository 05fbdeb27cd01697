"""Two generators of defects, one for the products that are developed on, another for those of the final judgment.

The first draws discs and strokes. The second draws the regions of noise, tears, and lays pieces of other photographs
on. What a region then suffers (another color, blur, a bend) is shared: there are not two kinds of blur.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from scipy import ndimage

from .camera import SCENE
from .scenes import Map, Rng, Scene, smooth_noise

# A defect (colors, region (SCENE, SCENE) in [0, 1], generator, strength in [0, 1]) -> colors.
Effect = Callable[[Map, Map, Rng, float], Map]
Region = Callable[[Map, Rng, float], Map]
Damage = Callable[[Scene, Rng], Map]

_ROWS, _COLUMNS = np.mgrid[:SCENE, :SCENE].astype(np.float32)
# What a defect changes at least, of 1.
VISIBLE = 0.04


def disc(body: Map, rng: Rng, radius: float) -> Map:
    """A soft ellipse around a point of the body."""
    y, x = _spot(body, rng)
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(1, 1.7)
    u = (_COLUMNS - x) * np.cos(angle) + (_ROWS - y) * np.sin(angle)
    v = (_ROWS - y) * np.cos(angle) - (_COLUMNS - x) * np.sin(angle)
    return _edge(radius - np.hypot(u / stretch, v))


def stroke(body: Map, rng: Rng, radius: float) -> Map:
    """A thin bent line, about three times as long as ``radius``."""
    y, x = _spot(body, rng)
    angle, bend = rng.uniform(0, np.pi), rng.uniform(-0.012, 0.012)
    u = (_COLUMNS - x) * np.cos(angle) + (_ROWS - y) * np.sin(angle)
    v = (_ROWS - y) * np.cos(angle) - (_COLUMNS - x) * np.sin(angle) - bend * u**2
    return _edge(rng.uniform(0.8, 2.2) - np.abs(v)) * _edge(1.5 * radius - np.abs(u))


def cloud(body: Map, rng: Rng, radius: float) -> Map:
    """A ragged region: noise, faded out around a point of the body."""
    y, x = _spot(body, rng)
    fade = 1.6 - np.hypot(_COLUMNS - x, _ROWS - y) / radius
    return _edge(radius * 0.4 * (fade + 0.6 * smooth_noise(rng, SCENE / (2.2 * radius))))


def crack(body: Map, rng: Rng, radius: float) -> Map:
    """A jagged line: a contour of noise within a disc."""
    y, x = _spot(body, rng)
    noise = smooth_noise(rng, SCENE / (3 * radius)) + 0.12 * smooth_noise(rng, SCENE / 12)
    level = noise[int(y), int(x)]
    slope = np.hypot(*np.gradient(noise)) + 1e-3
    return _edge(rng.uniform(0.9, 2) - np.abs(noise - level) / slope) * _edge(
        1.6 * radius - np.hypot(_COLUMNS - x, _ROWS - y)
    )


def _spot(body: Map, rng: Rng) -> tuple[float, float]:
    """A point of the body, not at the edge of the scene."""
    inner = np.zeros_like(body)
    inner[48:-48, 48:-48] = True
    rows, columns = np.nonzero(body & inner)
    pick = int(rng.integers(len(rows)))
    return float(rows[pick]), float(columns[pick])


def _edge(distance: Map) -> Map:
    return np.clip(distance + 0.5, 0, 1).astype(np.float32)


def stain(colors: Map, region: Map, rng: Rng, strength: float) -> Map:
    """Another color laid over, neither the nearest to that of the place nor the farthest from it."""
    here = (colors * region[..., None]).sum((0, 1)) / region.sum()
    tones = rng.uniform(0, 1, (8, 1)) * np.ones(3) if _is_gray(colors) else rng.uniform(0, 1, (8, 3))
    tone = tones[np.abs(tones - here).sum(1).argsort()[len(tones) // 2]].astype(np.float32)
    return colors + (0.4 + 0.5 * strength) * region[..., None] * (tone - colors)


def faint(colors: Map, region: Map, rng: Rng, strength: float) -> Map:
    """A little brighter or darker."""
    return colors * (1 + rng.choice([-1, 1]) * (0.14 + 0.12 * strength) * region[..., None])


def recolor(colors: Map, region: Map, rng: Rng, strength: float) -> Map:
    """Another hue of the same brightness."""
    luma = colors.mean(axis=2, keepdims=True)
    hue = rng.normal(size=3)
    hue -= hue.mean()
    cast = (0.10 + 0.14 * strength) * hue / np.abs(hue).max()
    turned = luma + np.roll(colors - luma, int(rng.integers(1, 3)), axis=2) + cast.astype(np.float32)
    return colors + region[..., None] * (turned - colors)


def soften(colors: Map, region: Map, rng: Rng, strength: float) -> Map:
    """Out of focus, or worn flat."""
    return colors + region[..., None] * (ndimage.gaussian_filter(colors, (2 + 3 * strength,) * 2 + (0,)) - colors)


def bend(colors: Map, region: Map, rng: Rng, strength: float) -> Map:
    """Twisted or pinched about the middle of the region."""
    inside = ndimage.gaussian_filter(region, 6)
    y, x = ndimage.center_of_mass(region)
    if rng.random() < 0.5:
        turn = rng.choice([-1, 1]) * (0.5 + 0.6 * strength) * inside
        dy = (_ROWS - y) * (np.cos(turn) - 1) + (_COLUMNS - x) * np.sin(turn)
        dx = (_COLUMNS - x) * (np.cos(turn) - 1) - (_ROWS - y) * np.sin(turn)
    else:
        pull = rng.choice([-0.35, 0.6]) * (0.6 + 0.5 * strength) * inside
        dy, dx = (_ROWS - y) * pull, (_COLUMNS - x) * pull
    return _moved(colors, dy, dx)


def tear(colors: Map, region: Map, rng: Rng, strength: float) -> Map:
    """What lies on one side of a line through the region slides along it."""
    y, x = ndimage.center_of_mass(region)
    angle = rng.uniform(0, np.pi)
    side = (_ROWS - y) * np.cos(angle) - (_COLUMNS - x) * np.sin(angle) > 0
    slide = side * ndimage.gaussian_filter(region, 3) * (7 + 9 * strength)
    return _moved(colors, slide * np.sin(angle), slide * np.cos(angle))


def erase(colors: Map, region: Map, rng: Rng, strength: float) -> Map:
    """Something is missing: the surroundings of the region instead."""
    weight = (ndimage.maximum_filter(region, 25) > 0.5) & (region < 0.05)
    rows, columns = np.nonzero(weight)
    # The commonest brightness around is that of the ground.
    values = colors[rows, columns].mean(axis=1)
    ground = colors[rows, columns][np.abs(values - np.median(values)) <= values.std() / 2 + 1e-3]
    fill = (
        ground.mean(axis=0)
        + ndimage.gaussian_filter(rng.normal(0, 1, colors.shape[:2]), 1)[..., None] * ground.std() / 2
    )
    return colors + region[..., None] * (fill.astype(np.float32) - colors)


def exchange(colors: Map, region: Map, rng: Rng, strength: float) -> Map:
    """Something else is in its place: another part of the same scene, turned."""
    other = np.rot90(colors, int(rng.integers(1, 4)))
    shift = rng.integers(SCENE // 6, SCENE // 2, 2)
    return colors + region[..., None] * (np.roll(other, tuple(shift), (0, 1)) - colors)


def tint(colors: Map, rng: Rng) -> Map:
    """The whole scene in another tone; where it is gray, with another contrast."""
    if _is_gray(colors):
        return np.clip(0.5 + (colors - 0.5) * rng.choice([0.5, 1.7]), 0, 1)
    return colors * (1 + 0.25 * np.eye(3, dtype=np.float32)[int(rng.integers(3))] * rng.choice([-1, 1]))


def defocus(colors: Map, rng: Rng) -> Map:
    """The whole scene out of focus, beyond what the camera does."""
    return ndimage.gaussian_filter(colors, (rng.uniform(2.2, 3.2),) * 2 + (0,))


def stretch(colors: Map, rng: Rng) -> Map:
    """The whole scene wider or narrower, as cloth whose weave shifts."""
    factor = rng.choice([-0.16, 0.22]) * rng.uniform(0.8, 1.3)
    along = (_COLUMNS - SCENE / 2) * factor
    return _moved(colors, np.zeros_like(along), along)


def skew(colors: Map, rng: Rng) -> Map:
    """The whole scene sheared, beyond what a turned camera does."""
    along = (_ROWS - SCENE / 2) * rng.choice([-1, 1]) * rng.uniform(0.16, 0.3)
    return _moved(colors, np.zeros_like(along), along)


def _moved(colors: Map, dy: Map, dx: Map) -> Map:
    at = (_ROWS + dy, _COLUMNS + dx)
    channels = [ndimage.map_coordinates(channel, at, order=1, mode="reflect") for channel in np.moveaxis(colors, 2, 0)]
    return np.stack(channels, axis=2)


def _is_gray(colors: Map) -> bool:
    return bool(np.ptp(colors, axis=2).max() < 0.02)


def _local(effect: Effect, region: Region, radius: tuple[float, float], scene: Scene, rng: Rng) -> Map:
    shape = region(scene.body, rng, rng.uniform(*radius)) * (scene.body if effect is not erase else 1)
    return effect(scene.colors, shape.astype(np.float32), rng, rng.uniform())


def _everywhere(effect: Callable[[Map, Rng], Map], scene: Scene, rng: Rng) -> Map:
    return effect(scene.colors, rng)


MEDIUM, SMALL, LARGE = (14.0, 30.0), (3.5, 6.0), (22.0, 40.0)

# By the name of the kind. Those of "pieces" are what a scene of pieces does itself.
FIRST: dict[str, Damage] = {
    "scratch": partial(_local, stain, stroke, MEDIUM),
    "stain": partial(_local, stain, disc, MEDIUM),
    "small": partial(_local, stain, disc, SMALL),
    "faint": partial(_local, faint, disc, LARGE),
    "color": partial(_local, recolor, disc, MEDIUM),
    "blur": partial(_local, soften, disc, LARGE),
    "deformed": partial(_local, bend, disc, LARGE),
    "missing": partial(_local, erase, disc, MEDIUM),
    "swapped": partial(_local, exchange, disc, MEDIUM),
}
SECOND: dict[str, Damage] = {
    "crack": partial(_local, stain, crack, MEDIUM),
    "spill": partial(_local, stain, cloud, MEDIUM),
    "speck": partial(_local, stain, cloud, SMALL),
    "shade": partial(_local, faint, cloud, LARGE),
    "color": partial(_local, recolor, cloud, MEDIUM),
    "worn": partial(_local, soften, cloud, LARGE),
    "torn": partial(_local, tear, disc, LARGE),
    "missing": partial(_local, erase, cloud, MEDIUM),
    "swapped": partial(_local, exchange, cloud, MEDIUM),
}
# Of the whole scene: there is no place to find.
FIRST_GLOBAL: dict[str, Damage] = {
    "tint": partial(_everywhere, tint),
    "stretched": partial(_everywhere, stretch),
}
SECOND_GLOBAL: dict[str, Damage] = {
    "defocus": partial(_everywhere, defocus),
    "skewed": partial(_everywhere, skew),
}


def changed(sound: Map, flawed: Map) -> Map:
    """Where two scenes differ visibly, bool (SCENE, SCENE), small gaps closed."""
    different = np.abs(ndimage.gaussian_filter(flawed - sound, (0.7, 0.7, 0))).max(axis=2) > VISIBLE
    return ndimage.binary_closing(different, iterations=2)
