"""Centers of the angle loss.

The center of a level is the mean residual of the patches of normal images, before any projector: each image against
normal references of the same product and view, without augmentation and with the normalization of the backbone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adfeatures.checkpoints import load_checkpoint, regular_file, save_checkpoint
from adfeatures.documents import DocumentError, parse
from adfeatures.errors import AdfeaturesError, CheckpointError, InputError
from adfeatures.images import normalized
from adfeatures.locks import only_run_for

from ..console import progress
from ..data.image_cache import ImageCache
from ..data.images import ImageLoader
from ..data.items import NORMAL, Item, items_digest
from ..distributed import agreed, rank
from .config import CentersConfig
from .dataset import Draw, PretrainingDataset, collate
from .frozen_backbone import FrozenBackbone
from .inputs import Inputs
from .residuals import batch_residuals

FORMAT = "adfeatures-centers"
# Batches between two states to resume from.
SAVE_EVERY = 50
_ADVICE = (
    "Compute them with: python -m training.centers "
    "and the same --recipe, --backbone, --backbone-weights, --levels, --img-size and --bit-depth."
)


def centers_of(config: CentersConfig, device: torch.device) -> list[Tensor]:
    """What a config asks for; errors as of ``compute_centers`` and ``Inputs``."""
    with only_run_for(config.output):
        inputs = Inputs(config, device)
        return compute_centers(config, inputs.backbone, inputs.train, inputs.normal, inputs.cache)


def find_centers(path: str | None, folder: Path, inputs: Inputs, seed: int) -> list[Tensor]:
    """The centers for a pretraining, on the device of the backbone.

    They are those of a file or, without a path, of the folder of the run, where one process computes them for all.

    Raises:
        CheckpointError: If there is no such file, or those of the file are of other features.
        AdfeaturesError: As of ``compute_centers``.
    """
    file = Path(path or folder / "centers.safetensors")
    if path is None:
        config = CentersConfig(output=str(file), seed=seed, workers=inputs.workers)
        given = inputs.backbone, inputs.train, inputs.normal, inputs.cache
        agreed(lambda: compute_centers(config, *given) if rank() == 0 else None)
    return [center.to(inputs.backbone.device) for center in load_centers(file, inputs.backbone)]


def compute_centers(
    config: CentersConfig,
    backbone: FrozenBackbone,
    items: Sequence[Item],
    pool: Sequence[Item],
    cache: ImageCache | None = None,
) -> list[Tensor]:
    """Mean residual of all patches of the normal images, summed in float64, kept in a file that says what it is of.

    The state is kept beside the output, as ``<output>.partial.safetensors``: the same call resumes from there. A
    finished output of the same call is returned as it is.

    Args:
        config: Where to write, how many images and references to draw, and how. Data and backbone are those given here.
        backbone: The backbone, on the device to compute on.
        items: What to take the normal images from: all of label 0, of the NG tree of Real-IAD as well.
        pool: Normal images that serve as references, drawn with replacement.
        cache: Where images are looked up before their files are read.

    Returns:
        (C_l,) float32 per level, on the CPU.

    Raises:
        InputError: For no normal images, or a product and view without references.
        ImageError: If image after image cannot be read; single ones are replaced by others with a warning.
        CheckpointError: If the output or the state beside it comes from another call.
        AdfeaturesError: If features are not finite, or a file cannot be written.
    """
    normal, output = [item for item in items if item.label == NORMAL], Path(config.output)
    if not normal:
        raise InputError("There are no normal images to compute centers from.")
    dataset = PretrainingDataset(normal, pool, _plain, backbone.transform, cache=cache, shots=(config.shots,))
    draws = _draws(len(normal), config)
    facts = {
        **_origin(backbone),
        "products": json.dumps(sorted({item.product for item in normal})),
        "normal_images": f"{len(normal)} {items_digest(normal)}",
        "references": f"{len(pool)} {items_digest(pool)}",
        "images": str(len(draws)),
        **{name: str(getattr(config, name)) for name in ("shots", "seed", "batch_size")},
    }
    if output.exists():
        return _resumed(output, facts)[0]
    state, done = output.with_suffix(f".partial{output.suffix}"), 0
    sums = [torch.zeros(channels, dtype=torch.float64) for channels in backbone.entry.channels]
    patches = [0] * len(sums)
    if state.exists():
        sums, position = _resumed(state, facts)
        patches, done = _fact(state, position, "patches", list[int]), _fact(state, position, "batches", int)
        if [(len(total), count > 0) for total, count in zip(sums, patches, strict=False)] != [
            (channels, True) for channels in backbone.entry.channels
        ]:
            raise CheckpointError(f"{state} is damaged. Remove it to begin again.")
    batches = [draws[start : start + config.batch_size] for start in range(0, len(draws), config.batch_size)]
    loader = ImageLoader(dataset, batches[done:], workers=config.workers, collate=collate)
    for batch in progress(loader, desc="centers", unit="batches", total=len(batches), initial=done):
        residuals = _residuals(backbone, batch)
        sums = [total + level.double().sum(dim=(0, 2, 3)).cpu() for total, level in zip(sums, residuals, strict=True)]
        patches = [count + level[:, 0].numel() for count, level in zip(patches, residuals, strict=True)]
        if not all(level.isfinite().all() for level in sums):
            raise AdfeaturesError(
                f"The backbone gives features that are not finite for one of {', '.join(batch['path'])}. "
                "Check its weights."
            )
        done += 1
        if done % SAVE_EVERY == 0:
            _write(state, "sum", sums, {**facts, "batches": str(done), "patches": json.dumps(patches)})
    centers = [(level / count).float() for level, count in zip(sums, patches, strict=True)]
    _write(output, "center", centers, facts)
    state.unlink(missing_ok=True)
    return centers


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
    centers = _read_npy(path) if path.suffix == ".npy" else _read_centers(path, _origin(backbone))
    if (lengths := [len(center) for center in centers]) != channels:
        raise CheckpointError(f"{path} holds centers of {lengths} channels, but the levels have {channels}. {_ADVICE}")
    return centers


def _origin(backbone: FrozenBackbone) -> dict[str, str]:
    """Which features centers are of: part of the metadata of their file."""
    mean, std = backbone.entry.normalization
    return {
        "format": FORMAT,
        "backbone": backbone.name,
        "weights": json.dumps(backbone.fingerprint),
        "levels": json.dumps(backbone.entry.blocks),
        "img_size": json.dumps(backbone.entry.img_size),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "bit_depth": str(backbone.bit_depth),
        "preset": backbone.preset,
    }


def _plain(image: Image.Image, seed: int) -> np.ndarray:
    """In the place of two augmented views: the image as it is, (1, H, W, 3)."""
    return np.asarray(image)[None]


def _draws(count: int, config: CentersConfig) -> list[Draw]:
    """Which images, in which order, with which seeds for their references, whatever the size of the batches."""
    random = np.random.default_rng(config.seed)
    order, seeds = random.permutation(count)[: config.images], random.integers(2**63, size=count)
    return [Draw(int(index), config.shots, int(seeds[index])) for index in order]


@torch.no_grad()
def _residuals(backbone: FrozenBackbone, batch: Mapping[str, Tensor]) -> list[Tensor]:
    pixels = (images.to(backbone.device) for images in (batch["views"].squeeze(1), batch["references"]))
    images, references = (backbone.module(normalized(own, *backbone.entry.normalization)) for own in pixels)
    places = batch["reference_indices"].to(backbone.device)
    return batch_residuals(images, [level[places] for level in references])


def _write(path: Path, name: str, levels: Sequence[Tensor], facts: Mapping[str, str]) -> None:
    save_checkpoint(path, {f"{name}.{number}": level for number, level in enumerate(levels, 1)}, metadata=facts)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, in the order of the levels, and metadata."""
    checkpoint = load_checkpoint(path)
    if any(level.ndim != 1 or not level.is_floating_point() for level in checkpoint.state_dict.values()):
        raise CheckpointError(f"{path} holds no centers, which have one dimension. {_ADVICE}")
    tensors = sorted(checkpoint.state_dict.items(), key=lambda entry: (len(entry[0]), entry[0]))
    # Earlier versions knew no other bit depth, and no other geometry.
    return dict(tensors), {"bit_depth": "16", "preset": "squash", **checkpoint.metadata}


def _resumed(path: Path, facts: Mapping[str, str]) -> tuple[list[Tensor], dict[str, str]]:
    """Levels and metadata of a file that was written with the same facts."""
    tensors, metadata = _read(path)
    if differing := [key for key in facts if metadata.get(key) != facts[key]]:
        raise CheckpointError(
            f"{path} is of another run, with other {', '.join(differing)}. Remove it, or choose another output."
        )
    return list(tensors.values()), metadata


def _read_centers(path: Path, wanted: Mapping[str, str]) -> list[Tensor]:
    """The centers of a file that was written for features of this origin."""
    tensors, found = _read(path)
    if found.get("format") != FORMAT or not all(name.startswith("center.") for name in tensors):
        raise CheckpointError(f"{path} holds no centers. {_ADVICE}")
    differences = []
    for key, value in wanted.items():
        # Of the fingerprints of weights one in common is enough.
        if found.get(key) != value and not (
            key == "weights" and set(_fact(path, found, key, list[str])) & set(json.loads(value))
        ):
            short = key in ("backbone", "levels", "img_size", "bit_depth", "preset")
            differences.append(f"{key} {str(found.get(key))[:99]}, not {value}" if short else f"other {key}")
    if differences:
        raise CheckpointError(f"{path} holds centers of other features: {'; '.join(differences)}. {_ADVICE}")
    return [center.float() for center in tensors.values()]


def _fact(path: Path, metadata: Mapping[str, str], name: str, kind: Any) -> Any:
    try:
        return parse(metadata.get(name, ""), kind, f"the {name} of its header")
    except DocumentError as error:
        raise CheckpointError(f"{path} holds no centers: {error}. {_ADVICE}") from error


def _read_npy(path: Path) -> list[Tensor]:
    try:
        # Mapped, since the header may announce any size.
        array = np.load(regular_file(path), mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a damaged file makes its reader fail in any way
        raise CheckpointError(f"{path} cannot be read as centers: {error}. {_ADVICE}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise CheckpointError(f"{path} does not hold finite centers of shape (levels, channels). {_ADVICE}")
    return list(torch.from_numpy(array.astype(np.float32)))
