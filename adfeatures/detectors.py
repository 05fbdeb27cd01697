"""What the options of the command make: a model, with its references in torch or in another runtime."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .bank_files import load_banks, maker
from .errors import ImageError, InputError
from .extractor import FeatureExtractor
from .factory import create_model
from .geometry import PLAIN, Geometry, Region
from .predictor import Detector, fit_threshold
from .references import ReferenceBank
from .runtime import ExportedModel, in_runtime
from .sources import OF_FILE_SYSTEMS, list_images


def detector_of(options: argparse.Namespace) -> Detector:
    """What scores: a model with references in torch or in the runtime that was asked for, or an exported file."""
    exported = str(options.bank).lower().endswith(".onnx")
    runtime = options.runtime or ("onnx" if exported else "torch")
    dtype = options.dtype or "float32"
    _check_runtime(options, runtime, exported)
    if exported:
        reader = ExportedModel(options.bank, runtime, dtype)
        _check_bank(reader.bank(), options)
        if options.max_pixels is not None:
            reader.max_pixels = options.max_pixels
        if options.threshold is None and options.quantile is not None:
            fit_threshold(reader, options.quantile, None, options.product)
        return reader
    if options.bank is not None:
        model = model_of_bank(options)
    else:
        model = model_of(options, options.model)
        set_references(model, options.references, **reading_of(options))
    if options.threshold is None and options.quantile is not None:
        fit_threshold(model, options.quantile, None, options.product)
    return model if runtime == "torch" else in_runtime(model, runtime, options.product, dtype)


def _check_runtime(options: argparse.Namespace, runtime: str, exported: bool) -> None:
    if runtime == "torch" and exported:
        raise InputError(f"torch cannot run {options.bank}. Give the bank that it was made from, or --runtime onnx.")
    if runtime == "torch" and options.dtype == "bfloat16":
        raise InputError("torch computes in float32 here. For bfloat16 use --runtime openvino.")
    if exported and (options.weights or options.backbone_weights or options.backbone):
        advice = "leave out --weights, --backbone-weights and --backbone"
        raise InputError(f"The weights are inside {options.bank}: {advice}.")
    if runtime != "torch":
        if options.device not in (None, "cpu"):
            raise InputError(f"{runtime} runs on the CPU here: leave out --device.")
        options.device = "cpu"


def model_of_bank(options: argparse.Namespace) -> FeatureExtractor:
    """The model of a bank, with the bank."""
    banks = load_banks(options.bank)
    bank = next(iter(banks.values()))
    model = model_of(options, _check_bank(bank, options), bank.record.img_size)
    model.hold_references(banks, options.bank)
    return model


def _check_bank(bank: ReferenceBank, options: argparse.Namespace) -> str | None:
    """The model of a bank."""
    if options.bit_depth not in (None, bank.record.bit_depth):
        raise InputError(
            f"{options.bank} was made of images of {bank.record.bit_depth} bits, so others are read the same way. "
            f"Make it again with: adfeatures fit --bit-depth {options.bit_depth}"
        )
    if options.rotations not in (None, bank.record.rotations):
        raise InputError(
            f"{options.bank} was made with {bank.record.rotations} rotations. Leave out --rotations, or make it again "
            f"with: adfeatures fit --rotations {options.rotations}"
        )
    if options.tile or options.keep_aspect or options.roi:
        raise InputError(
            f"{options.bank} was made of {bank.record.geometry}, so others are cut the same way. Leave out --tile, "
            "--keep-aspect and --roi, or make it again with them: adfeatures fit"
        )
    return maker(bank, options.model, options.bank)


def model_of(
    options: argparse.Namespace, name: str | None, img_size: tuple[int, int] | None = None
) -> FeatureExtractor:
    """A model without references, on the device and with the limits that were asked for."""
    model = create_model(
        name,
        weights=options.weights,
        backbone_weights=options.backbone_weights,
        backbone=options.backbone,
        img_size=img_size,
    )
    if options.bit_depth is not None:
        model.bit_depth = options.bit_depth
    if options.max_pixels is not None:
        model.max_pixels = options.max_pixels
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def reading_of(options: argparse.Namespace) -> dict[str, Any]:
    """How references are found and cut, as ``set_references`` takes it."""
    return {
        "product_folders": options.product_folders,
        "recursive": options.recursive,
        "rotations": options.rotations,
        "geometry": partial(_geometry_of, options),
    }


def _geometry_of(options: argparse.Namespace, product: str | None) -> Geometry:
    region = None
    if options.roi is not None:
        is_folder = product is not None and Path(options.roi).is_dir()
        region = Region.read(Path(options.roi, f"{product}.png") if is_folder else options.roi)
    return replace(options.tile or PLAIN, keep_aspect=options.keep_aspect, region=region)


def set_references(
    model: FeatureExtractor,
    folder: str,
    *,
    product_folders: bool,
    recursive: bool,
    geometry: Callable[[str | None], Geometry] = lambda _: PLAIN,
    **options: Any,
) -> None:
    """Set the references of one product, or with ``product_folders`` of one product for each sub-folder.

    Sub-folders without images are passed over with a warning, hidden ones and those of file systems without one.
    Further options are those of ``FeatureExtractor.set_references``, where each product has its geometry.
    """
    if not product_folders:
        model.set_references(list_images(folder, recursive=recursive), geometry=geometry(None), **options)
        return
    folders = sorted(
        path
        for path in Path(folder).glob("*")
        if path.is_dir() and not path.name.startswith(".") and path.name not in OF_FILE_SYSTEMS
    )
    if not folders:
        raise InputError(
            f"{folder} has no sub-folders to take as products. Leave out --product-folders if its images are all of "
            "one product."
        )
    for path in folders:
        try:
            images = list_images(path, recursive=recursive)
        except ImageError as error:
            warnings.warn(f"{path} is not a product: {error}", stacklevel=2)
        else:
            model.set_references(images, product=path.name, geometry=geometry(path.name), **options)
