"""The files of reference banks: safetensors, with the facts of each bank as JSON in the header."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checkpoints import atomic_path
from .errors import CheckpointError, InputError, ReferencesError
from .references import BankRecord, ReferenceBank

FORMAT, VERSION = "adfeatures-references", "1"


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
        if bank.scales is not None:
            tensors[f"{number}.scales"] = bank.scales
        own = {"product": product, "grids": bank.grids, "num_images": bank.num_images}
        facts.append(own | dataclasses.asdict(bank.record))
    metadata = {"format": FORMAT, "version": VERSION, "banks": json.dumps(facts, allow_nan=False)}
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)


def check_destination(path: str | os.PathLike[str]) -> None:
    """Make sure that a bank written there replaces nothing but a bank.

    Raises:
        InputError: Otherwise.
    """
    if not Path(path).is_file() or not Path(path).stat().st_size:
        return
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") == FORMAT:
                return
    except (SafetensorError, OSError, ValueError):
        pass
    raise InputError(f"{path} exists and is no reference bank, so it is not replaced. Choose another name.")


def check_maker(bank: ReferenceBank, name: str | None, source: str | os.PathLike[str]) -> None:
    """Make sure that a bank may be of a model that was named, with or without tag, before anything is fetched for it.

    Raises:
        ReferencesError: Otherwise.
    """
    if bank.model and name not in (None, bank.model, bank.model.partition(".")[0]):
        raise ReferencesError(f"{source} was made with {bank.model}, not with {name}. Name that model.")


def check_fit(
    bank: ReferenceBank,
    source: str,
    name: str,
    img_size: tuple[int, int],
    channels: Sequence[int],
    fingerprint: Sequence[str],
) -> None:
    """Make sure that a bank is of a model: of its name, input size, channels of each level and hashes of weights.

    Raises:
        ReferencesError: Otherwise.
    """
    advice = "Create that model, or make the bank again with: adfeatures fit"
    if bank.model not in (None, name):
        raise ReferencesError(f"{source} was made with {bank.model}, not with {name}. {advice}")
    if (size := bank.record.img_size) not in (None, img_size):
        raise ReferencesError(
            f"{source} was made for images of {size} pixels (height, width), not {img_size}. {advice}"
        )
    if [rows.shape[1] for rows in bank.rows] != list(channels):
        raise ReferencesError(f"{source} holds features of other levels than those of {name}. {advice}")
    if bank.record.fingerprint and not set(bank.record.fingerprint) & set(fingerprint):
        raise ReferencesError(f"{source} was made with other weights of {name}. {advice}")


def load_banks(path: str | os.PathLike[str]) -> dict[str, ReferenceBank]:
    """Read the banks that ``save_banks`` wrote, by product.

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
        return {own.pop("product"): _bank(own, f"{number}.", tensors) for number, own in enumerate(facts)}
    except (
        SafetensorError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise CheckpointError(
            f"The reference bank {path} is damaged ({error}). Make it again with: adfeatures fit"
        ) from error


def _facts(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a reference bank. Make one with: adfeatures fit --references DIR --bank FILE"
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} was written by a newer version of adfeatures. Update the package: pip install -U adfeatures"
        )
    facts = json.loads(metadata["banks"])
    _expect(isinstance(facts, list) and len(facts) > 0 and all(isinstance(own, dict) for own in facts), "no banks")
    _expect(all(isinstance(own["product"], str) for own in facts), "product")
    return list(facts)


def _bank(facts: dict[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> ReferenceBank:
    """A bank of its facts and tensors, every one of them checked: a damaged bank must not pass a defect."""
    facts.pop("complete", None)  # Of earlier versions; the number of rows says it.
    grids, count, size = facts.pop("grids"), facts.pop("num_images"), facts.pop("img_size")
    _expect(_is_whole(count) and count >= 1, "num_images")
    _expect(isinstance(grids, list) and len(grids) > 0 and all(_is_size(grid) for grid in grids), "grids")
    _expect(size is None or _is_size(size), "img_size")
    record = BankRecord(img_size=size and tuple(size), **facts)
    check_record(record, count)
    rows = [tensors[f"{prefix}rows.{level}"] for level in range(len(grids))]
    owners = [tensors[f"{prefix}images.{level}"] for level in range(len(grids))]
    for level, (own, images) in enumerate(zip(rows, owners, strict=True)):
        _expect(own.ndim == 2 and own.is_floating_point() and len(own) > 0, f"rows.{level}")
        _expect(images.dtype == torch.int32 and images.shape == own.shape[:1], f"images.{level}")
        _expect(int(images.min()) >= 0 and int(images.max()) < count, f"images.{level}")
        _expect(bool(own.isfinite().all()), f"rows.{level} holds NaN or infinite values")
    scales = tensors.get(f"{prefix}scales")
    if scales is not None:
        _expect(scales.ndim == 2 and len(scales) == len(grids) and scales.is_floating_point(), "scales")
        _expect(
            bool((scales.isfinite() & (scales > 0)).all()),
            "scales hold NaN or infinite values, or some that are not above 0",
        )
    return ReferenceBank(rows, owners, [(height, width) for height, width in grids], count, scales, record)


def check_record(record: BankRecord, count: int) -> None:
    """Make sure that what a file says of a bank of so many images can be true.

    Raises:
        ValueError: Otherwise.
    """
    of_images = {"files": record.files, "sha256s": record.sha256s, "pixels": record.pixels}
    for name, texts in {**of_images, "fingerprint": record.fingerprint}.items():
        _expect(isinstance(texts, list) and all(isinstance(text, str) for text in texts), name)
    _expect(all(len(texts) in (0, count) for texts in of_images.values()), "a name or hash for each image")
    _expect(all(text is None or isinstance(text, str) for text in (record.model, record.preset)), "model or preset")
    _expect(_is_whole(record.bit_depth) and record.bit_depth in range(9, 17), "bit_depth")
    _expect(isinstance(record.normal_scores, list) and _are_scores(record.normal_scores), "normal_scores")
    _expect(record.threshold is None or _are_scores([record.threshold]), "threshold")
    _expect(record.quantile is None or (_are_scores([record.quantile]) and 0 < record.quantile <= 1), "quantile")


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_whole(side) and 1 <= side < 2**31 for side in value)


def _are_scores(values: Iterable[object]) -> bool:
    return all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        for value in values
    )
