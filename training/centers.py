"""Centers of the angle loss: ``python -m training.centers --root DIR --backbone NAME --output centers.safetensors``.

The center of a level is the mean residual of the patches of normal images, before any projector: each image against
normal references of the same product and view, without augmentation and with the normalization of the backbone. The
command resumes when it was interrupted, and then gives the same bytes as if it had not been.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
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
from adfeatures.images import ImageTransform, build_transform
from adfeatures.loading import Encoder, load_backbone
from adfeatures.references import weights_fingerprint

from . import console
from .console import add_options, from_options, option
from .data.images import ImageLoader
from .data.items import NORMAL, Item, items_digest
from .data.real_iad import reference_pool, split_by_sample
from .data.transforms import MaskTransform
from .distributed import processes, world_size
from .pretraining.dataset import KINDS, Draw, PretrainingDataset, read_items
from .pretraining.residuals import batch_residuals

FORMAT = "adfeatures-centers"
# Batches between two states to resume from.
SAVE_EVERY = 50


@dataclass(frozen=True)
class CentersConfig:
    """How centers are computed.

    The defaults are those of the published weights, on the images that ``training.pretrain`` trains on.
    """

    output: str = option("centers.safetensors", "file to write")
    data: str = option("real_iad", "what root holds", KINDS)
    root: str = option("data/Real-IAD", "folder of the data set (for a manifest: the CSV file)")
    products: tuple[str, ...] = option((), "products to take; the default is all")
    filter_list: str | None = option(None, "Real-IAD: folder or file of lists of the anomalous images to keep")
    held_out: float = option(0.1, "part of the samples that is left out, as in the pretraining with the same seed")
    backbone: str = option("dinov2_base", "name of a backbone of adfeatures, or of a timm ViT or CNN")
    backbone_weights: str | None = option(None, "file or place of its weights; the default is the published ones")
    img_size: tuple[int, ...] = option((), "input height and width in pixels; the default is the backbone's")
    levels: tuple[int, ...] = option((), "blocks or stages, counted from 1; the default is the backbone's")
    images: int | None = option(None, "take only so many normal images, drawn at random; the default takes all")
    shots: int = option(4, "references of each image")
    batch_size: int = option(16, "images encoded at once")
    seed: int = option(42, "of the images left out and the references")
    workers: int = option(4, "processes that read images")
    device: str | None = option(None, "cpu or cuda; the default is cuda where there is one")

    def __post_init__(self) -> None:
        if Path(self.output).suffix != ".safetensors":
            raise InputError(f"Centers are written as .safetensors, not {self.output}.")
        if len(self.img_size) > 2:
            raise InputError(f"img_size is one side or height and width, got {self.img_size}.")


def compute_centers(
    output: str | os.PathLike[str],
    backbone: Encoder,
    items: Sequence[Item],
    pool: Sequence[Item],
    transform: ImageTransform,
    *,
    name: str,
    images: int | None = None,
    shots: int = 4,
    seed: int = 42,
    batch_size: int = 16,
    workers: int = 0,
) -> list[Tensor]:
    """Mean residual of all patches of the normal images, summed in float64 and written to a file with what it was computed from.

    The state is kept beside the output, as ``<output>.partial.safetensors``: the same call resumes from there. A
    finished output of the same call is returned as it is.

    Args:
        output: File to write, ``.safetensors``.
        backbone: What ``load_backbone`` gives, on the device to compute on.
        items: What to take the normal images from: all of label 0, of the NG tree of Real-IAD as well.
        pool: Normal images that serve as references, drawn with replacement.
        transform: For images and references.
        name: Name of the backbone.
        images: Take so many of the normal images, in an order drawn from the seed. None takes all.
        shots: References of each image.
        seed: Of what is drawn, not negative.
        batch_size: Images encoded at once.
        workers: Processes that read images.

    Returns:
        (C_l,) float32 per level, on the CPU.

    Raises:
        InputError: For no normal images, a product and view without references, or senseless numbers.
        ImageError: If image after image cannot be read; single ones are replaced by others with a warning.
        CheckpointError: If the output or the state beside it comes from another call.
        AdfeaturesError: If features are not finite, or a file cannot be written.
    """
    normal = [item for item in items if item.label == NORMAL]
    draws = _draws(len(normal), images, shots, seed, batch_size)
    dataset = PretrainingDataset(
        normal, pool, _Plain(transform), transform, MaskTransform(transform.img_size), shots=(shots,)
    )
    facts = {
        "format": FORMAT,
        **origin(backbone, transform, name=name),
        "products": json.dumps(sorted({item.product for item in normal})),
        "normal_images": f"{len(normal)} {items_digest(normal)}",
        "references": f"{len(pool)} {items_digest(pool)}",
        "images": str(sum(map(len, draws))),
        "shots": str(shots),
        "seed": str(seed),
        "batch_size": str(batch_size),
    }
    output = Path(output)
    if output.exists():
        return list(_same_run(output, facts)[0].values())
    partial = output.with_suffix(f".partial{output.suffix}")
    total = _Total.load(partial, facts) if partial.exists() else _Total()
    # A generator of its own, so that torch's is left as it is.
    loader = ImageLoader(
        dataset, batch_sampler=draws[total.batches :], num_workers=workers, generator=torch.Generator()
    )
    for batch in tqdm(loader, desc="centers", unit="batch", total=len(draws), initial=total.batches, disable=None):
        total.add(_residuals(backbone, batch), batch["path"])
        if total.batches % SAVE_EVERY == 0:
            total.save(partial, facts)
    centers = total.means()
    save_checkpoint(
        output, {f"center.{level}": center for level, center in enumerate(centers, start=1)}, metadata=facts
    )
    partial.unlink(missing_ok=True)
    return centers


def origin(backbone: Encoder, transform: ImageTransform, *, name: str) -> dict[str, str]:
    """Which features centers are of: part of the metadata of their file. Arguments as for ``compute_centers``."""
    return {
        "backbone": name,
        "weights": json.dumps(weights_fingerprint(backbone.state_dict())),
        "levels": json.dumps(backbone.levels),
        "img_size": json.dumps(transform.img_size),
        "mean": json.dumps(transform.mean),
        "std": json.dumps(transform.std),
    }


def load_centers(
    path: str | os.PathLike[str], channels: Sequence[int], expected: Mapping[str, str] | None = None
) -> list[Tensor]:
    """Read centers that ``compute_centers`` wrote, or the original's ``.npy`` of shape (levels, C).

    Args:
        path: The file.
        channels: Channels C_l of the levels.
        expected: The ``origin`` that they must have, None for any. A ``.npy`` says nothing of it.

    Returns:
        (C_l,) float32 per level.

    Raises:
        CheckpointError: For a file that is missing, damaged, no centers, or of other features.
    """
    path = Path(path)
    if path.suffix == ".npy":
        centers = _read_npy(path)
    else:
        centers, found = _read_centers(path)
        differences = [_difference(key, found[key], value) for key, value in (expected or {}).items()]
        if any(differences):
            raise CheckpointError(
                f"{path} holds centers of other features: {'; '.join(filter(None, differences))}. {_ADVICE}"
            )
    if (lengths := [len(center) for center in centers]) != list(channels):
        raise CheckpointError(
            f"{path} holds centers of {lengths} channels, but the levels have {list(channels)}. {_ADVICE}"
        )
    return centers


_ADVICE = "Compute them with: python -m training.centers and the same --backbone, --backbone-weights, --levels and --img-size."


def _difference(key: str, found: str, wanted: str) -> str:
    """In what an entry differs, "" where it does not. Of the fingerprints of weights one in common is enough."""
    if found == wanted or (key == "weights" and set(json.loads(found)) & set(json.loads(wanted))):
        return ""
    return f"{key} {found}, not {wanted}" if key in ("backbone", "levels", "img_size") else f"other {key}"


@dataclass(frozen=True)
class _Plain:
    """In the place of the two augmented views: the image as it is, (3, H, W)."""

    transform: ImageTransform

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        return self.transform(image)


def _draws(count: int, images: int | None, shots: int, seed: int, batch_size: int) -> list[list[Draw]]:
    """The batches: which images in which order, and with which seeds for their references; these do not depend on the batch size."""
    if not count:
        raise InputError("There are no normal images to compute centers from.")
    if seed < 0 or min(shots, batch_size, count if images is None else images) < 1:
        raise InputError(
            f"images, shots and batch_size must be at least 1 and the seed not negative: got {images}, {shots}, {batch_size} and {seed}."
        )
    random = np.random.default_rng(seed)
    order, seeds = random.permutation(count)[:images], random.integers(2**63, size=count)
    draws = [Draw(int(index), shots, int(seeds[index])) for index in order]
    return [draws[start : start + batch_size] for start in range(0, len(draws), batch_size)]


@torch.no_grad()
def _residuals(backbone: Encoder, batch: Mapping[str, Tensor]) -> list[Tensor]:
    device = next(backbone.parameters()).device
    images, references = batch["views"].to(device), batch["references"].to(device)
    encoded = [level.unflatten(0, references.shape[:2]) for level in backbone(references.flatten(0, 1))]
    return batch_residuals(backbone(images), encoded)


class _Total:
    """Sums over the batches so far: per level (C_l,) float64 on the CPU, and the number of patches."""

    def __init__(self) -> None:
        self.batches = 0
        self.sums: list[Tensor] = []
        self.patches: list[int] = []

    def add(self, residuals: Sequence[Tensor], paths: Sequence[str]) -> None:
        sums = [level.double().sum(dim=(0, 2, 3)).cpu() for level in residuals]
        if not all(level.isfinite().all() for level in sums):
            raise AdfeaturesError(
                f"The backbone gives features that are not finite for one of {', '.join(paths)}. Check its weights."
            )
        patches = [level.shape[0] * level.shape[2] * level.shape[3] for level in residuals]
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.batches else sums
        self.patches = [a + b for a, b in zip(self.patches, patches, strict=True)] if self.batches else patches
        self.batches += 1

    def means(self) -> list[Tensor]:
        return [(level / count).float() for level, count in zip(self.sums, self.patches, strict=True)]

    def save(self, path: Path, facts: Mapping[str, str]) -> None:
        position = {"batches": str(self.batches), "patches": json.dumps(self.patches)}
        save_checkpoint(
            path,
            {f"sum.{level}": values for level, values in enumerate(self.sums, start=1)},
            metadata={**facts, **position},
        )

    @classmethod
    def load(cls, path: Path, facts: Mapping[str, str]) -> _Total:
        total = cls()
        tensors, metadata = _same_run(path, facts)
        total.sums = list(tensors.values())
        total.batches, total.patches = int(metadata["batches"]), json.loads(metadata["patches"])
        return total


def _same_run(path: Path, facts: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in the order of the levels, and metadata, of a file that was written with the same facts."""
    checkpoint = load_checkpoint(path)
    differing = [key for key in facts if checkpoint.metadata.get(key) != facts[key]]
    if differing:
        raise CheckpointError(
            f"{path} is of another run, with other {', '.join(differing)}. Remove it, or choose another output."
        )
    return _by_level(checkpoint.state_dict), checkpoint.metadata


def _read_centers(path: Path) -> tuple[list[Tensor], dict[str, str]]:
    checkpoint = load_checkpoint(path)
    if checkpoint.metadata.get("format") != FORMAT or not all(
        key.startswith("center.") for key in checkpoint.state_dict
    ):
        raise CheckpointError(f"{path} holds no centers. {_ADVICE}")
    return [center.float() for center in _by_level(checkpoint.state_dict).values()], checkpoint.metadata


def _read_npy(path: Path) -> list[Tensor]:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read as centers: {error}. {_ADVICE}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise CheckpointError(f"{path} does not hold finite centers of shape (levels, channels). {_ADVICE}")
    return list(torch.from_numpy(array.astype(np.float32)))


def _by_level(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(tensors.items(), key=lambda pair: int(pair[0].rpartition(".")[2])))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.centers", description="Compute the centers of the angle loss."
    )
    add_options(parser, CentersConfig)
    options = parser.parse_args(arguments)

    def call() -> None:
        config = from_options(options, CentersConfig)
        with processes(config.device) as device:
            if world_size() > 1:
                raise InputError(
                    "Centers are computed by one process. Call python -m training.centers without torchrun."
                )
            run(config, device)
        print(f"{config.output}: done")

    return console.run("centers", call)


def run(config: CentersConfig, device: torch.device) -> None:
    """Compute the centers that a config asks for.

    Errors as in ``compute_centers``, and those of reading the data and the backbone.
    """
    items = read_items(config.data, config.root, config.products or None, config.filter_list)
    train, _ = split_by_sample(items, config.held_out, config.seed)
    # Random weights, where they are asked for, are then those of the pretraining.
    torch.manual_seed(config.seed)
    size = (config.img_size[0], config.img_size[-1]) if config.img_size else None
    backbone, entry = load_backbone(
        config.backbone, weights=config.backbone_weights, img_size=size, levels=config.levels or None
    )
    compute_centers(
        config.output,
        backbone.to(device),
        train,
        reference_pool(train),
        build_transform(entry.img_size, *entry.normalization),
        name=config.backbone,
        images=config.images,
        shots=config.shots,
        seed=config.seed,
        batch_size=config.batch_size,
        workers=config.workers,
    )


if __name__ == "__main__":
    sys.exit(main())
