"""The geometry of the original code, for results that are to be compared with the published ones."""

from __future__ import annotations

from adfeatures.catalog import unknown
from adfeatures.errors import UnknownNameError

from ..methods import METHODS
from . import DATASETS, mvtec

# "validation" is the original's evaluation of a projector while it trains, with FeatureNorm and PatchCore.
EVALUATED = (*METHODS, "validation")
ROLES = ("image", "reference")
# Everything is resized to 224 and cropped to 224, except the images (training and test, never references) of these
# products, by method and data set, which are resized to 256.
RESIZED_TO_256 = {
    ("patchcore", "mvtec"): mvtec.PRODUCTS,
    ("padim", "mvtec"): mvtec.PRODUCTS,
    ("validation", "mvtec"): mvtec.PRODUCTS,
    ("glass", "mvtec"): ("toothbrush", "wood"),
}


def original_geometry(method: str, dataset: str, role: str, product: str) -> str:
    """The preset of `adfeatures.images` that the original code uses.

    Note that it matches some images with references at another scale.

    Args:
        method: One of `EVALUATED`.
        dataset: One of `DATASETS`.
        role: "image", in training or test, or "reference".
        product: Name of the product.

    Raises:
        UnknownNameError: For an unknown method, data set or role.
    """
    for kind, name, known in (
        ("method", method, EVALUATED),
        ("data set", dataset, tuple(DATASETS)),
        ("role", role, ROLES),
    ):
        if name not in known:
            raise UnknownNameError(unknown(kind, name, known))
    larger = role == "image" and product in RESIZED_TO_256.get((method, dataset), ())
    return "resize256_crop224" if larger else "resize224_crop224"
