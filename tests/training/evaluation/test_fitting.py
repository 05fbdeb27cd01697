"""How a method is run: settings of the evaluation and batches as the paper has them."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trees import write_mvtec

from adfeatures.errors import InputError
from training.data import dataset
from training.data.items import Item
from training.evaluation.config import EvaluationConfig
from training.evaluation.fitting import settings, train_loader
from training.evaluation.model import EvaluatedModel, load_model
from training.methods import METHODS, find_method

SIZE = 64


@pytest.fixture(scope="module")
def model() -> EvaluatedModel:
    return load_model("residual_lite", tuple(METHODS), img_size=SIZE)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    root = write_mvtec(tmp_path_factory.mktemp("mvtec"), good=11)
    return dataset("mvtec").find_items(root, "train", ["bottle"])


def config(**options: Any) -> EvaluationConfig:
    return EvaluationConfig(model="residual_lite", dataset="mvtec", root="", output="", **options)


def defaults_of(name: str) -> dict[str, Any]:
    return METHODS[name].create.__dict__["__init__"].__kwdefaults__


def test_settings_are_the_defaults_of_the_class(model: EvaluatedModel) -> None:
    found = settings(METHODS["patchcore"], "raw", config(epochs=3), model, "squash", ["bottle"])
    assert found == defaults_of("patchcore")


def test_epochs(model: EvaluatedModel) -> None:
    for name, setting in (("cflow", "meta_epochs"), ("uniad", "epochs")):
        default = defaults_of(name)[setting]
        assert settings(METHODS[name], "raw", config(), model, "squash", [])[setting] == default
        assert settings(METHODS[name], "raw", config(epochs=3), model, "squash", [])[setting] == 3


@pytest.mark.parametrize("wrong", [{"takes": ("recipe",)}, {"takes": ("mean",)}, {"epochs": "rounds"}])
def test_settings_that_are_not_there_are_named(model: EvaluatedModel, wrong: dict[str, Any]) -> None:
    method = dataclasses.replace(METHODS["padim"], **wrong)
    with pytest.raises(InputError, match="says that PaDiM takes (recipe|mean|rounds), which it or the evaluation"):
        settings(method, "raw", config(), model, "squash", ["bottle"])


def test_glass_takes_geometry_and_folders(model: EvaluatedModel, tmp_path: Path) -> None:
    (tmp_path / "bottle").mkdir()
    own = config(textures=str(tmp_path), foregrounds=str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = settings(METHODS["glass"], "raw", own, model, "resize224_crop224", ["bottle"])
    expected = {"adapter": True, "mean": model.mean, "std": model.std, "preset": "resize224_crop224"}
    folders = {"textures": str(tmp_path), "foregrounds": str(tmp_path)}
    assert found == defaults_of("glass") | expected | folders
    with pytest.warns(UserWarning, match="has no foreground masks"):
        found = settings(METHODS["glass"], "pretrained", own, model, "squash", ["bottle", "cable"])
    assert found["foregrounds"] is None and found["adapter"] is False
    with pytest.warns(UserWarning, match="made its textures of noise"):
        settings(METHODS["glass"], "raw", config(), model, "squash", ["bottle"])


@pytest.mark.parametrize(
    ("method", "sizes"),
    [("padim", [8, 3]), ("cflow", [11]), ("glass", [8, 3]), ("uniad", [8]), ("training.methods:PaDiM", [8, 3])],
)
def test_training_batches(method: str, sizes: list[int], model: EvaluatedModel, items: list[Item]) -> None:
    entry = find_method(method)
    batches = [[*train_loader(entry, items, model, "squash", workers=0)] for _ in range(2)]
    assert [len(batch["path"]) for batch in batches[0]] == sizes
    paths = [[path for batch in one for path in batch["path"]] for one in batches]
    assert paths[0] == paths[1] and len(set(paths[0])) == sum(sizes)
    assert (paths[0] == sorted(paths[0])) != entry.shuffle
    # Pixels are read where a method needs them.
    assert torch.isfinite(batches[0][0]["image"]).all() == (method == "glass")
    assert all(batch["image"].shape[1:] == (3, SIZE, SIZE) for batch in batches[0])
