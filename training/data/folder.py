"""Your own images in the layout of MVTec AD.

The root holds a folder per product, or is itself the only product: ``train/good``, ``test/good``, ``test/<kind>`` for
each kind of defect, and masks named ``ground_truth/<kind>/<stem>_mask.png`` or ``<stem>.png``. A product without the
folder ``ground_truth`` has no masks: its images can be judged, their pixels cannot.
"""

from __future__ import annotations

from .layout import Layout

TREE = Layout(
    "data in the layout of MVTec AD",
    masks=("ground_truth/{defect}/{stem}_mask.png", "ground_truth/{defect}/{stem}.png"),
    masks_optional=True,
)
