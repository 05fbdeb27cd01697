"""How each method is evaluated: its name in tables, its training batches, and its settings for model, features and protocol."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch.utils.data import DataLoader

from ..data.images import ImageDataset, loader
from ..data.items import Item
from ..methods import METHODS
from .config import ORIGINAL, EvaluationConfig
from .extractors import KnownImages
from .results import RAW
from .subject import Subject

# Added to names of methods: FeatureNorm with references retrieved for each image, and the best result over all epochs.
OF_RETRIEVED, ORACLE = "_retrieved", "_oracle"


@dataclass(frozen=True)
class Recipe:
    """How a method is trained (the paper's settings).

    Attributes:
        batch: Training images of a batch.
        shuffle: Whether their order is drawn anew in each pass.
        drop_last: Whether a last, smaller batch is left out, unless there is no other.
        seed: Of the order.
        images: Whether it needs the training images and not only their features.
        epochs: The argument that says for how many epochs.
        joint: Whether one model is trained on all products.
    """

    batch: int = 8
    shuffle: bool = False
    drop_last: bool = False
    seed: int = 0
    images: bool = False
    epochs: str | None = None
    joint: bool = False


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "feature_norm": Recipe(),
        "patchcore": Recipe(),
        "padim": Recipe(),
        "cflow": Recipe(32, shuffle=True, drop_last=True, epochs="meta_epochs"),
        "glass": Recipe(shuffle=True, images=True, epochs="epochs"),
        "uniad": Recipe(shuffle=True, drop_last=True, seed=133, epochs="epochs", joint=True),
    }
)


def base(method: str) -> str:
    """The name of a method in `METHODS`."""
    return method.removesuffix(ORACLE).removesuffix(OF_RETRIEVED)


def title(method: str) -> str:
    """The name of a method for people."""
    retrieved = " (retrieved)" if method.removesuffix(ORACLE).endswith(OF_RETRIEVED) else ""
    return METHODS[base(method)].__name__ + retrieved + (" (oracle)" if method.endswith(ORACLE) else "")


def settings(
    method: str, features: str, config: EvaluationConfig, subject: Subject, preset: str, products: Sequence[str]
) -> dict[str, Any]:
    """All settings of a method: what it takes by default, and what follows from the evaluation.

    Warns where GLASS has to do without textures or foreground masks that the original has.
    """
    recipe = RECIPES[base(method)]
    own: dict[str, Any] = {}
    if recipe.epochs is not None and config.epochs is not None:
        own[recipe.epochs] = config.epochs
    if base(method) == "cflow" and config.protocol == ORIGINAL:
        own["level_reference"] = "test"
    if base(method) == "glass":
        own.update(adapter=features == RAW, mean=subject.mean, std=subject.std, preset=preset, textures=config.textures)
        own["foregrounds"] = _foregrounds(config.foregrounds, products)
        if config.textures is None:
            warnings.warn("GLASS made its textures of noise: no folder of DTD was given (--textures).", stacklevel=2)
    parameters = inspect.signature(METHODS[base(method)]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | own


def _foregrounds(folder: str | None, products: Sequence[str]) -> str | None:
    if folder is None or all(Path(folder, product).is_dir() for product in products):
        return folder
    warnings.warn(f"GLASS placed its defects anywhere: {folder} has no foreground masks of the product.", stacklevel=3)
    return None


def train_loader(
    method: str, items: Sequence[Item], subject: Subject, preset: str, size: tuple[int, int], workers: int
) -> DataLoader[Any]:
    """Batches of training images as a method takes them."""
    recipe = RECIPES[base(method)]
    known = not recipe.images
    return loader(
        KnownImages(items, size) if known else ImageDataset(items, subject.transform(preset)),
        recipe.batch,
        shuffle=recipe.shuffle,
        seed=recipe.seed,
        workers=0 if known else workers,
        drop_last=recipe.drop_last and len(items) >= recipe.batch,
    )


def known_loader(items: Sequence[Item], size: tuple[int, int]) -> DataLoader[Any]:
    """Batches of test images, whose features are known."""
    return loader(KnownImages(items, size), Recipe().batch)
