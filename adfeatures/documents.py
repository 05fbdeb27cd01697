"""JSON: what is read has the types that its reader names, and what is written holds no NaN."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import sys
import types
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from itertools import chain
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints, is_typeddict

from .checkpoints import AnyPath, regular_file
from .errors import InputError

# A bank of 200,000 images has 32 MB.
_MAX_BYTES = 64 << 20
_MAX_NESTED = 1_000_000
# As deep as may be written again: that takes Python more of its stack than reading does.
_MAX_DEPTH = 100

_Side: TypeAlias = Annotated[int, (1, 2**31 - 1)]
Size: TypeAlias = Annotated[tuple[_Side, _Side], "[height, width]"]

_WORDS = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "text",
}


class DocumentError(InputError):
    """JSON that is damaged, or holds something else than it should."""


def read_document(path: AnyPath, kind: Any) -> Any:
    """The JSON of a file, in UTF-8. Arguments and errors as of ``parse``."""
    file = regular_file(path, DocumentError)
    if file.stat().st_size > _MAX_BYTES:
        raise DocumentError(f"{path} has more than {_MAX_BYTES >> 20} MiB.")
    try:
        return parse(file.read_bytes(), kind)
    except (DocumentError, OSError) as error:
        raise DocumentError(f"{path} cannot be read: {error}") from error


def parse(text: str | bytes, kind: Any, name: str = "it") -> Any:
    """JSON of a type.

    Args:
        text: At most 64 MiB. NaN and Infinity are no JSON.
        kind: As of ``check``.
        name: What messages call it.

    Raises:
        DocumentError: For anything else.
    """
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        if len(text) > _MAX_BYTES or decoded.count("[") + decoded.count("{") > _MAX_NESTED:
            raise ValueError("it is too long")
        value = json.loads(decoded, parse_constant=_refuse, parse_float=_finite)
        if _is_deep(value):
            raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{name} is not JSON ({error})") from error
    return check(value, kind, name)


def check(value: Any, kind: Any, name: str = "it") -> Any:
    """A value as its type describes it: lists become tuples and mappings become dataclasses where these are named.

    Args:
        value: What JSON, or a pickle, gave.
        kind: bool, int (of 64 bits), float (finite, or an int), str, any other class; lists, tuples and
            dictionaries of these, with keys that are text; these or None; dataclasses, whose fields without default
            must be there, and no others; TypedDict, which leaves others as they are; and Any.
            Annotated[kind, (lowest, highest)] bounds numbers, Annotated[kind, words] describes a kind in messages.
        name: What messages call it.

    Raises:
        DocumentError: For a value of another type.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _fill(kind, check(value, dict[str, Any], name), name)
    if is_typeddict(kind):
        return _check_fields(kind, check(value, dict[str, Any], name), name)
    if origin is Annotated and isinstance(arguments[1], str):
        with suppress(DocumentError):
            return check(value, arguments[0], name)
    elif origin is Annotated:
        found, (low, high) = check(value, arguments[0], name), arguments[1]
        if low <= found <= high:
            return found
    if origin is Literal and value in arguments:
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else check(value, arguments[0], name)
    if origin is list and isinstance(value, list):
        return [check(item, arguments[0], f"{name}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: check(item, arguments[1], f"{name}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
        pairs = enumerate(zip(value, arguments, strict=True))
        return tuple(check(item, own, f"{name}[{index}]") for index, (item, own) in pairs)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) <= sys.float_info.max:
            return float(value)
    elif kind is int and type(value) is int and abs(value) < 1 << 63:
        return value
    if origin is None and kind not in (int, float) and isinstance(value, kind):
        return value
    raise DocumentError(f"{name} must be {_described(kind)}, not {reprlib.repr(value)}")


def dumps(value: Any, **options: Any) -> str:
    """A value as JSON, with null in the place of NaN and infinite numbers. Options as of ``json.dumps``."""
    return json.dumps(_plain(value), allow_nan=False, **options)


def _fill(kind: Any, value: dict[str, Any], name: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := [key for key in value if key not in fields]:
        raise DocumentError(f"{name} has the unknown field {unknown[0]}")
    for field in fields.values():
        if field.name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise DocumentError(f"{name} has no {field.name}")
    hints, place = _hints(kind), "" if name == "it" else f"{name}."
    return kind(**{key: check(item, hints[key], place + key) for key, item in value.items()})


def _check_fields(kind: Any, value: dict[str, Any], name: str) -> dict[str, Any]:
    if missing := sorted(kind.__required_keys__ - value.keys()):
        raise DocumentError(f"{name} has no {missing[0]}")
    return value | {key: check(value[key], hint, key) for key, hint in _hints(kind).items() if key in value}


def _described(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated and isinstance(arguments[1], str):
        return arguments[1]
    if origin is Annotated:
        return f"{_described(arguments[0])} from {arguments[1][0]:,} to {arguments[1][1]:,}"
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        return f"[{', '.join(map(_described, arguments))}]"
    return _WORDS.get(origin or kind) or str(kind.__name__)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _is_deep(value: Any) -> bool:
    level: list[Any] = [[value]]
    for _ in range(_MAX_DEPTH + 1):
        items = chain.from_iterable(own.values() if isinstance(own, dict) else own for own in level)
        level = [item for item in items if isinstance(item, (dict, list))]
    return bool(level)


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse(text)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text[:20]} is not a number")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
