"""The geometry of the original code, for results comparable with the published ones."""

from __future__ import annotations

from . import mvtec

# Everything is resized to 224 and cropped to 224, except the images (training and test, never references) of these
# products, by method and data set, which are resized to 256.
RESIZED_TO_256 = {
    ("patchcore", "mvtec"): mvtec.PRODUCTS,
    ("padim", "mvtec"): mvtec.PRODUCTS,
    ("glass", "mvtec"): ("toothbrush", "wood"),
}


def original_geometry(method: str, dataset: str, product: str) -> tuple[str, str]:
    """The presets of `adfeatures.images` that the original code uses for images and for their references.

    Note that it matches some images with references at another scale.
    """
    references = "resize224_crop224"
    larger = product in RESIZED_TO_256.get((method, dataset), ())
    return "resize256_crop224" if larger else references, references
