"""The table of promises in SECURITY.md names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PROMISES = re.findall(r"^\| (.+) \| (.+) \|$", (TESTS.parent / ".github/SECURITY.md").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize(("promise", "held_by"), PROMISES[1:], ids=lambda text: text[:40])
def test_every_promise_is_held_by_tests_that_are_there(promise: str, held_by: str) -> None:
    names = re.findall("`([^`]+)`", held_by)
    assert names
    for name in names:
        file, *inner = name.split("::")
        body = ast.parse((TESTS / file).read_text(encoding="utf-8")).body
        for part in inner:
            found = [node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == part]
            assert found, f"{name} is not there"
            body = found[0].body
