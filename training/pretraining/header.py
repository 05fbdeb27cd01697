"""The header of checkpoints, by which ``adfeatures.create_model(weights=...)`` knows what they are."""

from __future__ import annotations

import json

from adfeatures import catalog
from adfeatures.projector import ResidualProjector
from adfeatures.trained import NO_RESIDUAL

from ..data.fingerprint import TRAINED_ON, Fingerprint
from .frozen_backbone import FrozenBackbone


def checkpoint_header(
    backbone: FrozenBackbone,
    projector: ResidualProjector,
    title: str | None,
    trained_on: Fingerprint,
    *,
    no_residual: bool = False,
) -> dict[str, str]:
    """The metadata of a projector that was trained on a backbone, with images of a data set that is known or not."""
    name, entry = f"adpretrain_{backbone.name}", backbone.entry
    known = name in catalog.MODELS
    header = {
        "format": "adfeatures",
        "model": name if known else "adpretrain_timm",
        # What was asked for, or gives the same heads at every level.
        "num_heads": str(max(projector.num_heads)),
        "img_size": json.dumps(entry.img_size),
        TRAINED_ON: trained_on.to_text(),
    }
    if not known or entry.blocks != catalog.BACKBONES[backbone.name].blocks:
        facts = {key: getattr(entry, key) for key in ("timm_name", "blocks", "channels", "reductions")}
        facts["mean"], facts["std"] = entry.normalization
        header["backbone"] = json.dumps(facts)
    if no_residual:
        header[NO_RESIDUAL] = "yes"
    if title is not None:
        header["training_data"] = title
    return header
