"""The color images of MVTec 3D-AD (Bergmann et al., VISAPP 2022).

Layout: ``<product>/{train,test}/<kind>/rgb/*.png`` and ``<product>/test/<kind>/gt/<stem>.png``. The split "validation"
and the point clouds in ``xyz`` are not used.
"""

from __future__ import annotations

from .layout import Layout

PRODUCTS = ("bagel", "cable_gland", "carrot", "cookie", "dowel", "foam", "peach", "potato", "rope", "tire")
TREE = Layout(
    "MVTec 3D-AD",
    PRODUCTS,
    folders=("train", "test", "validation", "calibration"),
    images="{split}/{defect}/rgb",
    masks=("{split}/{defect}/gt/{stem}.png",),
)
