"""The reproduction from end to end, in miniature."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from helpers.ranks import run_ranks

from training import reproduce
from training.evaluation import pictures
from training.pretraining import loop
from training.reproduction import smoke


def rows(output: Path) -> dict[tuple[str, str], float]:
    with open(output / "tables.csv", newline="") as file:
        return {(r["table"], r["row"]): float(r["here"]) for r in csv.DictReader(file) if r["here"]}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The angle loss was 0")
def test_a_rehearsal_of_three_methods_on_one_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "BACKBONES", ("test_vit",))
    for module, name in ((pictures, "draw_detection_curves"), (pictures, "draw_maps"), (loop, "draw_curves")):
        monkeypatch.setattr(module, name, lambda *_: None)
    words = ["--smoke", "--output", str(tmp_path), "--device", "cpu", "--workers", "0"]
    words += ["--only", "padim", "patchcore", "feature_norm"]
    assert reproduce.main(words) == 0
    found = rows(tmp_path)
    ablations = {row for table, row in found if table == "Ablations"}
    assert ablations == {
        f"test_vit, {training}, {method}"
        for training in ("both losses", "angle loss alone", "norm loss alone")
        for method in ("PaDiM", "PatchCore", "FeatureNorm (8-shot)")
    } | {f"test_vit, without residuals, {method}" for method in ("PaDiM", "PatchCore", "FeatureNorm")}
    assert all(0 <= found["Ablations", row] <= 100 for row in ablations)
    assert found["test_vit", "test_vit, PatchCore, raw"] >= 0
    # Again, nothing is computed.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*/*/results/*/*.json")}
    assert reproduce.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*/*/results/*/*.json")} == before and before


@pytest.mark.release
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    assert reproduce.main(["--smoke", "--output", str(tmp_path), "--device", "cpu", "--workers", "0"]) == 0
    assert {row.split(", ")[0] for _, row in rows(tmp_path)} == set(smoke.BACKBONES)


@pytest.mark.release
def test_two_processes_rehearse_together(tmp_path: Path) -> None:
    words = ["--smoke", "--output", str(tmp_path), "--device", "cpu", "--workers", "0", "--only", "patchcore"]
    ended = run_ranks(2, "-m", "training.reproduce", *words)
    assert ended.returncode == 0, ended.stderr
    found = {row for table, row in rows(tmp_path) if table == "Ablations"}
    trainings = ("both losses", "angle loss alone", "norm loss alone", "without residuals")
    assert {row.rpartition(", ")[0] for row in found} == {f"{name}, {t}" for name in smoke.BACKBONES for t in trainings}
