"""The geometry of the original code, written down a second time."""

from __future__ import annotations

from training.data import DATASETS, dataset, mvtec
from training.data.protocol import original_geometry
from training.methods import METHODS


def test_original_geometry_is_that_of_the_published_code() -> None:
    larger = {
        (method, "mvtec", product)
        for method, products in {
            "patchcore": mvtec.PRODUCTS,
            "padim": mvtec.PRODUCTS,
            "glass": ("toothbrush", "wood"),
        }.items()
        for product in products
    }
    for method in METHODS:
        for name in DATASETS:
            for product in (*dataset(name).products, "one of your own"):
                expected = "resize256_crop224" if (method, name, product) in larger else "resize224_crop224"
                assert original_geometry(method, name, product) == (expected, "resize224_crop224")
