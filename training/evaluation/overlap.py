"""Whether weights are judged on images that they were trained on, which flatters them.

What counts are the test images, known by the content of their files. That the training images of the data set were seen
as well, as in its own split of Real-IAD, is no overlap but recorded: their features fit better than those of the test
images, which makes normal test images look more anomalous, not less.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from adfeatures.errors import ImageError, InputError

from ..data.fingerprint import Fingerprint
from ..data.images import noticing, some
from ..data.items import Item
from ..distributed import gather_objects, rank, world_size
from .config import EvaluationConfig
from .feature_cache import content_key
from .model import EvaluatedModel, ProjectorWeights

UNKNOWN = "cannot be excluded: the file does not say which images it was trained on, as those of earlier versions"


@dataclass(frozen=True)
class Overlap:
    """How many of the images of a product some weights were trained on, each of how many."""

    test: tuple[int, int]
    train: tuple[int, int]


# By the name of the weights and the product.
Overlaps = Mapping[tuple[str, str], Overlap]


def find_overlaps(config: EvaluationConfig, model: EvaluatedModel, products: Sequence[str]) -> Overlaps:
    """What is known of the overlap of the weights with the products that can be read; the processes share the work.

    Warns of weights of which nothing is known.

    Raises:
        InputError: If test images were trained on, unless the config allows it.
    """
    trained = [weights for weights in model.weights.values() if weights.projector is not None]
    known = [weights for weights in trained if weights.trained_on is not None]
    for weights in trained:
        if weights.trained_on is None and rank() == 0:
            warnings.warn(f"Overlap of {weights.source} with the test images {UNKNOWN}.", stacklevel=2)
    share: dict[tuple[str, str], Overlap] = {}
    for product in products[rank() :: world_size()] if known else ():
        try:
            with noticing():  # It is said where the product is evaluated.
                test, train = (config.tree.find_items(config.root, split, [product]) for split in ("test", "train"))
        except (InputError, ImageError):
            continue
        for weights in known:
            share[weights.name, product] = Overlap(*(_count(weights, items, config) for items in (test, train)))
    found = {key: overlap for part in gather_objects(share) for key, overlap in part.items()}
    if not config.allow_overlap:
        for weights in known:
            own = {product: found[name, product] for name, product in found if name == weights.name}
            _check(weights, own)
    return found


def _count(weights: ProjectorWeights, items: Iterable[Item], config: EvaluationConfig) -> tuple[int, int]:
    seen, of = 0, 0
    for item in items:
        of += 1
        if isinstance(weights.trained_on, str):
            # Other data may come in the layout of a known data set.
            seen += weights.trained_on == config.tree.title and item.product in config.tree.products
        else:
            seen += _holds(weights.trained_on, item.image)
    return seen, of


def _holds(images: Fingerprint | None, path: str) -> bool:
    try:
        return images is not None and content_key(path) in images
    except (ImageError, OSError):
        return False


def _check(weights: ProjectorWeights, overlaps: Mapping[str, Overlap]) -> None:
    places = [f"{product} {o.test[0]} of {o.test[1]}" for product, o in overlaps.items() if o.test[0]]
    if places:
        seen, of = (sum(counts) for counts in zip(*(overlap.test for overlap in overlaps.values()), strict=True))
        raise InputError(
            f"{weights.name} was trained on {seen} of the {of} test images ({some(places)}), which flatters it. "
            "Judge it on images that it has not seen, or say --allow-overlap, and all results are marked. The data set "
            "real_iad judges those that training.pretrain holds out with --seed 42 and --held-out 0.1."
        )
