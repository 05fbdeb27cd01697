"""JSON that is read has the types that were named, and JSON that is written holds no NaN."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import pytest

from adfeatures.documents import DocumentError, Size, check, dumps, parse, read_document
from adfeatures.errors import InputError


@dataclass
class Inner:
    numbers: list[float]
    pair: tuple[int, str]
    share: Annotated[float, (0, 1)] = 0.5
    names: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Outer(Inner):
    """Inherits fields."""

    inner: Inner | None
    size: Size | None = None
    anything: Any = None


class Open(TypedDict):
    count: Annotated[int, (1, 9)]


INNER = {"numbers": [1, 2.5], "pair": [3, "x"]}


def test_dataclasses_and_what_they_hold() -> None:
    text = json.dumps(
        {**INNER, "inner": {**INNER, "share": 1, "names": {"a": "b"}}, "size": [2, 3], "anything": [None]}
    )
    expected = Outer(
        [1.0, 2.5], (3, "x"), inner=Inner([1.0, 2.5], (3, "x"), 1.0, {"a": "b"}), size=(2, 3), anything=[None]
    )
    found = parse(text, Outer)
    assert found == expected and type(found.numbers[0]) is float
    assert parse(json.dumps({**INNER, "inner": None}).encode(), Outer).inner is None


def test_other_fields_of_a_typed_dict_stay() -> None:
    assert parse('{"count": 3, "more": [1]}', Open) == {"count": 3, "more": [1]}
    for text in ("{}", '{"count": 0}', '{"count": 10}', '{"count": "3"}', "[3]"):
        with pytest.raises(DocumentError, match="count|an object"):
            parse(text, Open)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"numbers": None}, "numbers must be a list, not None"),
        ({"numbers": [1, "2"]}, r"numbers\[1\] must be a number, not '2'"),
        ({"numbers": [True]}, r"numbers\[0\] must be a number, not True"),
        ({"numbers": [10**400]}, r"numbers\[0\] must be a number"),
        ({"pair": [1]}, r"pair must be \[a whole number, text\]"),
        ({"pair": [1.0, "x"]}, r"pair\[0\] must be a whole number, not 1.0"),
        ({"pair": [1 << 63, "x"]}, r"pair\[0\] must be a whole number"),
        ({"pair": [False, "x"]}, r"pair\[0\] must be a whole number, not False"),
        ({"share": 1.1}, "share must be a number from 0 to 1, not 1.1"),
        ({"names": {"a": 1}}, "names.a must be text, not 1"),
        ({"size": [0, 3]}, r"size must be \[height, width\]"),
        ({"inner": {**INNER, "pair": 1}}, r"inner.pair must be \["),
        ({"inner": 3}, "inner must be an object"),
        ({"more": 1}, "it has the unknown field more"),
    ],
)
def test_other_types_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(DocumentError, match=says):
        parse(json.dumps({**INNER, "inner": None, **change}), Outer)
    with pytest.raises(DocumentError, match="it has no pair"):
        parse('{"numbers": [], "inner": null}', Outer)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        "NaN",
        "[Infinity]",
        "-Infinity",
        "1e999",
        "9" * 5000,
        b"\xff\xfe",
        "[1] 2",
    ],
)
def test_no_json(text: str | bytes) -> None:
    with pytest.raises(DocumentError, match="it is not JSON") as caught:
        parse(text, Any)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("left", "right"), [("[", "]"), ('{"a":', "}"), ('[1,{"a":"[","b":', "}]")])
def test_what_can_be_read_can_be_written_again(left: str, right: str) -> None:
    levels = 2 if "," in left else 1
    text = left * (100 // levels) + "1" + right * (100 // levels)
    value = parse(text, Any)
    assert json.loads(dumps(value, indent=1)) == value == json.loads(text)
    for depth in (100 // levels + 1, 600 // levels):
        with pytest.raises(DocumentError, match="more than 100 deep"):
            parse(left * depth + "1" + right * depth, Any)


@pytest.mark.parametrize("text", ["[" + "[]," * 1_000_000 + "[]]", " " * (65 << 20) + "1"])
def test_much_in_little(text: str) -> None:
    with pytest.raises(DocumentError, match="too long"):
        parse(text, Any)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"ä": [1]}', encoding="utf-8")
    assert read_document(path, dict[str, list[int]]) == {"ä": [1]}
    with pytest.raises(InputError, match=r"a\.json cannot be read: it\.ä must be text"):
        read_document(path, dict[str, str])
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", tmp_path, tmp_path / "missing", Path("/dev/zero"), tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="Cannot open .*: "):
            read_document(other, Any)
    with open(tmp_path / "sparse.json", "wb") as file:
        file.truncate(4 << 30)
    with pytest.raises(InputError, match=r"sparse\.json has more than 64 MiB"):
        read_document(tmp_path / "sparse.json", Any)


def test_values_of_numpy_and_of_python() -> None:
    assert type(check(np.float64(0.5), float)) is float
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(DocumentError, match="it must be a number"):
            check(value, float)


def test_what_is_written_holds_no_nan() -> None:
    text = dumps({"a": [math.nan, 1.5], "b": {"c": (math.inf, -math.inf)}, "d": None}, indent=1)
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, 1.5], "b": {"c": [None, None]}, "d": None}


def test_one_of_some_words() -> None:
    kind = Literal["empirical", "lognormal"]
    assert check("lognormal", kind, "tail") == "lognormal"
    for value in ("Lognormal", 1, None, ["empirical"]):
        with pytest.raises(DocumentError, match="tail must be empirical or lognormal, not"):
            check(value, kind, "tail")
