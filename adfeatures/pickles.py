"""Files of torch.save, old and new, and TorchScript archives, the form in which OpenAI published CLIP, read as data.

Neither Python nor torch unpickles anything, and no code of an archive is compiled or run: the opcodes are interpreted
here, on plain containers, so that a file can name tensors, numbers and texts, but make and call nothing else. What that
takes is bounded by the size of the file and by the limits below.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

Operations: TypeAlias = Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]

# Those that torch can compare and convert: not complex numbers, bits, or two numbers in a byte.
PLAIN_DTYPE = re.compile(r"torch\.(bool|u?int(8|16|32|64)|float(16|32|64|8_\w+)|bfloat16)")
# What may be read beyond the size of a file, since its texts may be compressed. Those of CLIP have 3 MB.
_SPARE_BYTES = 64 << 20
# Those of ImageBind, with 1.2 billion parameters, have 30,000.
_MAX_OPCODES = 1_000_000
_MAX_NAMES = 100_000
MAX_RANK = 64
# Of a tensor that ``expand`` made of fewer, as strides of 0 say.
_MAX_EXPANDED = 1 << 20
_LEGACY = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "torch BFloat16Storage": torch.bfloat16,
    "torch BoolStorage": torch.bool,
    "torch ByteStorage": torch.uint8,
    "torch CharStorage": torch.int8,
    "torch ComplexDoubleStorage": torch.complex128,
    "torch ComplexFloatStorage": torch.complex64,
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
    "torch ShortStorage": torch.int16,
    "torch.storage UntypedStorage": torch.uint8,
}
# What surrounds tensors, and attributes that are none. Its values are not needed: None stands for them.
_IGNORED = re.compile(
    r"torch\.jit\._pickle \w+|torch (device|Size|Tensor)|torch\.nn\.parameter \w+|torch\.serialization _get_layout"
)


class PickleError(ValueError):
    """A file that is damaged, or holds what no file of weights holds."""


class RefusedError(PickleError):
    """A file that names what is neither a tensor, a float nor a module.

    Attributes:
        names: What it names, dotted.
    """

    def __init__(self, *names: str) -> None:
        super().__init__(", ".join(names))
        self.names = names


def read_pickle(path: Path) -> Any:
    """What ``torch.save`` or ``torch.jit.save`` wrote.

    Returns:
        Numbers, texts, lists, tuples, dictionaries and CPU tensors, nested as they were saved. Of TorchScript the
        parameters and buffers by their dotted names, as the ``state_dict`` of its module has them. Tensors that are
        not plain ones are replaced by empty ones on the meta device.

    Raises:
        PickleError: For a file that is damaged or too large, or names anything else. A file that is damaged may raise
            other exceptions, too.
    """
    storages = _Storages(path.stat().st_size + _SPARE_BYTES)
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            file.seek(0)
            return _read_legacy(file, storages)
        with zipfile.ZipFile(file) as archive:
            files = _Files(archive, storages.left)
            pickled = files.read("data.pkl")
            _check(io.BytesIO(pickled))
            content = _interpret(pickled, storages)
            for key, data in storages.data.items():
                files.fill(f"data/{key}", data)
            return dict(_state(content, files)) if isinstance(content, _Module) else content


def _read_legacy(file: BinaryIO, storages: _Storages) -> Any:
    """The form of torch before 1.6: five pickles, and behind them the elements of the storages one after another."""
    head, pickles = io.BytesIO(file.read(_SPARE_BYTES)), []
    for _ in ("magic number", "version", "system", "content", "keys of the storages"):
        start = head.tell()
        _check(head)
        pickles.append(head.getvalue()[start : head.tell()])
    magic, _, system, content, keys = (_interpret(data, storages) for data in pickles)
    if magic != _LEGACY or system["little_endian"] != (sys.byteorder == "little"):
        raise PickleError("it is not a file of torch, or one of another kind of processor")
    file.seek(head.tell())
    for key in keys:
        data, dtype = storages.data[key], storages.tensors[key].dtype
        (elements,) = struct.unpack("=q", file.read(8))
        if elements * dtype.itemsize != len(data) or file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise PickleError(f"storage {key} has {elements} elements, or is cut off")
    if len(keys) != len(storages.data):
        raise PickleError("it lacks some of its storages")
    return content


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(eq=False)
class _Module:
    kind: str
    attributes: dict[str, Any] = field(default_factory=dict)


class _Storages:
    """The storages that a pickle refers to, together at most ``left`` bytes. They are filled after it was read."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.data: dict[str, bytearray] = {}
        self.tensors: dict[str, Tensor] = {}

    def find(self, identity: Any) -> Tensor:
        """The one-dimensional tensor that a persistent id ("storage", type, key, device, elements) stands for."""
        kind, stored_type, key, _, elements, *view = identity
        if (
            kind != "storage"
            or not isinstance(stored_type, _Global)
            or not isinstance(key, str)
            or view not in ([], [None])
        ):
            raise PickleError("it refers to something that is not a storage")
        dtype = _DTYPES[stored_type.name]
        if key not in self.tensors:
            size = elements * dtype.itemsize
            self.left -= size
            if size < 0 or self.left < 0:
                raise PickleError(f"its storage {key} and those before it are larger than the file")
            data = self.data[key] = bytearray(size)
            self.tensors[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        found = self.tensors[key]
        if found.dtype != dtype or len(found) != elements:
            raise PickleError(f"storage {key} is both {len(found)} {found.dtype} and {elements} {dtype}")
        return found


class _Files:
    """The files within an archive, together at most ``left`` bytes of them."""

    def __init__(self, archive: zipfile.ZipFile, left: int) -> None:
        self.archive, self.left, self.names = archive, left, set(archive.namelist())
        roots = [name for name in self.names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        self.folder = _single(roots).removesuffix("data.pkl")
        if f"{self.folder}byteorder" in self.names and self.read("byteorder").decode() != sys.byteorder:
            raise PickleError("its bytes are in the order of another kind of processor")

    def read(self, name: str) -> bytes:
        info = self.archive.getinfo(self.folder + name)
        self.left -= info.file_size
        if self.left < 0:
            raise PickleError(f"its {name[:99]} and what was read before are larger than the file")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise PickleError("it is compressed in a way that torch does not know")
        with self.archive.open(info) as file:
            # Without a number this would be as long as what is packed, not as announced.
            return file.read(info.file_size)

    def fill(self, name: str, data: bytearray) -> None:
        """Read what must be as long as ``data`` into it."""
        found = self.read(name)
        if len(found) != len(data):
            raise PickleError(f"its {name[:99]} has {len(found)} bytes instead of {len(data)}")
        data[:] = found

    def state_names(self, kind: str) -> set[str] | None:
        """The attributes that a class lists as its parameters and buffers, None where its text is missing."""
        module, name = kind.split(" ")
        path = f"code/{module.replace('.', '/')}.py"
        if self.folder + path not in self.names:
            return None
        head = rf"^class {re.escape(name)}\(Module\):\n  __parameters__ = \[(.*)\]\n  __buffers__ = \[(.*)\]$"
        match = re.search(head, self.read(path).decode(), re.MULTILINE)
        return set(re.findall('"([^"]*)"', match[1] + match[2])) if match else None


def _state(root: _Module, files: _Files) -> Iterator[tuple[str, Tensor]]:
    waiting, count, state_names = [("", root)], 0, cache(files.state_names)
    while waiting:
        prefix, module = waiting.pop()
        named = state_names(module.kind)
        for key, value in module.attributes.items():
            # Modules may share others, so that few bytes can stand for many names, and long ones.
            count += 1
            if count > _MAX_NAMES or len(name := f"{prefix}{key}") > 1000:
                raise PickleError(f"it has more than {_MAX_NAMES:,} attributes, or longer names than 1000 letters")
            if isinstance(value, _Module):
                waiting.append((f"{name}.", value))
            elif isinstance(value, Tensor) and (named is None or key in named):
                yield name, value


def _check(stream: io.BytesIO) -> None:
    """Go to the end of a pickle, which must be short and name nothing that is refused."""
    names: set[str] = set()
    texts: list[str] = []
    try:
        operations: Operations = pickletools.genops(stream)
        for number, (opcode, argument, _) in enumerate(operations):
            if number > _MAX_OPCODES:
                raise PickleError(f"its pickle has more than {_MAX_OPCODES:,} operations")
            if opcode.name == "STACK_GLOBAL" and len(texts) == 2:
                names.add(" ".join(texts))
            elif opcode.name in ("GLOBAL", "INST"):
                names.add(argument)
            elif isinstance(argument, str):
                texts = [*texts[-1:], argument]
    except ValueError:
        if not names:
            raise
    if refused := sorted(name.replace(" ", ".") for name in names if not _is_known(name)):
        raise RefusedError(*refused)


def _is_known(name: str) -> bool:
    known = name in _DTYPES or name in _FUNCTIONS or name.startswith("__torch__")
    return known or _dtype(name) is not None or _IGNORED.fullmatch(name) is not None


def _dtype(name: str) -> torch.dtype | None:
    dotted = name.replace(" ", ".", 1)
    return getattr(torch, dotted.removeprefix("torch."), None) if PLAIN_DTYPE.fullmatch(dotted) else None


def _interpret(data: bytes, storages: _Storages) -> Any:
    """The object that a pickle describes. Only what torch itself writes is understood; anything else is an error."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    operations: Operations = pickletools.genops(data)
    for opcode, argument, _ in operations:
        match opcode.name:
            case "PROTO":
                pass
            case "BINUNICODE" | "SHORT_BINSTRING" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
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
            case "SETITEM" | "SETITEMS":
                values = above_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                if not all(map(_is_key, values[::2])):
                    raise PickleError("a dictionary has keys that are neither text nor numbers")
                stack[-1].update(zip(values[::2], values[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_Global(argument))
            case "BINPERSID":
                stack.append(storages.find(stack.pop()))
            case "NEWOBJ":
                _, made = stack.pop(), stack.pop()
                stack.append(_Module(made.name) if made.name.startswith("__torch__") else None)
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Module) and isinstance(state, dict):
                    stack[-1].attributes = state
                elif isinstance(stack[-1], _Dtype):
                    stack[-1].order = {"<": "<", ">": ">"}[state[1]]
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function.name, arguments))
            case "STOP":
                return _single(stack)
            case _:
                raise PickleError(f"it holds the opcode {opcode.name}")
    raise PickleError("its pickle has no end")


def _is_key(key: object) -> bool:
    """Whether a key can be hashed in no time: nested tuples take for ever, and so do large numbers of equal hash."""
    return isinstance(key, (str, float)) or (isinstance(key, int) and abs(key) < 1 << 60)


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    if (function := _FUNCTIONS.get(name)) is None:
        return None
    try:
        return function(*arguments)
    except TypeError as error:
        raise PickleError(f"{name.replace(' ', '.')} gets what it does not take ({error})") from error


def _tensor(
    storage: Tensor, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *more: Any, dtype: Any = None
) -> Tensor:
    flags = more[2:]  # Behind requires_grad and hooks: whether elements count as conjugated or negated.
    if any(flags):
        return _odd()
    if dtype is not None:
        storage = storage.view(dtype)
    if len(shape) != len(stride) or len(shape) > MAX_RANK or min((offset, *shape, *stride)) < 0:
        raise PickleError(f"a tensor has {len(shape)} dimensions and {len(stride)} strides, or some below 0")
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    elements = math.prod(shape)
    if elements > max(len(storage), _MAX_EXPANDED) or (elements and last >= len(storage)):
        raise PickleError(f"a tensor of {elements} elements exceeds its storage of {len(storage)}")
    return storage.as_strided(shape, stride, offset)


def _typed_tensor(
    storage: Tensor, offset: int, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: _Global, *flags: Any
) -> Tensor:
    return _tensor(storage, offset, shape, stride, grad, hooks, *flags, dtype=_dtype(dtype.name))


def _attributed(function: _Global, _: Any, arguments: tuple[Any, ...], *attributes: Any) -> Any:
    """A tensor to which Python attributes were given, or of a class such as Buffer."""
    return _call(function.name, arguments)


def _odd(*_: Any) -> Tensor:
    """Stands for a tensor that is not a plain one."""
    return torch.empty(0, device="meta")


class _Dtype:
    """Stands for ``numpy.dtype``, of which floats alone are known."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in ("f8", "f4"):
            raise RefusedError(f"numpy.{code}")
        self.code, self.order = {"f8": "d", "f4": "f"}[code], "="


def _scalar(dtype: _Dtype, data: bytes | str) -> float:
    data = data.encode("latin-1") if isinstance(data, str) else data
    return float(struct.unpack(dtype.order + dtype.code, data)[0])


def _single(values: list[Any]) -> Any:
    if len(values) != 1:
        raise PickleError(f"it holds {len(values)} objects instead of one")
    return values[0]


# What a file may call.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "_codecs encode": lambda text, encoding: text[:16],
    "collections OrderedDict": lambda: {},
    "numpy dtype": _Dtype,
    "numpy.core.multiarray scalar": _scalar,
    "numpy._core.multiarray scalar": _scalar,
    "torch._tensor _rebuild_from_type_v2": _attributed,
    "torch._utils _rebuild_meta_tensor_no_storage": _odd,
    "torch._utils _rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils _rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._utils _rebuild_sparse_tensor": _odd,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _typed_tensor,
}
