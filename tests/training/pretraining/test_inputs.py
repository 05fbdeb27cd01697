"""What pretraining and centers begin with: the images of each kind of data, and the frozen backbone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import write_photos
from helpers.real_iad_tree import write_real_iad
from helpers.trees import write_mvtec
from PIL import Image

from adfeatures.errors import InputError, UnknownNameError
from training.data import real_iad
from training.data.items import ANOMALOUS, Item
from training.pretraining.config import CentersConfig, PretrainConfig
from training.pretraining.inputs import Inputs, read_split

CPU = torch.device("cpu")
PRODUCTS = ("bottle_cap", "pcb")


def read(data: str, root: Path, **settings: Any) -> list[Item]:
    """All items: nothing is held out."""
    return read_split(CentersConfig(data=data, root=str(root), held_out=0.0, **settings))[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_real_iad(tmp_path_factory.mktemp("data"), PRODUCTS, ok=4, ng=2, views=2)


def test_items_of_real_iad(root: Path, tmp_path: Path) -> None:
    every = real_iad.read(root, PRODUCTS)
    assert read("real_iad", root, products=PRODUCTS) == every
    assert {item.product for item in read("real_iad", root, products=("pcb",))} == {"pcb"}
    kept = [Path(i.image).relative_to(root / "realiad_512").as_posix() for i in every if i.defect == "HS"]
    (tmp_path / "list.json").write_text(json.dumps(kept))
    found = read("real_iad", root, products=PRODUCTS, filter_list=str(tmp_path / "list.json"))
    assert {item.defect for item in found} == {"good", "HS"}


def test_items_of_a_folder_are_those_of_train_and_test(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path, ("gasket", "rivet"), good=3, test_good=2, bad=2, size=(16, 16))
    items = read("folder", root)
    counts = Counter((item.product, item.label) for item in items)
    assert counts == {("gasket", 0): 5, ("gasket", 1): 2, ("rivet", 0): 5, ("rivet", 1): 2}
    # Where the folder lies does not decide which images are held out.
    assert all(item.sample == Path(item.image).relative_to(root).as_posix() for item in items)
    assert {item.product for item in read("folder", root, products=("rivet",))} == {"rivet"}
    assert len(real_iad.reference_pool(items)) == 10


def test_items_of_a_manifest(tmp_path: Path) -> None:
    write_photos(tmp_path / "images", range(3))
    Image.new("L", (80, 60), 255).save(tmp_path / "images/mask.png")
    path = tmp_path / "list.csv"
    path.write_text(
        "image,mask,product\nimages/000.png,,nut\nimages/001.png,images/mask.png,nut\nimages/002.png,,cap\n"
    )
    assert [(Path(item.image).name, item.product) for item in read("manifest", path)] == [
        ("000.png", "nut"),
        ("001.png", "nut"),
        ("002.png", "cap"),
    ]
    nuts = read("manifest", path, products=("nut",))
    assert [item.label for item in nuts] == [0, ANOMALOUS] and nuts[1].mask == str(tmp_path / "images/mask.png")
    with pytest.raises(UnknownNameError, match="Did you mean 'nut'"):
        read("manifest", path, products=("nutt",))


@pytest.mark.parametrize("data", ["manifest", "folder"])
def test_filter_lists_go_with_real_iad_only(tmp_path: Path, data: str) -> None:
    with pytest.raises(InputError, match=f"not with {data}"):
        read(data, tmp_path, filter_list="list.json")


def test_another_kind_of_data(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'real_iad'"):
        read("real_aid", tmp_path)


def test_pretraining_and_centers_hold_out_the_same_samples(root: Path) -> None:
    given: dict[str, Any] = {"root": str(root), "products": PRODUCTS, "held_out": 0.3}
    train, held_out = read_split(PretrainConfig(**given))
    assert read_split(CentersConfig(**given)) == (train, held_out)
    assert held_out and not {item.sample for item in train} & {item.sample for item in held_out}
    assert sorted(item.image for item in (*train, *held_out)) == sorted(i.image for i in real_iad.read(root, PRODUCTS))
    assert read_split(PretrainConfig(**given, seed=1))[1] != held_out


@pytest.mark.parametrize(
    ("products", "data", "title"),
    [(PRODUCTS, "real_iad", "Real-IAD"), (("gasket", "pcb"), "real_iad", None), (PRODUCTS, "folder", None)],
)
def test_data_in_the_layout_of_real_iad_need_not_be_it(
    tmp_path: Path, products: tuple[str, ...], data: str, title: str | None
) -> None:
    if data == "folder":
        root = write_mvtec(tmp_path, products, good=3, test_good=2, bad=2, size=(16, 16))
    else:
        root = write_real_iad(tmp_path, products, ok=2, ng=2, views=2)
    config = CentersConfig(
        data=data, root=str(root), products=products, backbone="efficientnet_lite", img_size=(32,), bit_depth=12
    )
    inputs = Inputs(config, CPU)
    assert inputs.title == title
    assert (inputs.train, inputs.held_out) == read_split(config)
    assert inputs.normal == real_iad.reference_pool(inputs.train)
    assert inputs.backbone.entry.img_size == (32, 32) and inputs.backbone.transform.bit_depth == 12
