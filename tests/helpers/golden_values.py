"""Weights and inputs of the golden outputs in ``tests/golden``, rebuilt from their names.

The outputs are those of the original implementation in float32 on a CPU. ``state_dicts.json`` holds the keys and shapes
of its files.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"


def value(name: str, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    """The float32 tensor that belongs to a name: standard normal times ``scale``."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(np.asarray(scale * random.standard_normal(tuple(shape)), dtype=np.float32))


def golden(file: str) -> dict[str, Tensor]:
    """The tensors of ``tests/golden/<file>.safetensors``."""
    return load_file(FOLDER / f"{file}.safetensors")


def shapes(file: str) -> dict[str, list[int]]:
    """Keys and shapes of the original state dict behind a golden: projector, backbone_{dinov2,clip,imagebind}."""
    return json.loads((FOLDER / "state_dicts.json").read_text())[file]


def fill(shapes: Mapping[str, Sequence[int]], prefix: str) -> dict[str, Tensor]:
    """The weights of a module: values of ``prefix + key``, scale 0.05; LayerNorm weights and gammas about 1."""
    return {key: value(prefix + key, shape, 0.05) + _is_gain(key, shape) for key, shape in shapes.items()}


def _is_gain(key: str, shape: Sequence[int]) -> bool:
    norm = any(part in key for part in ("norm", "ln_", "pre_transformer_layer.0"))
    return key.endswith("gamma") or (norm and key.endswith("weight") and len(shape) == 1)


def assert_near(found: Tensor | Iterable[Tensor], expected: Tensor | Iterable[Tensor], tolerance: float = 1e-5) -> None:
    """Equal up to ``tolerance`` times the largest absolute value expected, per tensor."""
    pairs = (
        [(found, expected)]
        if isinstance(found, Tensor) and isinstance(expected, Tensor)
        else list(zip(found, expected, strict=True))
    )
    for one, other in pairs:
        assert one.shape == other.shape
        error = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"off by {error:.1e} of the largest value"
