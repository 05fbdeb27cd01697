"""Residuals of a batch against the reference bank of each image and against the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.golden_values import assert_near, golden, value

from adfeatures import ReferenceBank
from adfeatures.errors import InputError
from training.pretraining import residuals as module
from training.pretraining.residuals import batch_residuals


def test_residuals_are_the_original_ones() -> None:
    expected = golden("residual")
    for level in range(2):
        queries = value(f"residual.features.{level}", (2, 32, 16, 16))
        bank = value(f"residual.bank.{level}", (512, 32)).unflatten(0, (2, 16, 16)).permute(0, 3, 1, 2)
        (residuals,) = batch_residuals([queries], [bank.expand(2, -1, -1, -1, -1)])
        (name,) = (key for key in expected if "residual" in key and key.endswith(str(level)))
        assert_near(residuals, expected[name])


def test_every_image_has_its_own_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERIES_PER_CHUNK", 7)
    torch.manual_seed(0)
    levels = [torch.randn(3, 5, 4, 6), torch.randn(3, 8, 2, 3)]
    references = [torch.randn(3, 2, 5, 4, 4), torch.randn(3, 2, 8, 3, 3)]
    found = batch_residuals(levels, references)
    for image in range(3):
        bank = ReferenceBank.from_features([level[image] for level in references])
        expected = bank.residuals([level[image : image + 1] for level in levels])
        assert_near([level[image : image + 1] for level in found], expected, 1e-6)


def test_the_nearest_is_that_of_the_formula() -> None:
    torch.manual_seed(1)
    level, references = torch.randn(2, 4, 3, 3), torch.randn(2, 3, 4, 3, 3)
    (found,) = batch_residuals([level], [references])
    for image in range(2):
        rows = references[image].permute(0, 2, 3, 1).reshape(-1, 4)
        for y in range(3):
            for x in range(3):
                query = level[image, :, y, x]
                cosines = [F.cosine_similarity(row, query, dim=0) for row in rows]
                torch.testing.assert_close(found[image, :, y, x], query - rows[torch.stack(cosines).argmax()])


def test_features_in_bfloat16_are_matched_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the published training does: rows and similarities are rounded, and of equal ones the first is taken."""
    monkeypatch.setattr(module, "QUERIES_PER_CHUNK", 50)
    torch.manual_seed(2)
    level = torch.randn(2, 8, 12, 12)
    references = (0.9 * level[:, None] + 0.3 * torch.randn(2, 3, 8, 12, 12)).bfloat16()
    level = level.bfloat16()
    (found,) = batch_residuals([level], [references])
    (exact,) = batch_residuals([level.float()], [references.float()])
    assert found.dtype == torch.bfloat16 and not torch.equal(found, exact.bfloat16())
    for image in range(2):
        queries, rows = level[image].flatten(1).T, references[image].permute(0, 2, 3, 1).flatten(0, 2)
        similarities = F.normalize(queries, dim=1) @ F.normalize(rows, dim=1).T
        first = [int((row == row.max()).nonzero()[0]) for row in similarities]
        assert torch.equal(found[image].flatten(1).T, queries - rows[first])


def test_references_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="do not fit"):
        batch_residuals([torch.randn(2, 4, 3, 3)], [torch.randn(2, 0, 4, 3, 3)])
    with pytest.raises(InputError, match="do not fit"):
        batch_residuals([torch.randn(2, 4, 3, 3)], [torch.randn(1, 2, 4, 3, 3)])
