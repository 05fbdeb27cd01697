"""Anomaly detection methods on feature maps of any extractor: ``Method(extractor, **settings).fit(loader).predict(loader)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any

_CLASSES = {
    "feature_norm": "FeatureNorm",
    "patchcore": "PatchCore",
    "padim": "PaDiM",
    "cflow": "CFLOW",
    "glass": "GLASS",
    "uniad": "UniAD",
}
__all__ = ["CFLOW", "GLASS", "METHODS", "FeatureNorm", "PaDiM", "PatchCore", "UniAD"]


def _load(module: str) -> type[Any]:
    return getattr(import_module(f"{__name__}.{module}"), _CLASSES[module])


# What gets the class of each method: ``METHODS["patchcore"]()`` is PatchCore.
METHODS: Mapping[str, Callable[[], type[Any]]] = MappingProxyType({module: partial(_load, module) for module in _CLASSES})


def __getattr__(name: str) -> Any:
    for module, title in _CLASSES.items():
        if name == title:
            return _load(module)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
