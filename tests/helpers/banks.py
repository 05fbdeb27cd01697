"""Reference banks of made-up features, with every fact of their record set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from helpers.golden_values import value
from torch import Tensor

from adfeatures.geometry import Geometry, Region
from adfeatures.records import BankRecord
from adfeatures.references import ReferenceBank


def maps(
    name: str, count: int = 4, channels: tuple[int, ...] = (6, 5), grids: tuple[tuple[int, int], ...] = ((3, 4), (2, 3))
) -> list[Tensor]:
    return [
        value(f"{name}.{level}", (count, c, *grid)) for level, (c, grid) in enumerate(zip(channels, grids, strict=True))
    ]


FACTS: dict[str, Any] = {
    "files": ["a.png", "b/ä.png", "", "d.png"],
    "sha256s": ["1" * 64, "2" * 64, "3" * 64, ""],
    "pixels": ["5" * 64, "6" * 64, "7" * 64, ""],
    "model": "adpretrain_dinov2_base.realiad_norm",
    "fingerprint": ["f" * 64, "e" * 64],
    "form": "binomial",
    "img_size": (224, 280),
    "preset": "squash",
    "bit_depth": 12,
    "threshold": 0.1 + 0.2,
    "quantile": 0.99,
    "normal_scores": [1 / 3, 2 / 7, 1e-30],
    "geometry": Geometry(64, 8, True, Region.read(np.eye(90, 120, dtype=np.uint8))),
    "rotations": 3,
}


def full_bank(count: int = 4, **facts: object) -> ReferenceBank:
    bank = ReferenceBank.from_features(maps("references", count))
    bank.scales = torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    bank.record = BankRecord(**{**FACTS, **facts})
    return bank
