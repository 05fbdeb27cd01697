"""MPDD (Jezek et al., ICUMT 2021), metal parts in the layout of MVTec AD."""

from __future__ import annotations

from .layout import Layout

PRODUCTS = ("bracket_black", "bracket_brown", "bracket_white", "connector", "metal_plate", "tubes")
TREE = Layout("MPDD", PRODUCTS)
