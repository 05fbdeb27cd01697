"""The reproduction in miniature: rendered images, tiny random backbones, two steps of training, an epoch of methods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from adfeatures.checkpoints import atomic_path
from adfeatures.factory import load_backbone

from ..data import real_iad, synthetic
from ..data.items import NORMAL
from ..distributed import barrier, rank
from ..evaluation.config import SOUND
from .plan import BOTH, REAL_IAD, TRAININGS, Plan, ReproduceConfig

# The ablations are of one backbone, as in the paper.
BACKBONES = {"test_vit": tuple(TRAININGS), "test_vit2": (BOTH,)}
PARTS = synthetic.PRODUCTS[:2]
# The product that is evaluated on, and what is rendered in its place.
BOTTLE, RENDERED = "bottle", synthetic.PRODUCTS[2]
SIDE = 64
FOR_TRAINING = {
    "img_size": (SIDE,),
    "num_heads": 4,
    "num_keys": 8,
    "batch_size": 16,
    "shots": (1, 4),
    "max_steps": 2,
    "held_out": 0.3,
    "validation_images": 10,
    "precision": "float32",
}
FOR_EVALUATION = {"protocol": SOUND, "shots": 2, "epochs": 1}


def smoke_plan(config: ReproduceConfig) -> Plan:
    """The plan, with all that it needs made below the output."""
    data, weights = Path(config.output, "data"), Path(config.output, "backbones")
    if rank() == 0:
        _render(data)
        weights.mkdir(exist_ok=True)
        for name in BACKBONES:
            torch.manual_seed(0)
            module, _ = load_backbone(name, weights="random", img_size=SIDE)
            with atomic_path(weights / f"{name}.safetensors") as temporary:
                save_file(module.state_dict(), temporary)
    barrier()
    given = replace(config, data=str(data), weights=str(weights))
    return Plan(given, BACKBONES, FOR_TRAINING, FOR_EVALUATION)


def _render(data: Path) -> None:
    """Real-IAD to train on, and MVTec AD to evaluate on."""
    synthetic.synthesize(data / REAL_IAD, products=list(PARTS), good=6, bad=4, size=SIDE)
    synthetic.synthesize(data / "rendered", products=[RENDERED], good=2, bad=1, size=SIDE)
    items, folder = real_iad.read(data / "rendered"), data / "mvtec" / BOTTLE
    train = real_iad.reference_pool(items)[::2]
    for number, item in enumerate(items):
        split, kind = "train" if item in train else "test", "good" if item.label == NORMAL else "defect"
        places = {item.image: folder / split / kind / f"{number:03d}.png"}
        if item.mask:
            places[item.mask] = folder / "ground_truth" / kind / f"{number:03d}_mask.png"
        for source, place in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(source) as image, atomic_path(place) as temporary:
                image.save(temporary, "PNG")
