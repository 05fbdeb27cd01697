"""What projectors are evaluated on while they train: products with a few references, and images of both labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adfeatures.errors import InputError

from ..data import dataset, mvtec
from ..data.items import ANOMALOUS, NORMAL, Item, rank

REFERENCES_PER_VIEW = 8


@dataclass(frozen=True)
class Trial:
    """One product to evaluate on.

    Attributes:
        references: Normal images by view ("" where a data set has none).
        train: Normal images for methods that need some.
        test: Normal and anomalous images.
        presets: Geometry of these images and of the references, see ``adfeatures.create_transform``.
    """

    product: str
    references: Mapping[str, Sequence[Item]]
    train: Sequence[Item]
    test: Sequence[Item]
    presets: tuple[str, str] = ("squash", "squash")


def held_out_trials(train: Sequence[Item], held_out: Sequence[Item], limit: int, seed: int) -> list[Trial]:
    """A trial for each product with normal and anomalous images among the held-out ones, of views that have references.

    Args:
        train: Normal images that were not held out.
        held_out: The held-out images.
        limit: Most images of a product for training, and of each label for the test.
        seed: Decides which.

    Raises:
        InputError: If there is no such product.
    """
    trials = []
    for product in sorted({item.product for item in held_out}):
        own = _shuffled([item for item in train if item.product == product], seed)
        known = {item.view for item in own}
        candidates = _shuffled([item for item in held_out if item.product == product and item.view in known], seed)
        tests = [[item for item in candidates if item.label == label][:limit] for label in (NORMAL, ANOMALOUS)]
        if all(tests):
            test = [item for items in tests for item in items]
            views = sorted({item.view for item in test})
            references = {view: [item for item in own if item.view == view][:REFERENCES_PER_VIEW] for view in views}
            rest = [item for item in own if item.view in views and item not in references[item.view]]
            trials.append(Trial(product, references, (rest or own)[:limit], test))
    if not trials:
        raise InputError(
            "No product has held-out images of both labels to validate on. Raise --held-out, or say --validation none."
        )
    return trials


def mvtec_trials(root: str, img_size: tuple[int, int]) -> list[Trial]:
    """Every product of MVTec AD, with the first training images as references, as the published weights were selected.

    At the published size, 224 x 224 pixels, the geometry is that of the published code too.

    Raises:
        InputError: For products or files that are missing. A mean over fewer products would select other checkpoints.
    """
    presets = ("resize256_crop224", "resize224_crop224") if img_size == (224, 224) else ("squash", "squash")
    train, test = (dataset("mvtec").find_items(root, split, mvtec.PRODUCTS) for split in ("train", "test"))
    trials = []
    for product in mvtec.PRODUCTS:
        normal, tested = ([item for item in items if item.product == product] for items in (train, test))
        trials.append(Trial(product, {"": normal[:REFERENCES_PER_VIEW]}, normal, tested, presets))
    return trials


def _shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """In an order of the seed and of names within the data set, wherever it lies and however it is sorted."""
    return sorted(items, key=lambda item: rank(seed, f"{item.sample}:{item.image.rpartition('/')[2]}"))
