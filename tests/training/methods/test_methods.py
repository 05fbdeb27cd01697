"""The table of methods, and classes from outside."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

from adfeatures.errors import InputError, UnknownNameError
from training.methods import METHODS, PaDiM, cflow, find_method, glass, patchcore, uniad


def test_every_method_has_its_class_and_is_trained_as_in_the_paper() -> None:
    found = {
        name: (m.create.__name__, m.batch, m.shuffle, m.drop_last, m.seed, m.images, m.joint, m.epochs)
        for name, m in METHODS.items()
    }
    assert found == {
        "feature_norm": ("FeatureNorm", 8, False, False, 0, False, False, None),
        "patchcore": ("PatchCore", 8, False, False, 0, False, False, None),
        "padim": ("PaDiM", 8, False, False, 0, False, False, None),
        "cflow": ("CFLOW", 32, True, True, 0, False, False, "meta_epochs"),
        "glass": ("GLASS", 8, True, False, 0, True, False, "epochs"),
        "uniad": ("UniAD", 8, True, True, 133, False, True, "epochs"),
    }


def test_defaults_are_the_numbers_of_the_published_code() -> None:
    stated = {
        "FeatureNorm": {"sigma": 4},
        "PatchCore": {"levels": 3, "patch": 3, "dim": 1024, "coreset": 0.1, "projection": 128, "neighbors": 1,
                      "seed": 42, "sigma": 4},
        "PaDiM": {"epsilon": 0.01, "sigma": 4},
        "CFLOW": {"levels": 3, "blocks": 8, "chunk": 4096, "meta_epochs": 25, "sub_epochs": 8, "learning_rate": 2e-4,
                  "level_reference": "train", "seed": 0},
        "GLASS": {"adapter": False, "noise": None, "dim": 1536, "hidden": 1024, "epochs": 640,
                  "samples_per_epoch": 392, "learning_rate": 2e-4, "seed": 0},
        "UniAD": {"hidden": 512, "heads": 8, "layers": 4, "feed_forward": 2048, "dropout": 0.1, "neighbors": 7,
                  "jitter": 20, "epochs": 1000, "learning_rate": 1e-4, "seed": 133},
    }  # fmt: skip
    of_images = {"textures", "foregrounds", "mean", "std", "preset"}
    for method in METHODS.values():
        parameters = inspect.signature(method.create).parameters
        found = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        assert {name: value for name, value in found.items() if name not in of_images} == stated[method.create.__name__]
    assert (cflow.CONDITION, cflow.WARMUP_EPOCHS, patchcore.STARTS, glass.LEVELS) == (128, 2, 10, 2)
    assert (uniad.DECAY_EVERY, uniad.DECAY, uniad.EVALUATE_EVERY) == (800, 0.1, 10)


def test_a_method_by_name() -> None:
    assert find_method("padim").create is PaDiM
    with pytest.raises(UnknownNameError, match="Did you mean 'padim'.*A class from outside is given as module:Class"):
        find_method("padin")


def test_a_class_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package/own_method.py").write_text(
        "class Own:\n    def fit(self, loader): ...\n    def predict(self, loader): ...\nclass Half:\n    fit = print\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = find_method("own_package.own_method:Own")
    assert found.create is sys.modules["own_package.own_method"].Own
    assert (found.batch, found.shuffle, found.images, found.joint, found.takes) == (8, False, False, False, ())
    for name in ("Half", "Missing"):
        with pytest.raises(InputError, match=f"needs a class {name} in own_package.own_method with fit"):
            find_method(f"own_package.own_method:{name}")
    with pytest.raises(InputError, match="No module named 'own_package.missing'.*PYTHONPATH"):
        find_method("own_package.missing:Own")


@pytest.mark.parametrize("name", ["", ":", "a:", ":B", ".a:B", "a:B:c", "a b:C"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(UnknownNameError):
        find_method(name)
