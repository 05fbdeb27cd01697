"""How benchmarks measure. No time is asserted but that of a known sleep, since machines differ."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from adfeatures import measuring
from adfeatures.measuring import HEADER, RULE, Measurement, compare, in_child, machine, peak_megabytes, seconds, timed


def test_compared_functions_give_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3, 6, 1, 10, 2, 2])
    monkeypatch.setattr(measuring, "seconds", lambda function: function() or next(times))
    calls: list[str] = []
    row = compare("what", lambda: calls.append("ours"), lambda: calls.append("naive"), note="a note")
    assert (row.ours, row.naive, row.ratio) == (2, 6, 2)  # the ratios are 2, 10 and 1
    assert calls == ["ours", *["ours", "naive"] * 3]
    assert row.unit == "s" and row.note == "pairs 3; a note" and row.spread == (1.5, 6)


def test_a_limit_ends_a_comparison_after_the_pair_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "REST", 0)
    calls: list[str] = []
    row = compare("what", lambda: calls.append("ours"), lambda: calls.append("naive"), repeats=9, limit=0, unit="ms")
    assert calls == ["ours", "ours", "naive"]
    assert row.unit == "ms" and row.note == "pairs 1" and row.spread is None


def test_medians_of_runs() -> None:
    row = Measurement.of_runs("what", [0.1, 0.4, 0.2], [0.3, 0.4, 1.0], unit="ms", note="a note")
    assert (row.what, row.unit, row.note) == ("what", "ms", "a note")
    assert (row.ours, row.naive, row.ratio) == pytest.approx((200, 400, 3))  # the ratios are 3, 1 and 5
    alone = Measurement.of_runs("what", [1, 5, 2])
    assert alone == Measurement("what", "s", 2, spread=(1.5, 3.5))


def test_rows_make_an_aligned_table_of_markdown() -> None:
    rows = [
        Measurement("of a few", "ms", 1234.56, 2.0, 0.123, "a note", (0.1, 0.25)),
        Measurement("of seconds", "s", 1234.5678, 2.0, 10.0),
        Measurement("alone", "ms", 12.0, spread=(1234.5, 1300)),
        Measurement("not measured", "MB", None, note="another"),
    ]
    lines = [HEADER, RULE, *map(str, rows)]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][:5] == ["what", "ours", "naive", "ratio", "middle half"]
    assert all(set(cell) <= set("-:") and len(cell) >= 3 for cell in cells[1])
    assert cells[2:] == [
        ["of a few, ms", "1,234.6", "2.0", "0.12", "0.10 to 0.25", "a note"],
        ["of seconds, s", "1,234.568", "2.000", "10.00", "-", ""],
        ["alone, ms", "12.0", "-", "-", "1,234.5 to 1,300.0", ""],
        ["not measured, MB", "-", "-", "-", "-", "another"],
    ]
    bars = [[place for place, letter in enumerate(line) if letter == "|"][:5] for line in lines]
    assert all(own == bars[0] for own in bars)


def test_timed_returns_what_the_function_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(measuring.time, "sleep", rests.append)
    taken, value = timed(lambda: sleep(0.05) or "result")
    assert value == "result" and taken >= 0.05
    assert seconds(lambda: sleep(0.05)) >= 0.05
    assert timed(lambda: "at once", rested=False)[1] == "at once"
    assert rests == [measuring.REST] * 2


@pytest.mark.skipif(sys.platform == "win32", reason="Windows counts no peak")
def test_peak_is_that_of_the_child_alone() -> None:
    ballast = torch.ones(75_000_000)
    here, child = peak_megabytes(), in_child(peak_megabytes)
    assert here is not None and child is not None
    assert child < here - 200 and len(ballast)


def test_a_child_that_dies_gives_nothing() -> None:
    assert in_child(os._exit, 1) is None


def test_machine_names_what_figures_depend_on() -> None:
    facts = machine()
    assert list(facts)[:4] == ["torch", "device", "threads", "processors"]
    assert facts["threads"] == torch.get_num_threads() and facts["torch"] == torch.__version__
    assert facts["hardware"] and facts["bfloat16"] in ("yes", "no")


@pytest.mark.parametrize(
    ("flags", "expected"), [("fpu avx512_bf16", "yes"), ("amx_tile amx_bf16", "yes"), ("fpu avx2 bf16_not", "no")]
)
def test_machine_says_whether_it_computes_in_bfloat16(
    flags: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nmodel name\t: Some CPU @ 2: fast\nflags\t\t: {flags}\n\n")
    monkeypatch.setattr(measuring, "_CPU", file)
    assert (machine()["hardware"], machine()["bfloat16"]) == ("Some CPU @ 2: fast", expected)
