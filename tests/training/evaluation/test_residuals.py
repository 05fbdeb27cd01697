"""Residual features of a batch against the formula, written naively."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.models import CFG, tiny_extractor, write_photos
from torch import Tensor, nn

from adfeatures.errors import ReferencesError
from adfeatures.images import build_transform, read_image
from adfeatures.references import BankRecord, ReferenceBank
from adfeatures.scoring import CosineRingScorer, FeatureNormScorer
from training.evaluation.feature_cache import content_key
from training.evaluation.residuals import Residuals

SHAPES = ((5, 4, 3), (7, 2, 2))


def maps(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *shape, generator=generator) for shape in SHAPES]


def naive(features: list[Tensor], references: list[Tensor]) -> list[Tensor]:
    """Each patch minus the reference patch of the highest cosine."""
    residuals = []
    for level, rows in zip(features, references, strict=True):
        result = torch.empty_like(level)
        for image in range(level.shape[0]):
            for y in range(level.shape[2]):
                for x in range(level.shape[3]):
                    query = level[image, :, y, x]
                    cosines = torch.stack(
                        [query @ c / (query.norm() * c.norm()) for c in rows.permute(0, 2, 3, 1).flatten(0, 2)]
                    )
                    result[image, :, y, x] = query - rows.permute(0, 2, 3, 1).flatten(0, 2)[cosines.argmax()]
        residuals.append(result)
    return residuals


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return [str(path) for path in write_photos(tmp_path, range(5))]


def bank(features: list[Tensor], paths: list[str]) -> ReferenceBank:
    made = ReferenceBank.from_features(features)
    made.record = BankRecord(sha256s=[content_key(path) for path in paths])
    return made


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_products_and_views_have_references_of_their_own(paths: list[str]) -> None:
    queries = maps(4, 0)
    references = {("nut", "C1"): maps(2, 1), ("nut", "C2"): maps(2, 2), ("bolt", ""): maps(3, 3)}
    banks = {key: ReferenceBank.from_features(value) for key, value in references.items()}
    keys = [("nut", "C1"), ("bolt", "C9"), ("nut", "C2"), ("bolt", "")]
    extractor = Residuals(
        lambda _: queries, banks, dict(zip(paths, keys, strict=False)), None, scorer=FeatureNormScorer()
    )
    found = extractor({"path": paths[:4]})
    for index, key in enumerate([("nut", "C1"), ("bolt", ""), ("nut", "C2"), ("bolt", "")]):
        one = slice(index, index + 1)
        assert_same([level[one] for level in found], naive([level[one] for level in queries], references[key]))


@pytest.mark.parametrize("leave_out", [True, False])
def test_references_among_the_images(paths: list[str], leave_out: bool) -> None:
    queries = maps(3, 0)
    references = [level[[2, 0]] for level in queries]
    extractor = Residuals(
        lambda _: queries,
        {("nut", ""): bank(references, [paths[2], paths[0]])},
        dict.fromkeys(paths, ("nut", "")),
        None,
        leave_out=leave_out,
        scorer=FeatureNormScorer(),
    )
    found = extractor({"path": paths[:3]})
    assert_same([level[1:2] for level in found], naive([level[1:2] for level in queries], references))
    own = [level[[0, 2]] for level in found]
    if leave_out:
        others = ([level[2:3] for level in queries], [level[0:1] for level in queries])
        expected = [
            naive([level[i : i + 1] for level in queries], other) for i, other in zip((0, 2), others, strict=True)
        ]
        assert_same(own, [torch.cat(pair) for pair in zip(*expected, strict=True)])
    else:
        assert all(not level.any() for level in own)


def test_augmented_images_are_kept_from_their_origin(paths: list[str]) -> None:
    queries = maps(1, 0)
    references = [torch.cat([own, other]) for own, other in zip(queries, maps(1, 5), strict=True)]
    extractor = Residuals(
        lambda _: queries,
        {("nut", ""): bank(references, paths[:2])},
        dict.fromkeys(paths, ("nut", "")),
        None,
        scorer=FeatureNormScorer(),
    )
    found = extractor({"path": [None], "origin": paths[:1]})
    assert_same(found, naive(queries, [level[1:] for level in references]))


def test_a_single_reference_cannot_be_left_out(paths: list[str]) -> None:
    queries = maps(1, 0)
    extractor = Residuals(
        lambda _: queries,
        {("nut", ""): bank(queries, paths[:1])},
        {paths[0]: ("nut", "")},
        None,
        scorer=FeatureNormScorer(),
    )
    with pytest.raises(ReferencesError, match="single reference"):
        extractor({"path": paths[:1]})


def test_unit_length(paths: list[str]) -> None:
    queries, references = maps(2, 0), maps(2, 1)

    def unit(levels: list[Tensor]) -> list[Tensor]:
        return [level / level.norm(dim=1, keepdim=True) for level in levels]

    banks = {("nut", ""): ReferenceBank.from_features(unit(references))}
    extractor = Residuals(lambda _: queries, banks, dict.fromkeys(paths, ("nut", "")), None, scorer=CosineRingScorer())
    assert_same(extractor({"path": paths[:2]}), naive(unit(queries), unit(references)))


def test_projector_gets_all_residuals(paths: list[str]) -> None:
    class Projector(nn.Module):
        def forward(self, residuals: list[Tensor]) -> list[Tensor]:
            return [level.flip(1) for level in residuals]

    queries, references = maps(2, 0), maps(2, 1)
    banks = {("nut", ""): ReferenceBank.from_features(references)}
    extractor = Residuals(
        lambda _: queries, banks, dict.fromkeys(paths, ("nut", "")), Projector(), scorer=FeatureNormScorer()
    )
    assert_same(extractor({"path": paths[:2]}), [level.flip(1) for level in naive(queries, references)])


def test_equals_the_model(paths: list[str]) -> None:
    """The same features as the installed package gives its users."""
    model = tiny_extractor()
    model.set_references(paths[:2])
    transform = build_transform(model.img_size, CFG["mean"], CFG["std"])
    x = torch.stack([transform(read_image(path)) for path in paths[2:]])
    banks = {("nut", ""): model.references["default"]}
    extractor = Residuals(
        lambda batch: model.backbone(batch["image"]),
        banks,
        dict.fromkeys(paths, ("nut", "")),
        model.projector,
        scorer=FeatureNormScorer(),
    )
    for found, expected in zip(extractor({"image": x, "path": paths[2:]}), model(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
