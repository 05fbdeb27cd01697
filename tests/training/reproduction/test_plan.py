"""Which runs a reproduction consists of, by the folders that are there and what is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trees import write_mpdd, write_mvtec, write_visa

from adfeatures.errors import DownloadError, InputError
from training import reproduce
from training.evaluation.config import EvaluationConfig
from training.methods import METHODS
from training.pretraining.config import PretrainConfig

NORM = ("feature_norm", "cflow", "glass", "uniad")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two data sets, under one of our names and one of the authors'."""
    write_visa(tmp_path / "data/visa", size=(8, 8))
    write_mvtec(tmp_path / "data/mvtec_anomaly_detection", size=(8, 8))
    return tmp_path / "data"


class Runs:
    """Stands for the entries that a reproduction calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
        self.data, self.evaluations, self.trainings = data, [], []  # type: ignore[var-annotated]
        monkeypatch.setattr(reproduce, "evaluate_model", self._evaluate)
        monkeypatch.setattr(reproduce, "pretrain", self._pretrain)

    def _evaluate(self, config: EvaluationConfig) -> int:
        self.evaluations.append(config)
        if "missing" in str(config.weights) or "clip" in config.model:
            raise DownloadError("no weights")
        return 0

    def _pretrain(self, config: PretrainConfig, device: torch.device) -> None:
        self.trainings.append(config)

    def __call__(self, *only: str, **options: Any) -> int:
        self.evaluations, self.trainings = [], []
        words = ["--data", str(self.data), "--output", str(self.data.parent / "run"), "--device", "cpu"]
        words += ["--only", *only] if only else []
        words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return reproduce.main(words)

    @property
    def places(self) -> set[str]:
        return {str(Path(e.output).relative_to(self.data.parent / "run")) for e in self.evaluations}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, data: Path) -> Runs:
    return Runs(monkeypatch, data)


def test_everything_that_is_on_disk(run: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 1  # the weights of CLIP are missing
    backbones = ("dinov2_base", "dinov2_large", "clip_base", "clip_large", "imagebind_huge")
    assert run.places == {
        f"published/{backbone}/{data}/{kind}"
        for backbone in backbones
        for data in ("mvtec", "visa")
        for kind in ("angle", "norm")
    }
    for evaluation in run.evaluations:
        kind = Path(evaluation.output).name
        assert evaluation.model.endswith(f".realiad_{kind}") and evaluation.weights is None
        assert evaluation.methods == (NORM if kind == "norm" else ("patchcore", "padim"))
        assert evaluation.protocol == "original" and evaluation.oracle and not evaluation.allow_overlap
        assert (evaluation.references, evaluation.shots, evaluation.epochs) == (None, 8, None)
    assert "published/clip_base/mvtec/angle: no weights" in capsys.readouterr().err
    assert run("clip_base") == 2


def test_what_the_authors_published_is_used_where_it_is_there(run: Runs, data: Path) -> None:
    for folder in ("8shot/visa", "aligned/references/visa", "dtd/images", "fg_mask"):
        (data / folder).mkdir(parents=True)
    files = data.parent / "files"
    (files / "dino-base").mkdir(parents=True)
    for name in ("dinov2_vitb14_pretrain.pth", "dino-base/checkpoints_pro_norm.pth"):
        (files / name).touch()
    assert run("dinov2_base", weights=files) == 0
    assert run.places == {
        f"published/dinov2_base/{place}"
        for place in ("mvtec/angle", "mvtec/norm", "visa/angle", "visa/norm", "visa/norm_listed")
    }
    by_place = {Path(e.output).parts[-2:]: e for e in run.evaluations}
    listed = by_place["visa", "norm_listed"]
    assert listed.methods == ("feature_norm",) and listed.references == f"lists:{data}/aligned/references"
    assert by_place["visa", "norm"].methods == NORM[1:] and by_place["visa", "norm"].references == str(data / "8shot")
    assert by_place["mvtec", "norm"].methods == NORM and by_place["mvtec", "norm"].references is None
    assert {e.backbone_weights for e in run.evaluations} == {str(files / "dinov2_vitb14_pretrain.pth")}
    assert by_place["mvtec", "norm"].weights == str(files / "dino-base/checkpoints_pro_norm.pth")
    assert by_place["mvtec", "angle"].weights is None
    assert listed.textures == str(data / "dtd/images") and listed.foregrounds == str(data / "fg_mask")


def test_only_what_is_named(run: Runs) -> None:
    assert run("imagebind_huge", "visa", "padim", "glass") == 0
    assert {(Path(e.output).parts[-2:], e.methods) for e in run.evaluations} == {
        (("visa", "angle"), ("padim",)),
        (("visa", "norm"), ("glass",)),
    }


def test_a_method_from_outside(run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = "".join(f"    def {name}(self, loader): ...\n" for name in ("fit", "predict"))
    (tmp_path / "mine.py").write_text(f"class Mine:\n{steps}")
    monkeypatch.syspath_prepend(tmp_path)
    assert run("dinov2_base", "visa", "mine:Mine", protocol="sound") == 0
    assert [e.methods for e in run.evaluations] == [("mine:Mine",)]
    assert run("dinov2_base", "visa", "mine:Mine", "no_residual", "padim", protocol="sound") == 0
    assert sorted(e.methods for e in run.evaluations) == [("mine:Mine",), ("padim",)]
    # The protocol of the published code has no such method.
    assert run("dinov2_base", "visa", "mine:Mine") == 2


def test_projectors_that_are_trained_here(run: Runs, data: Path) -> None:
    assert run("imagebind_huge", "visa", "both", "angle", "norm", "no_residual") == 0
    assert [(t.losses, t.no_residual) for t in run.trainings] == [
        ("both", False),
        ("angle", False),
        ("norm", False),
        ("both", True),
    ]
    assert all(t.root == str(data / "Real-IAD") and t.backbone == "imagebind_huge" for t in run.trainings)
    outputs = {Path(t.output).name: t.output for t in run.trainings}
    for evaluation in run.evaluations:
        training, *_, kind = Path(evaluation.output).parts[-4:]
        assert evaluation.model == f"{outputs[training]}/checkpoints_pro_{kind}.safetensors"
        ablated = ("feature_norm",) if kind == "norm" else ("patchcore", "padim")
        assert evaluation.methods == (NORM if (training, kind) == ("both", "norm") else ablated)


def test_features_are_kept_until_a_data_set_is_done(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = run.data.parent / "run/cache"
    seen = []

    def evaluate(config: EvaluationConfig) -> int:
        seen.append((config.dataset, cache.exists()))
        cache.mkdir(exist_ok=True)
        assert config.cache == str(cache)
        return int("visa" in config.output)

    monkeypatch.setattr(reproduce, "evaluate_model", evaluate)
    assert run("dinov2_base") == 1
    assert [data_set for data_set, _ in seen] == ["mvtec", "mvtec", "visa", "visa"]
    assert [kept for _, kept in seen] == [False, True, False, True]
    assert cache.exists()  # that of a data set that failed


def test_data_that_is_not_there(run: Runs, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("visa", "btad") == 2
    assert f"{data} lacks BTAD ({data / 'btad'})" in capsys.readouterr().err
    run.data = tmp_path / "nowhere"
    assert run() == 2
    assert "lacks MVTec AD" in capsys.readouterr().err
    write_mpdd(tmp_path / "nowhere/MPDD", size=(8, 8))
    assert run("dinov2_base", "patchcore") == 0 and run.places == {"published/dinov2_base/mpdd/angle"}


def test_names_that_are_none(run: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("patchcor") == 2
    assert "Did you mean 'patchcore'" in capsys.readouterr().err
    assert set(METHODS) == {"patchcore", "padim", *NORM}


def test_the_folder_is_held(run: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def again(config: EvaluationConfig) -> int:
        return reproduce.main(["--data", str(run.data), "--output", str(run.data.parent / "run")])

    monkeypatch.setattr(reproduce, "evaluate_model", again)
    assert run("dinov2_base", "visa", "padim") == 2
    assert "Another run writes to" in capsys.readouterr().err


def test_what_concerns_all_ends_the_run(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(config: EvaluationConfig) -> int:
        raise InputError("a fault") if "visa" in config.output else OSError("no space")

    monkeypatch.setattr(reproduce, "evaluate_model", full)
    with pytest.raises(OSError, match="no space"):
        run("dinov2_base")
