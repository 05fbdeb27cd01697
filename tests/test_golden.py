"""The golden outputs against formulas, evaluated in float64 by tests/golden/make_formulas.py."""

from __future__ import annotations

import pytest
from golden import make_formulas
from helpers.golden_values import FOLDER, assert_near, golden
from helpers.golden_values import shapes as stored_shapes

# Ten steps add up what float32 rounds.
TOLERANCES = {"training": 1e-3}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.release] if name == "training" else []) for name in make_formulas.MAKERS],
)
def test_formulas_give_the_stored_numbers(name: str) -> None:
    found, expected = make_formulas.MAKERS[name](), golden(name)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_near(found[key], tensor, TOLERANCES.get(name, 1e-5))


def test_shapes_follow_from_the_sizes() -> None:
    for name, shapes in make_formulas.shapes().items():
        assert shapes == stored_shapes(name)


def test_every_file_has_its_line() -> None:
    """Whoever adds a golden says whether it can be made again."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in FOLDER.iterdir():
        if path.suffix in (".safetensors", ".pth", ".json"):
            assert f"`{path.name}`" in text
