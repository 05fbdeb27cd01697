"""adfeatures: pretrained features for industrial anomaly detection.

Everything public is loaded on first use, so that importing the package is cheap and has no side effects.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .catalog import DEFAULT_MODEL, list_models

if TYPE_CHECKING:
    from .extractor import FeatureExtractor
    from .factory import create_model, create_transform, register_with_timm
    from .predictor import Prediction
    from .references import ReferenceBank
    from .scoring import AnomalyMap

__version__ = "0.1.0"
__all__ = [
    "DEFAULT_MODEL",
    "AnomalyMap",
    "FeatureExtractor",
    "Prediction",
    "ReferenceBank",
    "create_model",
    "create_transform",
    "list_models",
    "register_with_timm",
]

_MODULES = {
    "AnomalyMap": "scoring",
    "FeatureExtractor": "extractor",
    "Prediction": "predictor",
    "ReferenceBank": "references",
    "create_model": "factory",
    "create_transform": "factory",
    "register_with_timm": "factory",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    try:
        return import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted(__all__)
