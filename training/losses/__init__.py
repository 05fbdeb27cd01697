"""The two losses of ADPretrain."""

from .angle import angle_loss
from .norm import norm_loss

__all__ = ["angle_loss", "norm_loss"]
