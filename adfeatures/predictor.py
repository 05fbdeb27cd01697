"""Photos in, predictions out: reading and transforming photos for a model, thresholds, and decisions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .errors import InputError
from .images import ImageTransform, build_transform, read_image
from .scoring import normal_quantile, outliers
from .sources import ImageSource, digest, distinct, image_sources, name_of

if TYPE_CHECKING:
    from .extractor import FeatureExtractor

Images: TypeAlias = "Tensor | ImageSource | Sequence[ImageSource]"
Products: TypeAlias = "str | Sequence[str | None] | None"

PRESET = "squash"
QUANTILE = 0.99
# Images per forward pass where the caller does not say.
BATCH_SIZE = 8


class Prediction(NamedTuple):
    """The score of one image.

    Attributes:
        score: Image score, >= 0, without upper bound: the maximum of the smoothed map at the model's input size.
        map: Anomaly map at the size of the original image, float32 (H, W).
        threshold: Score above which an image counts as anomalous, None with a single reference image.
        is_anomalous: The decision, None without a threshold.
        is_reference: Whether the image is one of the references; then its score says nothing, since it was compared
            with itself.
    """

    score: float
    map: np.ndarray
    threshold: float | None
    is_anomalous: bool | None
    is_reference: bool


class ReferencePhotos(NamedTuple):
    """Normal images on their way into a bank.

    Attributes:
        batches: Transformed images (B, 3, H, W), read when they are asked for.
        files: File name of each image, "" where it did not come from a file.
        sha256s: Hash of each image, "" for tensors.
        preset: Preset that they were transformed with, None for tensors.
    """

    batches: Iterator[Tensor]
    files: list[str]
    sha256s: list[str]
    preset: str | None


def transform_for(model: FeatureExtractor, bit_depth: int, preset: str = PRESET) -> ImageTransform:
    """The way from a photo to the input of a model."""
    cfg = model.pretrained_cfg
    return build_transform(model.img_size, cfg["mean"], cfg["std"], preset=preset, bit_depth=bit_depth)


def bit_depth_of(model: FeatureExtractor, product: str | None) -> int:
    """Bits in use of 16-bit photos that are compared with the references of a product, or of all products.

    Raises:
        InputError: If no product is named and they differ.
    """
    if product is not None:
        return model.bank(product).record.bit_depth
    depths = {bank.record.bit_depth for bank in model.references.values()} or {model.bit_depth}
    if len(depths) > 1:
        raise InputError(f"The references of the products were read with bit depths {sorted(depths)}: name a product.")
    return depths.pop()


def reference_photos(model: FeatureExtractor, images: Images, bit_depth: int, known: Sequence[str]) -> ReferencePhotos:
    """The references among images: copies of each other, or of known ones, are left out with a warning.

    Raises:
        ImageError: For a folder without images, or a file that is missing.
        InputError: For no images.
    """
    if isinstance(images, Tensor):
        photos = ReferencePhotos(iter(images.split(BATCH_SIZE)), [""] * len(images), [""] * len(images), None)
    else:
        sources = distinct(image_sources(images), known)
        transform = transform_for(model, bit_depth)
        own = list(sources.values())
        batches = (_read(own[i : i + BATCH_SIZE], transform)[1] for i in range(0, len(own), BATCH_SIZE))
        photos = ReferencePhotos(batches, [name_of(source) for source in sources.values()], list(sources), PRESET)
    if not photos.files:
        raise InputError("No reference images were given. Give at least one normal image, better eight.")
    return photos


def predict(model: FeatureExtractor, images: Images, product: Products, batch_size: int) -> list[Prediction]:
    """See ``FeatureExtractor.score``."""
    if isinstance(images, Tensor):
        raise InputError("score takes images; for transformed tensors there is anomaly_map.")
    sources = image_sources(images)
    products = [product] * len(sources) if product is None or isinstance(product, str) else list(product)
    if len(products) != len(sources):
        raise InputError(f"{len(products)} products were named for {len(sources)} images.")
    for name in dict.fromkeys(products):
        ensure_threshold(model, name)
    predictions: list[Prediction] = []
    for start in range(0, len(sources), batch_size):
        chunk = slice(start, start + batch_size)
        predictions += _predict_batch(model, sources[chunk], products[chunk])
    return predictions


def _predict_batch(
    model: FeatureExtractor, sources: Sequence[ImageSource], products: Sequence[str | None]
) -> Iterator[Prediction]:
    banks = [model.bank(product) for product in products]
    images, inputs = [], []
    for source, bank in zip(sources, banks, strict=True):
        own, x = _read([source], transform_for(model, bank.record.bit_depth))
        images += own
        inputs.append(x)
    maps, scores = model.anomaly_map(model.as_input(torch.cat(inputs)), products)
    for source, bank, image, smoothed, score in zip(sources, banks, images, maps, scores.tolist(), strict=True):
        size = (image.height, image.width)
        resized = F.interpolate(smoothed[None, None], size=size, mode="bilinear", align_corners=False)
        decision = None if bank.threshold is None else score > bank.threshold
        known = digest(source) in bank.sha256s
        yield Prediction(score, resized[0, 0].cpu().numpy(), bank.threshold, decision, known)


def ensure_threshold(model: FeatureExtractor, product: str | None) -> None:
    """Fit the threshold of a product, unless it has one or a single reference can give none."""
    bank = model.bank(product)
    if bank.threshold is None and (bank.num_images > 1 or bank.record.normal_scores):
        fit_threshold(model, QUANTILE, None, product)


def fit_threshold(model: FeatureExtractor, quantile: float, normals: Images | None, product: str | None) -> float:
    """See ``FeatureExtractor.fit_threshold``."""
    bank = model.bank(product)
    record = bank.record
    if normals is not None:
        record.normal_scores = _scores_of(model, normals, product)
    elif not record.normal_scores:
        record.normal_scores = model.leave_one_out_scores(product)
        for index in outliers(record.normal_scores):
            name = record.files[index] or index
            warnings.warn(f"Reference {name} looks anomalous among the others. Is it a good part?", stacklevel=3)
    record.threshold, record.quantile = normal_quantile(record.normal_scores, quantile), quantile
    count = len(record.normal_scores)
    if count * (1 - quantile) < 1:
        warnings.warn(
            f"{count} normal images cannot pin down the {quantile:g} quantile: "
            f"expect about one false alarm in {count + 1} good images.",
            stacklevel=3,
        )
    return record.threshold


def _scores_of(model: FeatureExtractor, normals: Images, product: str | None) -> list[float]:
    if isinstance(normals, Tensor):
        batches = model.as_input(normals).split(BATCH_SIZE)
    else:
        # One by one: their sizes differ, and so many may be given that they do not fit into memory together.
        transform = transform_for(model, model.bank(product).record.bit_depth)
        batches = (model.as_input(_read([source], transform)[1]) for source in image_sources(normals))
    return [score for batch in batches for score in model.anomaly_map(batch, product).scores.tolist()]


def _read(sources: Sequence[ImageSource], transform: ImageTransform) -> tuple[list[Image.Image], Tensor]:
    """The images as they are, and transformed for the model."""
    images = [read_image(source, bit_depth=transform.bit_depth) for source in sources]
    return images, torch.stack([transform(image) for image in images])
