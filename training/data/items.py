"""What a data set is made of: items that name an image file, its mask and what is known of both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

NORMAL, ANOMALOUS = 0, 1


@dataclass(frozen=True)
class Item:
    """One image of a data set.

    Attributes:
        image: Path of the image file.
        label: NORMAL or ANOMALOUS.
        product: Name of the product (class, object) that it shows.
        mask: Path of the mask image, None where nothing is anomalous (or no mask was made).
        defect: Name of the defect as the data set has it, "good" for normal images.
        view: Name of the camera position, "" where a data set has none.
        sample: Name of the physical part, shared by all images of it, "" where that is not known.
    """

    image: str
    label: int
    product: str
    mask: str | None = None
    defect: str = "good"
    view: str = ""
    sample: str = ""


def rank(seed: int, name: str) -> bytes:
    """The place of a name, of any bytes, in an order drawn from a seed, whatever other names there are."""
    return hashlib.sha256(f"{seed}:{name}".encode(errors="surrogateescape")).digest()


def items_digest(items: Sequence[Item]) -> str:
    """SHA-256 of what the items are, wherever the data set lies."""
    names = [[item.product, item.view, item.sample, item.label, os.path.basename(item.image)] for item in items]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()
