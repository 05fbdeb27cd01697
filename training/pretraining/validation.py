"""What a projector is worth while it trains: FeatureNorm and PatchCore on products with a few references, which select checkpoints."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from adfeatures.errors import ImageError
from adfeatures.extractor import FeatureExtractor
from adfeatures.images import ImageTransform, build_transform, read_image
from adfeatures.loading import Encoder
from adfeatures.projector import ResidualProjector

from .. import metrics
from ..data import mvtec
from ..data.images import ImageDataset, loader
from ..data.items import ANOMALOUS, NORMAL, Item
from ..distributed import gather_objects, rank, world_size
from ..methods import FeatureNorm, PatchCore
from ..methods.base import Batch, Extractor, Loader
from .dataset import MAX_FAILURES

SHOTS = 8
BATCH = 16
# The method that stands for each loss in the names of the checkpoints, and the metrics that select them.
METHODS = {"norm": FeatureNorm, "angle": PatchCore}
CRITERIA = {"img": "image_auroc", "pix": "pixel_auroc", "pro": "aupro"}

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Trial:
    """One product to evaluate on.

    Attributes:
        references: Normal images by view ("" where a data set has none).
        train: Normal images for methods that need some.
        test: Normal and anomalous images.
    """

    product: str
    references: Mapping[str, Sequence[Item]]
    train: Sequence[Item]
    test: Sequence[Item]


def held_out_trials(train: Sequence[Item], held_out: Sequence[Item], limit: int, seed: int) -> list[Trial]:
    """A trial for each product with normal and anomalous images among the held-out ones, of views that have references.

    Args:
        train: Normal images that were not held out.
        held_out: The held-out images.
        limit: Most images of a product for training, and of each label for the test.
        seed: Decides which.
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
            references = {view: [item for item in own if item.view == view][:SHOTS] for view in views}
            rest = [item for item in own if item.view in views and item not in references[item.view]]
            trials.append(Trial(product, references, (rest or own)[:limit], test))
    return trials


def mvtec_trials(root: str) -> list[Trial]:
    """Every product of MVTec AD, with the first training images as references, as the published weights were selected.

    Raises:
        InputError: For products or files that are missing. A mean over fewer products would select other checkpoints.
    """
    train, test = (mvtec.TREE.find_items(root, split, mvtec.PRODUCTS) for split in ("train", "test"))
    trials = []
    for product in mvtec.PRODUCTS:
        normal, tested = ([item for item in items if item.product == product] for items in (train, test))
        trials.append(Trial(product, {"": normal[:SHOTS]}, normal, tested))
    return trials


class Validation:
    """Evaluates projectors on trials, one after the other, so that the references of only one product are held at a time.

    Args:
        backbone: The frozen encoder.
        trials: What to evaluate on; several processes share them.
        img_size: Height and width of the input.
        statistics: Mean and standard deviation of the input's channels.
        preset: Geometry of the test and training images, see ``adfeatures.create_transform``.
        reference_preset: Geometry of the references.
        methods: Which of METHODS.
        workers: Processes that read images.
    """

    def __init__(
        self,
        backbone: Encoder,
        trials: Sequence[Trial],
        *,
        img_size: tuple[int, int],
        statistics: tuple[Sequence[float], Sequence[float]],
        preset: str = "squash",
        reference_preset: str = "squash",
        methods: Sequence[str] = tuple(METHODS),
        workers: int = 0,
    ) -> None:
        mean, std = statistics
        self.trials = list(trials)[rank() :: world_size()]
        self.transform = build_transform(img_size, mean, std, preset=preset)
        self.reference_transform = build_transform(img_size, mean, std, preset=reference_preset)
        self.methods, self.workers = methods, workers
        self.device = next(backbone.parameters()).device
        cfg = {"mean": mean, "std": std}
        self.extractor = FeatureExtractor(backbone, None, name="validation", img_size=img_size, pretrained_cfg=cfg)

    def run(self, projector: ResidualProjector | None) -> Scores:
        """Means over the products of image AUROC, pixel AUROC and AUPRO, as "img", "pix" and "pro", for each method.

        A product for which a metric is not defined, such as one whose masks lost their small defects, does not count in
        that mean.

        Args:
            projector: The projector; it is not changed. None evaluates the residuals themselves.

        Raises:
            ImageError: For a mask that does not fit, or where image after image cannot be read. Single ones are
                replaced, with a warning.
        """
        self.extractor.projector = None if projector is None else copy.deepcopy(projector).float().requires_grad_(False)
        own = [
            self._evaluate(trial)
            for trial in tqdm(self.trials, desc="validation", unit="product", leave=False, disable=None)
        ]
        # Training has a use for the memory.
        self.extractor.projector = None
        self.extractor.clear_references()
        scores = [score for part in gather_objects(own) for score in part]
        return {
            method: {key: _mean(score[method][key] for score in scores) for key in CRITERIA} for method in self.methods
        }

    def _evaluate(self, trial: Trial) -> Scores:
        self.extractor.clear_references()
        for view, items in trial.references.items():
            self.extractor.set_references(
                _references(items, self.reference_transform).to(self.device), product=_bank(view)
            )
        train, test = (
            loader(_Readable(items, self.transform), BATCH, workers=self.workers) for items in (trial.train, trial.test)
        )
        scores = {}
        for name in self.methods:
            truths: list[tuple[Tensor, Tensor]] = []
            predictions = METHODS[name](self._features(trial)).fit(train).predict(_collecting(truths, test))
            masks, labels = map(torch.cat, zip(*truths, strict=True))
            found = metrics.evaluate(predictions.maps, masks, labels, predictions.scores)
            scores[name] = {key: float(getattr(found, field)) for key, field in CRITERIA.items()}
        return scores

    def _features(self, trial: Trial) -> Extractor:
        views = {item.image: item.view for items in (trial.train, trial.test) for item in items}

        def extract(batch: Batch) -> list[Tensor]:
            banks = [_bank(views[path]) for path in batch["path"]]
            return self.extractor(batch["image"].to(self.device), banks)

        return extract


def _mean(values: Iterable[float]) -> float:
    """Of those that are not NaN. Masks and labels alone decide which, so every validation of a run takes the same ones."""
    defined = [value for value in values if not isnan(value)]
    return fmean(defined) if defined else nan


def _bank(view: str) -> str:
    return f"view {view}"


class _Readable(ImageDataset):
    """In the place of an image that cannot be read, the next one with its own label and mask; a training passes over such images too."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        for position in range(index, index + MAX_FAILURES):
            try:
                return super().__getitem__(position % len(self))
            except ImageError:
                # Else the mask is at fault.
                if _read(self.items[position % len(self)], self.transform) is not None:
                    raise
        raise ImageError(
            f"{MAX_FAILURES} images in a row could not be read, from {self.items[index].image} on. Check the data set."
        )


def _read(item: Item, transform: ImageTransform) -> Tensor | None:
    """The image as input (3, H, W), or a warning and None where it cannot be read."""
    try:
        return transform(read_image(item.image))
    except ImageError as error:
        warnings.warn(f"{error} The validation does without it.", stacklevel=2)
        return None


def _references(items: Sequence[Item], transform: ImageTransform) -> Tensor:
    images = [image for item in items if (image := _read(item, transform)) is not None]
    if not images:
        raise ImageError(f"None of the references {', '.join(item.image for item in items)} can be read. Restore them.")
    return torch.stack(images)


def _collecting(truths: list[tuple[Tensor, Tensor]], batches: Loader) -> Iterator[Batch]:
    """The batches, whose masks (B, H, W) and labels (B,) are put into a list as they pass."""
    for batch in batches:
        truths.append((batch["mask"][:, 0], batch["label"]))
        yield batch


def _shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """The items in an order that depends on the seed and on their names within the data set, not on where it lies or how it is sorted."""
    return sorted(
        items,
        key=lambda item: hashlib.sha256(f"{seed}:{item.sample}:{item.image.rpartition('/')[2]}".encode()).digest(),
    )
