"""The command that judges: what it writes and prints, what stops it."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from adfeatures.errors import AdfeaturesError
from training import judge
from training.judging.packages import PACKAGES
from training.judging.protocol import Result, Size


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_it_writes_what_every_contender_is_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge, "fetch", lambda folder: None)
    monkeypatch.setattr(judge, "QUICK", Size(references=3, good=2, bad=2, draws={1: 1, 2: 2}))
    options = ["--photographs", str(tmp_path / "photographs"), "--output", str(tmp_path / "judged"), "--quick"]
    assert judge.main([*options, "--model", "residual_lite.in1k_v1", "--products", "rendered_denim"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name} {package.version}: {package.license}" in said for name, package in PACKAGES.items())
    written = (tmp_path / "judged/results.md").read_text()
    assert said.endswith(written) and "**2 references, 2 draws**" in written
    rows = list(csv.DictReader((tmp_path / "judged/results.csv").open()))
    contenders = ["residual_lite.in1k_v1", "raw residual norm", "cosine matching", "PatchCore"]
    assert [row["contender"] for row in rows] == contenders * 3
    assert all(0 <= float(row["image_auroc"]) <= 1 for row in rows)


@pytest.mark.slow
def test_thresholds_are_judged_of_the_models_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "fetch", lambda folder: None)
    monkeypatch.setattr(judge, "THRESHOLDS", Size(references=4, good=3, bad=1, draws={2: 1, 4: 1}))
    options = ["--photographs", str(tmp_path / "photographs"), "--output", str(tmp_path / "judged"), "--thresholds"]
    assert judge.main([*options, "--model", "residual_lite.in1k_v2", "--products", "rendered_denim"]) == 0
    rows = list(csv.DictReader((tmp_path / "judged/results.csv").open()))
    assert [(row["contender"], row["shots"]) for row in rows] == [("residual_lite.in1k_v2", n) for n in ("2", "4")]
    assert all(0 <= float(row["flagged"]) <= 1 for row in rows)


def test_products_that_are_done_stay_when_a_later_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(name: str, *_: object) -> Sequence[Result]:
        if name == "cup":
            raise AdfeaturesError("cup cannot be judged")
        return [Result(name, "fixed", "residual_lite.in1k_v1", 8, 0, 0.9, 0.9, 0.9, 0.5, 0.0, "faint")]

    monkeypatch.setattr(judge, "fetch", lambda folder: None)
    monkeypatch.setattr(judge, "pictures", lambda *_, **__: None)
    monkeypatch.setattr(judge, "judged", judged)
    options = ["--photographs", str(tmp_path / "photographs"), "--output", str(tmp_path / "judged")]
    assert judge.main([*options, "--model", "residual_lite.in1k_v1", "--products", "coins", "cup"]) == 2
    (row,) = csv.DictReader((tmp_path / "judged/results.csv").open())
    assert row["product"] == "coins" and "| coins |" in (tmp_path / "judged/results.md").read_text()


def test_what_it_does_not_know_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--photographs", str(tmp_path / "a"), "--output", str(tmp_path / "b")]
    for arguments, message in (
        (["--products", "coin"], "Did you mean 'coins'"),
        (["--products", "gravel"], "Unknown development product 'gravel'"),
        (["--model", "residual_light"], "Did you mean 'residual_lite'"),
    ):
        assert judge.main([*folders, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error and error.count("training.judge: error:") == 1
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    (tmp_path / "b").write_text("in the way")
    assert judge.main(folders) == 2
    assert "b cannot be used as a folder" in capsys.readouterr().err
