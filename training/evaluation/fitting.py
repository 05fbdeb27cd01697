"""How a method is run: its settings, and the batches that it is trained on and judged by."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adfeatures.errors import InputError

from ..data.images import ImageDataset, ImageLoader, loader
from ..data.items import Item
from ..methods import Method
from .config import ORIGINAL, EvaluationConfig
from .model import EvaluatedModel
from .raw_features import KnownImages
from .results import RAW


def settings(
    method: Method, features: str, config: EvaluationConfig, model: EvaluatedModel, preset: str, products: Sequence[str]
) -> dict[str, Any]:
    """All settings of a method: what it takes by default, and what follows from the evaluation.

    Warns where GLASS has to do without textures or foreground masks that the original has.

    Raises:
        InputError: If its line in the table of methods names settings that an evaluation or its class does not have.
    """
    parameters = inspect.signature(method.create).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    offered = {
        "level_reference": "test" if config.protocol == ORIGINAL else "train",
        "adapter": features == RAW,
        "mean": model.mean,
        "std": model.std,
        "preset": preset,
        "textures": config.textures,
        "foregrounds": config.foregrounds,
    }
    lacks = {name for name in method.takes if name not in offered}
    lacks |= {name for name in (*method.takes, method.epochs) if name is not None and name not in parameters}
    if lacks:
        raise InputError(
            f"METHODS says that {method.create.__name__} takes {', '.join(sorted(lacks))}, which it or the evaluation "
            f"does not have. An evaluation has {', '.join(offered)}."
        )
    own: dict[str, Any] = {name: offered[name] for name in method.takes}
    if method.epochs is not None and config.epochs is not None:
        own[method.epochs] = config.epochs
    if "textures" in own and config.textures is None:
        warnings.warn("GLASS made its textures of noise: no folder of DTD was given (--textures).", stacklevel=2)
    if own.get("foregrounds") and not all(Path(own["foregrounds"], product).is_dir() for product in products):
        warnings.warn(
            f"GLASS placed its defects anywhere: {own['foregrounds']} has no foreground masks of the product.",
            stacklevel=2,
        )
        own["foregrounds"] = None
    return defaults | own


def train_loader(
    method: Method, items: Sequence[Item], model: EvaluatedModel, preset: str, workers: int
) -> ImageLoader:
    """Batches of training images as a method takes them."""
    images = ImageDataset(items, model.transform(preset)) if method.images else KnownImages(items, model.img_size)
    return loader(
        images,
        method.batch,
        shuffle=method.shuffle,
        seed=method.seed,
        workers=workers if method.images else 0,
        drop_last=method.drop_last and len(items) >= method.batch,
    )
