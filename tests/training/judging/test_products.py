"""The products of the protocol: apart from each other, and the same pictures every time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from helpers.photographs import Noise

from training.data.synthetic import PRODUCTS
from training.judging import products
from training.judging.defects import FIRST, FIRST_GLOBAL, SECOND, SECOND_GLOBAL
from training.judging.packages import JUDGED
from training.judging.products import DEVELOPMENT, FINAL, Product, pictures
from training.judging.scenes import Objects, Rendered, Texture, Whole


def sources(table: dict[str, Product]) -> set[tuple[Any, ...]]:
    """What the products of a set show: a photograph or a box of it, objects, a rendered product."""
    found: set[tuple[Any, ...]] = set()
    for product in table.values():
        setting = product.setting
        if isinstance(setting, Objects):
            assert setting.package in JUDGED
            found |= {(setting.package, name) for name in (*setting.names, setting.other) if name}
        elif isinstance(setting, Rendered):
            assert setting.product in PRODUCTS
            found.add((setting.product,))
        else:
            assert isinstance(setting, Whole | Texture) and setting.package in JUDGED
            found.add((setting.package, setting.name, getattr(setting, "box", None)))
    return found


def test_nothing_that_is_developed_on_is_in_the_final_judgment_but_another_box_of_one_board() -> None:
    first, last = sources(dict(DEVELOPMENT)), sources(dict(FINAL))
    # An almond is swapped in among pecans, and is the product of a final one.
    assert first & last <= {("tuxpaint-stamps-default", "food/nuts/almond.png")}
    boards = sorted(source[2] for source in first | last if len(source) > 1 and source[1] == "board.jpg")
    assert [box[0] for box in boards] == [0, 340] and boards[0][2] <= boards[1][0]
    assert not set(DEVELOPMENT) & set(FINAL) and min(len(DEVELOPMENT), len(FINAL)) >= 12


def test_both_sets_hold_every_kind_of_product() -> None:
    for table, changes in ((DEVELOPMENT, FIRST_GLOBAL), (FINAL, SECOND_GLOBAL)):
        groups = {product.group for product in table.values()}
        assert groups >= {"fixed", "free", "gray free", "texture", "tissue", "print", "electronics", "pieces", "heap"}
        assert {change for product in table.values() for change in product.changes} == set(changes)
        assert {product.gray for product in table.values()} == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kinds"), [("fruit_tray", FIRST), ("gravel", SECOND)])
def test_pictures_are_of_all_kinds_in_turn_with_their_masks(name: str, kinds: dict[str, object]) -> None:
    made = pictures(name, Noise(), references=2, good=2, bad=9)
    gray = name == "gravel"
    expected = [*(kind for kind in kinds if not (gray and kind == "color")), *(["skewed"] if gray else [])]
    assert made.kinds == ["", "", *expected][:11] and made.labels.tolist() == [0] * 2 + [1] * 9
    assert len(made.references) == 2 and all(picture.size == (320, 320) for picture in made.tests)
    areas = made.masks.sum(axis=(1, 2))
    assert not areas[:2].any() and (areas[2:] > 0).all()
    assert Counter(made.located.tolist()) == ({True: 10, False: 1} if gray else {True: 11})


def test_the_same_arguments_give_the_same_pictures_and_another_seed_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "TRIES", 2)
    first, again, other = (pictures("page", Noise(), references=1, good=1, bad=2, seed=seed) for seed in (0, 0, 1))
    for one, two in zip(first.tests + first.references, again.tests + again.references, strict=True):
        assert one.tobytes() == two.tobytes()
    assert first.tests[0].tobytes() != other.tests[0].tobytes() != first.references[0].tobytes()
    np.testing.assert_array_equal(first.masks, again.masks)
