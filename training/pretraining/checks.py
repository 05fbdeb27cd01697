"""What would spoil a training without an error, looked for before it begins."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from adfeatures.errors import InputError
from adfeatures.images import FORMATS

from ..data.checks import ODD_MASKS
from ..data.images import read_mask
from ..data.items import ANOMALOUS, Item

# How many images are looked into for 16-bit samples, and how many files a warning names.
LOOKED_AT, NAMED = 32, 3


def check_labels(items: Sequence[Item]) -> None:
    """Raise InputError where the losses lack what they contrast: anomalous images, each with a mask."""
    anomalous = [item for item in items if item.label == ANOMALOUS]
    if not anomalous:
        raise InputError(
            f"None of the {len(items)} training images, such as {items[0].image}, is anomalous, "
            "so there is nothing to contrast."
        )
    if bare := next((item.image for item in anomalous if item.mask is None), None):
        raise InputError(
            f"{bare} is anomalous without a mask, and the losses need one. Add the mask, or leave the image out."
        )


def check_masks(items: Sequence[Item]) -> None:
    """Read all masks, and warn of those that hardly show what is a defect: black, inverted, or gray as of JPEG.

    Raises:
        InputError: If all are black, so that there is nothing to contrast.
        ImageError: For a mask that cannot be read.
    """
    masks = [item.mask for item in items if item.mask is not None]
    odd: dict[str, list[str]] = defaultdict(list)
    blank = 0
    for path in tqdm(masks, desc="masks", leave=False, disable=None):
        pixels = np.asarray(read_mask(path))
        blank += not pixels.any()
        for kind, is_odd in ODD_MASKS.items():
            if is_odd(pixels):
                odd[kind].append(path)
    for kind, paths in odd.items():
        more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
        warnings.warn(f"Of {len(masks)} masks {len(paths)} are {kind}: {', '.join(paths[:NAMED])}{more}.", stacklevel=2)
    if blank == len(masks):
        raise InputError(
            f"All {len(masks)} masks, such as {masks[0]}, are black everywhere, so there is nothing to contrast. "
            "Draw the defects in white."
        )


def check_bit_depth(items: Sequence[Item], bit_depth: int) -> None:
    """Warn where the 16-bit images among some of the items use fewer bits than they are read with."""
    highest = {item.image: _highest(item.image) for item in items[:: max(1, len(items) // LOOKED_AT)]}
    path = max(highest, key=lambda path: highest[path])
    bits = max(9, highest[path].bit_length())
    if highest[path] > 0 and bits < bit_depth:
        warnings.warn(
            f"No sample of the 16-bit images that were looked into, such as {path}, is above {highest[path]}: "
            f"{bits} bits would hold it, but {bit_depth} are read, which makes them dark. Say how many the camera "
            "gives with --bit-depth.",
            stacklevel=2,
        )


def _highest(path: str) -> int:
    """The largest sample of a 16-bit grayscale image, 0 for any other and where it cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return int(np.asarray(image).max()) if image.mode.startswith("I") else 0
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
        return 0
