"""What projectors are evaluated on while they train: products with a few references, and images of both labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adfeatures.errors import InputError

from ..data import DATASETS
from ..data.draws import given_references
from ..data.items import ANOMALOUS, NORMAL, Item, rank
from ..data.protocol import original_geometry
from .config import PUBLISHED, PretrainConfig
from .inputs import Inputs

REFERENCES_PER_VIEW = 8


@dataclass(frozen=True)
class Trial:
    """One product to evaluate on.

    Attributes:
        references: Normal images by view ("" where a data set has none).
        train: Normal images for methods that need some.
        test: Normal and anomalous images.
        presets: Geometry of these images and of the references, see ``adfeatures.create_transform``.
        original_aupro: Whether AUPRO is the published code's approximation.
    """

    product: str
    references: Mapping[str, Sequence[Item]]
    train: Sequence[Item]
    test: Sequence[Item]
    presets: tuple[str, str] = ("squash", "squash")
    original_aupro: bool = False


def validation_trials(config: PretrainConfig, inputs: Inputs) -> list[Trial]:
    """What a pretraining is validated on, against given references or else normal images of the same data.

    Raises:
        InputError: As of the functions below, or for a product without given references.
    """
    name, folder = config.validation, config.validation_references
    shots = 0 if folder else config.validation_shots
    if name == "none":
        return []
    if name == "held_out":
        name, limit = "real_iad", config.validation_images
        trials = held_out_trials(inputs.normal, inputs.held_out, limit, config.seed, shots)
        trials = [replace(trial, presets=(config.preset, config.preset)) for trial in trials]
    else:
        trials = data_set_trials(name, str(config.validation_root), inputs.backbone.entry.img_size, shots)
    trials = [replace(trial, original_aupro=config.recipe == PUBLISHED) for trial in trials]
    if folder is None:
        return trials
    with_given = []
    for trial in trials:
        given = given_references(folder, name, trial.product, config.validation_shots)
        # They serve all views.
        with_given.append(replace(trial, references=dict.fromkeys(trial.references, given)))
    return with_given


def held_out_trials(
    train: Sequence[Item],
    held_out: Sequence[Item],
    limit: int,
    seed: int,
    shots: int = REFERENCES_PER_VIEW,
) -> list[Trial]:
    """A trial for each product with normal and anomalous images among the held-out ones, of views that have references.

    Args:
        train: Normal images that were not held out.
        held_out: The held-out images.
        limit: Most images of a product for training, and of each label for the test.
        seed: Decides which.
        shots: References of a view, of which there may be fewer in ``train``.

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
            references = _references([item for item in own if item.view in views], shots)
            rest = [item for item in own if item.view in views and item not in references[item.view]]
            trials.append(Trial(product, references, (rest or own)[:limit], test))
    if not trials:
        raise InputError(
            "No product has held-out images of both labels to validate on. Raise --held-out, or say --validation none."
        )
    return trials


def data_set_trials(name: str, root: str, img_size: tuple[int, int], shots: int = REFERENCES_PER_VIEW) -> list[Trial]:
    """Every product of a data set of the evaluation, as the published weights were selected on MVTec AD.

    References are the first training images of each view. At the published size, 224 x 224 pixels, the
    geometry is that of the published code too.

    Raises:
        InputError: For products, files or references that are missing. A mean over fewer products would select other
            checkpoints.
    """
    tree, trials = DATASETS[name], []
    # Data of other products may come in the layout of a known data set.
    products = tree.products if set(tree.products) & set(tree.find_products(root)) else tree.choose(root)
    train, test = (tree.find_items(root, split, products) for split in ("train", "test"))
    for product in products:
        normal = [item for item in train if item.product == product and item.label == NORMAL]
        references = _references(normal, shots)
        presets = original_geometry("patchcore", name, product) if img_size == (224, 224) else ("squash", "squash")
        trials.append(Trial(product, references, normal, [item for item in test if item.product == product], presets))
    return trials


def _references(items: Sequence[Item], shots: int) -> dict[str, list[Item]]:
    """The first of these items by view."""
    views = sorted({item.view for item in items})
    return {view: [item for item in items if item.view == view][:shots] for view in views}


def _shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """In an order of the seed and of names within the data set, wherever it lies and however it is sorted."""
    return sorted(items, key=lambda item: rank(seed, f"{item.sample}:{item.image.rpartition('/')[2]}"))
