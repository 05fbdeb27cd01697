"""A model with its references as one ONNX file, for machines without torch.

The file runs with onnxruntime, numpy and Pillow alone. With ``adfeatures export --uint8`` it takes photos at the
model's input size, and this is all that a station needs:

    import json

    import numpy as np
    import onnxruntime
    from PIL import Image, ImageOps

    session = onnxruntime.InferenceSession("part.onnx", providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    height, width = json.loads(facts["img_size"])
    with Image.open("photo.png") as photo:
        photo = ImageOps.exif_transpose(photo).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    maps, scores = session.run(["map", "score"], {"image": np.asarray(photo)[None]})
    print(scores[0], "anomalous" if scores[0] > json.loads(facts["threshold"]) else "normal")

It gives the scores of ``adfeatures score`` for 8-bit photos without transparency, where these are squashed. The file of
a bank of tiles, padded photos or a region of interest has a second input, ``counts``, without which it does not run, so
that it cannot be fed whole photos; ``adfeatures score`` cuts them for it. The metadata also holds the color
scale of the maps, the names and hashes of the references, and the hashes of the weights; all values but names are JSON.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import __version__
from .checkpoints import atomic_path, weights_fingerprint
from .documents import dumps
from .errors import InputError
from .predictor import ensure_threshold
from .runtime import FORMAT, TEXTS, VERSION, load_extra
from .scoring import color_scale

if TYPE_CHECKING:
    from .extractor import FeatureExtractor

SUFFIX = ".onnx"
# An ONNX file is one protobuf message, which can be no larger.
MAX_BYTES = 2**31 - 1


class _Station(nn.Module):
    """What the file computes: from images to maps, scores, and the features where they are asked for."""

    def __init__(self, model: FeatureExtractor, product: str | None, uint8: bool, features: bool) -> None:
        super().__init__()
        self.model, self.product, self.uint8, self.features = model, product, uint8, features
        self.mean, self.std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))

    def forward(self, image: Tensor, counts: Tensor | None = None) -> tuple[Tensor, ...]:
        if self.uint8:
            image = (image.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        maps, scores = self.model.anomaly_map(image, self.product, counts=counts)
        return maps, scores, *(self.model(image, self.product) if self.features else ())


def check_output(path: str | os.PathLike[str]) -> None:
    """Make sure that a file can be exported there, before anything is computed.

    Raises:
        InputError: For a name without the suffix .onnx, or if the extra ``onnx`` is not installed.
    """
    if Path(path).suffix.lower() != SUFFIX:
        raise InputError(f"{path} must end in {SUFFIX}: OpenVINO reads that format too.")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        load_extra(module, "onnx")


def export_onnx(
    model: FeatureExtractor,
    path: str | os.PathLike[str],
    *,
    product: str | None = None,
    uint8: bool = False,
    features: bool = False,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Write a model with the references of a product to an ONNX file, atomically.

    Inputs and outputs: ``image``, float32 (B, 3, H, W) as the model's transform gives it, or with ``uint8`` the resized
    photos (B, H, W, 3); where photos are cut ``counts``, bool (B, H, W), what counts of them; ``map``, float32
    (B, H, W); ``score``, float32 (B,); and ``features_1``, ... of the levels that ``forward`` gives.

    Args:
        model: Extractor with references.
        path: File to write, ending in .onnx.
        product: Whose references, where several products are held.
        uint8: Whether to take 8-bit photos and normalize them inside.
        features: Whether to put out the features too.
        batch_size: Images per run; the default takes any number.

    Returns:
        The metadata of the file.

    Raises:
        InputError: For a name or size that ONNX does not allow, a model that cannot be exported, or a missing extra.
        ReferencesError: If no references are set.
        UnknownNameError: For a product that has none, or none named among several.
        AdfeaturesError: If the file cannot be written.
    """
    check_output(path)
    facts = _facts(model, product) | {"input": "uint8" if uint8 else "float32"}
    rows = model.bank(product).rows
    held = [*model.state_dict().values(), *rows, *rows]  # The rows also at unit length.
    if (size := sum(tensor.numel() * tensor.element_size() for tensor in held)) > MAX_BYTES:
        raise InputError(
            f"{model.name} and its references take {size / 1e9:.1f} GB, and an ONNX file holds 2.1 GB at most. "
            "Fit the bank with a smaller --coreset, or take a smaller model."
        )
    height, width = model.img_size
    # A batch of one would be taken for the only one.
    image = torch.zeros(batch_size or 2, 3, height, width)
    if uint8:
        image = torch.zeros(batch_size or 2, height, width, 3, dtype=torch.uint8)
    inputs: dict[str, Tensor] = {"image": image}
    if not model.bank(product).record.geometry.is_plain:
        inputs["counts"] = torch.ones(len(image), height, width, dtype=torch.bool)
    batch = torch.export.Dim("batch", min=1)
    count = len(model.feature_info.out_indices) if features else 0
    station = _Station(model, product, uint8, features).eval()
    with torch.no_grad(), _quietly():
        try:
            program = torch.onnx.export(
                station,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=["map", "score", *(f"features_{number}" for number in range(1, count + 1))],
                dynamic_shapes=None if batch_size else {name: {0: batch} for name in inputs},
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # Exporters fail in many ways.
            reason = str(error).strip().partition("\n")[0]
            raise InputError(
                f"{model.name} cannot be exported to ONNX by torch {torch.__version__}: {reason}"
            ) from error
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # Source files of this machine.
    program.model.metadata_props.update(
        {name: value if name in TEXTS else dumps(value) for name, value in facts.items()}
    )
    with atomic_path(path) as temporary:
        program.save(temporary, external_data=False)
        _compute_constants(temporary)
    return facts


def _facts(model: FeatureExtractor, product: str | None) -> dict[str, Any]:
    bank = model.bank(product)
    ensure_threshold(model, product)
    return bank.record.facts() | {
        "format": FORMAT,
        "version": VERSION,
        "adfeatures": __version__,
        "model": model.name,
        "product": next(name for name, own in model.references.items() if own is bank),
        "img_size": model.img_size,
        "mean": list(model.pretrained_cfg["mean"]),
        "std": list(model.pretrained_cfg["std"]),
        "num_images": bank.num_images,
        "top": model.top,
        "tail": model.tail,
        "color_scale": color_scale(bank.threshold, model.top),
        "fingerprint": weights_fingerprint(model.state_dict()),
    }


def _compute_constants(path: Path) -> None:
    """Compute once what no image changes: keys and values, position embeddings, which OpenVINO resizes otherwise."""
    runtime = load_extra("onnxruntime", "onnx")
    settings = runtime.SessionOptions()
    settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.optimized_model_filepath = os.fspath(path)
    settings.log_severity_level = 3
    try:
        runtime.InferenceSession(path.read_bytes(), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # It has exceptions of its own for a full disk.
        raise OSError(str(error).strip().partition("\n")[0]) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep back what the exporter says of itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
