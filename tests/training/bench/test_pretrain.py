"""The plain form that a training step is timed against takes the same steps, and the table is made."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from training.bench import pretrain as bench
from training.bench import throughput
from training.bench.__main__ import main

SIZES = bench.StepSizes(width=48, depth=12, keys=16, batch=4, shots=2, side=56, pool=6, repeats=1)
SMALL = throughput.Sizes(batch=4, side=28, source=32, images=8, steps=1, keys=4, width=48, depth=24)


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
    monkeypatch.setattr(throughput, "QUICK", SMALL)
    rows = list(bench.rows(quick=True))
    assert len(rows) == 7
    for row in rows:
        assert row.ours is not None and row.naive is not None
        assert row.ratio == pytest.approx(row.naive / row.ours)
    assert ["target" in row.note for row in rows] == [True, True, False, False, False, False, False]
    for row, source in zip(rows[5:], (32, 128), strict=True):
        assert row.what == f"a sample of {source} px for 28 px, CPU time"
        rates = re.fullmatch(r"samples .* core (\d+), .* files \d+, .* alone \d+; 2 kB an image in the cache", row.note)
        assert rates is not None and row.ours is not None and int(rates[1]) == pytest.approx(1000 / row.ours, abs=1)


@pytest.mark.slow
def test_whole_steps_on_a_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(throughput, "QUICK", SMALL)
    assert main(["pretrain", "--device", "cpu", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()[4:]
    for line, (name, precision) in zip(
        lines, product(("dinov2_base", "dinov2_large"), ("float32", "autocast", "bfloat16")), strict=True
    ):
        assert line.startswith(f"| step of {name}, batch 4, {precision}, s")
        assert re.search(r"cache: waiting \d+%, [\d,]+ images/s; files: waiting \d+%.*peak memory [\d,]+ MB", line)


@pytest.mark.gpu
def test_whole_steps_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(throughput, "QUICK", SMALL)
    assert main(["pretrain", "--device", "cuda", "--quick"]) == 0
    assert capsys.readouterr().out.count("step of ") == 6


def test_a_device_is_for_this_benchmark_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "padim", "--device", "cpu"]) == 2
    assert "--device is for the benchmark pretrain only" in capsys.readouterr().err
