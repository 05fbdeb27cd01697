"""Which normal images are the references of a product: by rule from the training images, or those of a given folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from adfeatures.errors import InputError
from adfeatures.sources import list_images

from .items import NORMAL, Item


def draw_references(train: Sequence[Item], shots: int, draw: int) -> list[Item]:
    """The references of a draw: of every view ``shots`` normal images of a product, by path, from ``draw * shots`` on.

    Draws are numbered from 0. No image is in two, and where the images run out nothing begins anew.

    Raises:
        InputError: If there are too few images.
    """
    drawn: list[Item] = []
    wanted = (draw + 1) * shots
    for view in sorted({item.view for item in train}):
        items = sorted((item for item in train if item.view == view), key=lambda item: item.image)
        if len(items) < wanted:
            of_view = f" of view {view}" if view else ""
            raise InputError(
                f"Draw {draw + 1} of {shots} references needs {wanted} normal training images{of_view}, "
                f"{items[0].product} has {len(items)}. Lower --shots or --draws."
            )
        drawn += items[draw * shots : wanted]
    return drawn


def given_references(folder: str | os.PathLike[str], dataset: str, product: str, shots: int) -> list[Item]:
    """The first ``shots`` images, sorted by path, in the folder of a product. They serve all views.

    That folder is ``<dataset>/<product>/train``, as the authors' references are laid out, or ``<product>/train``, or
    either without ``train``.

    Raises:
        InputError: If the folder is missing or holds too few images.
        ImageError: If it cannot be read.
    """
    places = [Path(folder, *of_set, product, *train) for of_set in ((dataset,), ()) for train in (("train",), ())]
    place = next((place for place in places if place.is_dir()), None)
    if place is None:
        raise InputError(
            f"There are no references of {product} in {folder}: {places[1]} and {places[3]} are no folders."
        )
    images = list_images(place, recursive=True)
    if len(images) < shots:
        raise InputError(f"{place} holds {len(images)} images, {shots} references were asked for. Lower --shots.")
    return [Item(str(image), NORMAL, product) for image in images[:shots]]
