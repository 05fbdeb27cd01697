"""The plain form that a training step is timed against takes the same steps, and the table is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.bench import pretrain as bench

SIZES = bench.StepSizes(width=48, depth=12, keys=16, batch=4, shots=2, side=56, pool=6, repeats=1)


def test_the_plain_step_gives_the_same(tmp_path: Path) -> None:
    step = bench.BenchedStep(SIZES, str(tmp_path))
    losses = [step.ours() for _ in range(3)]
    assert len(set(losses)) == 3
    assert losses == pytest.approx([step.naive() for _ in range(3)], rel=1e-4)


def test_references_of_the_pool_are_those_encoded(tmp_path: Path) -> None:
    encoded, pooled = (bench.BenchedStep(SIZES, str(tmp_path / name)) for name in ("encoded", "pooled"))
    assert pooled.ours(pooled.store) == pytest.approx(encoded.ours(), rel=1e-2)


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", SIZES)
    rows = list(bench.rows(quick=True))
    assert len(rows) == 5
    for row in rows:
        assert row.ours is not None and row.naive is not None
        assert row.ratio == pytest.approx(row.naive / row.ours)
    assert ["target" in row.note for row in rows] == [True, True, False, False, False]
