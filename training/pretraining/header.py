"""The header of checkpoints, by which ``adfeatures.create_model(weights=...)`` knows what they are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from adfeatures import catalog

from ..data import real_iad
from ..data.items import Item
from .config import PretrainConfig
from .inputs import FrozenBackbone


def checkpoint_header(config: PretrainConfig, backbone: FrozenBackbone, train: Sequence[Item]) -> dict[str, str]:
    """The metadata of a projector that was trained as the config says, on these items."""
    name, entry = f"adpretrain_{config.backbone}", backbone.entry
    header = {
        "format": "adfeatures",
        "model": name if name in catalog.MODELS else "adpretrain_timm",
        "num_heads": str(config.num_heads),
        "img_size": json.dumps(entry.img_size),
        "training": json.dumps(dataclasses.asdict(config)),
    }
    if name not in catalog.MODELS or config.levels:
        facts = {key: getattr(entry, key) for key in ("timm_name", "blocks", "channels", "reductions")}
        facts["mean"], facts["std"] = entry.normalization
        header["backbone"] = json.dumps(facts)
    # Other data may come in the same layout.
    if config.data == "real_iad" and {item.product for item in train} <= set(real_iad.PRODUCTS):
        header["training_data"] = "Real-IAD"
    return header
