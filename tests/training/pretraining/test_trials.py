"""Which images projectors are evaluated on, and against which references."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.real_iad_tree import write_real_iad
from helpers.trees import write_mvtec, write_visa

from adfeatures.catalog import BACKBONES
from adfeatures.errors import InputError
from training.data import mvtec, visa
from training.data.items import ANOMALOUS, NORMAL, Item
from training.pretraining.config import PretrainConfig
from training.pretraining.trials import REFERENCES_PER_VIEW, data_set_trials, held_out_trials, validation_trials


def images(product: str, view: str, label: int, samples: range) -> list[Item]:
    return [
        Item(f"/data/{product}/{view}/{n}_{label}.jpg", label, product, view=view, sample=f"{product}/S{n}")
        for n in samples
    ]


def test_trials_are_of_products_with_held_out_images_of_both_labels() -> None:
    train = [
        *images("nut", "C1", NORMAL, range(20)),
        *images("nut", "C2", NORMAL, range(20)),
        *images("bolt", "C1", NORMAL, range(9)),
    ]
    held_out = [
        item
        for view in ("C1", "C2")
        for label in (NORMAL, ANOMALOUS)
        for item in images("nut", view, label, range(30, 36))
    ]
    (trial,) = held_out_trials(train, [*held_out, *images("bolt", "C1", NORMAL, range(30, 36))], limit=10, seed=0)
    assert trial.product == "nut"
    assert {view: len(items) for view, items in trial.references.items()} == {
        "C1": REFERENCES_PER_VIEW,
        "C2": REFERENCES_PER_VIEW,
    }
    references = [item for view, items in trial.references.items() for item in items if item.view == view]
    assert len(references) == 2 * REFERENCES_PER_VIEW and set(references) <= set(train)
    assert set(trial.train) <= set(train) - set(references) and len(set(trial.train)) == 10
    assert set(trial.test) <= set(held_out) and Counter(item.label for item in trial.test) == {
        NORMAL: 10,
        ANOMALOUS: 10,
    }


def test_trials_depend_on_the_seed_and_on_neither_order_nor_place() -> None:
    train = images("nut", "C1", NORMAL, range(40))
    held_out = [*images("nut", "C1", NORMAL, range(50, 60)), *images("nut", "C1", ANOMALOUS, range(50, 60))]
    one, other = held_out_trials(train, held_out, 5, 0), held_out_trials(train, held_out, 5, 1)
    assert one != other
    assert held_out_trials(train[::-1], held_out[::-1], 5, 0) == one
    moved, moved_out = (
        [replace(item, image=item.image.replace("/data", "/moved")) for item in items] for items in (train, held_out)
    )
    found = held_out_trials(moved, moved_out, 5, 0)
    assert [item.sample for item in found[0].test] == [item.sample for item in one[0].test]


def test_a_view_without_references_is_left_out() -> None:
    train = images("nut", "C1", NORMAL, range(1))
    held_out = [
        item
        for view in ("C1", "C2")
        for label in (NORMAL, ANOMALOUS)
        for item in images("nut", view, label, range(5, 8))
    ]
    (trial,) = held_out_trials(train, held_out, 10, 0)
    assert {item.view for item in trial.test} == set(trial.references) == {"C1"}
    assert trial.train == train  # the only normal image has to serve twice
    with pytest.raises(InputError, match="No product has held-out images of both labels"):
        held_out_trials(train, [item for item in held_out if item.view == "C2"], 10, 0)
    with pytest.raises(InputError, match="No product has held-out images of both labels"):
        held_out_trials(train, [item for item in held_out if item.label == NORMAL], 10, 0)


@pytest.fixture(scope="module")
def mvtec_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mvtec(
        tmp_path_factory.mktemp("mvtec"),
        mvtec.PRODUCTS,
        good=REFERENCES_PER_VIEW + 1,
        test_good=1,
        bad=1,
        size=(16, 16),
    )


def test_mvtec_is_evaluated_against_its_first_images(mvtec_root: Path) -> None:
    trials = data_set_trials("mvtec", str(mvtec_root), (56, 56))
    assert tuple(trial.product for trial in trials) == mvtec.PRODUCTS
    for trial in trials:
        names = [str(Path(item.image).relative_to(mvtec_root)) for item in trial.references[""]]
        assert names == [f"{trial.product}/train/good/{number:03d}.png" for number in range(REFERENCES_PER_VIEW)]
        assert len(trial.train) == REFERENCES_PER_VIEW + 1 and [item.label for item in trial.test] == [
            ANOMALOUS,
            NORMAL,
        ]
        assert {item.product for item in (*trial.train, *trial.test)} == {trial.product}


def test_products_of_mvtec_that_are_missing_are_named_at_once(mvtec_root: Path, tmp_path: Path) -> None:
    shutil.copytree(mvtec_root, tmp_path / "mvtec")
    for product in ("cable", "zipper"):
        shutil.rmtree(tmp_path / "mvtec" / product)
    with pytest.raises(InputError, match="holds no cable, zipper. Extract the rest of MVTec AD"):
        data_set_trials("mvtec", str(tmp_path / "mvtec"), (224, 224))


def test_at_the_size_of_the_original_the_geometry_is_the_originals(mvtec_root: Path) -> None:
    for side, presets in ((224, ("resize256_crop224", "resize224_crop224")), (56, ("squash", "squash"))):
        assert {trial.presets for trial in data_set_trials("mvtec", str(mvtec_root), (side, side))} == {presets}


def test_any_data_set_selects_with_as_many_references_as_asked_for(tmp_path: Path) -> None:
    root = write_visa(tmp_path / "visa", visa.PRODUCTS, good=3, test_good=1, bad=1, size=(16, 16))
    trials = data_set_trials("visa", str(root), (224, 224), shots=2)
    assert tuple(trial.product for trial in trials) == visa.PRODUCTS
    for trial in trials:
        assert [Path(item.image).name for item in trial.references[""]] == ["0000.JPG", "0001.JPG"]
        assert len(trial.train) == 3 and trial.presets == ("resize224_crop224", "resize224_crop224")
    with pytest.raises(InputError, match="holds no candle"):
        shutil.rmtree(root / "candle")
        data_set_trials("visa", str(root), (224, 224))


def test_a_data_set_with_views_and_products_of_its_own(tmp_path: Path) -> None:
    root = write_real_iad(tmp_path / "tree", ("cogwheel",), ok=4, ng=2)
    (trial,) = data_set_trials("real_iad", str(root), (56, 56), shots=2)
    assert {view: len(items) for view, items in trial.references.items()} == {"C1": 2, "C2": 2}
    assert all(item.view == view for view, items in trial.references.items() for item in items)
    assert {item.view for item in trial.test} == {"C1", "C2"}


def test_given_references_serve_all_views(tmp_path: Path) -> None:
    folder = write_mvtec(tmp_path / "8shot", ("nut",), good=3, test_good=0, bad=0, size=(16, 16))
    train, held_out = images("nut", "C1", NORMAL, range(9)), images("nut", "C1", NORMAL, range(20, 23))
    held_out += images("nut", "C1", ANOMALOUS, range(20, 23))
    inputs: Any = SimpleNamespace(normal=train, held_out=held_out)
    given = PretrainConfig(validation_shots=2, validation_references=str(folder))
    (trial,) = validation_trials(given, inputs)
    names = [str(Path(item.image).relative_to(folder)) for item in trial.references["C1"]]
    assert names == ["nut/train/good/000.png", "nut/train/good/001.png"]
    assert set(trial.train) == set(train)
    with pytest.raises(InputError, match="There are no references of nut"):
        validation_trials(replace(given, validation_references=str(tmp_path)), inputs)
    # Without any they are drawn.
    drawn = validation_trials(replace(given, validation_references=None), inputs)
    assert drawn == held_out_trials(train, held_out, given.validation_images, given.seed, shots=2)
    assert validation_trials(replace(given, validation="none"), inputs) == []


def test_the_published_recipe_has_its_geometry_and_its_aupro(mvtec_root: Path) -> None:
    held_out = [item for label in (NORMAL, ANOMALOUS) for item in images("nut", "C1", label, range(20, 23))]
    entry = replace(BACKBONES["dinov2_base"], img_size=(224, 224))
    inputs: Any = SimpleNamespace(normal=images("nut", "C1", NORMAL, range(9)), held_out=held_out)
    inputs.backbone = SimpleNamespace(entry=entry)
    for recipe, preset in (("sound", "squash"), ("published", "resize224_crop224")):
        (trial,) = validation_trials(PretrainConfig(recipe=recipe), inputs)
        assert trial.presets == (preset, preset) and trial.original_aupro == (recipe == "published")
        given = PretrainConfig(recipe=recipe, validation="mvtec", validation_root=str(mvtec_root))
        for trial in validation_trials(given, inputs):
            assert trial.presets == ("resize256_crop224", "resize224_crop224")
            assert trial.original_aupro == (recipe == "published")
