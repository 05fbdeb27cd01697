"""Photos in, predictions out: reading and transforming photos for a model, thresholds, and decisions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import ImageError, InputError
from .geometry import PLAIN, Geometry, View
from .images import ImageSource, ImageTransform, build_transform
from .references import ReferenceBank
from .scoring import AnomalyMap
from .sources import Photo, image_sources, read_distinct, read_photo, size_of
from .thresholds import QUANTILES, Tail, outliers, threshold_of

Images: TypeAlias = "Tensor | ImageSource | Sequence[ImageSource]"
Products: TypeAlias = "str | Sequence[str | None] | None"

PRESET = "squash"
# Images per forward pass where the caller does not say.
BATCH_SIZE = 8
# Thresholds below this fraction of the color scale are those of copies, not of other good parts.
_NEAR_ZERO = 0.01
# Fewer photos may all be bad.
_MANY = 10


class Detector(Protocol):
    """What scores photos: an extractor with references, or an exported file in a runtime.

    Attributes:
        name: Model name with tag.
        runtime: What computes, and in which numbers.
        img_size: Height and width that photos are resized to.
        pretrained_cfg: Holds the mean and std of the preprocessing.
        bit_depth: Bits in use of 16-bit photos.
        max_pixels: Pixels of photos in memory at a time.
    """

    name: str
    runtime: str
    img_size: tuple[int, int]
    pretrained_cfg: dict[str, Any]
    bit_depth: int
    max_pixels: int

    @property
    def top(self) -> float:
        """Top of the color scale of maps where no threshold gives one."""

    @property
    def tail(self) -> Tail:
        """How thresholds are taken from the scores of normal images."""

    @property
    def references(self) -> dict[str, ReferenceBank]:
        """The reference banks by product."""

    def bank(self, product: str | None = None) -> ReferenceBank:
        """The references of a product."""

    def threshold(self, product: str | None = None) -> float | None:
        """The threshold of a product."""

    def leave_one_out_scores(self, product: str | None = None) -> list[float]:
        """Scores of the references, each against the others alone."""

    def as_input(self, x: Tensor) -> Tensor:
        """Transformed images as the model takes them."""

    def anomaly_map(self, x: Tensor, product: Products = None, *, counts: Tensor | None = None) -> AnomalyMap:
        """Maps and scores of a batch, of what counts of it."""


class Prediction(NamedTuple):
    """The score of one image.

    Attributes:
        score: Image score, >= 0, without upper bound: the maximum of the smoothed maps at the model's input size.
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


def whole_number(name: str, value: Any) -> int:
    """An option that counts something.

    Raises:
        InputError: Unless it is a whole number, 1 or more.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(f"{name} is {value!r}; it must be a whole number, 1 or more.")
    return int(value)


def transform_for(model: Detector, bit_depth: int, preset: str = PRESET) -> ImageTransform:
    """The way from a photo to the input of a model."""
    cfg = model.pretrained_cfg
    return build_transform(
        model.img_size, cfg["mean"], cfg["std"], preset=preset, bit_depth=bit_depth, max_pixels=model.max_pixels
    )


def bit_depth_of(model: Detector, product: str | None) -> int:
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


def normal_photos(
    model: Detector, images: Images, bit_depth: int, known: Collection[str] = (), geometry: Geometry = PLAIN
) -> Iterator[list[Photo]]:
    """Normal images in batches. Copies of each other, or of those whose hashes are known, are left out with a warning.

    What a geometry takes from the sizes of references it takes from those of these images.

    Raises:
        ImageError: For a folder without images, or a file that cannot be read or cut.
        InputError: For tensors that are no transformed images, or should be cut.
    """
    if isinstance(images, Tensor):
        if not geometry.is_plain:
            raise InputError("Transformed tensors cannot be cut. Give files, PIL images or arrays.")
        _check_transformed(model, images)
        photos = [Photo(None, "", "", [View(x, None, (x.shape[1], x.shape[2]))], (0, 0)) for x in images]
        return (photos[start : start + BATCH_SIZE] for start in range(0, len(photos), BATCH_SIZE))
    sources = image_sources(images)
    geometry = geometry.resolved(map(size_of, sources), model.img_size)
    return read_distinct(sources, transform_for(model, bit_depth), known, BATCH_SIZE, geometry)


def view_batches(photos: Sequence[Photo], batch_size: int) -> Iterator[tuple[list[int], list[View]]]:
    """The views of photos in batches, and the number of the photo of each."""
    views = ((number, view) for number, photo in enumerate(photos) for view in photo.views)
    while batch := list(islice(views, batch_size)):
        yield [number for number, _ in batch], [view for _, view in batch]


def stacked(views: Sequence[View]) -> tuple[Tensor, Tensor | None]:
    """The model's input (B, 3, H, W) of views, and what counts of it, bool (B, H, W); None for all."""
    x = torch.stack([view.x for view in views])
    if all(view.counts is None for view in views):
        return x, None
    whole = torch.ones(x.shape[2:], dtype=torch.bool)
    return x, torch.stack([whole if view.counts is None else view.counts for view in views])


def _check_transformed(model: Detector, images: Tensor) -> None:
    advice = "Transform images with adfeatures.create_transform(model), or give them as files, PIL images or arrays."
    if images.ndim != 4 or not images.is_floating_point():
        raise InputError(f"Expected float images (K, 3, H, W), got {images.dtype} {tuple(images.shape)}. {advice}")
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    low, high = float((-mean / std).min()), float(((1 - mean) / std).max())
    if not images.numel() or not images.isfinite().all():
        return  # The model itself refuses it.
    lowest, highest = float(images.min()), float(images.max())
    unnormalized = low < -0.1 and lowest >= 0 and highest <= 1 and highest - lowest > 0.5
    if unnormalized or lowest < low - 0.1 or highest > high + 0.1:
        warnings.warn(
            f"The images hold values from {lowest:.3g} to {highest:.3g}, which the model's transform does not give "
            f"({low:.3g} to {high:.3g}). {advice}",
            stacklevel=3,
        )


def predict(model: Detector, images: Images, product: Products, batch_size: int) -> list[Prediction]:
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
    for result, _ in score_photos(model, sources, products, batch_size):
        if isinstance(result, ImageError):
            raise result
        predictions.append(result)
    for name in dict.fromkeys(products):
        own = [prediction.score for prediction, other in zip(predictions, products, strict=True) if other == name]
        warn_of_drift(model.bank(name), own)
    return predictions


def score_photos(
    model: Detector,
    sources: Iterable[ImageSource],
    products: Iterable[str | None],
    batch_size: int = BATCH_SIZE,
    side: int | None = None,
    mapped: Callable[..., Iterable[Any]] = map,
) -> Iterator[tuple[Prediction | ImageError, Image.Image | None]]:
    """Score images as they come, holding no more than one of them at its full size unless ``mapped`` does.

    Args:
        model: Extractor with references.
        sources: The images.
        products: Whose references to use, for each image.
        batch_size: Images per forward pass.
        side: Longest side in pixels of maps and pictures. By default maps have the size of the image.
        mapped: Reads them in their order, as ``map`` does.

    Yields:
        For each image the prediction, or why it cannot be read; and with ``side`` the picture that the map belongs to.

    Raises:
        InputError: For a batch size below 1, or a score that is not finite.
        ReferencesError: If no references are set.
    """
    batch_size = whole_number("batch_size", batch_size)
    results = iter(mapped(partial(_read_or_refuse, model, side), sources, products))
    batch: list[tuple[Photo | ImageError, str | None]] = []
    number = 0
    while read := list(islice(results, 1)):
        batch += read
        read.clear()
        number += 1
        # Photos of many views are scored one by one. A new group begins at fixed numbers, wherever a run is resumed.
        views = sum(len(photo.views) if isinstance(photo, Photo) else 1 for photo, _ in batch)
        if views >= batch_size or number % batch_size == 0:
            yield from _score_batch(model, batch, batch_size)
            batch.clear()  # Its pictures are gone before the next are read.
    yield from _score_batch(model, batch, batch_size)


def _score_batch(
    model: Detector, batch: Sequence[tuple[Photo | ImageError, str | None]], batch_size: int
) -> Iterator[tuple[Prediction | ImageError, Image.Image | None]]:
    photos = [photo for photo, _ in batch if isinstance(photo, Photo)]
    names = [name for photo, name in batch if isinstance(photo, Photo)]
    predictions = iter(_predict_batch(model, photos, names, batch_size))
    for result, _ in batch:
        yield (next(predictions), result.picture) if isinstance(result, Photo) else (result, None)


def _read_or_refuse(
    model: Detector, side: int | None, source: ImageSource, product: str | None
) -> tuple[Photo | ImageError, str | None]:
    record = model.bank(product).record
    try:
        return read_photo(source, transform_for(model, record.bit_depth), side, record.geometry), product
    except ImageError as error:
        return error, product


def _predict_batch(
    model: Detector, photos: Sequence[Photo], products: Sequence[str | None], batch_size: int
) -> Iterator[Prediction]:
    for number, views in groupby(_scored_views(model, photos, products, batch_size), itemgetter(0)):
        _, maps, scores = zip(*views, strict=True)
        photo, bank, score = photos[number], model.bank(products[number]), float(np.max(scores))
        if not math.isfinite(score):
            raise InputError(f"The score of {photo.source} is {score}: the model overflows, or the bank is damaged.")
        assert photo.cut is not None
        decision = None if bank.threshold is None else score > bank.threshold
        known = not bank.record.known.isdisjoint({photo.sha256, photo.pixels})
        yield Prediction(score, photo.cut.join(maps, photo.size), bank.threshold, decision, known)


def _scored_views(
    model: Detector, photos: Sequence[Photo], products: Sequence[str | None], batch_size: int = BATCH_SIZE
) -> Iterator[tuple[int, Tensor, float]]:
    """The number of the photo of each view, its map and its score."""
    for numbers, views in view_batches(photos, batch_size):
        x, counts = stacked(views)
        maps, scores = model.anomaly_map(model.as_input(x), [products[number] for number in numbers], counts=counts)
        yield from zip(numbers, maps, scores.tolist(), strict=True)


def ensure_threshold(model: Detector, product: str | None) -> None:
    """Fit the threshold of a product, unless it has one or a single reference can give none."""
    bank = model.bank(product)
    if bank.threshold is None and (bank.num_images > 1 or bank.record.normal_scores):
        fit_threshold(model, None, None, product)


def fit_threshold(model: Detector, quantile: float | None, normals: Images | None, product: str | None) -> float:
    """See ``FeatureExtractor.fit_threshold``."""
    bank, quantile = model.bank(product), float(QUANTILES[model.tail] if quantile is None else quantile)
    record = bank.record
    if normals is not None:
        scores = _scores_of(model, normals, product)
    else:
        scores = record.normal_scores or model.leave_one_out_scores(product)
        # Those of a bank without whole images were taken when it was made.
        is_new = not record.normal_scores or (record.threshold is None and len(scores) == len(bank.left_out))
        for index in outliers(scores) if is_new else ():
            number = bank.left_out[index]
            name = (record.files[number] if record.files else "") or number
            warnings.warn(
                f"Reference {name} looks anomalous compared with the others. Is it a good part?", stacklevel=3
            )
    threshold = threshold_of(scores, quantile, model.tail)
    record.threshold, record.quantile, record.normal_scores = threshold, quantile, scores
    if model.tail == "empirical" and len(scores) * (1 - quantile) < 1:
        warnings.warn(
            f"{len(scores)} normal images cannot pin down the {quantile:g} quantile: "
            f"expect about one false alarm in {len(scores) + 1} good images.",
            stacklevel=3,
        )
    if threshold < _NEAR_ZERO * model.top or (normals is not None and _far_below(model, threshold, product)):
        warnings.warn(
            f"The threshold is {threshold:.3g}: the normal images are almost copies of each other or of references, "
            "so nearly every other image will count as anomalous. Give photos of different good parts.",
            stacklevel=3,
        )
    return threshold


def warn_of_drift(bank: ReferenceBank, scores: Iterable[float]) -> None:
    """Warn once where many photos all score above all normal ones: not every part is bad all of a sudden."""
    normal, count, lowest = bank.record.normal_scores, 0, math.inf
    for score in scores:
        count, lowest = count + 1, min(lowest, score)
    if count >= _MANY and normal and lowest > max(normal):
        warnings.warn(
            f"All {count} photos score above every normal one. Unless all of them show defects, lighting, focus "
            "or position have changed: set that right, or fit new references.",
            stacklevel=3,
        )


def _far_below(model: Detector, threshold: float, product: str | None) -> bool:
    """Whether a threshold is far below what references score against each other, so that its images are copies."""
    bank = model.bank(product)
    return bank.complete and bank.num_images > 1 and threshold < 0.25 * min(model.leave_one_out_scores(product))


def _scores_of(model: Detector, normals: Images, product: str | None) -> list[float]:
    scores: list[float] = []
    record = model.bank(product).record
    for batch in normal_photos(model, normals, record.bit_depth, record.known, record.geometry):
        views = _scored_views(model, batch, [product] * len(batch))
        scores += [float(np.max([score for _, _, score in own])) for _, own in groupby(views, itemgetter(0))]
    if not scores:
        raise InputError("No normal image is left that is not a reference. Give photos of other good parts.")
    return scores
