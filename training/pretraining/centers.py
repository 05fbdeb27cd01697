"""Centers of the angle loss.

The center of a level is the mean residual of the patches of normal images, before any projector: each image against
normal references of the same product and view, without augmentation and with the normalization of the backbone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from adfeatures.checkpoints import load_checkpoint, save_checkpoint
from adfeatures.errors import AdfeaturesError, CheckpointError, InputError
from adfeatures.images import ImageTransform

from ..data.images import ImageLoader
from ..data.items import NORMAL, Item, items_digest
from ..data.real_iad import reference_pool
from ..data.transforms import MaskTransform
from ..distributed import world_size
from .config import CentersConfig, PretrainConfig
from .dataset import Draw, PretrainingDataset
from .inputs import FrozenBackbone, load_frozen_backbone, read_split
from .residuals import batch_residuals

FORMAT = "adfeatures-centers"
# Batches between two states to resume from.
SAVE_EVERY = 50
_ADVICE = (
    "Compute them with: python -m training.centers "
    "and the same --backbone, --backbone-weights, --levels and --img-size."
)


def centers_of(config: CentersConfig, device: torch.device) -> list[Tensor]:
    """What a config asks for; errors as of ``compute_centers``, and those of reading the data and the backbone."""
    train, _ = read_split(config)
    return compute_centers(config, load_frozen_backbone(config, device), train, reference_pool(train))


def find_centers(config: PretrainConfig, backbone: FrozenBackbone, train: Sequence[Item]) -> list[Tensor]:
    """The centers for a pretraining, on the device of the backbone: of a file or, in a single process, computed now.

    Raises:
        InputError: If they are needed by several processes and there are none.
        CheckpointError: If those of the file are of other features.
    """
    path = config.centers or str(Path(config.output) / "centers.safetensors")
    if config.centers is None and world_size() == 1:
        given = CentersConfig(output=path, seed=config.seed, workers=config.workers)
        centers = compute_centers(given, backbone, train, reference_pool(train))
    elif Path(path).exists():
        centers = load_centers(path, backbone)
    else:
        raise InputError(
            f"There are no centers {path}. "
            "Run python -m training.centers in one process first, then give --centers FILE."
        )
    return [center.to(backbone.device) for center in centers]


def compute_centers(
    config: CentersConfig, backbone: FrozenBackbone, items: Sequence[Item], pool: Sequence[Item]
) -> list[Tensor]:
    """Mean residual of all patches of the normal images, summed in float64, kept in a file that says what it is of.

    The state is kept beside the output, as ``<output>.partial.safetensors``: the same call resumes from there. A
    finished output of the same call is returned as it is.

    Args:
        config: Where to write, how many images and references to draw, and how. Data and backbone are those given here.
        backbone: The backbone, on the device to compute on.
        items: What to take the normal images from: all of label 0, of the NG tree of Real-IAD as well.
        pool: Normal images that serve as references, drawn with replacement.

    Returns:
        (C_l,) float32 per level, on the CPU.

    Raises:
        InputError: For no normal images, or a product and view without references.
        ImageError: If image after image cannot be read; single ones are replaced by others with a warning.
        CheckpointError: If the output or the state beside it comes from another call.
        AdfeaturesError: If features are not finite, or a file cannot be written.
    """
    normal, transform = [item for item in items if item.label == NORMAL], backbone.transform
    if not normal:
        raise InputError("There are no normal images to compute centers from.")
    dataset = PretrainingDataset(
        normal, pool, _Plain(transform), transform, MaskTransform(transform.img_size), shots=(config.shots,)
    )
    draws = _draws(len(normal), config)
    facts = {
        "format": FORMAT,
        **origin(backbone),
        "products": json.dumps(sorted({item.product for item in normal})),
        "normal_images": f"{len(normal)} {items_digest(normal)}",
        "references": f"{len(pool)} {items_digest(pool)}",
        "images": str(len(draws)),
        **{name: str(getattr(config, name)) for name in ("shots", "seed", "batch_size")},
    }
    output = Path(config.output)
    if output.exists():
        return _read_levels(output, facts)[0]
    partial = output.with_suffix(f".partial{output.suffix}")
    total = _Total.load(partial, facts) if partial.exists() else _Total()
    batches = [draws[start : start + config.batch_size] for start in range(0, len(draws), config.batch_size)]
    # A generator of its own, so that torch's is left as it is.
    loader = ImageLoader(
        dataset, batch_sampler=batches[total.batches :], num_workers=config.workers, generator=torch.Generator()
    )
    for batch in tqdm(loader, desc="centers", unit="batch", total=len(batches), initial=total.batches, disable=None):
        total.add(_residuals(backbone, batch["views"], batch["references"]), batch["path"])
        if total.batches % SAVE_EVERY == 0:
            total.save(partial, facts)
    centers = [(level / count).float() for level, count in zip(total.sums, total.patches, strict=True)]
    _write_levels(output, "center", centers, facts)
    partial.unlink(missing_ok=True)
    return centers


def origin(backbone: FrozenBackbone) -> dict[str, str]:
    """Which features centers are of: part of the metadata of their file."""
    mean, std = backbone.entry.normalization
    return {
        "backbone": backbone.name,
        "weights": json.dumps(backbone.fingerprint),
        "levels": json.dumps(backbone.entry.blocks),
        "img_size": json.dumps(backbone.entry.img_size),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
    }


def load_centers(path: str | os.PathLike[str], backbone: FrozenBackbone) -> list[Tensor]:
    """Read centers that ``compute_centers`` wrote, or the original's ``.npy`` of shape (levels, C).

    Args:
        path: The file.
        backbone: What they must be of. A ``.npy`` says nothing but the number of levels and channels.

    Returns:
        (C_l,) float32 per level.

    Raises:
        CheckpointError: For a file that is missing, damaged, no centers, or of other features.
    """
    path, channels = Path(path), list(backbone.entry.channels)
    centers = _read_npy(path) if path.suffix == ".npy" else _read_centers(path, origin(backbone))
    if (lengths := [len(center) for center in centers]) != channels:
        raise CheckpointError(f"{path} holds centers of {lengths} channels, but the levels have {channels}. {_ADVICE}")
    return centers


@dataclass(frozen=True)
class _Plain:
    """In the place of the two augmented views: the image as it is, (3, H, W)."""

    transform: ImageTransform

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        return self.transform(image)


def _draws(count: int, config: CentersConfig) -> list[Draw]:
    """Which images, in which order, with which seeds for their references, whatever the size of the batches."""
    random = np.random.default_rng(config.seed)
    order, seeds = random.permutation(count)[: config.images], random.integers(2**63, size=count)
    return [Draw(int(index), config.shots, int(seeds[index])) for index in order]


@torch.no_grad()
def _residuals(backbone: FrozenBackbone, images: Tensor, references: Tensor) -> list[Tensor]:
    encoded = backbone.module(references.flatten(0, 1).to(backbone.device))
    banks = [level.unflatten(0, references.shape[:2]) for level in encoded]
    return batch_residuals(backbone.module(images.to(backbone.device)), banks)


@dataclass
class _Total:
    """Of the batches so far: per level the sum, (C_l,) float64 on the CPU, and the number of the residuals."""

    sums: Sequence[Tensor] = ()
    patches: Sequence[int] = ()
    batches: int = 0

    def add(self, residuals: Sequence[Tensor], paths: Sequence[str]) -> None:
        sums = [level.double().sum(dim=(0, 2, 3)).cpu() for level in residuals]
        patches = [level[:, 0].numel() for level in residuals]
        if not all(level.isfinite().all() for level in sums):
            raise AdfeaturesError(
                f"The backbone gives features that are not finite for one of {', '.join(paths)}. Check its weights."
            )
        if self.batches:
            sums = [before + level for before, level in zip(self.sums, sums, strict=True)]
            patches = [before + count for before, count in zip(self.patches, patches, strict=True)]
        self.sums, self.patches, self.batches = sums, patches, self.batches + 1

    def save(self, path: Path, facts: Mapping[str, str]) -> None:
        position = {"batches": str(self.batches), "patches": json.dumps(self.patches)}
        _write_levels(path, "sum", self.sums, {**facts, **position})

    @classmethod
    def load(cls, path: Path, facts: Mapping[str, str]) -> _Total:
        sums, metadata = _read_levels(path, facts)
        return cls(sums, json.loads(metadata["patches"]), int(metadata["batches"]))


def _write_levels(path: Path, name: str, tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> None:
    save_checkpoint(path, {f"{name}.{level}": tensor for level, tensor in enumerate(tensors, 1)}, metadata=metadata)


def _read_levels(path: Path, facts: Mapping[str, str]) -> tuple[list[Tensor], dict[str, str]]:
    """Tensors in the order of the levels, and metadata, of a file that was written with the same facts."""
    checkpoint = load_checkpoint(path)
    differing = [key for key in facts if checkpoint.metadata.get(key) != facts[key]]
    if differing:
        raise CheckpointError(
            f"{path} is of another run, with other {', '.join(differing)}. Remove it, or choose another output."
        )
    return _by_level(checkpoint.state_dict), checkpoint.metadata


def _read_centers(path: Path, wanted: Mapping[str, str]) -> list[Tensor]:
    """The centers of a file that was written for features of this origin."""
    checkpoint = load_checkpoint(path)
    found = checkpoint.metadata
    if found.get("format") != FORMAT or not all(key.startswith("center.") for key in checkpoint.state_dict):
        raise CheckpointError(f"{path} holds no centers. {_ADVICE}")
    differences = []
    for key, value in wanted.items():
        # Of the fingerprints of weights one in common is enough.
        if found[key] != value and not (key == "weights" and set(json.loads(found[key])) & set(json.loads(value))):
            short = key in ("backbone", "levels", "img_size")
            differences.append(f"{key} {found[key]}, not {value}" if short else f"other {key}")
    if differences:
        raise CheckpointError(f"{path} holds centers of other features: {'; '.join(differences)}. {_ADVICE}")
    return [center.float() for center in _by_level(checkpoint.state_dict)]


def _read_npy(path: Path) -> list[Tensor]:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read as centers: {error}. {_ADVICE}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise CheckpointError(f"{path} does not hold finite centers of shape (levels, channels). {_ADVICE}")
    return list(torch.from_numpy(array.astype(np.float32)))


def _by_level(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensors[key] for key in sorted(tensors, key=lambda key: int(key.rpartition(".")[2]))]
