"""The header of checkpoints: what it says, and that it is enough to build the model again."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from adfeatures.backbones import create_backbone
from adfeatures.catalog import BACKBONES
from adfeatures.factory import load_backbone
from adfeatures.projector import ResidualProjector
from training.data.fingerprint import TRAINED_ON, Fingerprint
from training.pretraining.config import PretrainConfig
from training.pretraining.frozen_backbone import FrozenBackbone, load_frozen_backbone
from training.pretraining.header import checkpoint_header

IMAGES = Fingerprint(["00" * 32, "ab" * 32])


def header(title: str | None = None, num_heads: int = 4, **settings: Any) -> tuple[dict[str, str], FrozenBackbone]:
    backbone = load_frozen_backbone(PretrainConfig(**settings), torch.device("cpu"))
    projector = ResidualProjector(backbone.entry.channels, num_heads, num_keys=2)
    return checkpoint_header(backbone, projector, title, IMAGES), backbone


def test_a_model_of_the_catalog_is_named() -> None:
    found, _ = header(backbone="efficientnet_lite", img_size=(64, 32))
    assert (found["format"], found["model"]) == ("adfeatures", "adpretrain_efficientnet_lite")
    assert json.loads(found["img_size"]) == [64, 32] and found["num_heads"] == "4"
    assert "backbone" not in found
    images = Fingerprint.from_text(found[TRAINED_ON])
    assert len(images) == 2 and "ab" * 32 in images


def test_other_levels_than_the_usual_ones_are_described() -> None:
    entry = dataclasses.replace(BACKBONES["dinov2_base"], blocks=(2, 4), channels=(8, 8))
    backbone = FrozenBackbone("dinov2_base", create_backbone("dinov2_base", embed_dim=8, depth=4, num_heads=2), entry)
    found = checkpoint_header(backbone, ResidualProjector((8, 8), 2, 2), None, IMAGES)
    assert found["model"] == "adpretrain_dinov2_base" and json.loads(found["backbone"])["blocks"] == [2, 4]


@pytest.mark.parametrize("num_heads", [3, 4, 6, 16])
def test_the_number_of_heads_makes_the_same_projector(num_heads: int) -> None:
    found, backbone = header(num_heads=num_heads, backbone="efficientnet_lite", img_size=(32,))
    one, other = (ResidualProjector(backbone.entry.channels, n, 2) for n in (num_heads, int(found["num_heads"])))
    assert one.num_heads == other.num_heads


def test_a_backbone_of_timm_is_described() -> None:
    found, backbone = header(backbone="resnet10t", backbone_weights="random", img_size=(64,))
    assert found["model"] == "adpretrain_timm"
    facts = json.loads(found["backbone"])
    module, entry = load_backbone(
        facts["timm_name"].partition(".")[0], weights="random", levels=facts["blocks"], img_size=(64, 64)
    )
    with torch.no_grad():
        maps = module(torch.zeros(1, 3, 64, 64))
    assert [level.shape[1] for level in maps] == facts["channels"]
    assert [64 // level.shape[2] for level in maps] == facts["reductions"]
    assert [list(values) for values in entry.normalization] == [facts["mean"], facts["std"]]


@pytest.mark.parametrize("title", ["Real-IAD", None])
def test_the_training_data_are_named_where_they_are_known(title: str | None) -> None:
    found, _ = header(title, backbone="efficientnet_lite", img_size=(32,))
    assert found.get("training_data") == title
