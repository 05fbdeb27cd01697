"""Data sets: where each keeps its images and masks, and how they become batches."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType, ModuleType

from adfeatures.catalog import unknown
from adfeatures.errors import UnknownNameError

# Name of the module of each data set, and its title.
DATASETS: Mapping[str, str] = MappingProxyType(
    {
        "mvtec": "MVTec AD",
        "visa": "VisA",
        "btad": "BTAD",
        "mvtec3d": "MVTec 3D-AD",
        "mpdd": "MPDD",
        "real_iad": "Real-IAD",
        "folder": "data in the layout of MVTec AD",
    }
)


def dataset(name: str) -> ModuleType:
    """The module of a data set: ``PRODUCTS`` and ``find_items(root, split, products=None)``.

    Raises:
        UnknownNameError: For an unknown name, with the closest known ones.
    """
    if name not in DATASETS:
        raise UnknownNameError(unknown("data set", name, DATASETS))
    return import_module(f"{__name__}.{name}")
