"""Pictures of an evaluation: heat maps of the best and worst test images, and ROC and PRO curves."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_curve
from torch import Tensor
from torchvision.transforms import functional as TF

from adfeatures.checkpoints import atomic_path
from adfeatures.images import ImageTransform
from adfeatures.overlays import contact_sheet, overlay, save_picture

from .. import metrics
from ..data.images import noticing
from ..data.items import ANOMALOUS, NORMAL, Item
from ..methods.base import Predictions

COLUMNS, TILE, LONGEST_SIDE = 4, 320, 640
# False positive rates at which curves are kept.
RATES = np.linspace(0, 1, 201)
PRO_RATES = np.linspace(0, metrics.LIMIT, 61)

Curves = Mapping[str, Sequence[float]]


def draw_maps(path: Path, items: Sequence[Item], predictions: Predictions, transform: ImageTransform) -> None:
    """Draw heat maps: a row each of missed defects, false alarms, best found defects and the most normal images.

    All are on one scale, so that a map is red only where few pixels of the product score as high. Where the geometry of
    the transform cuts off borders, so do the pictures.
    """
    scale = map_scale(predictions.maps)
    tiles = [
        _tile(heading, items[i], predictions.maps[i], float(predictions.scores[i]), transform, scale)
        for heading, indices in extremes(items, predictions.scores).items()
        for i in indices
    ]
    # Much faster, for a slightly larger file.
    save_picture(contact_sheet(tiles, columns=COLUMNS, tile_width=TILE), path, compress_level=3)


def map_scale(maps: Tensor) -> tuple[float, float]:
    """Median and 99.9 % quantile of maps, never equal."""
    low, high = np.quantile(maps.numpy(), (0.5, 0.999))
    return float(low), float(high if high > low else low + 1)


def extremes(items: Sequence[Item], scores: Tensor) -> dict[str, list[int]]:
    """Up to `COLUMNS` images of each kind of ``draw_maps``, by index, the most extreme first; none is in two kinds."""
    order = scores.argsort(stable=True).tolist()
    anomalous = [i for i in order if items[i].label == ANOMALOUS]
    normal = [i for i in order if items[i].label == NORMAL]
    return {
        "lowest defect": anomalous[: len(anomalous) // 2][:COLUMNS],
        "highest normal": normal[len(normal) // 2 :][::-1][:COLUMNS],
        "highest defect": anomalous[len(anomalous) // 2 :][::-1][:COLUMNS],
        "lowest normal": normal[: len(normal) // 2][:COLUMNS],
    }


def _tile(
    heading: str, item: Item, anomaly_map: Tensor, score: float, transform: ImageTransform, scale: tuple[float, float]
) -> Image.Image:
    with noticing():  # What is odd about the image is known by now.
        picture = seen(transform.read(item.image), transform)
    size = (picture.height, picture.width)
    resized = F.interpolate(anomaly_map[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    caption = f"{heading}, {score:.4g}: {item.defect} {Path(item.image).stem}"
    return overlay(picture, resized.numpy(), scale=scale, caption=caption)


def seen(image: Image.Image, transform: ImageTransform) -> Image.Image:
    """What a model sees of an image, in the proportions of the image."""
    if transform.preset == "squash":
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        return image
    channels = [torch.tensor(values)[:, None, None] for values in (transform.std, transform.mean)]
    return TF.to_pil_image((transform.of_rgb(image) * channels[0] + channels[1]).clamp(0, 1))


def curves(predictions: Predictions, masks: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Points of the image ROC, the pixel ROC at `RATES` and the PRO curve at `PRO_RATES`, where they are defined."""
    found: dict[str, list[float]] = {}
    if len(labels.unique()) == 2:
        x, y, _ = roc_curve(labels.numpy(), predictions.scores.numpy())
        found.update(image_x=x.tolist(), image_y=y.tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        roc, pro = metrics.curves(predictions.maps, masks, np.concatenate([RATES, PRO_RATES]))
    if np.isfinite(roc).all():
        found.update(pixel=roc[: len(RATES)].round(6).tolist(), pro=pro[len(RATES) :].round(6).tolist())
    return found


def draw_detection_curves(path: Path, title: str, by_features: Mapping[str, Curves]) -> None:
    """Draw the curves of a product and a method, image ROC, pixel ROC and PRO: a line for each kind of features."""
    from matplotlib.figure import Figure

    # A layout that looks for its margins is slow.
    figure = Figure(figsize=(12, 4))
    figure.subplots_adjust(left=0.05, right=0.985, bottom=0.13, top=0.84, wspace=0.2)
    # Bytes of a product's name that are no UTF-8 cannot be drawn.
    figure.suptitle(title.encode("utf-8", "backslashreplace").decode("utf-8"))
    kinds = (
        ("image ROC", "true positive rate", 1.0, "image_y", None),
        ("pixel ROC", "true positive rate", 1.0, "pixel", RATES),
        ("PRO", "per-region overlap", metrics.LIMIT, "pro", PRO_RATES),
    )
    for axes, (name, unit, limit, key, rates) in zip(figure.subplots(1, 3), kinds, strict=True):
        for features, found in by_features.items():
            if key in found:
                axes.plot(found["image_x"] if rates is None else rates, found[key], label=features)
        axes.set(title=name, xlabel="false positive rate", ylabel=unit, xlim=(0, limit), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc="lower right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)
