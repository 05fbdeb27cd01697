"""What an evaluation is asked to do, and which of it decides the numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from adfeatures.errors import InputError, UnknownNameError
from training.evaluation.config import EvaluationConfig


def config(**options: Any) -> EvaluationConfig:
    return EvaluationConfig(**{"model": "m", "dataset": "mvtec", "root": "r", "output": "o", **options})


def test_methods_by_name() -> None:
    every = ("feature_norm", "patchcore", "padim", "cflow", "glass", "uniad")
    assert config().methods == config(method=("patchcore", "all")).methods == every
    assert config(method=("padim", "cflow", "padim")).methods == ("padim", "cflow")
    assert config(method=("all", "training.methods:PaDiM")).methods == (*every, "training.methods:PaDiM")
    with pytest.raises(UnknownNameError, match="patchcor"):
        config(method=("all", "patchcor"))


def test_input_sizes() -> None:
    assert config().size is None
    assert config(img_size=(96,)).size == (96, 96) and config(img_size=(64, 96)).size == (64, 96)
    assert config(protocol="original").size == (224, 224)
    with pytest.raises(InputError, match="one side or height and width"):
        config(img_size=(1, 2, 3))


def test_what_decides_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names, but for bit depth and split, are those in settings.json of every folder that was written before."""
    settings = config().settings()
    assert set(settings) == {
        "model", "img_size", "bit_depth", "dataset", "shots", "references", "protocol", "epochs", "oracle", "textures",
        "foregrounds", "split"
    }  # fmt: skip
    free = {field.name for field in dataclasses.fields(EvaluationConfig)} - set(settings)
    assert free == {
        "output", "root", "products", "method", "draws", "cache", "workers", "device", "backbone_weights", "weights",
        "allow_overlap"
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("dtd").mkdir()
    assert config(textures="dtd").settings()["textures"] == str(tmp_path / "dtd")
    assert config(references="dtd").settings()["references"] == str(tmp_path / "dtd")
    assert config(references="retrieved").settings()["references"] is None
    assert config(references="lists:dtd").settings()["references"] == f"lists:{tmp_path / 'dtd'}"
    assert config(dataset="real_iad", split="dtd").settings()["split"] == str(tmp_path / "dtd")
