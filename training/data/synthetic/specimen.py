"""One physical part, sound or with a defect, and the photographs of it with exact masks."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import numpy as np
from PIL import Image
from scipy import ndimage

from adfeatures.catalog import unknown
from adfeatures.errors import InputError, UnknownNameError

from .camera import OVERSAMPLING, Relief, View, develop, expose
from .canvas import Builder, Part
from .defects import DEFECTS
from .goods import GOODS
from .hardware import HARDWARE
from .shapes import Map, Rng
from .sheets import SHEETS

_KINDS = (SHEETS, HARDWARE, GOODS)
_ROWS = zip_longest(*(kind.items() for kind in _KINDS))
# Of each kind in turn, so that the first few are already unlike each other.
BUILDERS: dict[str, Builder] = dict(pair for row in _ROWS for pair in row if pair is not None)
# A pixel belongs to a defect where it changes by more than VISIBLE of the full range, in an area that somewhere changes
# by more than CLEAR. The noise of the sensor stays below.
VISIBLE, CLEAR = 0.024, 0.05
# Pixels, in an image of 256 pixels a side.
SMALLEST_MASK = 14
TRIES, SMALLEST_SIZE = 8, 32
# Pixels around a mask in which the defect may still show faintly, and pixels around a picture while masks are made.
MARGIN, RIM = 2, 4
# What random numbers of a part are for.
PART, CAMERA, SENSOR, DEFECT = range(4)


def stream(key: tuple[int, ...], *purpose: int) -> Rng:
    """Random numbers that depend on nothing but the part and what they are for."""
    return np.random.default_rng(np.random.SeedSequence(key, spawn_key=purpose))


@dataclass
class Specimen:
    """A part that can be photographed.

    Attributes:
        key: Seed, product, tree and sample: all that its random numbers depend on.
        size: Height and width of its pictures.
        sound: The part without its defect.
        flawed: The part with it, None for a normal one.
        exposed: Pictures without noise that were already made, by camera and whether the defect is in it.
    """

    key: tuple[int, ...]
    size: int
    sound: Relief
    flawed: Relief | None = None
    exposed: dict[tuple[int, bool], Map] = field(default_factory=dict)

    @classmethod
    def make(cls, product: str, key: tuple[int, int, int], defect: str | None, size: int) -> Specimen:
        """Build a part of a product, with a defect that camera 1 sees where one is named.

        Its ``key`` is the seed, the number of the tree and that of the sample.
        """
        for kind, name, known in (("product", product, BUILDERS), ("defect", defect or "HS", DEFECTS)):
            if name not in known:
                raise UnknownNameError(unknown(kind, name, known))
        if size < SMALLEST_SIZE:
            raise InputError(f"Images must be at least {SMALLEST_SIZE} pixels wide, got {size}.")
        if min(key) < 0:
            raise InputError(f"The seed must not be negative, got {key[0]}.")
        numbers = (key[0], zlib.crc32(product.encode()), *key[1:])
        specimen = cls(numbers, size, Relief.of(build(BUILDERS[product], numbers, size)))
        if defect is not None:
            specimen._spoil(product, defect)
        return specimen

    def _spoil(self, product: str, defect: str) -> None:
        """Damage the part, again and more strongly while the defect cannot be seen from above."""
        number = list(DEFECTS).index(defect)
        for attempt in range(TRIES):
            rng = stream(self.key, DEFECT, number, attempt)
            strength = min(1.0, rng.uniform(0, 1) + 0.2 * attempt)
            part = self.sound.part
            # Some pieces are too faint to be missed.
            if defect == "QS" and part.pieces.count and attempt < TRIES // 2:
                part = build(BUILDERS[product], self.key, self.size, missing=int(rng.integers(part.pieces.count)))
            else:
                part = replace(part, maps=part.maps.copy())
                DEFECTS[defect][1](part, rng, strength)
            self.flawed = Relief.of(part)
            self.exposed[1, True] = expose(self.flawed, self._view(1), self.size)
            if changed(self._expose(1), self.exposed[1, True]).any():
                return

    def _view(self, number: int) -> View:
        return View.of(number, stream(self.key, CAMERA, number), self.sound.part)

    def photograph(self, number: int) -> tuple[Image.Image, Map | None]:
        """The picture of one camera (1 to VIEWS), and the mask of what the defect changes in it.

        Returns:
            RGB image, and uint8 (size, size) of 0 and 255, or None where the picture is that of a normal part.
        """
        picture, mask = self._expose(number), None
        if self.flawed is not None:
            flawed = self._expose(number, flawed=True)
            mask = changed(picture, flawed)
            # Traces of the defect too faint to see are taken out.
            picture = np.where(ndimage.binary_dilation(mask, iterations=MARGIN), flawed, picture)
        image = Image.fromarray(develop(picture, self._view(number), stream(self.key, SENSOR, number)))
        return image, (mask * np.uint8(255) if mask is not None and mask.any() else None)

    def _expose(self, number: int, flawed: bool = False) -> Map:
        if (number, flawed) not in self.exposed:
            relief = self.flawed if flawed and self.flawed is not None else self.sound
            self.exposed[number, flawed] = expose(relief, self._view(number), self.size)
        return self.exposed[number, flawed]


def build(builder: Builder, key: tuple[int, ...], size: int, missing: int | None = None) -> Part:
    """The sound part of a key for pictures of this size, without one of its pieces where asked for."""
    # An even number of texels, for the maps that are made at half the resolution.
    part = Part.blank(2 * round(size * OVERSAMPLING / 2), missing)
    builder(part, stream(key, PART))
    return part


def changed(sound: Map, flawed: Map) -> np.ndarray:
    """Where two pictures (3, H, W) differ visibly, bool (H, W).

    Gaps are closed; specks and areas that are faint all over are left out.
    """
    # With a rim, for the closing of gaps would eat into areas that touch the edge.
    difference = np.pad(np.abs(flawed - sound).max(0), RIM)
    result = np.zeros(difference.shape, bool)
    for rows, columns in ndimage.find_objects((difference > VISIBLE).astype(np.uint8)):
        window = slice(rows.start - RIM, rows.stop + RIM), slice(columns.start - RIM, columns.stop + RIM)
        near = difference[window]
        solid = ndimage.binary_fill_holes(ndimage.binary_closing(near > VISIBLE, np.ones((3, 3)), iterations=2))
        labels, count = ndimage.label(solid, np.ones((3, 3)))
        areas, clear = (np.bincount(labels[where], minlength=count + 1) for where in (solid, near > CLEAR))
        least = SMALLEST_MASK * (sound.shape[1] / 256) ** 2
        kept = (areas >= max(1, 0.3 * least)) & (clear >= max(1, 0.1 * least))
        if areas[kept].max(initial=0) >= least:
            result[window] = kept[labels] & solid
    return result[RIM:-RIM, RIM:-RIM]
