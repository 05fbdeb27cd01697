"""Anomaly detection methods on feature maps of any extractor: ``Method(extractor, **settings).fit(loader).predict(loader)``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .cflow import CFLOW
from .feature_norm import FeatureNorm
from .glass import GLASS
from .padim import PaDiM
from .patchcore import PatchCore
from .uniad import UniAD

__all__ = ["CFLOW", "GLASS", "METHODS", "FeatureNorm", "PaDiM", "PatchCore", "UniAD"]

METHODS: Mapping[str, type[Any]] = MappingProxyType(
    {
        "feature_norm": FeatureNorm,
        "patchcore": PatchCore,
        "padim": PaDiM,
        "cflow": CFLOW,
        "glass": GLASS,
        "uniad": UniAD,
    }
)
