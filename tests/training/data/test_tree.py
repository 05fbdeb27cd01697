"""What all data sets share: masks of their own images, products by name, and what is said of a wrong folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trees import MARK, WRITERS, write_mvtec

from adfeatures.errors import InputError, UnknownNameError
from adfeatures.images import build_transform
from training.data import DATASETS, dataset, folder, mvtec
from training.data.images import ImageDataset
from training.data.items import ANOMALOUS

PLAIN: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
TRANSFORM = build_transform((32, 32), **PLAIN)


def test_data_sets_are_known_by_name() -> None:
    for name in DATASETS:
        assert callable(dataset(name).find_items) and isinstance(dataset(name).products, tuple)
    with pytest.raises(UnknownNameError, match="Did you mean 'mvtec"):
        dataset("mvtek")
    assert [len(dataset(name).products) for name in DATASETS] == [15, 12, 3, 10, 6, 30, 0, 0]


@pytest.mark.parametrize("name", WRITERS)
def test_every_mask_marks_the_defect_of_its_own_image(tmp_path: Path, name: str) -> None:
    root = WRITERS[name](tmp_path, bad=4, size=(40, 32))
    bad = [item for item in dataset(name).find_items(root, "test") if item.label == ANOMALOUS]
    assert len(bad) == 4
    if name != "visa":
        # Pairing by position would now give every image the mask of its neighbor; the table of VisA has no position.
        Path(bad[0].image).unlink()
        bad = [item for item in dataset(name).find_items(root, "test") if item.label == ANOMALOUS]
        assert len(bad) == 3
    data = ImageDataset(bad, TRANSFORM)
    for entry in (data[index] for index in range(len(data))):
        marked = entry["image"][:, entry["mask"][0] > 0].median(dim=1).values * 255
        assert torch.allclose(marked, torch.tensor(MARK, dtype=torch.float32), atol=10)


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_mask_is_named(tmp_path: Path, name: str) -> None:
    root = WRITERS[name](tmp_path, size=(16, 16))
    item = next(item for item in dataset(name).find_items(root, "test") if item.label == ANOMALOUS)
    assert item.mask is not None
    Path(item.mask).unlink()
    with pytest.raises(InputError) as caught:
        dataset(name).find_items(root, "test")
    assert item.mask in str(caught.value) and item.image in str(caught.value)
    dataset(name).find_items(root, "train")


@pytest.mark.parametrize("name", WRITERS)
def test_a_wrong_root_is_answered_with_the_right_one(tmp_path: Path, name: str) -> None:
    data = dataset(name)
    root = WRITERS[name](tmp_path / "sets" / name, data.products[:1], size=(16, 16))
    product = root / data.products[0]
    for wrong in (root.parent, tmp_path, product, next(path for path in product.iterdir() if path.is_dir())):
        with pytest.raises(InputError, match=f"Give {root} instead"):
            data.find_items(wrong, "test")
    with pytest.raises(InputError, match="There is no folder"):
        data.find_items(tmp_path / "nowhere", "test")
    (tmp_path / "a/b/c/d").mkdir(parents=True)
    with pytest.raises(InputError, match="Give the folder that holds"):
        data.find_items(tmp_path / "a/b/c", "test")


def test_products_that_are_missing_or_unknown_are_named(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path, size=(16, 16))
    with pytest.raises(InputError, match="holds no cable, zipper"):
        mvtec.TREE.find_items(root, "test", ["bottle", "cable", "zipper"])
    with pytest.raises(UnknownNameError, match="Did you mean 'bottle'"):
        mvtec.TREE.find_items(root, "test", ["botle"])
    with pytest.raises(UnknownNameError, match="Did you mean 'bottle'"):
        folder.TREE.find_items(root, "test", ["botle"])
    with pytest.raises(UnknownNameError, match="Did you mean 'test'"):
        mvtec.TREE.find_items(root, "tests")


def test_a_product_that_is_named_twice_is_taken_once(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path, size=(16, 16))
    assert mvtec.TREE.find_items(root, "test", ["bottle", "bottle"]) == mvtec.TREE.find_items(root, "test")


def test_folders_that_are_no_products_are_left_out_with_a_note(tmp_path: Path) -> None:
    """As where a shell lists what is there."""
    root = write_mvtec(tmp_path, ("shaft", "gear"), size=(16, 16))
    for name in ("@eaDir", "notes"):
        (root / name).mkdir()
    with pytest.warns(UserWarning) as caught:
        assert folder.TREE.choose(root, ["gear", "@eaDir", "notes"]) == ["gear"]
    assert [str(one.message).partition(" holds no product")[0] for one in caught] == [
        str(root / "@eaDir"),
        str(root / "notes"),
    ]
    with pytest.raises(UnknownNameError, match="Did you mean 'gear'"):
        folder.TREE.choose(root, ["gea"])
    with pytest.warns(UserWarning), pytest.raises(InputError, match="no product .* among notes"):
        folder.TREE.choose(root, ["notes"])
    assert folder.TREE.choose(root) == ["gear", "shaft"]
