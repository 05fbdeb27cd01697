"""The reproduction from end to end, in miniature."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from helpers.ranks import run_ranks

from training import reproduce


def rows(output: Path) -> dict[tuple[str, str], float]:
    with open(output / "tables.csv", newline="") as file:
        return {(r["table"], r["row"]): float(r["here"]) for r in csv.DictReader(file) if r["here"]}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The angle loss was 0")
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    words = ["--smoke", "--output", str(tmp_path), "--device", "cpu", "--workers", "0"]
    assert reproduce.main(words) == 0
    found = rows(tmp_path)
    ablations = {row for table, row in found if table == "Ablations"}
    trained = {("test_vit", training) for training in ("both losses", "angle loss alone", "norm loss alone")}
    assert ablations == {
        f"{backbone}, {training}, {method}"
        for backbone, training in trained | {("test_vit2", "both losses")}
        for method in ("PaDiM", "PatchCore", "FeatureNorm (8-shot)")
    } | {f"test_vit, without residuals, {method}" for method in ("PaDiM", "PatchCore", "FeatureNorm")}
    as_found = {(table, row): here for (table, row), here in found.items() if not row.endswith(", difference")}
    methods = ("CFLOW (last epoch)", "CFLOW", "GLASS (last epoch)", "GLASS", "UniAD", "UniAD (oracle)")
    assert {row for table, row in as_found if table != "Ablations"} == {
        f"{backbone}, {method}, {features}"
        for backbone in ("test_vit", "test_vit2")
        for features, feature_norm in (("raw", "FeatureNorm"), ("pretrained", "FeatureNorm (8-shot)"))
        for method in (*methods, "PaDiM", "PatchCore", feature_norm)
    }
    assert all(0 <= percent <= 100 for percent in as_found.values())
    figures = {path.parent.parent.parent for path in tmp_path.glob("*/*/*/*/figures/bottle/*-curves.png")}
    assert figures == {path.parent for path in tmp_path.glob("*/*/*/*/results.json")} and len(figures) == 10
    # Again, nothing is computed.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*/*/results/*/*.json")}
    assert reproduce.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*/*/results/*/*.json")} == before and before


@pytest.mark.release
def test_two_processes_rehearse_together(tmp_path: Path) -> None:
    words = ["--smoke", "--output", str(tmp_path), "--device", "cpu", "--workers", "0", "--only", "patchcore"]
    ended = run_ranks(2, "-m", "training.reproduce", *words)
    assert ended.returncode == 0, ended.stderr
    found = {row for table, row in rows(tmp_path) if table == "Ablations"}
    trainings = ("both losses", "angle loss alone", "norm loss alone", "without residuals")
    expected = {f"test_vit, {training}" for training in trainings} | {"test_vit2, both losses"}
    assert {row.rpartition(", ")[0] for row in found} == expected
