"""Real-IAD: the published layout with its oddities, filter lists, held-out parts, and reports of what is missing."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import pytest
from helpers.real_iad_tree import write_real_iad
from hypothesis import given
from hypothesis import strategies as st

from adfeatures.errors import InputError, UnknownNameError
from training.data import real_iad
from training.data.items import ANOMALOUS, NORMAL, Item

PRODUCTS = ("bottle_cap", "pcb")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_real_iad(tmp_path, PRODUCTS, ok=3, ng=2, views=3)


def test_the_thirty_products() -> None:
    assert len(set(real_iad.PRODUCTS)) == 30
    assert list(real_iad.PRODUCTS) == sorted(real_iad.PRODUCTS)


def test_every_image_is_an_item_and_every_mask_belongs_to_one(root: Path) -> None:
    items = real_iad.read(root, PRODUCTS)
    files = {str(path) for path in root.rglob("*.jpg")}
    masks = {str(path) for path in root.rglob("*.png")}
    assert len(items) == len(files) == 2 * (3 + 2 * 2) * 3
    assert {item.image for item in items} == files
    assert {item.mask for item in items} - {None} == masks
    assert all((item.label == ANOMALOUS) == (item.mask is not None) for item in items)
    assert all(item.mask is None or Path(item.mask).stem == Path(item.image).stem for item in items)


def test_root_may_be_either_folder(root: Path) -> None:
    assert real_iad.read(root, PRODUCTS) == real_iad.read(root / "realiad_512", PRODUCTS)


def test_defect_and_sample_are_those_of_the_folders(root: Path) -> None:
    odd = [item for item in real_iad.read(root, PRODUCTS) if "__" in item.image]
    assert len(odd) == 2 * 3
    assert {(item.product, item.defect, item.sample) for item in odd} == {
        (p, "HS", f"{p}/NG/HS/S0000") for p in PRODUCTS
    }
    assert all("_NG_ZW_" in item.image for item in odd)
    assert {item.view for item in odd} == {"C1", "C2", "C3"}


def test_a_defect_that_a_view_does_not_show_makes_a_normal_image_but_no_reference(root: Path) -> None:
    items = real_iad.read(root, PRODUCTS)
    hidden = [item for item in items if item.defect != "good" and item.label == NORMAL]
    assert len(hidden) == 2 * 2 * 2
    assert {item.view for item in hidden} == {"C3"}
    pool = real_iad.reference_pool(items)
    assert len(pool) == 2 * 3 * 3
    assert all("/OK/" in item.image for item in pool)


def test_mask_name_ends_at_the_first_dot_and_must_lie_beside_the_image(root: Path) -> None:
    folder = root / "realiad_512/pcb/OK/S0300"
    image = next(folder.glob("*_C1_*.jpg"))
    mask = next((root / "realiad_512/pcb/NG").rglob("*.png"))
    dotted = folder / f"{image.stem}.v2.jpg"
    image.rename(dotted)
    (folder / f"{image.stem}.png").write_bytes(mask.read_bytes())
    (root / "realiad_512/pcb/OK/S0301" / f"{next(folder.glob('*_C2_*.jpg')).stem}.png").write_bytes(mask.read_bytes())
    items = [item for item in real_iad.read(root, ["pcb"]) if item.sample == "pcb/OK/S0300"]
    assert [(item.view, item.label) for item in items] == [("C1", ANOMALOUS), ("C2", NORMAL), ("C3", NORMAL)]
    assert str(dotted) in {item.image for item in items}
    assert str(dotted) not in {item.image for item in real_iad.reference_pool(items)}


def test_order_is_view_then_product_as_asked_then_ok_before_ng(root: Path) -> None:
    items = real_iad.read(root, ("pcb", "bottle_cap", "pcb"))
    keys = [(item.view, item.product != "pcb", item.defect != "good", item.sample) for item in items]
    assert keys == sorted(keys)
    assert len(items) == len(real_iad.read(root, PRODUCTS))


def test_a_name_without_a_view_is_refused(root: Path) -> None:
    image = next((root / "realiad_512/pcb/OK/S0300").glob("*_C1_*.jpg"))
    image.rename(image.with_name("pcb_0300_OK_C7_2023.jpg"))
    with pytest.raises(InputError, match="pcb_0300_OK_C7_2023.jpg.*C1, C2, C3, C4, C5"):
        real_iad.read(root, PRODUCTS)


@pytest.mark.parametrize("product", ["PCC1_board", "left_C4_", "C2", "C10"])
def test_letters_like_a_view_in_the_name_of_a_product_are_none(tmp_path: Path, product: str) -> None:
    items = real_iad.read(write_real_iad(tmp_path, (product,), views=5))
    assert [f"_{item.view}_2" in item.image for item in items] == [True] * (3 + 2 * 2) * 5
    image = next((tmp_path / "realiad_512" / product / "OK/S0300").glob("*_C1_2*.jpg"))
    image.rename(image.with_name("PCC1_board_0300_OK_2023.jpg"))
    with pytest.raises(InputError, match="holds no view"):
        real_iad.read(tmp_path)


def test_suffixes_may_be_in_capitals(root: Path) -> None:
    before = real_iad.read(root, PRODUCTS)
    for path in [*root.rglob("*.jpg"), *root.rglob("*.png")]:
        path.rename(path.with_suffix(path.suffix.upper()))
    after = real_iad.read(root, PRODUCTS)
    assert [(item.image[:-4], item.label) for item in after] == [(item.image[:-4], item.label) for item in before]
    assert all(item.mask is None or Path(item.mask).is_file() for item in after)


def test_without_products_all_thirty_are_expected_of_the_published_set(root: Path) -> None:
    with pytest.raises(InputError) as caught:
        real_iad.read(root)
    listed = str(caught.value).partition("There is no ")[2].partition(".\n")[0].split(", ")
    assert set(listed) == set(real_iad.PRODUCTS) - set(PRODUCTS)


def test_without_products_a_set_of_others_is_taken_as_it_is(tmp_path: Path) -> None:
    write_real_iad(tmp_path, ("gasket", "rivet"))
    assert {item.product for item in real_iad.read(tmp_path)} == {"gasket", "rivet"}


def test_one_report_names_everything_that_is_missing(root: Path) -> None:
    data = root / "realiad_512"
    (data / "pcb/OK").rename(data / "pcb/ok_images")
    for path in (data / "bottle_cap/OK").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(InputError) as caught:
        real_iad.read(root, ("pcb", "bottle_cap", "zipper", "bottle_cup"))
    report = str(caught.value)
    assert str(data) in report
    assert "no pcb/OK, zipper, bottle_cup.\n" in report
    assert "no images in bottle_cap/OK.\n" in report
    assert "Did you mean 'bottle_cap'?" in report
    assert "Extract" in report


def test_products_without_defects_are_named(root: Path) -> None:
    (root / "realiad_512/pcb/NG").rename(root / "realiad_512/pcb/ng_images")
    with pytest.warns(UserWarning, match="no images in pcb/NG of"):
        items = real_iad.read(root, ("bottle_cap", "pcb"))
    assert {item.product for item in items if item.defect != "good"} == {"bottle_cap"}
    (root / "realiad_512/pcb/NG/HS/S0000").mkdir(parents=True)
    with pytest.warns(UserWarning, match="no images in pcb/NG of"):
        assert real_iad.read(root, ("bottle_cap", "pcb")) == items


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_missing_and_empty_roots(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=name):
        real_iad.read(tmp_path / name)


def test_hidden_files_of_archivers_are_passed_over(root: Path) -> None:
    before = real_iad.read(root, PRODUCTS)
    (root / "realiad_512/pcb/OK/S0300/._pcb_0300_OK_C1_2023.jpg").write_bytes(b"junk")
    (root / "realiad_512/pcb/NG/.cache").mkdir()
    assert real_iad.read(root, PRODUCTS) == before


def _relative(root: Path, item: Item) -> str:
    return Path(item.image).relative_to(root / "realiad_512").as_posix()


def _filtered(root: Path, filter_list: Path, products: tuple[str, ...] = PRODUCTS) -> tuple[set[str], set[str]]:
    items = real_iad.read(root, products, filter_list)
    names = {_relative(root, item) for item in items}
    return {name for name in names if "/OK/" in name}, {name for name in names if "/NG/" in name}


def test_filter_lists_keep_exactly_the_ng_images_named_and_all_ok_images(root: Path, tmp_path: Path) -> None:
    kept = {
        product: [_relative(root, i) for i in real_iad.read(root, [product]) if i.defect == "ZW"]
        for product in PRODUCTS
    }
    (tmp_path / "lists").mkdir()
    for product, names in kept.items():
        (tmp_path / "lists" / f"{product}.json").write_text(json.dumps(names))
    (tmp_path / "all.json").write_text(json.dumps(sum(kept.values(), [])))
    for filter_list in (tmp_path / "lists", tmp_path / "all.json"):
        ok, ng = _filtered(root, filter_list)
        assert ng == set(sum(kept.values(), []))
        assert len(ok) == 2 * 3 * 3
        assert len(ng) == 2 * 2 * 3


def test_an_entry_keeps_no_image_whose_name_is_only_a_part_of_it(root: Path, tmp_path: Path) -> None:
    wanted = next(item for item in real_iad.read(root, ["pcb"]) if item.defect == "ZW")
    short = Path(wanted.image).with_name("C1.jpg")
    short.write_bytes(Path(wanted.image).read_bytes())
    entry = _relative(root, wanted)
    (tmp_path / "one.json").write_text(
        json.dumps([entry, "pcb/NG/ZW/S0000/before_C1.jpg", f"pcb/NG/HS/{Path(entry).name}"])
    )
    assert _filtered(root, tmp_path / "one.json", ("pcb",))[1] == {entry}


def test_the_typo_of_the_published_list_is_undone(tmp_path: Path) -> None:
    root = write_real_iad(tmp_path, ("wooden_beads", "pcb"))
    names = [_relative(root, item) for item in real_iad.read(root, ["wooden_beads"]) if item.defect == "HS"]
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/wooden_beads.json").write_text(json.dumps([f"wooden_beads{name}" for name in names]))
    assert _filtered(root, tmp_path / "lists", ("wooden_beads",))[1] == set(names)


def test_a_filter_list_that_leaves_a_product_without_defects_is_warned_of(root: Path, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(
        json.dumps([_relative(root, i) for i in real_iad.read(root, ["bottle_cap"]) if i.defect == "ZW"])
    )
    with pytest.warns(UserWarning, match="no images in pcb/NG of .* that .*one.json keeps"):
        ng = _filtered(root, tmp_path / "one.json")[1]
    assert len(ng) == 2 * 3


@pytest.mark.parametrize("content", ["{}", "[1]", "[", '["pcb/NG/ZW/S0000/other_C1.jpg"]'])
def test_broken_filter_lists_are_refused(root: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(InputError, match="broken.json"):
        real_iad.read(root, PRODUCTS, tmp_path / "broken.json")


def test_a_folder_of_filter_lists_must_have_one_for_each_product(root: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    with pytest.raises(InputError, match="bottle_cap.json"):
        real_iad.read(root, PRODUCTS, tmp_path / "lists")


def test_items_of_an_evaluation(root: Path) -> None:
    train, test = (real_iad.TREE.find_items(root, split, PRODUCTS) for split in ("train", "test"))
    assert all(item.label == NORMAL and item.defect == "good" for item in train)
    assert {item.label for item in test} == {NORMAL, ANOMALOUS}
    assert not {item.sample for item in train} & {item.sample for item in test}
    # 3 OK and 4 NG parts of each product: 1 of either is held out, from 3 views each
    counts = Counter((item.product, item.defect == "good") for item in test)
    assert counts == {(product, good): 3 for product in PRODUCTS for good in (True, False)}
    assert test == real_iad.split_by_sample(real_iad.read(root, PRODUCTS), 0.1, 42)[1]
    assert Counter(item.product for item in train) == dict.fromkeys(PRODUCTS, 2 * 3)
    with pytest.raises(UnknownNameError, match="split"):
        real_iad.TREE.find_items(root, "validation", PRODUCTS)


@st.composite
def parts(draw: st.DrawFn) -> list[Item]:
    """Items of up to three products; the same sample folder may occur in both trees and in several products."""
    items = []
    for product in draw(st.lists(st.sampled_from("abc"), unique=True, min_size=1)):
        for tree in ("OK", "NG/ZW"):
            for number in draw(st.lists(st.integers(0, 30), unique=True, max_size=12)):
                sample = f"{product}/{tree}/S{number:04d}"
                defect = "good" if tree == "OK" else "ZW"
                views = draw(st.integers(1, 3))
                items += [
                    Item(f"{sample}/C{view}.jpg", int(tree != "OK"), product, None, defect, f"C{view}", sample)
                    for view in range(views)
                ]
    return items


@given(parts(), st.floats(0.01, 0.99), st.integers(0, 3), st.randoms())
def test_split_holds_out_whole_parts_in_the_right_number_whatever_the_order(
    items: list[Item], fraction: float, seed: int, shuffler: random.Random
) -> None:
    train, held_out = real_iad.split_by_sample(items, fraction, seed)
    assert sorted(train + held_out, key=items.index) == items
    assert train == [item for item in items if item in train]
    for product in {item.product for item in items}:
        for good in (True, False):
            count = [
                len({i.sample for i in part if i.product == product and (i.defect == "good") == good})
                for part in (train, held_out)
            ]
            total = len({i.sample for i in items if i.product == product and (i.defect == "good") == good})
            assert sum(count) == total  # no part on both sides
            assert abs(count[1] - fraction * total) <= 0.5 + 1e-9 or 1 in count or total < 2
            assert total < 2 or min(count) >= 1
    shuffled = list(items)
    shuffler.shuffle(shuffled)
    assert set(real_iad.split_by_sample(shuffled, fraction, seed)[1]) == set(held_out)
    alone = [item for item in items if item.product == "a"]
    assert real_iad.split_by_sample(alone, fraction, seed)[1] == [item for item in held_out if item.product == "a"]


def test_another_seed_holds_out_other_parts() -> None:
    items = [Item(f"{n}.jpg", 0, "a", sample=f"a/OK/S{n:04d}") for n in range(100)]
    splits = [{item.sample for item in real_iad.split_by_sample(items, 0.3, seed)[1]} for seed in range(5)]
    assert all(len(split) == 30 for split in splits)
    # drawn without replacement, two seeds share 9 of 30 in the mean, with a standard deviation below 2.5
    assert all(len(one & other) < 20 for i, one in enumerate(splits) for other in splits[:i])


def test_nothing_is_held_out_at_0_and_senseless_fractions_are_refused() -> None:
    items = [Item("1.jpg", 0, "a"), Item("2.jpg", 0, "a")]
    assert real_iad.split_by_sample(items, 0) == (items, [])
    assert [len(part) for part in real_iad.split_by_sample(items, 0.1)] == [
        1,
        1,
    ]  # without samples, each image is a part
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match="fraction"):
            real_iad.split_by_sample(items, fraction)


def test_masks_whose_accents_are_written_in_another_way(tmp_path: Path) -> None:
    root = write_real_iad(tmp_path, ("bottle_cap",))
    before = [item.label for item in real_iad.read(root, ["bottle_cap"])]
    for path in [*root.rglob("*.jpg"), *root.rglob("*.png")]:
        form: Literal["NFC", "NFD"] = "NFC" if path.suffix == ".jpg" else "NFD"
        path.rename(path.with_name(normalize(form, path.name.replace("bottle", "é"))))
    assert [item.label for item in real_iad.read(root, ["bottle_cap"])] == before and ANOMALOUS in before


def test_names_that_are_not_utf8_are_split_too() -> None:
    """And others are where they were: the order is that of hashes of their bytes."""
    names = [f"part{number}" for number in range(9)] + [os.fsdecode(b"caf\xe9"), "\u5199\u771f"]
    items = [Item(f"{name}.png", NORMAL, "product", sample=name) for name in names]
    _, held_out = real_iad.split_by_sample(items, 0.3, 7)
    ranked = sorted(names, key=lambda name: hashlib.sha256(b"7:" + name.encode(errors="surrogateescape")).digest())
    assert {item.sample for item in held_out} == set(ranked[:3])
