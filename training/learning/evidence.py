"""What the head sees of the pictures of a product, kept in a file, so that a stopped run resumes."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adfeatures
from adfeatures import scoring
from adfeatures.catalog import BACKBONES, MODELS
from adfeatures.checkpoints import atomic_path
from adfeatures.errors import InputError
from adfeatures.evidence import SEEN
from adfeatures.factory import load_learned
from adfeatures.references import ReferenceBank

from ..judging.packages import Photographs
from ..judging.products import Product, pictures

MODEL, TAG = "residual_lite", "in1k_v2"
BACKBONE = BACKBONES[MODELS[MODEL].backbone]
REFERENCES, GOOD, BAD = 16, 12, 18
BATCH_SIZE = 8
# Maps while training are of this many pixels a side, which is enough to see where a defect is.
SIDE = 80


@dataclass
class Evidence:
    """Pictures of a product against references of it.

    Attributes:
        distances: As multiples of what is normal, (N, h_l, w_l) per level, float16 as all.
        scales: What is normal, of the same shapes.
        seen: The rest of the evidence, (N, S, h_l, w_l) per level.
        bad: Which pictures are defective, bool (N,).
        located: Of which the mask says where.
        masks: Where the defects are, bool (N, SIDE, SIDE).
    """

    distances: list[Tensor]
    scales: list[Tensor]
    seen: list[Tensor]
    bad: Tensor
    located: Tensor
    masks: Tensor

    def of(self, pictures: Tensor) -> Evidence:
        """Some of the pictures, as float32."""
        distances, scales, seen = (
            [level[pictures].float() for level in part] for part in (self.distances, self.scales, self.seen)
        )
        return Evidence(distances, scales, seen, self.bad[pictures], self.located[pictures], self.masks[pictures])

    @classmethod
    def load(cls, path: Path) -> Evidence:
        """Read a file that ``collect`` wrote.

        Raises:
            InputError: For one of another version, which saw something else.
        """
        tensors = load_file(path)
        if tensors["seen.0"].shape[1] != SEEN:
            raise InputError(f"{path} is of another version of this command. Give another folder as --work.")
        distances, scales, seen = (
            [tensors[f"{name}.{level}"] for level in range(len(BACKBONE.blocks))]
            for name in ("distances", "scales", "seen")
        )
        return cls(distances, scales, seen, tensors["bad"], tensors["located"], tensors["masks"])


def files_of(name: str, folder: Path) -> dict[Path, int]:
    """The files of evidence of a product, and the number of references in each: 8, and one of 1, 2, 4 or 16."""
    counts = (8, (1, 2, 4, 16)[zlib.crc32(name.encode()) % 4])
    return {folder / f"{name}_{count}.safetensors": count for count in counts}


@torch.no_grad()
def collect(named: tuple[str, Product], photographs: Path, folder: Path) -> None:
    """Write the files of evidence of the pictures of a product with its name."""
    name, product = named
    shown = pictures(name, Photographs(photographs), references=REFERENCES, good=GOOD, bad=BAD, product=product)
    model = adfeatures.create_model(f"{MODEL}.in1k_v1")
    facts = MODELS[MODEL].tags[TAG]
    model.scorer = scorer = load_learned(BACKBONE, facts.typical_distances, None)
    transform = adfeatures.create_transform(model)
    images = torch.stack([transform(image) for image in shown.references + shown.tests])
    parts = [model.patches(batch) for batch in images.split(BATCH_SIZE)]
    patches = [torch.cat(level) for level in zip(*parts, strict=True)]
    masks = torch.from_numpy(shown.masks).float()[:, None]
    common = {
        "bad": torch.from_numpy(shown.labels > 0),
        "located": torch.from_numpy(shown.located),
        "masks": torch.nn.functional.adaptive_max_pool2d(masks, SIDE)[:, 0] > 0,
    }
    for path, count in files_of(name, folder).items():
        generator = torch.Generator().manual_seed(zlib.crc32(path.name.encode()))
        drawn = torch.randperm(REFERENCES, generator=generator)[:count].sort().values
        bank = ReferenceBank.from_features([level[drawn] for level in patches], looks=scorer.looks)
        scorer.prepare(bank)
        left_out = bank.leave_one_out(compare=scorer.compare) if count > 1 else ()
        scales = [scorer.scales(left_out, len(patches))]
        compared = scorer.compare(bank, [level[REFERENCES:] for level in patches])
        tensors = dict(common)
        for level, (own, normal) in enumerate(zip(compared, scorer.normal(compared, scales), strict=True)):
            tensors[f"distances.{level}"] = (own[:, 0] / normal).half()
            tensors[f"scales.{level}"] = normal.expand(len(own), -1, -1).half()
            tensors[f"seen.{level}"] = own[:, 1:].half()
        with atomic_path(path) as temporary:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)


def maps_of(scorer: scoring.LocalCosineScorer, scores: list[Tensor]) -> Tensor:
    """Maps (N, SIDE, SIDE) of what the head gave, as ``anomaly_maps`` makes larger ones."""
    side = BACKBONE.img_size[0]
    return scorer.leveled(scoring.fuse(scores, (SIDE, SIDE), scoring.SIGMA * SIDE / side))
