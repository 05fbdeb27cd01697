"""Weights on disk: read without running any code in them, checked, written atomically, converted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .errors import AdfeaturesError, CheckpointError, InputError

if TYPE_CHECKING:
    from torch import Tensor

AnyPath: TypeAlias = "str | os.PathLike[str]"

_PICKLES = (".pth", ".pt", ".bin")
_WRAPPERS = ("projectors", "state_dict", "model")
# Prefix of the keys of a backbone in files of ours, which may hold a projector too.
BACKBONE = "backbone."
# Names of the folders that ``atomic_path`` writes in.
TEMPORARY = re.compile(r"\..*\.adfeatures-[0-9a-f]{8}", re.DOTALL)


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds.

    Attributes:
        state_dict: Finite tensors on the CPU, with the dtypes of the file.
        metrics: Numbers stored beside the weights, under the file's own keys.
        metadata: Text entries of a safetensors header, without its "metrics"; empty for other formats.
    """

    state_dict: dict[str, Tensor]
    metrics: dict[str, float]
    metadata: dict[str, str]


def load_checkpoint(path: AnyPath) -> Checkpoint:
    """Read weights from ``.safetensors``, or from ``.pth``, ``.pt`` and ``.bin`` without running any code in them.

    A pickle may be a state dict, or hold one under "projectors", "state_dict" or "model" with numbers beside it. Of a
    TorchScript archive, as OpenAI's CLIP files are, the tensors of its modules are taken.

    Raises:
        CheckpointError: For a file that is missing, empty, truncated or of another format; that names a Python object
            other than tensors, float scalars and the modules of TorchScript; or that holds anything but finite tensors
            and numbers.
    """
    path = regular_file(path)
    if not path.stat().st_size:
        raise CheckpointError(f"{path} is empty. Download it again.")
    suffix = path.suffix.lower()
    metadata: dict[str, str] = {}
    metrics: Any
    if suffix == ".safetensors":
        state_dict, metadata = _read_safetensors(path)
        metrics = metadata.pop("metrics", "{}")
    elif suffix in _PICKLES:
        state_dict, metrics = _unwrap(path, _read_pickle(path))
    else:
        known = ", ".join((".safetensors", *_PICKLES))
        raise CheckpointError(f"{path}: unknown format {suffix!r}. Weights are read from {known}.")
    # Names may share what a file holds, so that few bytes can stand for much to look at and to copy.
    if sum(getattr(tensor, "nbytes", 0) for tensor in state_dict.values()) > 4 * path.stat().st_size + (64 << 20):
        raise CheckpointError(f"{path}: its tensors share memory, and would take more than four times its size.")
    return Checkpoint(_checked(path, state_dict), _numbers(path, metrics), metadata)


def read_state(weights: AnyPath | Mapping[str, Tensor] | None) -> tuple[Mapping[str, Tensor] | None, str]:
    """The weights of a backbone, of a file that may hold a projector beside them, and what messages call them.

    Raises:
        CheckpointError: For a file that is missing, damaged or unsafe.
    """
    if weights is None:
        return None, ""
    if isinstance(weights, Mapping):
        return weights, "the given state dict"
    state = load_checkpoint(weights).state_dict
    return of_prefix(state, BACKBONE) or state, str(weights)


def of_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose keys begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def regular_file(path: AnyPath, error: type[AdfeaturesError] = CheckpointError) -> Path:
    """The path of a file that can be read, possibly through links. Folders, pipes and devices could be read for ever.

    Raises:
        AdfeaturesError: Of the type ``error``, for anything else.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as problem:  # ValueError: a name with a null character
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"Cannot open {path}: {reason}.") from None
    if not stat.S_ISREG(mode):
        raise error(f"Cannot open {path}: it is a {'folder' if stat.S_ISDIR(mode) else 'pipe or device'}, not a file.")
    if not os.access(path, os.R_OK):
        raise error(f"Cannot open {path}: permission denied. Make it readable: chmod u+r.")
    return Path(path)


def save_checkpoint(
    path: AnyPath,
    state_dict: Mapping[str, Tensor],
    *,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file that appears complete or not at all. The same content always gives the same bytes.

    Raises:
        InputError: For a suffix other than ``.safetensors``, or metadata that is not text.
        CheckpointError: For tensors that ``load_checkpoint`` would refuse.
        AdfeaturesError: When the file cannot be written.
    """
    from safetensors.torch import save_file

    entries = dict(metadata or {})
    if Path(path).suffix != ".safetensors":
        raise InputError(f"{path}: weights are written as .safetensors.")
    if "metrics" in entries or not all(isinstance(text, str) for pair in entries.items() for text in pair):
        raise InputError(f"Metadata must be text, with the numbers given as metrics: {entries!r}.")
    if metrics:
        entries["metrics"] = json.dumps(_numbers(Path(path), {key: float(value) for key, value in metrics.items()}))
    tensors = _unshared(_checked(Path(path), state_dict))
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=entries)
        _sort_metadata(temporary)


@contextmanager
def atomic_path(path: AnyPath, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary file of the same name that takes the place of ``path`` when the block succeeds.

    It lies in a folder of its own beside ``path``, since safetensors writes a temporary file of its own next to it.

    Args:
        path: The file.
        durable: Wait until the disk has it, so that it is whole after a power cut too, and not only after a kill.

    Raises:
        AdfeaturesError: When the folder cannot be made or written, or the disk is full. Nothing is left behind then.
    """
    from safetensors import SafetensorError

    path = Path(path)
    folder = path.with_name(f".{path.stem[:32]}.adfeatures-{uuid.uuid4().hex[:8]}")
    temporary = folder / path.name
    try:
        folder.mkdir(parents=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # safetensors writes files that only their owner can read
        if durable:
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, AdfeaturesError):
            raise
        advice = "Free some space or choose a folder that can be written"
        raise AdfeaturesError(f"Cannot write {path}: {error}. {advice}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def convert(source: AnyPath, destination: AnyPath, metadata: Mapping[str, str] | None = None) -> Checkpoint:
    """Rewrite any loadable weights as safetensors: tensors bit for bit, metrics, and the name and sha256 of the source.

    A destination that already holds this very conversion is left as it is.

    Raises:
        InputError: When the destination exists and is anything else, or is not named ``.safetensors``.
        CheckpointError: When the source cannot be read.
        AdfeaturesError: When the destination cannot be written.
    """
    source, destination = Path(source), Path(destination)
    checkpoint = load_checkpoint(source)
    facts = {"format": "adfeatures", "source": source.name, "source_sha256": sha256(source)}
    wanted = {**checkpoint.metadata, **(metadata or {}), **facts}
    if destination.exists():
        with suppress(CheckpointError):
            existing = load_checkpoint(destination)
            if (existing.metadata, existing.metrics) == (wanted, checkpoint.metrics):
                return existing
        problem = f"{destination} exists and is not this conversion of {source}"
        raise InputError(f"{problem}. Remove it or choose another name.")
    save_checkpoint(destination, checkpoint.state_dict, metrics=checkpoint.metrics, metadata=wanted)
    return load_checkpoint(destination)


def sha256(path: AnyPath) -> str:
    """Hexadecimal sha256 of a file."""
    return _hash_file(path, hashlib.sha256())


def git_blob_id(path: AnyPath) -> str:
    """The hexadecimal id under which git, and so the Hub, knows the content of a file."""
    return _hash_file(path, hashlib.sha1(b"blob %d\0" % os.path.getsize(path), usedforsecurity=False))


def _hash_file(path: AnyPath, digest: Any) -> str:
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return str(digest.hexdigest())


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinite values."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # The extremes show it, forty times faster than isfinite does; torch has them for no 8-bit float.
    numbers = tensor.float() if tensor.element_size() == 1 else tensor
    return bool(torch.stack(torch.aminmax(numbers)).isfinite().all())


def weights_fingerprint(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Hashes of weights as rounded to each half precision: a model and its ``.half()`` or ``.bfloat16()`` share one."""
    import torch

    hashes = []
    for dtype in (torch.float16, torch.bfloat16):
        digest = hashlib.sha256()
        for key, value in state_dict.items():
            rounded = value.to("cpu", dtype if value.is_floating_point() else value.dtype)
            digest.update(key.encode() + rounded.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        hashes.append(digest.hexdigest())
    return hashes


def _damaged(path: Path, detail: str) -> CheckpointError:
    with open(path, "rb") as file:
        head = file.read(64)
    advice = "It is truncated, damaged or of another format: fetch it again and check its sha256 against that published"
    if head.startswith(b"version https://git-lfs"):
        advice = "It is a Git LFS pointer: run `git lfs pull`, or download the weights themselves"
    elif head.lstrip().startswith(b"<"):
        advice = "It is a web page: download the weights themselves"
    (detail, *_) = detail.strip().splitlines() or [""]
    return CheckpointError(f"{path} cannot be read as weights. {advice}. ({detail[:200]})")


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:
        raise _damaged(path, str(error)) from error


def _numbers(path: Path, metrics: Any) -> dict[str, float]:
    from .documents import DocumentError, check, parse

    try:
        return dict(parse(metrics, dict[str, float]) if isinstance(metrics, str) else check(metrics, dict[str, float]))
    except DocumentError as error:
        raise CheckpointError(f"{path}: its metrics are not numbers by name: {error}.") from error


def _read_pickle(path: Path) -> Any:
    from .pickles import RefusedError, read_pickle

    try:
        return read_pickle(path)
    except RefusedError as error:
        problem = f"{path} was not unpickled: besides tensors and float scalars it names {_shortened(error.names)}"
    except Exception as error:  # a damaged file makes its reader fail in any way
        raise _damaged(path, str(error)) from error
    raise CheckpointError(
        f"{problem}, which could run code. Use a file from its publisher that holds weights only, or have its author "
        "save the state dict alone."
    )


def _shortened(names: Sequence[Any]) -> str:
    """The first names of a hostile file may be long, and many."""
    return ", ".join(str(name)[:99] for name in names[:10])


def _unwrap(path: Path, content: object) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch

    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict.")
    wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), dict)), None)
    state_dict, metrics = content, {}
    if wrapper is not None:
        state_dict, metrics = content[wrapper], {key: value for key, value in content.items() if key != wrapper}
    alien = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    alien += [key for key, value in metrics.items() if isinstance(value, bool) or not isinstance(value, Real)]
    alien += [key for key in (*state_dict, *metrics) if not isinstance(key, str)]
    if alien:
        found = _shortened([repr(key) for key in alien])
        raise CheckpointError(f"{path} holds more than weights and metrics: {found}. Save its state dict alone.")
    return state_dict, metrics


def _checked(path: Path, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch

    tensors = {}
    for name, tensor in state_dict.items():
        if len(name) > 1000:
            raise CheckpointError(f"{path}: {name[:99]}... is not the name of a tensor.")
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or _is_odd(tensor):
            raise CheckpointError(f"{path}: {name} is not a plain tensor.")
        tensors[name] = tensor = tensor.detach().cpu()
        if not is_finite(tensor):
            problem = f"{path}: {name} holds NaN or infinite values"
            raise CheckpointError(f"{problem}. The file is damaged or its training diverged.")
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors.")
    return tensors


def _is_odd(tensor: Tensor) -> bool:
    from .pickles import MAX_RANK, PLAIN_DTYPE

    if tensor.is_meta or tensor.is_quantized or tensor.is_nested or tensor.ndim > MAX_RANK:
        return True
    return not PLAIN_DTYPE.fullmatch(str(tensor.dtype))


def _unshared(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    storages: set[int] = set()
    tensors = {}
    for name, tensor in state_dict.items():
        tensor = tensor.contiguous()
        tensors[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(tensor.untyped_storage().data_ptr())
    return tensors


def _sort_metadata(path: Path) -> None:
    """Put the text entries, which safetensors writes in random order, in one, so that equal content has one hash."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(errors="replace").ljust(length))
