"""The files of reference banks: safetensors, with the facts of each bank as JSON in the header."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checkpoints import atomic_path
from .errors import CheckpointError

FORMAT, VERSION = "adfeatures-references", "1"
T = TypeVar("T")
# The facts of a bank as plain values, and its tensors.
Packed: TypeAlias = "tuple[dict[str, Any], dict[str, Tensor]]"


def write(banks: Mapping[str, Packed], path: str | os.PathLike[str]) -> None:
    """Write banks by product to one file, atomically.

    Raises:
        AdfeaturesError: If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    facts = []
    for number, (product, (own, of_bank)) in enumerate(banks.items()):
        tensors |= {f"{number}.{name}": tensor.contiguous() for name, tensor in of_bank.items()}
        facts.append({"product": product, **own})
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, "version": VERSION, "banks": json.dumps(facts)})


def read(path: str | os.PathLike[str], unpack: Callable[[dict[str, Any], dict[str, Tensor]], T]) -> dict[str, T]:
    """Read the banks that ``write`` wrote, by product.

    Args:
        path: The file.
        unpack: From the facts and the tensors of a bank to the bank.

    Raises:
        CheckpointError: For a file that is missing, damaged or no bank.
    """
    if not Path(path).is_file():
        raise CheckpointError(
            f"There is no reference bank {path}. Make one with: adfeatures fit --references DIR --bank {path}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            facts = _facts(file.metadata() or {}, path)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        banks = {own.pop("product"): unpack(own, _of_bank(number, tensors)) for number, own in enumerate(facts)}
    except (SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The reference bank {path} is damaged ({error}). Make it again with: adfeatures fit"
        ) from error
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise CheckpointError(
            f"The reference bank {path} holds NaN or infinite values. Make it again with: adfeatures fit"
        )
    return banks


def _facts(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a reference bank. Make one with: adfeatures fit --references DIR --bank FILE"
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} was written by a newer version of adfeatures. Update the package: pip install -U adfeatures"
        )
    return list(json.loads(metadata["banks"]))


def _of_bank(number: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{number}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
