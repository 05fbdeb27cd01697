"""The naive form that the benchmark compares with is the original's, and the table is made."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.golden_values import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from training.bench import aupro as bench
from training.metrics import aupro_original


def test_naive_form_is_the_original() -> None:
    stored = golden("metrics")
    assert bench.naive(stored["scores"].numpy(), stored["masks"].numpy()) == pytest.approx(
        float(stored["values"][6]), abs=1e-9
    )


@pytest.mark.slow
@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]), st.integers(1, 3), st.booleans())
@settings(max_examples=20)
def test_aupro_original_is_the_naive_form(seed: int, dtype: type, count: int, tied: bool) -> None:
    random = np.random.default_rng(seed)
    masks = (random.random((count, 8, 9)) < 0.2).astype(np.uint8)
    masks[0, 0, :2] = 0, 1
    maps = random.standard_normal(masks.shape).astype(dtype) + masks
    maps = maps.round(1) if tied else maps
    assert aupro_original(maps, masks) == pytest.approx(bench.naive(maps, masks), abs=1e-9)


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    example = bench.example
    monkeypatch.setattr(bench, "example", lambda count: example(count // 10, side=56))
    exact, original, seven = bench.rows(quick=True)
    assert exact.ratio is not None and original.ratio is not None and seven.ratio is None
    ours, naive = (float(text.split()[-1]) for text in original.note.split(","))
    assert ours == naive != float(exact.note.split(",")[0].split()[-1])
    assert 0 < naive < 1
    assert "MB beyond" in seven.note


def test_example_has_normal_and_defective_maps() -> None:
    maps, masks = bench.example(6, side=56)
    assert maps.dtype == np.float32 and maps.shape == masks.shape == (6, 56, 56)
    assert masks.any(axis=(1, 2)).tolist() == [True, False] * 3
    assert maps[masks == 1].mean() > maps[masks == 0].mean()
