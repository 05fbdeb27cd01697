"""What a projector is worth while it trains: FeatureNorm and PatchCore on products with a few references.

Their metrics select the checkpoints.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import isnan, nan
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from adfeatures.errors import ImageError
from adfeatures.extractor import FeatureExtractor
from adfeatures.images import ImageTransform
from adfeatures.predictor import Products
from adfeatures.projector import ResidualProjector

from .. import metrics
from ..console import progress
from ..data.images import ImageDataset, loader
from ..data.items import Item
from ..distributed import gather_objects, rank, world_size
from ..methods import FeatureNorm, PatchCore
from ..methods.base import Batch, Loader
from ..metrics import CRITERIA, SELECTED_BY
from .dataset import MAX_FAILURES
from .frozen_backbone import FrozenBackbone
from .trials import Trial

IMAGES_AT_ONCE = 16
# The methods of ``metrics.SELECTED_BY``.
_SELECTORS: dict[str, type[FeatureNorm] | type[PatchCore]] = {"norm": FeatureNorm, "angle": PatchCore}

# Fractions by "norm" and "angle", and by the keys of ``metrics.CRITERIA``.
Scores = dict[str, dict[str, float]]


def validate(
    projector: ResidualProjector | None,
    backbone: FrozenBackbone,
    trials: Sequence[Trial],
    *,
    methods: Sequence[str] = tuple(SELECTED_BY),
    workers: int = 0,
    no_residual: bool = False,
) -> Scores:
    """Means over the products of image AUROC, pixel AUROC and AUPRO, as "img", "pix" and "pro", for each method.

    A product for which a metric is not defined, such as one whose masks lost their small defects, does not count in
    that mean. The trials come one after the other, so that the references of only one product are held at once.

    Args:
        projector: The projector; it is not changed. None evaluates the residuals themselves.
        backbone: The frozen encoder.
        trials: What to evaluate on; several processes share them.
        methods: Which of ``metrics.SELECTED_BY``.
        workers: Processes that read images.
        no_residual: Whether features are projected as they are.

    Raises:
        ImageError: For a mask that does not fit, or where image after image cannot be read. Single ones are replaced,
            with a warning.
    """
    mean, std = backbone.entry.normalization
    # One of its own for each validation: in it the projector is frozen, and training needs the memory back.
    extractor = (_FeatureExtractorWithoutResiduals if no_residual else FeatureExtractor)(
        backbone.module,
        None if projector is None else copy.deepcopy(projector).to(next(backbone.module.parameters())),
        name="validation",
        img_size=backbone.entry.img_size,
        pretrained_cfg={"mean": mean, "std": std},
    )
    own = progress(trials[rank() :: world_size()], desc="validation", unit="products", leave=False)
    shares = gather_objects([_evaluate(extractor, backbone, trial, methods, workers) for trial in own])
    by_product = [scores for share in shares for scores in share]
    return {
        method: {criterion.key: _mean(each[method][criterion.key] for each in by_product) for criterion in CRITERIA}
        for method in methods
    }


class _FeatureExtractorWithoutResiduals(FeatureExtractor):
    def residuals(self, x: Tensor, product: Products = None) -> list[Tensor]:
        return self.backbone_features(x)


def _evaluate(
    extractor: FeatureExtractor, backbone: FrozenBackbone, trial: Trial, methods: Sequence[str], workers: int
) -> Scores:
    of_images, of_references = (replace(backbone.transform, preset=preset) for preset in trial.presets)
    extractor.clear_references()
    for view, items in trial.references.items():
        extractor.set_references(_references(items, of_references).to(backbone.device), product=f"view {view}")
    banks = {item.image: f"view {item.view}" for items in (trial.train, trial.test) for item in items}

    def features(batch: Batch) -> list[Tensor]:
        return extractor(batch["image"].to(backbone.device), [banks[path] for path in batch["path"]])

    train, test = (
        loader(_Readable(items, of_images), IMAGES_AT_ONCE, workers=workers) for items in (trial.train, trial.test)
    )
    scores = {}
    for name in methods:
        truths: list[tuple[Tensor, Tensor]] = []
        predictions = _SELECTORS[name](features).fit(train).predict(_collecting(truths, test))
        masks, labels = map(torch.cat, zip(*truths, strict=True))
        found = metrics.evaluate(predictions.maps, masks, labels, predictions.scores)
        if trial.original_aupro:
            found = replace(found, aupro=metrics.aupro_original(predictions.maps, masks))
        scores[name] = {criterion.key: float(getattr(found, criterion.field)) for criterion in CRITERIA}
    return scores


def _mean(values: Iterable[float]) -> float:
    """Of those that are not NaN: masks and labels decide which, so every validation of a run takes the same ones."""
    defined = [value for value in values if not isnan(value)]
    return fmean(defined) if defined else nan


class _Readable(ImageDataset):
    """In the place of an image that cannot be read, the next one with its own label and mask."""

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
        return transform.of_rgb(transform.read(item.image))
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
