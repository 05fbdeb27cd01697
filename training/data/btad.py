"""BTAD (Mishra et al., ISIE 2021): ``<product>/{train,test}/{ok,ko}/*``, ``<product>/ground_truth/ko/<stem>``.

Images are .bmp or .png by product; the masks are .png for 01 and 02, .bmp for 03.
"""

from __future__ import annotations

from .layout import Layout

PRODUCTS = ("01", "02", "03")
TREE = Layout(
    "BTAD", PRODUCTS, normal="ok", masks=("ground_truth/{defect}/{stem}.png", "ground_truth/{defect}/{stem}.bmp")
)
