"""Data sets: where each keeps its images and masks, and how they become batches."""

from __future__ import annotations

from adfeatures.catalog import unknown
from adfeatures.errors import UnknownNameError

from . import btad, folder, manifest, mpdd, mvtec, mvtec3d, real_iad, visa
from .tree import Tree

DATASETS: dict[str, Tree] = {
    "mvtec": mvtec.TREE,
    "visa": visa.TREE,
    "btad": btad.TREE,
    "mvtec3d": mvtec3d.TREE,
    "mpdd": mpdd.TREE,
    "real_iad": real_iad.TREE,
    "folder": folder.TREE,
    "manifest": manifest.TREE,
}


def dataset(name: str) -> Tree:
    """The data set of a name.

    Raises:
        UnknownNameError: For an unknown name, with the closest known ones.
    """
    if name not in DATASETS:
        raise UnknownNameError(unknown("data set", name, DATASETS))
    return DATASETS[name]
