"""The frozen backbone: its transform, its weights, and what is known of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.models import photo
from PIL import Image

from adfeatures.catalog import BACKBONES
from adfeatures.factory import load_backbone
from training.pretraining.config import CentersConfig, PretrainConfig
from training.pretraining.frozen_backbone import load_frozen_backbone

CPU = torch.device("cpu")


def test_a_backbone_with_what_is_known_of_it() -> None:
    given = CentersConfig(backbone="efficientnet_lite", img_size=(32, 64))
    backbone = load_frozen_backbone(given, CPU)
    assert backbone.name == "efficientnet_lite" and backbone.entry.img_size == (32, 64)
    assert backbone.entry.channels == BACKBONES["efficientnet_lite"].channels and backbone.device == CPU
    image = backbone.transform(photo(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in backbone.entry.normalization)
    pixels = torch.from_numpy(np.array(photo(0).resize((64, 32), Image.Resampling.BICUBIC)))
    torch.testing.assert_close(image * std + mean, pixels.permute(2, 0, 1) / 255, atol=1e-6, rtol=1e-6)
    expected, _ = load_backbone("efficientnet_lite", img_size=(32, 64))
    for found, level in zip(backbone.module(image[None]), expected(image[None]), strict=True):
        assert torch.equal(found, level)


def test_random_backbones_are_those_of_the_seed() -> None:
    given: dict[str, Any] = {"backbone": "resnet10t", "backbone_weights": "random", "img_size": (64,)}
    one, same = (load_frozen_backbone(make(**given), CPU) for make in (PretrainConfig, CentersConfig))
    other = load_frozen_backbone(PretrainConfig(**given, seed=1), CPU)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert not any(parameter.requires_grad for parameter in one.module.parameters())


def test_the_bit_depth_is_that_of_what_is_read(tmp_path: Path) -> None:
    samples = np.random.RandomState(0).randint(0, 4096, (32, 32), dtype=np.uint16)
    Image.fromarray(samples).save(tmp_path / "deep.png")
    given: dict[str, Any] = {"backbone": "efficientnet_lite", "img_size": (32,)}
    identities = set()
    for bit_depth in (12, 16):
        backbone = load_frozen_backbone(PretrainConfig(bit_depth=bit_depth, **given), CPU)
        expected = torch.from_numpy(np.rint(samples / (2**bit_depth - 1) * 255).astype(np.uint8))
        assert torch.equal(backbone.read(str(tmp_path / "deep.png")), expected[..., None].expand(-1, -1, 3))
        identities.add(str(backbone.identity))
    assert len(identities) == 2


def test_the_published_recipe_cuts_the_middle_out() -> None:
    given: dict[str, Any] = {"backbone": "resnet10t", "backbone_weights": "random"}
    whole = load_frozen_backbone(PretrainConfig(**given, img_size=(224,)), CPU)
    middle = load_frozen_backbone(PretrainConfig(**given, recipe="published"), CPU)
    image = photo(0, (300, 224))
    assert torch.equal(middle.transform(image), whole.transform(image.crop((38, 0, 262, 224))))
    assert middle.entry == whole.entry and middle.identity == [*whole.identity, "resize224_crop224"]
