"""TorchScript archives, the form in which OpenAI published CLIP, read as data: none of their code is compiled or run.

An archive is a zip file. Its ``data.pkl`` describes a tree of modules, and the elements of each tensor lie in a storage
beside it. The pickle is interpreted here on plain containers, without Python's unpickler, so that it can name objects
but make none.
"""

from __future__ import annotations

import pickletools
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What may be read beyond the size of the file, since its texts are compressed. Those of CLIP have 3 MB.
_TEXT_BYTES = 64 << 20
_MAX_NAMES = 100_000
_DTYPES = {
    "torch BFloat16Storage": torch.bfloat16,
    "torch BoolStorage": torch.bool,
    "torch ByteStorage": torch.uint8,
    "torch CharStorage": torch.int8,
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
    "torch ShortStorage": torch.int16,
}
_REBUILD = "torch._utils _rebuild_tensor_v2"
# What attributes that are no tensors are made of. Their values are not needed: None stands for them.
_IGNORED = re.compile(r"torch\.jit\._pickle \w+|torch device|collections OrderedDict")


class ArchiveError(ValueError):
    """A TorchScript archive that is damaged, or holds what no TorchScript archive holds."""


class _Global(NamedTuple):
    name: str


@dataclass(eq=False)
class _Module:
    kind: str
    attributes: dict[str, Any] = field(default_factory=dict)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    with suppress(OSError, ValueError, NotImplementedError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
    return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of an archive by their dotted names, as the ``state_dict`` of its module has them.

    Memory is bounded by the size of the file and 64 MiB.

    Raises:
        ArchiveError: For an archive that is damaged, too large, or names anything but modules and tensors.
    """
    with zipfile.ZipFile(path) as archive:
        files = _Files(archive, path.stat().st_size + _TEXT_BYTES)
        root = _interpret(files.read("data.pkl"), files)
        if not isinstance(root, _Module):
            raise ArchiveError("it holds no module")
        return dict(_state(root, files))


def _state(root: _Module, files: _Files) -> Iterator[tuple[str, Tensor]]:
    waiting, count, state_names = [("", root)], 0, cache(files.state_names)
    while waiting:
        prefix, module = waiting.pop()
        named = state_names(module.kind)
        for key, value in module.attributes.items():
            # Modules may share others, so that few bytes can stand for many names.
            count += 1
            if count > _MAX_NAMES:
                raise ArchiveError(f"it has more than {_MAX_NAMES:,} attributes")
            if isinstance(value, _Module):
                waiting.append((f"{prefix}{key}.", value))
            elif isinstance(value, Tensor) and (named is None or key in named):
                yield prefix + key, value


class _Files:
    """The files within an archive, together at most ``budget`` bytes of them."""

    def __init__(self, archive: zipfile.ZipFile, budget: int) -> None:
        self.archive, self.left, self.names = archive, budget, set(archive.namelist())
        roots = [name for name in self.names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        self.folder = _single(roots).removesuffix("data.pkl")
        self.storages: dict[str, Tensor] = {}
        if f"{self.folder}byteorder" in self.names and self.read("byteorder").decode() != sys.byteorder:
            raise ArchiveError("its bytes are in the order of another kind of processor")

    def read(self, name: str) -> bytes:
        info = self.archive.getinfo(self.folder + name)
        self.left -= info.file_size
        if self.left < 0:
            raise ArchiveError(f"its {name} and what was read before are larger than the file")
        return self.archive.read(info)

    def storage(self, identity: Any) -> Tensor:
        """The one-dimensional tensor that a persistent id ("storage", type, key, device, elements) stands for."""
        kind, stored_type, key, _, elements = identity
        if kind != "storage" or not isinstance(stored_type, _Global) or not isinstance(key, str):
            raise ArchiveError("it refers to something that is not a storage")
        dtype = _DTYPES[stored_type.name]
        if key not in self.storages:
            data = bytearray(self.read(f"data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        found = self.storages[key]
        if found.dtype != dtype or len(found) != elements:
            raise ArchiveError(
                f"storage {key} has {len(found)} elements of {found.dtype} instead of {elements} of {dtype}"
            )
        return found

    def state_names(self, kind: str) -> set[str] | None:
        """The attributes that a class lists as its parameters and buffers, None where its text is missing."""
        module, name = kind.split(" ")
        path = f"code/{module.replace('.', '/')}.py"
        if self.folder + path not in self.names:
            return None
        head = rf"^class {re.escape(name)}\(Module\):\n  __parameters__ = \[(.*)\]\n  __buffers__ = \[(.*)\]$"
        match = re.search(head, self.read(path).decode(), re.MULTILINE)
        return set(re.findall('"([^"]*)"', match[1] + match[2])) if match else None


def _interpret(data: bytes, files: _Files) -> Any:
    """The object that a pickle describes. Only what torch itself writes is understood; anything else is an error."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    operations: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(data)
    for opcode, argument, _ in operations:
        match opcode.name:
            case "PROTO":
                pass
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[opcode.name]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode.name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "TUPLE":
                stack.append(tuple(above_mark()))
            case "APPEND" | "APPENDS":
                values = above_mark() if opcode.name == "APPENDS" else [stack.pop()]
                stack[-1].extend(values)
            case "SETITEMS":
                values = above_mark()
                # A tuple of tuples of tuples could take for ever to hash.
                if not all(isinstance(key, (str, int, float)) for key in values[::2]):
                    raise ArchiveError("a dictionary has keys that are neither text nor numbers")
                stack[-1].update(zip(values[::2], values[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_named(argument))
            case "BINPERSID":
                stack.append(files.storage(stack.pop()))
            case "NEWOBJ":
                _, made = stack.pop(), stack.pop()
                stack.append(_Module(made.name) if made.name.startswith("__torch__") else None)
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Module) and isinstance(state, dict):
                    stack[-1].attributes = {key: value for key, value in state.items() if isinstance(key, str)}
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_tensor(*arguments) if function.name == _REBUILD else None)
            case "STOP":
                return _single(stack)
            case _:
                raise ArchiveError(f"it holds the opcode {opcode.name}")
    raise ArchiveError("its pickle has no end")


def _named(argument: str) -> _Global:
    if argument.startswith("__torch__") or argument in _DTYPES or argument == _REBUILD or _IGNORED.fullmatch(argument):
        return _Global(argument)
    raise ArchiveError(f"it names {argument.replace(' ', '.')}, which is neither a module nor a tensor")


def _tensor(storage: Tensor, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if len(shape) != len(stride) or min((offset, *shape, *stride)) < 0:
        raise ArchiveError(f"a tensor has the shape {shape} and the strides {stride}")
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    elements = torch.Size(shape).numel()
    if elements > len(storage) or (elements and last >= len(storage)):
        raise ArchiveError(f"a tensor of shape {shape} reaches beyond its storage of {len(storage)} elements")
    return storage.as_strided(shape, stride, offset)


def _single(values: list[Any]) -> Any:
    if len(values) != 1:
        raise ArchiveError(f"it holds {len(values)} objects instead of one")
    return values[0]
