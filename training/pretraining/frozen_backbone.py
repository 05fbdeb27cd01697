"""The backbone, which is not trained, with what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adfeatures import catalog
from adfeatures.backbones import Encoder
from adfeatures.checkpoints import weights_fingerprint
from adfeatures.factory import load_backbone
from adfeatures.images import ImageTransform, build_transform

from .config import InputsConfig


@dataclass(frozen=True)
class FrozenBackbone:
    """A backbone with what is known of it.

    Attributes:
        name: The name that it was asked for by.
        module: Maps images (B, 3, H, W) to one map (B, C_l, h_l, w_l) per level.
        entry: Its description, with the levels and the input size in use.
        bit_depth: Bits in use, 9 to 16, of the 16-bit images that it is shown.
        preset: Their geometry, one of `adfeatures.images.PRESETS`.
    """

    name: str
    module: Encoder
    entry: catalog.Backbone
    bit_depth: int = 16
    preset: str = "squash"

    @cached_property
    def fingerprint(self) -> list[str]:
        """Hashes of its weights; see ``weights_fingerprint``."""
        return weights_fingerprint(self.module.state_dict())

    @property
    def identity(self) -> list[Any]:
        """What features depend on besides the images."""
        facts: list[Any] = [self.name, self.fingerprint, self.entry.blocks, self.entry.img_size]
        # Earlier versions knew no other bit depth, and no other geometry.
        facts += [] if self.bit_depth == 16 else [self.bit_depth]
        return facts if self.preset == "squash" else [*facts, self.preset]

    @property
    def transform(self) -> ImageTransform:
        """The way from an image to its input, without augmentation."""
        (mean, std), bits = self.entry.normalization, self.bit_depth
        return build_transform(self.entry.img_size, mean, std, preset=self.preset, bit_depth=bits)

    def read(self, path: str) -> Tensor:
        """An image file at the size of the input, (H, W, 3) uint8."""
        transform = self.transform
        return torch.from_numpy(np.array(transform.resized(transform.read(path))))

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.module.parameters()).device


def load_frozen_backbone(config: InputsConfig, device: torch.device) -> FrozenBackbone:
    """The backbone of a config, on a device; errors as of ``load_backbone``."""
    # Random weights, where they are asked for, are the same in whatever resumes or precedes the pretraining.
    torch.manual_seed(config.seed)
    module, entry = load_backbone(
        config.backbone, weights=config.backbone_weights, img_size=config.size, levels=config.levels or None
    )
    return FrozenBackbone(config.backbone, module.to(device), entry, config.bit_depth, config.preset)
