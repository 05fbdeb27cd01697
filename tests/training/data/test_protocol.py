"""The geometry of the original code, written down a second time."""

from __future__ import annotations

import pytest

from adfeatures.errors import UnknownNameError
from training.data import DATASETS, dataset, mvtec
from training.data.protocol import EVALUATED, original_geometry


def test_original_geometry_is_that_of_the_published_code() -> None:
    larger = {
        (method, "mvtec", product)
        for method, products in {
            "patchcore": mvtec.PRODUCTS,
            "padim": mvtec.PRODUCTS,
            "validation": mvtec.PRODUCTS,
            "glass": ("toothbrush", "wood"),
        }.items()
        for product in products
    }
    for method in EVALUATED:
        for name in DATASETS:
            for product in dataset(name).products:
                expected = "resize256_crop224" if (method, name, product) in larger else "resize224_crop224"
                assert original_geometry(method, name, "image", product) == expected
                assert original_geometry(method, name, "reference", product) == "resize224_crop224"


@pytest.mark.parametrize(
    "arguments", [("patchcor", "mvtec", "image"), ("padim", "mvtek", "image"), ("padim", "mvtec", "images")]
)
def test_original_geometry_refuses_unknown_names(arguments: tuple[str, str, str]) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean"):
        original_geometry(*arguments, "bottle")
