"""The files of reference banks: safetensors, with the facts of each bank as JSON in the header."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checkpoints import atomic_path, is_finite, regular_file
from .documents import Size, check, dumps, parse
from .errors import CheckpointError, InputError, ReferencesError
from .evidence import OWN
from .records import MAX_ROTATIONS, BankRecord
from .reduction import GROUPS
from .references import ReferenceBank
from .scoring import MAX_DISTANCE, RINGS

FORMAT, VERSION = "adfeatures-references", "1"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Squares of larger ones are not finite, nor may the sums of a projector be.
_MAX_FEATURE = 1e15
# No distance is so small or large that its logarithm is this.
_MAX_LOG = 100

Score: TypeAlias = Annotated[float, (0, math.inf)]


@dataclass(kw_only=True)
class RecordFacts(BankRecord):
    """What a file says of a bank, with the ranges that a sound one keeps to."""

    product: str
    num_images: Annotated[int, (1, 2**31 - 1)]
    img_size: Size | None = None
    bit_depth: Annotated[int, (9, 16)] = 16
    threshold: Score | None = None
    quantile: Annotated[float, (math.ulp(0), 1)] | None = None
    normal_scores: list[Score] = field(default_factory=list)
    rotations: Annotated[int, (1, MAX_ROTATIONS)] = 1

    def record(self) -> BankRecord:
        """The record alone.

        Raises:
            ValueError: If there is not one hash or name for each image.
        """
        for name in ("files", "sha256s", "pixels"):
            _expect(len(getattr(self, name)) in (0, self.num_images), f"{name}: one per image")
        return BankRecord(**{known.name: getattr(self, known.name) for known in dataclasses.fields(BankRecord)})


@dataclass(kw_only=True)
class _Facts(RecordFacts):
    grids: list[Size]
    groups: Annotated[int, (1, GROUPS)] = 1
    looks: Annotated[int, (0, 64)] = 0
    turned: bool = False
    complete: bool | None = None  # Of earlier versions; the number of rows says it.


def save_banks(path: str | os.PathLike[str], banks: Mapping[str, ReferenceBank]) -> None:
    """Write the banks of several products to one safetensors file, atomically.

    Raises:
        AdfeaturesError: If the file cannot be written.
        InputError: As ``check_destination``.
    """
    check_destination(path)
    tensors: dict[str, Tensor] = {}
    facts = []
    for number, (product, bank) in enumerate(banks.items()):
        for level, (rows, owners) in enumerate(zip(bank.rows, bank.image_of_row, strict=True)):
            tensors |= {f"{number}.rows.{level}": rows, f"{number}.images.{level}": owners}
        for name, parts in (("kept", bank.kept), ("units", bank.units), ("own", bank.own)):
            tensors |= {f"{number}.{name}.{level}": own for level, own in enumerate(parts or ())}
        if bank.scales is not None:
            tensors[f"{number}.scales"] = bank.scales
        own = {"product": product, "grids": bank.grids, "num_images": bank.num_images}
        own |= {"groups": bank.groups, "looks": bank.looks} if bank.looks else {}
        own |= {"turned": True} if bank.turned else {}
        facts.append(own | bank.record.facts())
    check(facts, list[_Facts], "banks")
    content, text = {name: tensor.contiguous() for name, tensor in tensors.items()}, dumps(facts)
    metadata = {"format": FORMAT, "version": VERSION, "banks": text, "sha256": _digest(text, content)}
    with atomic_path(path) as temporary:
        save_file(content, temporary, metadata=metadata)


def check_destination(path: str | os.PathLike[str]) -> None:
    """Make sure that a bank written there replaces nothing but a bank.

    Raises:
        InputError: Otherwise.
    """
    if not os.path.exists(path) or (os.path.isfile(path) and not os.path.getsize(path)):
        return
    try:
        with safe_open(regular_file(path), framework="pt") as file:
            if (file.metadata() or {}).get("format") == FORMAT:
                return
    except (SafetensorError, CheckpointError, OSError, ValueError):
        pass
    raise InputError(f"{path} exists and is not a reference bank, so it is not replaced. Choose another name.")


def maker(bank: ReferenceBank, name: str | None, source: str | os.PathLike[str]) -> str | None:
    """The model of a bank, with its tag, before anything is fetched for it; where the bank knows none, as it was named.

    Raises:
        ReferencesError: Otherwise.
    """
    if bank.model and name is not None and not f"{bank.model}.".startswith(f"{name}."):
        raise ReferencesError(
            f"{source} was made with {bank.model}, not with {name}. Use {bank.model}, or fit a bank with {name}."
        )
    return bank.model or name


def load_banks(path: str | os.PathLike[str]) -> dict[str, ReferenceBank]:
    """Read the banks that ``save_banks`` wrote, by product.

    Raises:
        CheckpointError: For a file that is missing, damaged or no bank.
    """
    try:
        regular_file(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error} To make a bank: adfeatures fit --references DIR --bank {path}") from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            facts = _facts(metadata, path)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        banks = {own.product: _bank(own, f"{number}.", tensors) for number, own in enumerate(facts)}
        # Banks of earlier versions hold no hash. What can be true is not always what was written, such as a threshold.
        unchanged = metadata.get("sha256") in (None, _digest(metadata["banks"], tensors))
        _expect(unchanged, "its content is not what was written")
        return banks
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file makes its reader fail in any way
        raise CheckpointError(
            f"{path} is damaged, or not a reference bank ({error}). Make it again with: adfeatures fit"
        ) from error


def _facts(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> list[_Facts]:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a reference bank. Make one with: adfeatures fit --references DIR --bank FILE"
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} was written by a newer version of adfeatures. Update the package: pip install -U adfeatures"
        )
    facts = parse(metadata["banks"], list[_Facts], "banks")
    _expect(0 < len(facts) == len({own.product for own in facts}), "no banks, or two of one product")
    return list(facts)


def _bank(facts: _Facts, prefix: str, tensors: Mapping[str, Tensor]) -> ReferenceBank:
    """A bank of its facts and tensors, every one of them checked: a damaged bank must not pass a defect."""
    rows = [tensors[f"{prefix}rows.{level}"] for level in range(len(facts.grids))]
    owners = [tensors[f"{prefix}images.{level}"] for level in range(len(facts.grids))]
    for level, (own, images) in enumerate(zip(rows, owners, strict=True)):
        _expect(own.ndim == 2 and own.dtype in _FLOATS and own.numel() > 0, f"rows.{level}")
        _expect(images.dtype == torch.int32 and images.shape == own.shape[:1], f"images.{level}")
        _expect(int(images.min()) >= 0 and int(images.max()) < facts.num_images, f"images.{level}")
        low, high = map(float, own.aminmax())
        finite = -_MAX_FEATURE < low <= high < _MAX_FEATURE
        _expect(finite, f"rows.{level} holds NaN or infinite values, or some as good as infinite")
    scales = tensors.get(f"{prefix}scales")
    if scales is not None:
        _expect(scales.shape == (len(rows), RINGS + 1) and scales.dtype in _FLOATS, "scales")
        _expect(
            is_finite(scales) and bool((scales > 0).all()),
            "scales hold NaN or infinite values, or some that are not above 0",
        )
        # Each is the square of a mean distance over that of the interior. Larger ones would pass defects.
        largest = float((scales.double() * scales[:, -1:]).max())
        _expect(largest <= MAX_DISTANCE**2, "scales are larger than those of any distances")
    kept, units, known = (
        [tensors[f"{prefix}{name}.{level}"] for level in range(len(rows))] if f"{prefix}{name}.0" in tensors else None
        for name in ("kept", "units", "own")
    )
    for level, (own, places) in enumerate(zip(rows, kept or (), strict=False)):
        within = places.numel() > 0 and 0 <= int(places.min()) <= int(places.max()) < len(own)
        _expect(places.dtype == torch.int32 and places.ndim == 1 and within, f"kept.{level}")
    for level, lengths in enumerate(units or ()):
        fitting = lengths.shape == ((kept or owners)[level]).shape and lengths.dtype in _FLOATS
        _expect(fitting and is_finite(lengths) and bool((lengths > 0).all()), f"units.{level}")
    for level, own in enumerate(rows):
        even = len((kept or rows)[level]) % facts.groups == 0
        _expect(even and facts.looks < own.shape[1], f"groups of rows.{level}")
    if facts.turned:
        enough = (len(own) >= facts.num_images * math.prod(grid) for own, grid in zip(rows, facts.grids, strict=True))
        _expect(facts.geometry.is_plain and all(enough), "rows of whole images")
    for level, logs in enumerate(known or ()):
        fitting = logs.shape == (len((kept or rows)[level]), OWN) and logs.dtype in _FLOATS
        _expect(fitting and is_finite(logs) and float(logs.abs().max()) < _MAX_LOG, f"own.{level}")
    return ReferenceBank(
        rows,
        owners,
        facts.grids,
        facts.num_images,
        scales,
        facts.record(),
        kept,
        units,
        own=known,
        groups=facts.groups,
        looks=facts.looks,
        turned=facts.turned,
    )


def _digest(facts: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)
