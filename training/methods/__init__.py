"""Anomaly detection methods on features of any extractor: ``Class(extractor).fit(loader).predict(loader)``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

from adfeatures.catalog import unknown
from adfeatures.errors import InputError, UnknownNameError

from .cflow import CFLOW
from .feature_norm import FeatureNorm
from .glass import GLASS
from .padim import PaDiM
from .patchcore import PatchCore
from .uniad import UniAD

__all__ = ["CFLOW", "GLASS", "METHODS", "FeatureNorm", "Method", "PaDiM", "PatchCore", "UniAD", "find_method"]


@dataclass(frozen=True)
class Method:
    """A method and how an evaluation runs it, as the paper does."""

    create: Callable[..., Any]  # its class, called with an extractor and settings
    batch: int = 8  # training images of a batch
    shuffle: bool = False  # whether their order is drawn anew in each pass
    drop_last: bool = False  # whether a last, smaller batch is left out, unless there is no other
    seed: int = 0  # of the order
    images: bool = False  # whether it needs the training images and not only their features
    joint: bool = False  # whether one model is trained on all products
    epochs: str | None = None  # the setting of how many epochs it trains, in ``fit(loader, on_epoch)``; None: no epochs
    takes: tuple[str, ...] = ()  # further settings that follow from the model, its features and the protocol


_OF_GLASS = ("adapter", "mean", "std", "preset", "textures", "foregrounds")
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "feature_norm": Method(FeatureNorm),
        "patchcore": Method(PatchCore),
        "padim": Method(PaDiM),
        "cflow": Method(CFLOW, 32, shuffle=True, drop_last=True, epochs="meta_epochs", takes=("level_reference",)),
        "glass": Method(GLASS, shuffle=True, images=True, epochs="epochs", takes=_OF_GLASS),
        "uniad": Method(UniAD, shuffle=True, drop_last=True, seed=133, joint=True, epochs="epochs"),
    }
)


def find_method(name: str) -> Method:
    """The method of a name in `METHODS`, or a class from outside as ``module:Class``.

    The module is imported. The class is called with an extractor and its own defaults; ``fit(loader)`` and
    ``predict(loader)``, which returns maps and scores, are as in this package. The images of its batches are blank:
    features are what the extractor gives of a batch.

    Raises:
        UnknownNameError: For another name.
        InputError: If there is no such module, or no such class in it.
    """
    if name in METHODS:
        return METHODS[name]
    if not re.fullmatch(r"\w[\w.]*:\w+", name):
        raise UnknownNameError(f"{unknown('method', name, METHODS)} A class from outside is given as module:Class.")
    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise InputError(
            f"The method {name} cannot be imported ({error}). Install {module}, or add its folder to PYTHONPATH."
        ) from error
    if not all(callable(getattr(found, step, None)) for step in ("fit", "predict")):
        raise InputError(
            f"The method {name} needs a class {attribute} in {module} with fit(loader) and predict(loader)."
        )
    return Method(found)


def title_of(name: str) -> str:
    """The name of a method for people: that of its class, which is not imported."""
    return METHODS[name].create.__name__ if name in METHODS else name.rpartition(":")[2]
