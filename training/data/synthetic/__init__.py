"""A procedural data set in the layout of Real-IAD: many products, five views of each part, exact masks of the defects.

Everything is computed here, from a seed. A part is a set of maps seen from above (canvas), drawn with shapes by the
function of its product (sheets, hardware, goods), damaged (defects), photographed by five cameras (camera,
specimen), and written in the layout of Real-IAD (layout).
"""

from __future__ import annotations

from .camera import VIEWS
from .layout import DEFECTS, PRODUCTS, render, synthesize

__all__ = ["DEFECTS", "PRODUCTS", "VIEWS", "render", "synthesize"]
