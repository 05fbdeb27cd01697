"""Files of ``adfeatures export`` in ONNX Runtime or OpenVINO, in place of the model that they were made of."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .bank_files import RecordFacts
from .catalog import unknown
from .checkpoints import regular_file
from .documents import Size, check, parse
from .errors import CheckpointError, InputError, ReferencesError, UnknownNameError
from .image_files import MAX_PIXELS
from .references import ReferenceBank
from .scoring import AnomalyMap
from .thresholds import Tail

if TYPE_CHECKING:
    from .extractor import FeatureExtractor
    from .predictor import Products

FORMAT, VERSION = "adfeatures-export", "1"
# The facts that are plain texts; all others are JSON.
TEXTS = ("format", "version", "adfeatures", "model", "product", "input")
# What a runtime says of numbers that it may compute with.
DTYPES = {"float32": "f32", "bfloat16": "bf16"}
_Channels: TypeAlias = tuple[float, float, float]
_Positive: TypeAlias = Annotated[float, (np.finfo(np.float32).tiny, np.finfo(np.float32).max)]


@dataclass(kw_only=True)
class ExportFacts(RecordFacts):
    """What an exported file says of itself.

    Attributes:
        adfeatures: Version of this package that wrote it.
        input: Kind of its input, float32 or uint8.
        mean: Of each channel, for values in [0, 1]; ``std`` likewise.
        top: Top of the color scale where no threshold gives one.
        tail: How thresholds are taken from the scores of normal images, in the words of ``scoring``.
        color_scale: Values of the map that its first and last color stand for.
    """

    format: str
    version: str
    adfeatures: str
    model: str
    img_size: Size
    input: str
    mean: _Channels
    std: tuple[_Positive, _Positive, _Positive]
    top: _Positive
    color_scale: tuple[float, float]
    tail: Tail = "empirical"


class Session(Protocol):
    """A file in a runtime.

    Attributes:
        facts: The metadata of the file.
        batch: Images that every run takes, None for any number.
    """

    facts: Mapping[str, str]
    batch: int | None

    def run(self, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Maps (B, H, W) and scores (B,) of what the inputs of the file are."""


class _OnnxRuntime:
    def __init__(self, path: str, dtype: str) -> None:
        runtime = import_module("onnxruntime")
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        self._session = runtime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        self.facts: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        count = self._session.get_inputs()[0].shape[0]
        self.batch: int | None = count if isinstance(count, int) else None

    def run(self, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        maps, scores = self._session.run(["map", "score"], inputs)
        return maps, scores


class _OpenVino:
    def __init__(self, path: str, dtype: str) -> None:
        core = import_module("openvino").Core()
        model = core.read_model(path)
        named = model.get_rt_info(["framework"]).value if model.has_rt_info(["framework"]) else {}
        self.facts: Mapping[str, str] = {name: getattr(value, "value", value) for name, value in named.items()}
        if model.input(0).partial_shape[0].is_dynamic:
            # One photo at a time, so that it compiles for a fixed shape.
            model.reshape({own.any_name: [1, *list(own.partial_shape)[1:]] for own in model.inputs})
        self.batch: int | None = model.input(0).partial_shape[0].get_length()
        # Left to itself it takes bfloat16 where the processor has it, which moves scores visibly.
        settings = {"INFERENCE_PRECISION_HINT": DTYPES[dtype], "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self._compiled = core.compile_model(model, "CPU", settings)

    def run(self, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        found = self._compiled(inputs)
        return found["map"], found["score"]


_MODULES = {"onnx": "onnxruntime", "openvino": "openvino"}


class ExportedModel:
    """An exported file, with what scoring photos asks of an extractor. Its references are a record without features.

    Args:
        path: File that ``adfeatures export`` wrote.
        runtime: onnx or openvino.
        dtype: float32, or for openvino bfloat16, which is faster on processors that have it and moves scores.

    Raises:
        CheckpointError: For a file that is missing, damaged or of another origin.
        InputError: For a runtime that is not installed or cannot compute in this dtype.
    """

    def __init__(self, path: str | os.PathLike[str], runtime: str = "onnx", dtype: str = "float32") -> None:
        check_runtime(runtime, dtype)
        self.runtime = f"{runtime} {dtype}"
        try:
            regular_file(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error} Make an exported file with: adfeatures export --output {path}") from error
        try:
            kind: type[_OnnxRuntime | _OpenVino] = _OpenVino if runtime == "openvino" else _OnnxRuntime
            self._session: Session = kind(os.fspath(path), dtype)
        except Exception as error:  # Each runtime has exceptions of its own.
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(f"{path} cannot be run ({reason}). Make it again with: adfeatures export") from error
        facts = self._session.facts
        if (facts.get("format"), facts.get("version")) != (FORMAT, VERSION):
            raise CheckpointError(f"{path} was made by another version. Make it again with: adfeatures export")
        try:
            self._read({name: text if name in TEXTS else parse(text, Any, name) for name, text in facts.items()})
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged ({error}). Make it again with: adfeatures export") from error

    def _read(self, values: Mapping[str, Any]) -> None:
        facts: ExportFacts = check(values, ExportFacts)
        self.name, self._product, self.img_size, self.top = facts.model, facts.product, facts.img_size, facts.top
        self.tail, self.bit_depth, self.max_pixels = facts.tail, facts.bit_depth, MAX_PIXELS
        self.pretrained_cfg: dict[str, Any] = {"mean": facts.mean, "std": facts.std}
        self._uint8 = facts.input == "uint8"
        self._bank = ReferenceBank([], [], [], facts.num_images, record=facts.record())

    @property
    def references(self) -> dict[str, ReferenceBank]:
        """The record of the references by product."""
        return {self._product: self._bank}

    def bank(self, product: str | None = None) -> ReferenceBank:
        """The record of the references.

        Raises:
            UnknownNameError: For another product than that of the file.
        """
        if product not in (None, self._product):
            raise UnknownNameError(unknown("product", str(product), self.references))
        return self._bank

    def threshold(self, product: str | None = None) -> float | None:
        """The threshold, None where a single reference gave none."""
        return self.bank(product).threshold

    def leave_one_out_scores(self, product: str | None = None) -> list[float]:
        """Refused: the features of the references cannot be told apart any more."""
        raise ReferencesError("An exported file cannot score its own references. Use the bank that it was made from.")

    def as_input(self, x: Tensor) -> Tensor:
        """Transformed images as they are."""
        return x

    def anomaly_map(self, x: Tensor, product: Products = None, *, counts: Tensor | None = None) -> AnomalyMap:
        """Maps and scores as those of ``FeatureExtractor.anomaly_map``, to 1e-4 of them in float32."""
        for name in {product} if product is None or isinstance(product, str) else set(product):
            self.bank(name)
        size = x.shape[2:]
        if self._uint8:
            mean, std = (torch.tensor(self.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
            x = ((x * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        inputs = {"image": x}
        if not self._bank.record.geometry.is_plain:
            inputs["counts"] = torch.ones(len(x), *size, dtype=torch.bool) if counts is None else counts
        batch = self._session.batch or len(x)
        chunks = ({name: own[n : n + batch] for name, own in inputs.items()} for n in range(0, len(x), batch))
        maps, scores = zip(*(self._run(chunk, batch) for chunk in chunks), strict=True)
        return AnomalyMap(torch.cat(maps), torch.cat(scores))

    def _run(self, inputs: Mapping[str, Tensor], batch: int) -> tuple[Tensor, Tensor]:
        count = len(inputs["image"])
        filled = {
            name: torch.cat([x, x[-1:].expand(batch - count, *x.shape[1:])]).contiguous().numpy()
            for name, x in inputs.items()
        }
        maps, scores = self._session.run(filled)
        return torch.from_numpy(maps[:count].copy()), torch.from_numpy(scores[:count].copy())


def in_runtime(model: FeatureExtractor, runtime: str, product: str | None, dtype: str) -> ExportedModel:
    """A model with references in another runtime: exported and read again."""
    from .export import export_onnx

    check_runtime(runtime, dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, path, product=product, batch_size=1)
        exported = ExportedModel(path, runtime, dtype)
    exported.max_pixels = model.max_pixels
    return exported


def check_runtime(runtime: str, dtype: str) -> None:
    """Make sure that a runtime is installed and computes in a dtype.

    Raises:
        InputError: Otherwise.
        UnknownNameError: For another runtime than onnx and openvino.
    """
    if runtime not in _MODULES:
        raise UnknownNameError(unknown("runtime", runtime, _MODULES))
    if dtype not in (DTYPES if runtime == "openvino" else ("float32",)):
        raise InputError(f"{runtime} does not compute in {dtype} here. For bfloat16 take openvino.")
    load_extra(_MODULES[runtime], runtime)


def load_extra(module: str, extra: str) -> Any:
    """Import what an extra of this package installs.

    Raises:
        InputError: If it is not installed, with the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(
            f'{module} is not installed ({error}). Install it: pip install "adfeatures[{extra}]"'
        ) from error
