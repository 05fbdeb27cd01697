"""What would spoil a training without an error, looked for before it begins."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from adfeatures.errors import InputError

from ..console import progress
from ..data.fingerprint import Fingerprint
from ..data.images import ODD_MASKS, in_parallel, read_mask, shared_masks, some, summarize
from ..data.items import ANOMALOUS, Item
from .trials import Trial


def check_labels(items: Sequence[Item]) -> None:
    """Raise InputError where the losses lack what they contrast: anomalous images, each with a mask."""
    anomalous = [item for item in items if item.label == ANOMALOUS]
    if not anomalous:
        raise InputError(
            f"None of the {len(items)} training images, such as {items[0].image}, is anomalous, "
            "so there is nothing to contrast."
        )
    if bare := [item.image for item in anomalous if item.mask is None]:
        raise InputError(
            f"Anomalous images need a mask, which these lack: {some(bare)}. Add the masks, or leave the images out."
        )


def check_trials(trials: Sequence[Trial], trained_on: Fingerprint) -> None:
    """Raise InputError where the validation would judge images that are trained on, whatever they are called there."""
    tested = [item.image for trial in trials for item in trial.test]
    if seen := trained_on.known(tested):
        raise InputError(
            f"{len(seen)} of the {len(tested)} images to validate on are trained on: {some(seen)}. "
            "Choose another --validation, or take the copies away."
        )


def check_masks(items: Sequence[Item], workers: int = 0) -> None:
    """Read all masks, and warn of odd ones: black, inverted, gray as of JPEG, or of several images.

    Raises:
        InputError: If all are black, so that there is nothing to contrast.
        ImageError: For a mask that cannot be read.
    """
    masks = {item: item.mask for item in items if item.mask is not None}
    looks = in_parallel(_look, list(masks.values()), workers)
    seen = list(progress(looks, total=len(masks), desc="masks", unit="masks", leave=False))
    if not any(drawn for drawn, _ in seen):
        raise InputError(
            f"All masks are black everywhere, so there is nothing to contrast: {some(list(masks.values()))}. "
            "Draw the defects in white."
        )
    for text in (*summarize(masks, [kinds for _, kinds in seen]), *shared_masks(masks)):
        warnings.warn(f"In the training data: {text}", stacklevel=2)


def _look(path: str) -> tuple[bool, list[str]]:
    """Whether a mask shows anything, and what is odd about it."""
    pixels = np.asarray(read_mask(path))
    return bool(pixels.any()), [kind for kind, is_odd in ODD_MASKS.items() if is_odd(pixels)]
