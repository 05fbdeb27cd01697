"""Small models and images for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from adfeatures.backbones import create_backbone
from adfeatures.extractor import FeatureExtractor
from adfeatures.projector import ResidualProjector

CFG = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def tiny_extractor(seed: int = 0, img_size: tuple[int, int] = (56, 56), **kwargs: Any) -> FeatureExtractor:
    """A DINOv2-like extractor of 32 channels with random weights that react to their input."""
    torch.manual_seed(seed)
    backbone = create_backbone("dinov2_base", embed_dim=32, depth=4, num_heads=2)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1.0)
    projector = ResidualProjector(backbone.channels, num_keys=16)
    return FeatureExtractor(backbone, projector, name="tiny", img_size=img_size, pretrained_cfg=CFG, **kwargs)


def photo(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """A smooth random picture of (width, height) pixels."""
    coarse = np.random.RandomState(seed).randint(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_photos(folder: Path, seeds: range, suffix: str = ".png") -> list[Path]:
    """Photos of these seeds as files named after them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed:03d}{suffix}" for seed in seeds]
    for seed, path in zip(seeds, paths, strict=True):
        photo(seed).save(path)
    return paths


def pixels(image: Image.Image) -> np.ndarray:
    """The pixels (H, W, 3) of an RGB picture that stands on its own."""
    assert type(image) is Image.Image and image.mode == "RGB"
    return np.asarray(image)
