"""The official splits of Real-IAD: their images, labels and masks, and what is wrong with a list."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.real_iad_tree import write_official_lists, write_real_iad

from adfeatures.errors import InputError
from training.data.items import ANOMALOUS, NORMAL
from training.data.real_iad import TREE, RealIAD


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_real_iad(tmp_path_factory.mktemp("iad"), ("pcb", "toy"), ok=4, ng=2)


@pytest.fixture
def lists(root: Path, tmp_path: Path) -> Path:
    return write_official_lists(root, tmp_path / "realiad_jsons", ("pcb", "toy"))


def of(lists: Path) -> RealIAD:
    return replace(TREE, lists=lists)


def test_the_split_is_that_of_the_list(root: Path, lists: Path) -> None:
    content = json.loads((lists / "pcb.json").read_text())
    for split in ("train", "test"):
        found = of(lists).find_items(root, split, ["pcb"])
        listed = [str(root / "realiad_512/pcb" / entry["image_path"]) for entry in content[split]]
        assert [item.image for item in found] == listed and len(listed) > 3
        assert [item.label == ANOMALOUS for item in found] == [e["anomaly_class"] != "OK" for e in content[split]]
        masks = [entry["mask_path"] and str(root / "realiad_512/pcb" / entry["mask_path"]) for entry in content[split]]
        assert [item.mask for item in found] == masks
        assert {item.view for item in found} == {"C1", "C2"} and all(item.sample.startswith("pcb/") for item in found)
    both = of(lists).find_items(root, "test", ["toy", "pcb"])
    assert list(dict.fromkeys(item.product for item in both)) == ["toy", "pcb"]


def test_the_list_decides_about_labels_and_the_training_has_none(root: Path, lists: Path) -> None:
    """As where a variant has anomalous images in the training, or calls normal what has a mask beside it."""
    content = json.loads((lists / "pcb.json").read_text())
    anomalous = next(entry for entry in content["test"] if entry["mask_path"])
    content["train"].append(anomalous)
    content["test"] = [{**anomalous, "anomaly_class": "OK", "mask_path": None}]
    (lists / "pcb.json").write_text(json.dumps(content))
    train, test = (of(lists).find_items(root, split, ["pcb"]) for split in ("train", "test"))
    assert {(item.label, item.mask) for item in (*train, *test)} == {(NORMAL, None)}
    assert train[-1].image == test[0].image and "/NG/" in test[0].image


@pytest.mark.parametrize("form", ["{product}/{path}", "{windows}"])
def test_paths_in_other_forms(root: Path, lists: Path, form: str) -> None:
    expected = of(lists).find_items(root, "test", ["pcb"])
    content = json.loads((lists / "pcb.json").read_text())
    for entry in content["test"]:
        for key in ("image_path", "mask_path"):
            if entry[key]:
                entry[key] = form.format(product="pcb", path=entry[key], windows=entry[key].replace("/", "\\"))
    (lists / "pcb.json").write_text(json.dumps(content))
    assert of(lists).find_items(root, "test", ["pcb"]) == expected


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.pop(name)


def rename(content: dict[str, Any]) -> None:
    for number, entry in enumerate(content["test"]):
        entry["image_path"] = f"OK/S9999/{number}_C1.jpg"


def unmask(content: dict[str, Any]) -> None:
    next(entry for entry in content["test"] if entry["mask_path"])["mask_path"] = "NG/HS/S0000/gone.png"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("meta"), "has not the form of realiad_jsons: .*pcb.json.* has no meta"),
        (drop("test"), "has not the form of realiad_jsons: .*pcb.json.* has no test"),
        (lambda content: content["meta"].update(prefix="toy/"), "is of toy/, not of pcb"),
        (lambda content: content.update(test=[[1]]), "has not the form of realiad_jsons"),
        (lambda content: content["test"][0].update(image_path=None), "has not the form of realiad_jsons"),
        (rename, "images that are not there: pcb/OK/S9999/0_C1.jpg, .* and .* more. Extract the rest of pcb"),
        (unmask, "names images with a defect whose masks are not there"),
    ],
)
def test_what_is_no_list_of_these_images(
    root: Path, lists: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    content = json.loads((lists / "pcb.json").read_text())
    change(content)
    (lists / "pcb.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        of(lists).find_items(root, "test", ["pcb"])


@pytest.mark.parametrize("text", ["", "[", "[]", "null", "[" * 100_000])
def test_what_is_no_json(root: Path, lists: Path, text: str) -> None:
    (lists / "pcb.json").write_text(text)
    with pytest.raises(InputError, match="pcb.json"):
        of(lists).find_items(root, "test", ["pcb"])


def test_lists_of_other_products(root: Path, lists: Path) -> None:
    (lists / "pcb.json").unlink()
    with pytest.raises(InputError, match="holds no list of pcb, but of toy"):
        of(lists).find_items(root, "test", ["pcb"])
    with pytest.raises(InputError, match=f"Give one of {lists}"):
        of(lists.parent).find_items(root, "test", ["toy"])
    with pytest.raises(InputError, match="Give the folder realiad_jsons"):
        of(lists / "nowhere").find_items(root, "test", ["toy"])
