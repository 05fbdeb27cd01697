"""The table of the benchmarks is printed, and mistakes end in one line."""

from __future__ import annotations

import pytest

from adfeatures.measuring import HEADER, RULE, Measurement
from training.bench import __main__ as entry
from training.bench import aupro as bench


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        bench,
        "rows",
        lambda quick: iter(
            [Measurement(f"quick {quick}", "s", 0.5, 2.0, 4.0, "a note"), Measurement("alone", "s", 1.0)]
        ),
    )
    assert entry.main(["aupro", "--quick"]) == 0
    machine, empty, header, rule, *lines = capsys.readouterr().out.splitlines()
    assert machine.startswith("torch ") and empty == "" and (header, rule) == (HEADER, RULE)
    assert [[cell.strip() for cell in line.split("|")] for line in lines] == [
        ["", "quick True, s", "0.500", "2.000", "4.00", "-", "a note", ""],
        ["", "alone, s", "1.000", "-", "-", "-", "", ""],
    ]


def test_unknown_names_and_interruptions_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(quick: bool) -> list[Measurement]:
        raise KeyboardInterrupt

    assert entry.main(["padim", "aupor"]) == 2
    assert capsys.readouterr() == ("", "training.bench: error: Unknown benchmark 'aupor'. Did you mean 'aupro'?\n")
    monkeypatch.setattr(bench, "rows", interrupted)
    assert entry.main(["aupro"]) == 130
    assert capsys.readouterr().err.count("\n") == 1
