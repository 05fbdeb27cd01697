"""MVTec AD (Bergmann et al., CVPR 2019).

Layout: ``<product>/{train,test}/<kind>/*.png`` and ``<product>/ground_truth/<kind>/<stem>_mask.png``.
"""

from __future__ import annotations

from .layout import Layout

PRODUCTS = (
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut", "pill", "screw", "tile",
    "toothbrush", "transistor", "wood", "zipper"
)  # fmt: skip
TREE = Layout("MVTec AD", PRODUCTS)
