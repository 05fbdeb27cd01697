"""The digest of items: the same wherever a data set lies, another for other images."""

from __future__ import annotations

from dataclasses import replace

import pytest

from training.data.items import ANOMALOUS, Item, items_digest

ITEMS = [
    Item("/a/cap/000.png", 0, "cap", view="C1", sample="S1"),
    Item("/a/cap/001.png", 1, "cap", "/a/m.png", "cut", "C2", "S2"),
]


def test_the_digest_is_that_of_the_names_alone() -> None:
    moved = [replace(item, image=item.image.replace("/a/", "/b/c/"), mask=None) for item in ITEMS]
    assert items_digest(moved) == items_digest(ITEMS)
    # Stored beside checkpoints and features, so it may never change.
    assert items_digest(ITEMS) == "60ca4d0fb89c021e8988a047b01aa57968fab750cd8222fad1eeebdab254a60b"


@pytest.mark.parametrize(
    "change", [{"image": "/a/cap/2.png"}, {"label": ANOMALOUS}, {"product": "cup"}, {"view": "C3"}, {"sample": "S3"}]
)
def test_other_items_have_another_digest(change: dict[str, object]) -> None:
    assert items_digest([replace(ITEMS[0], **change), ITEMS[1]]) != items_digest(ITEMS)  # type: ignore[arg-type]
    assert items_digest(ITEMS[::-1]) != items_digest(ITEMS)
