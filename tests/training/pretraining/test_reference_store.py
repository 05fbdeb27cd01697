"""The store of reference features: what is in it, and that it survives."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.full_disk import full_disk
from torch import Tensor

from adfeatures.errors import AdfeaturesError, ImageError
from training.data.items import NORMAL, Item
from training.pretraining import reference_store as module
from training.pretraining.reference_store import ReferenceStore

ITEMS = [Item(f"/data/{number}.png", NORMAL, "nut", view="C1") for number in range(7)]


def read(path: str) -> Tensor:
    return torch.full((3, 8, 8), float(Path(path).stem))


def maps(images: Tensor) -> list[Tensor]:
    """Two levels, which tell the images apart."""
    values = images[:, :1, :1, :1] / 3
    return [values + torch.arange(4).view(1, 4, 1, 1) * torch.ones(2, 3), values.expand(-1, 2, 1, 1) - 1]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENCODED_AT_ONCE", 2)


def encoded(folder: Path, items: list[Item] = ITEMS, identity: str = "one") -> tuple[ReferenceStore, list[str]]:
    """A store that is ready to be read, and the files that had to be read for it."""
    files: list[str] = []
    store = ReferenceStore(folder, items, identity)

    def read_and_note(path: str) -> Tensor:
        files.append(path)
        return read(path)

    store.encode(read_and_note, maps)
    return store, files


def test_it_holds_the_maps_in_half_precision(tmp_path: Path) -> None:
    store, files = encoded(tmp_path)
    assert files == [item.image for item in ITEMS]
    indices = torch.tensor([[6, 0, 6], [3, 3, 2]])
    for found, level in zip(store.read(indices), range(2), strict=True):
        assert found.shape == (2, 3, *((4, 2, 3), (2, 1, 1))[level]) and found.dtype == torch.float16
        for row in range(2):
            for column in range(3):
                expected = maps(read(ITEMS[indices[row, column]].image)[None])[level][0]
                assert torch.equal(found[row, column], expected.half())
    assert sum(path.stat().st_size for path in tmp_path.glob("*.f16")) == 7 * (4 * 2 * 3 + 2) * 2


def test_what_is_encoded_is_not_encoded_again(tmp_path: Path) -> None:
    encoded(tmp_path / "store")
    assert encoded(tmp_path / "store")[1] == []
    # The data set may have moved.
    assert (
        encoded(
            tmp_path / "store", [dataclasses.replace(item, image=f"/moved/{Path(item.image).name}") for item in ITEMS]
        )[1]
        == []
    )


DAMAGED = [
    {"done": "7"}, {"done": -1}, {"done": True}, {"shapes": [[4, 2]]}, {"shapes": [[4, 2, 10**30]]}, {"shapes": 5},
    {"shapes": [[4, 2, -3], [2, 1, 1]]}, {"shapes": None},
]  # fmt: skip


@pytest.mark.parametrize("change", DAMAGED, ids=str)
def test_facts_of_other_types_are_encoded_anew(tmp_path: Path, change: dict[str, object]) -> None:
    encoded(tmp_path)
    facts = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps({**facts, **change}))
    assert encoded(tmp_path)[1] == [item.image for item in ITEMS]


@pytest.mark.parametrize("change", ["identity", "pool", "facts", "list", "nested", "pipe"])
def test_a_store_of_something_else_is_encoded_anew(tmp_path: Path, change: str) -> None:
    encoded(tmp_path)
    if change == "facts":
        (tmp_path / "store.json").write_text('{"identity": "')
    elif change in ("list", "nested"):
        (tmp_path / "store.json").write_text("[]" if change == "list" else "[" * 100_000)
    elif change == "pipe":
        (tmp_path / "store.json").unlink()
        os.mkfifo(tmp_path / "store.json")
    items = ITEMS[2:] if change == "pool" else ITEMS
    store, files = encoded(tmp_path, items, "two" if change == "identity" else "one")
    assert files == [item.image for item in items]
    assert torch.equal(store.read(torch.tensor([[1]]))[0][0, 0], maps(read(items[1].image)[None])[0][0].half())


def test_an_interrupted_encoding_goes_on(tmp_path: Path) -> None:
    whole, _ = encoded(tmp_path / "whole")

    def interrupted(path: str) -> Tensor:
        if path.endswith("5.png"):
            raise KeyboardInterrupt
        return read(path)

    with pytest.raises(KeyboardInterrupt):
        ReferenceStore(tmp_path / "cut", ITEMS, "one").encode(interrupted, maps)
    cut, files = encoded(tmp_path / "cut")
    assert files == [item.image for item in ITEMS[4:]]
    indices = torch.arange(7)[None]
    assert all(map(torch.equal, cut.read(indices), whole.read(indices)))


def test_an_interrupted_encoding_of_something_else_does_not_pass_for_the_first(tmp_path: Path) -> None:
    def flipped(images: Tensor) -> list[Tensor]:
        return maps(images)[::-1]

    ReferenceStore(tmp_path, ITEMS, "one").encode(read, flipped)
    # Room for no more than the first, small level.
    with full_disk(2 * 2 * 2), pytest.raises(AdfeaturesError, match="Cannot write"):
        ReferenceStore(tmp_path, ITEMS, "two").encode(read, lambda images: [level + 1 for level in flipped(images)])
    store = ReferenceStore(tmp_path, ITEMS, "one")
    store.encode(read, flipped)
    expected = flipped(torch.stack([read(item.image) for item in ITEMS]))
    assert all(
        torch.equal(found[0], level.half())
        for found, level in zip(store.read(torch.arange(7)[None]), expected, strict=True)
    )


@pytest.mark.parametrize("cut", [None, 2 * 2])
def test_arrays_that_were_deleted_or_cut_are_encoded_anew(tmp_path: Path, cut: int | None) -> None:
    encoded(tmp_path)
    level = tmp_path / "level2.f16"
    level.unlink() if cut is None else level.write_bytes(level.read_bytes()[:-cut])
    store, files = encoded(tmp_path)
    assert len(files) == 7
    assert torch.equal(store.read(torch.tensor([[6]]))[1][0, 0], maps(read(ITEMS[6].image)[None])[1][0].half())


def test_a_full_disk_keeps_what_is_encoded(tmp_path: Path) -> None:
    with (
        full_disk(5 * 4 * 2 * 3 * 2),
        pytest.raises(AdfeaturesError, match="references.*File too large.*Free some space or lower --pool"),
    ):
        ReferenceStore(tmp_path / "references", ITEMS, "one").encode(read, maps)
    store, files = encoded(tmp_path / "references")
    assert files == [item.image for item in ITEMS[4:]]
    expected = maps(torch.stack([read(item.image) for item in ITEMS]))
    for found, level in zip(store.read(torch.arange(7)[None]), expected, strict=True):
        assert torch.equal(found[0], level.half())


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    def broken(path: str) -> Tensor:
        raise ImageError(f"Cannot read {path}: there is no such file.")

    with pytest.raises(
        ImageError, match=r"/data/0.png: there is no such file\. It belongs to the pool of references: restore it"
    ):
        ReferenceStore(tmp_path, ITEMS, "one").encode(broken, maps)


@pytest.mark.parametrize("value", [1e6, np.nan])
def test_features_that_half_precision_cannot_hold(tmp_path: Path, value: float) -> None:
    with pytest.raises(AdfeaturesError, match="half precision.*--pool"):
        ReferenceStore(tmp_path, ITEMS, "one").encode(read, lambda images: [images * 0 + value])
    assert not list(tmp_path.iterdir())


def test_the_first_rank_encodes_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_rank() -> None:
        """What the others wait for."""
        with monkeypatch.context() as patch:
            patch.setattr(module, "rank", lambda: 0)
            patch.setattr(module, "barrier", lambda: None)
            encoded(tmp_path)

    monkeypatch.setattr(module, "rank", lambda: 1)
    monkeypatch.setattr(module, "barrier", first_rank)
    store, files = encoded(tmp_path)
    assert files == []
    assert torch.equal(store.read(torch.tensor([[4]]))[0][0, 0], maps(read(ITEMS[4].image)[None])[0][0].half())
