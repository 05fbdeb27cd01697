"""What is photographed: whole photographs, crops of textures, objects that are laid out, parts that are rendered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image
from scipy import ndimage

from ..data.synthetic import render
from .camera import SCENE, to_bytes
from .packages import Photographs

Rng = np.random.Generator
Map = np.ndarray
MARGIN = 16  # pixels around an object that its shadow takes


@dataclass
class Scene:
    """Colors (SCENE, SCENE, 3) in [0, 1], and the part of them (SCENE, SCENE) that belongs to the product, bool."""

    colors: Map
    body: Map


class Setting(Protocol):
    """A kind of product.

    Attributes:
        pieces: Whether it is made of pieces, so that ``flaw`` "missing" and "swapped" leave one out or take another.
    """

    @property
    def pieces(self) -> bool:
        """See the attributes."""

    def scene(self, photographs: Photographs, rng: Rng, *, flaw: str | None = None) -> Scene:
        """One specimen. The same generator gives the same, with and without a flaw."""


@dataclass(frozen=True)
class Whole:
    """A photograph as it is, or a box of it (left, top, right, bottom): an object in fixed pose."""

    package: str
    name: str
    box: tuple[int, int, int, int] | None = None
    pieces: bool = False

    def scene(self, photographs: Photographs, rng: Rng, *, flaw: str | None = None) -> Scene:
        """The photograph, squashed to a square."""
        photo = photographs.photo(self.package, self.name)
        if self.box is not None:
            left, top, right, bottom = self.box
            photo = photo[top:bottom, left:right]
        return Scene(resized(photo, SCENE, SCENE), np.ones((SCENE, SCENE), bool))


@dataclass(frozen=True)
class Texture:
    """Crops of a photograph, at random: references and tests are alike, as those of a production are.

    Attributes:
        side: Side of a crop, in pixels of the photograph.
    """

    package: str
    name: str
    side: int
    pieces: bool = False

    def scene(self, photographs: Photographs, rng: Rng, *, flaw: str | None = None) -> Scene:
        """A crop at random."""
        photo = photographs.photo(self.package, self.name)
        top, left = (int(rng.integers(length - self.side + 1)) for length in photo.shape[:2])
        crop = photo[top : top + self.side, left : left + self.side]
        return Scene(resized(crop, SCENE, SCENE), np.ones((SCENE, SCENE), bool))


@dataclass(frozen=True)
class Objects:
    """Objects that were cut out of photographs, laid on a ground.

    Attributes:
        names: The object, or objects that lie in turn.
        ground: Color of the ground.
        side: Length of the longer side of an object, as a fraction of the scene.
        grid: Rows and columns of places. With ``heap``, that number of objects anywhere.
        turn: Largest rotation in degrees.
        stray: Largest shift from the place, as a fraction of the scene.
        other: The object that lies in the place of a swapped one.
    """

    names: Sequence[str]
    ground: tuple[float, float, float]
    side: float
    grid: tuple[int, int] = (1, 1)
    turn: float = 0.0
    stray: float = 0.0
    other: str | None = None
    heap: bool = False
    package: str = "tuxpaint-stamps-default"

    @property
    def pieces(self) -> bool:
        """Whether there is more than one object."""
        return self.grid != (1, 1)

    def scene(self, photographs: Photographs, rng: Rng, *, flaw: str | None = None) -> Scene:
        """The objects in their places, one missing or swapped with such a ``flaw``."""
        rows, columns = self.grid
        colors = np.ones((SCENE, SCENE, 3), np.float32) * np.array(self.ground, np.float32)
        colors *= 1 + 0.03 * smooth_noise(rng, 3.0)[..., None]
        body = np.zeros((SCENE, SCENE), bool)
        # On top, where it is seen.
        odd = rows * columns - 1 - int(rng.integers(max(1, rows * columns // 4)))
        for number in range(rows * columns):
            place = np.array([(number // columns + 0.5) / rows, (number % columns + 0.5) / columns])
            place = rng.uniform(0, 1, 2) if self.heap else place + rng.uniform(-1, 1, 2) * self.stray
            angle = rng.uniform(-1, 1) * self.turn
            side = self.side * (rng.uniform(0.85, 1.15) if self.heap else 1)
            name = self.names[number % len(self.names)]
            if number == odd and flaw == "missing":
                continue
            if number == odd and flaw == "swapped":
                name = self.other or self.names[(number + 1) % len(self.names)]
            _lay(colors, body, photographs.cutout(self.package, name), place * SCENE, side * SCENE, angle)
        return Scene(colors, body)


@dataclass(frozen=True)
class Rendered:
    """A product of the renderer of this repository, seen from above."""

    product: str
    pieces: bool = False

    def scene(self, photographs: Photographs, rng: Rng, *, flaw: str | None = None) -> Scene:
        """A part at random."""
        image, _ = render(self.product, int(rng.integers(1 << 20)), size=SCENE)
        return Scene(np.asarray(image, np.float32) / 255, np.ones((SCENE, SCENE), bool))


def _lay(colors: Map, body: Map, cutout: Map, place: Map, side: float, angle: float) -> None:
    """Lay an object, with its shadow, on a scene."""
    scale = side / max(cutout.shape[:2])
    height, width = (max(2, round(length * scale)) for length in cutout.shape[:2])
    # Opacity is kept apart, for where nothing is the colors are black.
    image = Image.fromarray(to_bytes(cutout), "RGBA").convert("RGBa").resize((width, height), Image.Resampling.BICUBIC)
    image = image.convert("RGBA").rotate(angle, Image.Resampling.BICUBIC, expand=True)
    # The shadow needs a margin.
    laid = np.pad(np.asarray(image, np.float32) / 255, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    top, left = (round(middle - length / 2) for middle, length in zip(place, laid.shape[:2], strict=True))
    seen = np.s_[max(0, -top) : SCENE - top, max(0, -left) : SCENE - left]
    there = np.s_[max(0, top) : top + laid.shape[0], max(0, left) : left + laid.shape[1]]
    opacity = laid[..., 3][seen]
    shadow = ndimage.gaussian_filter(np.roll(laid[..., 3], (5, 3), (0, 1)), 4)[seen]
    colors[there] *= 1 - 0.35 * shadow[..., None]
    colors[there] += opacity[..., None] * (laid[..., :3][seen] - colors[there])
    body[there] |= opacity > 0.5


def resized(image: Map, height: int, width: int) -> Map:
    """Colors (H, W, 3) at another size."""
    return (
        np.asarray(Image.fromarray(to_bytes(image)).resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    )


def smooth_noise(rng: Rng, crossings: float) -> Map:
    """Noise (SCENE, SCENE) of mean 0 and standard deviation 1, which crosses 0 about so often across a scene."""
    noise = ndimage.gaussian_filter(rng.normal(size=(SCENE, SCENE)), SCENE / (4 * crossings), mode="wrap")
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)
