"""Render the sample images of ``adfeatures demo``: ``python -m training.assets.samples --output DIR``.

The images show one product, a turned steel flange with a brass bushing and six socket screws, seen from above on a
rubber mat. Everything is computed here, so the images need no license but the project's own, and the masks of the
defects are exact. The part is a height field. Its normals are lit by soft boxes, with the stretched highlights of
turned metal, and the result goes through the faults of a camera: uneven light, blur, noise.

All lengths are pixels of the finished image; rendering is done at SUPERSAMPLING times that resolution. Colors are
linear until the camera.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from adfeatures.errors import AdfeaturesError

from .. import console

WIDTH, HEIGHT, SUPERSAMPLING = 400, 300, 2
BORE, BUSHING, RIM = 21.5, 34.0, 122.5
SCREWS, SCREW_CIRCLE, SCREW_RADIUS = 6, 88.0, 13.0
REFERENCES, GOOD = 8, 6
JPEG_QUALITY = 90
NOTE = """\
The images and masks in this folder were rendered by training/assets/samples.py of this project:
    python -m training.assets.samples --output DIR
No photograph or other work went into them. They are under the license of the project, MIT.
"""

# Height of the turned part over its radius: bore, bushing, hub, flange with a groove, chamfered rim, mat.
PROFILE_RADIUS = (0, 21, 22, 24, 33, 34, 35, 37, 50, 53, 57, 60, 66, 67, 69, 70, 115, 122, 123, 400)
PROFILE_HEIGHT = (-30, -30, 12, 14, 14, 13, 15, 17, 17, 14, 2, 0, 0, -1.5, -1.5, 0, 0, -7, -14, -14)

BRIGHT_STEEL = (0.80, 0.82, 0.85)
BRASS = (0.88, 0.66, 0.32)
BLACKENED_STEEL = (0.075, 0.075, 0.085)
YELLOW_ZINC = (0.72, 0.58, 0.26)
RUBBER = (0.035, 0.055, 0.075)
# Gloss of metal without turning marks.
PLAIN_METAL = 0.35
# Direction towards the light, its color and its angular size.
LIGHTS = (
    ((-0.55, -0.65, 0.80), (1.00, 0.97, 0.92), 0.16),
    ((0.75, -0.20, 0.75), (0.62, 0.68, 0.78), 0.12),
    ((0.10, 0.90, 0.65), (0.42, 0.42, 0.46), 0.20),
)

Map = NDArray[np.float64]


@dataclass
class Part:
    """What the camera sees, as maps of (H, W) or (H, W, 3).

    Attributes:
        radius, angle: Polar coordinates around the axis of the part.
        height: Height field.
        color: Reflectance.
        gloss: 1 where metal was turned and reflects in streaks, 0 where the surface is matt, between for plain metal.
        defect: Which pixels are defective.
    """

    radius: Map
    angle: Map
    height: Map
    color: Map
    gloss: Map
    defect: NDArray[np.bool_]

    def at(self, distance: float, angle: float) -> tuple[Map, Map]:
        """Offsets (x, y) of each pixel from a point given in the polar coordinates of the part."""
        x = self.radius * np.cos(self.angle) - distance * np.cos(angle)
        y = self.radius * np.sin(self.angle) - distance * np.sin(angle)
        return x, y


def _noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float | tuple[float, ...]) -> Map:
    """Smooth noise with standard deviation 1."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    return noise / noise.std()


def _flange(rng: np.random.Generator) -> Part:
    """The part without screws, in a slightly different pose each time, on its mat."""
    y, x = np.mgrid[: HEIGHT * SUPERSAMPLING, : WIDTH * SUPERSAMPLING] / SUPERSAMPLING
    center_x, center_y = WIDTH / 2 + rng.uniform(-4, 4), HEIGHT / 2 + rng.uniform(-4, 4)
    radius = np.hypot(x - center_x, y - center_y)
    angle = np.arctan2(y - center_y, x - center_x) - rng.uniform(-0.12, 0.12)
    height = ndimage.gaussian_filter(np.interp(radius, PROFILE_RADIUS, PROFILE_HEIGHT), 0.6 * SUPERSAMPLING)
    metal = (radius > BORE) & (radius < RIM)
    brass = metal & (radius < BUSHING)
    color = np.where(brass[..., None], BRASS, np.where(metal[..., None], BRIGHT_STEEL, RUBBER))
    return Part(
        radius, angle, height + _mat(x, y, rng) * ~metal, color, metal.astype(float), np.zeros(radius.shape, bool)
    )


def _mat(x: Map, y: Map, rng: np.random.Generator) -> Map:
    """Height of the ribbed rubber."""
    shift = rng.uniform(0, 12)
    rib = np.cos((x + y + shift) * 2 * np.pi / 16) * np.cos((x - y + shift) * 2 * np.pi / 16)
    return 3 * np.clip(rib, -0.1, 0.3) + 0.12 * _noise(rng, x.shape, 0.8 * SUPERSAMPLING)


def _socket_screw(part: Part, index: int, rng: np.random.Generator) -> None:
    """A black socket head with its hexagon turned at random, in its counterbore."""
    distance, hexagon = _around_screw(part, index, rng)
    head = np.interp(distance, (0, 8.6, 10.2, 10.8), (5, 5, 3.5, -6)) - 7 * np.clip(5.3 - hexagon, 0, 1)
    _put(part, distance < 10.8, head, BLACKENED_STEEL)


def _hexagon_screw(part: Part, index: int, rng: np.random.Generator) -> None:
    """A zinc-plated hexagon head, which does not belong here."""
    distance, hexagon = _around_screw(part, index, rng)
    head = np.interp(hexagon, (0, 5, 5.6, 9, 10), (7, 7, 9, 9, 7)) - 0.8 * np.clip(distance - 9.2, 0, None)
    _put(part, hexagon < 9.8, head, YELLOW_ZINC)


def _around_screw(part: Part, index: int, rng: np.random.Generator) -> tuple[Map, Map]:
    """Distance from the axis of a screw, round and hexagonal, the hexagon turned at random."""
    x, y = part.at(SCREW_CIRCLE, index * 2 * np.pi / SCREWS)
    distance = np.hypot(x, y)
    turn = np.arctan2(y, x) + rng.uniform(0, 2 * np.pi)
    return distance, distance * np.cos((turn + np.pi / 6) % (np.pi / 3) - np.pi / 6)


def _put(part: Part, inside: NDArray[np.bool_], height: Map, color: tuple[float, float, float]) -> None:
    """Cover some pixels of the part with plain metal."""
    part.height[inside] = height[inside]
    part.color[inside] = color
    part.gloss[inside] = PLAIN_METAL


def _counterbore(part: Part, index: int) -> None:
    """The hole that a screw sits in."""
    distance = np.hypot(*part.at(SCREW_CIRCLE, index * 2 * np.pi / SCREWS))
    bore = np.interp(distance, (0, 6, 6.8, 12.2, 13), (-30, -30, -8, -7, 0))
    inside = distance < SCREW_RADIUS
    part.height[inside] = np.minimum(part.height, bore)[inside]
    part.color[distance < 6.5] = RUBBER
    part.gloss[distance < 6.5] = 0


def _make(rng: np.random.Generator, wrong: int | None = None) -> Part:
    """A whole part; ``wrong`` is the index of a place that got the wrong screw."""
    part = _flange(rng)
    for index in range(SCREWS):
        _counterbore(part, index)
        (_hexagon_screw if index == wrong else _socket_screw)(part, index, rng)
    if wrong is not None:
        part.defect = np.hypot(*part.at(SCREW_CIRCLE, wrong * 2 * np.pi / SCREWS)) < SCREW_RADIUS
    return part


def _free_spot(rng: np.random.Generator, nearest: float = 74.0, farthest: float = 104.0) -> tuple[float, float]:
    """A point (radius, angle) of the flange between two screws."""
    between = (rng.integers(SCREWS) + 0.5) * 2 * np.pi / SCREWS
    return rng.uniform(nearest, farthest), between + rng.uniform(-0.13, 0.13)


def _scratch(rng: np.random.Generator) -> Part:
    """A bent groove cut across the turning marks."""
    part = _make(rng)
    x, y = part.at(*_free_spot(rng))
    direction = rng.uniform(0, np.pi)
    along, across = x * np.cos(direction) + y * np.sin(direction), y * np.cos(direction) - x * np.sin(direction)
    across = across + 0.004 * rng.uniform(-1, 1) * along**2
    half_length, width = rng.uniform(14, 26), rng.uniform(0.7, 1.1)
    depth = np.exp(-((across / width) ** 2)) * np.clip((half_length - np.abs(along)) / 6, 0, 1)
    depth *= part.gloss > 0.5
    part.height -= 1.6 * depth
    part.gloss *= 1 - 0.8 * depth
    part.defect = depth > 0.2
    return part


def _dent(rng: np.random.Generator) -> Part:
    """A blow that pressed the metal in and threw up a rim."""
    part = _make(rng)
    x, y = part.at(*_free_spot(rng))
    size = rng.uniform(5, 8)
    stretched = np.hypot(x, y * rng.uniform(0.8, 1.25)) / size
    press = np.exp(-(stretched**2)) - 0.35 * np.exp(-((stretched - 1.5) ** 2) / 0.12)
    part.height -= 0.45 * size * press * (part.gloss > 0.5)
    part.gloss *= 1 - 0.4 * np.exp(-(stretched**2))
    part.defect = stretched < 1.7
    return part


def _rust(rng: np.random.Generator) -> Part:
    """A corroded patch: brown, matt and rough."""
    part = _make(rng)
    x, y = part.at(*_free_spot(rng))
    size = rng.uniform(9, 16)
    edge = (
        np.hypot(x, y) / size
        + 0.22 * _noise(rng, x.shape, 4 * SUPERSAMPLING)
        + 0.12 * _noise(rng, x.shape, SUPERSAMPLING)
    )
    cover = np.clip((1 - edge) * 2.5, 0, 0.95) * (part.gloss > 0.5)
    brown = np.array((0.22, 0.075, 0.025)) * np.exp(0.4 * _noise(rng, x.shape, 1.5 * SUPERSAMPLING))[..., None]
    # A thin film takes the color before it takes the shine.
    film = np.sqrt(cover)[..., None]
    part.color = part.color * (1 - film) + brown * film
    part.gloss *= 1 - cover**2
    part.height += 0.3 * cover * _noise(rng, x.shape, 0.8 * SUPERSAMPLING)
    part.defect = cover > 0.05
    return part


def _wrong_screw(rng: np.random.Generator) -> Part:
    """One screw is of another kind."""
    return _make(rng, wrong=int(rng.integers(SCREWS)))


DEFECTS: dict[str, tuple[Callable[[np.random.Generator], Part], int]] = {
    "scratch": (_scratch, 3),
    "dent": (_dent, 2),
    "rust": (_rust, 2),
    "wrong_screw": (_wrong_screw, 2),
}


def _turning_marks(part: Part, rng: np.random.Generator) -> Map:
    """Fine streaks around the axis, noise that is long in angle and short in radius."""
    marks = _noise(rng, (96, 512), (2.5, 0.9)) + 0.8 * _noise(rng, (1, 512), (0, 0.7))
    angle = (part.angle / (2 * np.pi) % 1) * 96
    return ndimage.map_coordinates(marks, (angle, part.radius * SUPERSAMPLING), order=1, mode="grid-wrap")


def _shade(part: Part, rng: np.random.Generator) -> Map:
    """Linear colors (H, W, 3): matt light everywhere, and on metal the highlights that turning stretches across its grooves."""
    slope_y, slope_x = np.gradient(part.height, 1 / SUPERSAMPLING)
    marks = _turning_marks(part, rng)
    # The grooves tilt the surface outwards and inwards.
    tilt = 0.05 * marks * part.gloss
    normal = np.stack(
        [-slope_x + tilt * np.cos(part.angle), -slope_y + tilt * np.sin(part.angle), np.ones_like(tilt)], -1
    )
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    along = np.stack([-np.sin(part.angle), np.cos(part.angle), np.zeros_like(tilt)], -1)
    across = np.cross(normal, along)
    metal = (part.gloss > 0)[..., None]
    diffuse, highlight = np.full(part.color.shape, 0.12), np.full(part.color.shape, 0.05)
    for direction, light, size in LIGHTS:
        towards = np.array(direction) / np.linalg.norm(direction)
        half = towards + (0, 0, 1)
        half = half / np.linalg.norm(half)
        facing = np.clip(normal @ half, 0.05, 1)
        narrow = size + 0.35 * (1 - part.gloss)
        streak = np.exp(-((along @ half / narrow) ** 2 + (across @ half / 0.42) ** 2) / facing**2)
        highlight += (1.5 * streak)[..., None] * light
        diffuse += (0.6 * np.clip(normal @ towards, 0, 1))[..., None] * light
    gloss = part.gloss[..., None]
    sky = (0.10 + 0.12 * normal[..., 1:2]) * metal
    lit = diffuse * (1 - 0.75 * gloss) + highlight * (0.25 + 0.75 * gloss) * metal + sky
    return part.color * lit * _shadow(part)


def _shadow(part: Part) -> Map:
    """How much light reaches each point, (H, W, 1): less beside taller neighbors, least on the side away from the main light."""
    result = np.ones(part.height.shape)
    for step in (2, 5, 9):
        offset = (0.7 * step * SUPERSAMPLING, 0.6 * step * SUPERSAMPLING)
        nearer_the_light = ndimage.shift(
            ndimage.gaussian_filter(part.height, 0.5 * step * SUPERSAMPLING), offset, order=1, mode="nearest"
        )
        result *= np.exp(-0.05 * np.clip(nearer_the_light - part.height - 1, 0, 12))
    around = ndimage.gaussian_filter(part.height, 5 * SUPERSAMPLING)
    return (result * np.exp(-0.06 * np.clip(around - part.height, 0, 20)))[..., None]


def _photograph(linear: Map, rng: np.random.Generator) -> NDArray[np.uint8]:
    """What an 8-bit camera makes of linear colors (H, W, 3) at rendering size: (HEIGHT, WIDTH, 3)."""
    image = ndimage.gaussian_filter(linear, (0.45 * SUPERSAMPLING, 0.45 * SUPERSAMPLING, 0))
    image = image.reshape(HEIGHT, SUPERSAMPLING, WIDTH, SUPERSAMPLING, 3).mean((1, 3))
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    uneven = 1 - 0.10 * (x**2 + y**2) + rng.uniform(-0.03, 0.03) * x + rng.uniform(-0.03, 0.03) * y
    image = image * uneven[..., None] * rng.uniform(0.95, 1.05) * rng.uniform(0.985, 1.015, 3)
    image = image * 1.12 / (1 + 0.3 * image)
    encoded = np.clip(image, 0, 1) ** (1 / 2.2) + rng.normal(0, 0.010, image.shape)
    return (np.clip(encoded, 0, 1) * 255).round().astype(np.uint8)


def _picture(part: Part, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(_photograph(_shade(part, rng), rng))


def _mask(part: Part) -> Image.Image:
    """White where at least half of a pixel is defective."""
    share = part.defect.reshape(HEIGHT, SUPERSAMPLING, WIDTH, SUPERSAMPLING).mean((1, 3))
    return Image.fromarray(((share >= 0.5) * 255).astype(np.uint8))


def render(output: Path) -> None:
    """Write LICENSE.txt, references/, test/<kind>/ and masks/<defect>/ below ``output``.

    With the same libraries the files are the same.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "LICENSE.txt").write_text(NOTE, encoding="utf-8")
    for folder, count, seed in ((output / "references", REFERENCES, 1), (output / "test" / "good", GOOD, 2)):
        _write(folder, None, _make, count, seed)
    for seed, (name, (make, count)) in enumerate(DEFECTS.items(), start=3):
        _write(output / "test" / name, output / "masks" / name, make, count, seed)


def _write(
    folder: Path, masks: Path | None, make: Callable[[np.random.Generator], Part], count: int, seed: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        part = make(rng)
        _picture(part, rng).save(folder / f"{index:03d}.jpg", quality=JPEG_QUALITY)
        if masks is not None:
            masks.mkdir(parents=True, exist_ok=True)
            _mask(part).save(masks / f"{index:03d}.png", optimize=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.assets.samples", description="Render the sample images of adfeatures demo."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    options = parser.parse_args(arguments)
    return console.run("samples", lambda: _render(options.output))


def _render(output: Path) -> None:
    try:
        render(output)
    except OSError as error:
        raise AdfeaturesError(
            f"Cannot write to {output}: {error}. Free some space or choose another --output."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
