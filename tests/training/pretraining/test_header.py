"""The header of checkpoints: what it says, and that it is enough to build the model again."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from adfeatures.factory import load_backbone
from training.data.items import NORMAL, Item
from training.pretraining.config import PretrainConfig
from training.pretraining.header import checkpoint_header
from training.pretraining.inputs import FrozenBackbone, load_frozen_backbone

REAL_IAD = [Item("a.jpg", NORMAL, "pcb"), Item("b.jpg", NORMAL, "usb")]


def header(train: list[Item] = REAL_IAD, **settings: Any) -> tuple[dict[str, str], FrozenBackbone]:
    config = PretrainConfig(num_heads=4, **settings)
    backbone = load_frozen_backbone(config, torch.device("cpu"))
    return checkpoint_header(config, backbone, train), backbone


def test_a_model_of_the_catalog_is_named() -> None:
    found, _ = header(backbone="efficientnet_lite", img_size=(64, 32))
    assert (found["format"], found["model"]) == ("adfeatures", "adpretrain_efficientnet_lite")
    assert json.loads(found["img_size"]) == [64, 32] and found["num_heads"] == "4"
    assert "backbone" not in found
    config = PretrainConfig(num_heads=4, backbone="efficientnet_lite", img_size=(64, 32))
    assert json.loads(found["training"]) == json.loads(json.dumps(dataclasses.asdict(config)))


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


@pytest.mark.parametrize(
    ("data", "train", "known"),
    [
        ("real_iad", REAL_IAD, True),
        ("real_iad", [*REAL_IAD, Item("c.jpg", NORMAL, "my_own")], False),
        ("folder", REAL_IAD, False),
    ],
)
def test_the_training_data_are_named_where_they_are_known(data: str, train: list[Item], known: bool) -> None:
    found, _ = header(train, backbone="efficientnet_lite", data=data)
    assert found.get("training_data") == ("Real-IAD" if known else None)
