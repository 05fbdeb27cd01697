"""Tests of what images are matched with."""

from __future__ import annotations

import pytest
import torch
from helpers.banks import maps

from adfeatures.reduction import reduce
from adfeatures.references import ReferenceBank


def test_reduced_banks_keep_all_rows_and_match_with_some() -> None:
    bank = ReferenceBank.from_features(maps("references", count=4))
    everything = bank.match(maps("queries", count=2))
    reduce(bank, 10**6)
    for found, expected in zip(bank.match(maps("queries", count=2)), everything, strict=True):
        assert torch.equal(found, expected)
    reduce(bank, 1)
    assert bank.complete and bank.kept is not None
    for kept, rows, (height, width), found in zip(
        bank.kept, bank.rows, bank.grids, bank.match(maps("queries", count=2)), strict=True
    ):
        assert len(kept) == min(len(rows), 2 * height * width) and bool((kept.diff() > 0).all())
        matched = found.permute(0, 2, 3, 1).flatten(0, 2)
        assert (matched[:, None] == rows[kept][None]).all(dim=2).any(dim=1).all()
    again = [kept.clone() for kept in bank.kept]
    reduce(bank, 1)
    assert all(torch.equal(one, other) for one, other in zip(again, bank.kept, strict=True))


@pytest.mark.parametrize("most", [12, 1000])
def test_of_turned_copies_a_bank_keeps_what_is_matched_with(most: int) -> None:
    features = maps("references", count=3)
    upright = ReferenceBank.from_features(features)
    turned = [ReferenceBank.from_features(maps(name, count=3)) for name in ("queries", "more")]
    bank, drawn = upright.with_turned(turned), upright.with_turned(turned)
    drawn.turned = False  # So that only what is drawn is left.
    for either in (bank, drawn):
        reduce(either, most)
    assert bank.complete and bank.kept is not None and not drawn.complete
    for level, kept in enumerate(bank.kept):
        own, expected = bank.rows[level], drawn.rows[level]
        assert torch.equal(own[kept.long()], expected)
        assert torch.equal(bank.image_of_row[level][kept.long()], drawn.image_of_row[level])
        count = len(upright.rows[level])
        assert torch.equal(own[:count], upright.rows[level])
        # Further rows are those that were drawn, each once.
        assert len(own) == count + len(kept[kept >= count].unique())
    assert all(torch.equal(*pair) for pair in zip(bank.features(), features, strict=True))
