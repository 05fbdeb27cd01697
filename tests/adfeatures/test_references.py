"""Reference banks against brute force, the original's numbers (goldens), and themselves after saving."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.banks import FACTS, full_bank, maps
from helpers.golden_values import assert_near, golden, value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from adfeatures import matching, references
from adfeatures.errors import InputError, ReferencesError
from adfeatures.geometry import PLAIN
from adfeatures.records import BankRecord
from adfeatures.references import ReferenceBank, residuals_of_images


def brute_force(queries: Tensor, references: Tensor, barred: list[int | None], found: Tensor) -> None:
    """Check every patch of ``found`` (B, C, h, w) against all cosine similarities to (K, C, h, w), in float64."""
    units = [F.normalize(level.double(), dim=1).permute(0, 2, 3, 1) for level in (queries, references)]
    similarity = torch.einsum("bhwc,kyxc->bhwkyx", *units)
    for image, other in enumerate(barred):
        if other is not None:
            similarity[image, :, :, other] = -torch.inf
    best = similarity.flatten(3).amax(dim=3)
    rows = references.permute(0, 2, 3, 1).flatten(0, 2)
    for image, y, x in np.ndindex(*best.shape):
        same = (rows == found[image, :, y, x]).all(dim=1)
        assert same.any(), "not a row of the bank"
        assert similarity[image, y, x].flatten()[same].max() >= best[image, y, x] - 1e-6


# Matching


def test_golden() -> None:
    expected = golden("residual")
    # 512 rows are two maps of 16 x 16.
    rows = [value(f"residual.bank.{level}", (512, 32)) for level in range(2)]
    bank = ReferenceBank.from_features([level.reshape(2, 16, 16, 32).permute(0, 3, 1, 2) for level in rows])
    features = [value(f"residual.features.{level}", (2, 32, 16, 16)) for level in range(2)]
    assert_near(bank.match(features), [expected["matched.0"], expected["matched.1"]], 0)
    assert_near(bank.residuals(features), [expected["residual.0"], expected["residual.1"]], 0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], Any, list[int | None], tuple[int, int]]:
    """Queries, references, ``exclude`` in some form and per image, chunk sizes; with zeros and duplicates."""
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    count, batch, levels = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    side = st.integers(1, 4)
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    queries, references = [], []
    for _ in range(levels):
        channels = draw(st.integers(1, 7))
        pair = [torch.randn(n, channels, draw(side), draw(side), generator=generator) for n in (batch, count)]
        for level in pair:
            tokens = level.permute(0, 2, 3, 1).reshape(-1, channels).clone()
            kind = torch.rand(len(tokens), generator=generator)
            tokens[kind < draw(st.sampled_from([0.0, 0.3]))] = 0
            twins = kind > draw(st.sampled_from([1.0, 0.6]))
            tokens[twins] = pair[1].permute(0, 2, 3, 1).reshape(-1, channels)[0].clone()
            tokens *= 10.0 ** torch.randint(-3, 4, (len(tokens), 1), generator=generator)
            level.copy_(tokens.reshape(level.shape[0], *level.shape[2:], channels).permute(0, 3, 1, 2))
        queries.append(pair[0].to(dtype))
        references.append(pair[1].to(dtype))
    chunks = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    indices = st.integers(0, count - 1)
    if count == 1:
        return queries, references, None, [None] * batch, chunks
    excluded = draw(st.one_of(st.none(), indices, st.lists(indices, min_size=batch, max_size=batch)))
    per_image: list[int | None] = list(excluded) if isinstance(excluded, list) else [excluded] * batch
    forms: list[Callable[[list[int]], object]] = [list, tuple, torch.tensor, np.array]
    given = draw(st.sampled_from(forms))(excluded) if isinstance(excluded, list) else excluded
    return queries, references, given, per_image, chunks


@settings(max_examples=200)
@given(cases())
def test_matching_is_brute_force(
    case: tuple[list[Tensor], list[Tensor], Any, list[int | None], tuple[int, int]],
) -> None:
    queries, kept, exclude, barred, chunks = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "QUERIES_PER_CHUNK", chunks[0])
        patch.setattr(matching, "ROWS_PER_CHUNK", chunks[1])
        bank = ReferenceBank.from_features(kept)
        found = bank.match(queries, exclude)
        residuals = bank.residuals(queries, exclude)
    for query, level, match, residual in zip(queries, kept, found, residuals, strict=True):
        assert match.shape == query.shape and match.dtype == query.dtype
        brute_force(query, level, barred, match)
        assert torch.equal(residual, query - match)


@pytest.mark.parametrize("best", [0, 1, 3, 4, 5, 7, 8, 10, 11])
@pytest.mark.parametrize("query", [0, 2, 3, 5, 6])
def test_chunk_boundaries(best: int, query: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "QUERIES_PER_CHUNK", 3)
    monkeypatch.setattr(matching, "ROWS_PER_CHUNK", 4)
    rows, queries = value("boundaries.rows", (12, 8)), value("boundaries.queries", (7, 8))
    rows[best] = queries[query] * 0.1
    bank = ReferenceBank.from_features([rows.T.reshape(1, 8, 3, 4)])
    found = bank.match([queries.T.reshape(1, 8, 7, 1)])[0]
    assert torch.equal(found[0, :, query, 0], rows[best])
    brute_force(queries.T.reshape(1, 8, 7, 1), rows.T.reshape(1, 8, 3, 4), [None], found)


def test_length_does_not_count_but_the_row_is_returned_as_it_is() -> None:
    rows = torch.tensor([[100.0, 0.0], [0.0, 0.001], [-50.0, -50.0]])
    bank = ReferenceBank.from_features([rows.reshape(1, 1, 3, 2).permute(0, 3, 1, 2)])
    queries = torch.tensor([[0.1, 0.05], [5.0, 500.0], [-1e-4, -1e-4]])
    matched = bank.match([queries.reshape(3, 2, 1, 1)])[0]
    assert torch.equal(matched.flatten(1), rows)


def test_zero_vectors() -> None:
    bank = ReferenceBank.from_features([torch.zeros(2, 3, 2, 2)])
    assert torch.equal(bank.residuals([torch.ones(1, 3, 2, 2)])[0], torch.ones(1, 3, 2, 2))
    bank = ReferenceBank.from_features(maps("references"))
    residuals = bank.residuals([torch.zeros_like(level) for level in maps("references")], exclude=[0, 1, 2, 3])
    assert all(torch.isfinite(level).all() for level in residuals)


def test_reference_against_itself_leaves_nothing() -> None:
    features = maps("references")
    assert all(not level.any() for level in ReferenceBank.from_features(features).residuals(features))


def test_queries_of_another_grid_and_no_queries() -> None:
    bank = ReferenceBank.from_features(maps("references"))
    queries = maps("queries", count=2, grids=((5, 2), (1, 7)))
    for query, level, match in zip(queries, maps("references"), bank.match(queries), strict=True):
        brute_force(query, level, [None, None], match)
    assert [tuple(level.shape) for level in bank.match([level[:0] for level in queries])] == [
        (0, 6, 5, 2),
        (0, 5, 1, 7),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_of_the_bank_and_of_the_queries_may_differ(dtype: torch.dtype) -> None:
    kept, queries = maps("references"), maps("queries", count=2)
    bank = ReferenceBank.from_features(kept)
    bank.apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
    assert all(rows.dtype == dtype for rows in bank.rows) and all(
        images.dtype == torch.int32 for images in bank.image_of_row
    )
    for query, level, match in zip(queries, kept, bank.match(queries), strict=True):
        assert match.dtype == torch.float32
        brute_force(query, level.to(dtype).float(), [None, None], match)


def test_autocast_does_not_coarsen_the_matching() -> None:
    rows = value("autocast.rows", (2, 64, 8, 8)) + 5 * value("autocast.mean", (1, 64, 1, 1))
    queries = value("autocast.queries", (1, 64, 8, 8), 0.3) + rows.mean(dim=(0, 2, 3), keepdim=True)
    bank = ReferenceBank.from_features([rows])
    with torch.autocast("cpu", torch.bfloat16):
        found = bank.match([queries])
    assert_near(found, bank.match([queries]), 0)


def test_matching_refuses_other_levels() -> None:
    bank = ReferenceBank.from_features(maps("references"))
    for features in (maps("queries")[:1], maps("queries")[::-1], [*maps("queries"), maps("queries")[0]]):
        with pytest.raises(InputError, match=r"\[6, 5\].*got"):
            bank.match(features)


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that anything makes."""

    bytes = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func._schema.returns[0].alias_info:
            self.bytes = max(self.bytes, result.nbytes)
        return result


@pytest.mark.parametrize("exclude", [None, 1])
def test_nothing_as_large_as_the_bank_is_made(exclude: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "QUERIES_PER_CHUNK", 16)
    monkeypatch.setattr(matching, "ROWS_PER_CHUNK", 32)
    bank = ReferenceBank.from_features([value("memory", (4, 8, 32, 32)).half()])
    query = value("memory.query", (1, 8, 8, 8)).half()
    with _Largest() as largest:
        bank.match([query], exclude)
    # The largest pieces are one block of similarities, one of the bank, and whatever has the size of the queries or of
    # the bank's index.
    assert largest.bytes <= max(16 * 32 * 4, 32 * 8 * 4, query.nbytes * 4, bank.image_of_row[0].numel())


_CHILD = """
import resource, sys, torch
from adfeatures.references import ReferenceBank
torch.set_num_threads(1)
rows = torch.empty({rows}, 768, dtype=torch.float16).normal_()
bank = ReferenceBank([rows], [torch.arange(8, dtype=torch.int32).repeat_interleave({rows} // 8)], [(1, {rows} // 8)], 8)
query = torch.randn(1, 768, 16, 16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bank.match([query], exclude={exclude})
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
@pytest.mark.parametrize("exclude", [None, 3])
def test_memory_of_matching_with_a_large_bank(exclude: int | None) -> None:
    """256 queries against 512,000 rows of 768: a distance matrix would take 0.5 GB, the bank in float32 1.6 GB."""
    code = _CHILD.format(rows=512_000, exclude=exclude)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < 150e6


# Leaving out


def test_exclude_forms() -> None:
    features = maps("references")
    bank = ReferenceBank.from_features(features)
    one = [level[:1] for level in features]
    expected = ReferenceBank.from_features([level[1:] for level in features]).match(one)
    forms: list[Any] = [0, [0], (0,), torch.tensor([0]), np.array([0]), range(1)]
    for exclude in forms:
        assert_near(bank.match(one, exclude), expected, 0)
    # One index serves all images, several serve one each.
    both = [level[[2, 2]] for level in features]
    matched = bank.match(both, [2, 0])
    assert_near([level[:1] for level in matched], bank.match([level[2:3] for level in features], 2), 0)
    assert_near([level[1:] for level in matched], [level[2:3] for level in features], 0)
    assert_near(bank.match(both, 2), [level[[2, 2]] for level in bank.match(features, [0, 1, 2, 3])], 0)


@pytest.mark.parametrize("exclude", [4, -1, [0], [0, 1, 2], [0, 4], [-1, 0]])
def test_exclude_must_name_references(exclude: int | list[int]) -> None:
    with pytest.raises(InputError, match="exclude must name one of 4 references for each of 2 images"):
        ReferenceBank.from_features(maps("references")).match(maps("queries", count=2), exclude)


def test_a_single_reference_cannot_be_left_out() -> None:
    bank = ReferenceBank.from_features(maps("references", count=1))
    with pytest.raises(ReferencesError, match="second"):
        bank.residuals(maps("references", count=1), exclude=0)


def test_leave_one_out() -> None:
    features = maps("references", count=11)
    bank = ReferenceBank.from_features(features)
    found = [torch.cat(level) for level in zip(*bank.leave_one_out(), strict=True)]
    for image in range(11):
        others = ReferenceBank.from_features([torch.cat([level[:image], level[image + 1 :]]) for level in features])
        expected = others.residuals([level[image : image + 1] for level in features])
        assert_near([level[image : image + 1] for level in found], expected, 0)
        assert all(level.any() for level in expected)
    some = [torch.cat(level) for level in zip(*bank.leave_one_out([7, 2]), strict=True)]
    assert_near(some, [level[[7, 2]] for level in found], 0)


def test_leave_one_out_finds_twins() -> None:
    features = [torch.cat([level, level[1:2]]) for level in maps("references")]
    found = [torch.cat(level) for level in zip(*ReferenceBank.from_features(features).leave_one_out(), strict=True)]
    assert [[bool(image.any()) for image in level] for level in found] == [[True, False, True, True, False]] * 2


@pytest.mark.parametrize(
    ("count", "taken"), [(4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4]), (6, [0, 1, 2, 4, 5]), (21, [0, 5, 10, 15, 20])]
)
def test_leave_one_out_of_many_takes_some_of_them(
    count: int, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "LEAVE_ONE_OUT_IMAGES", 5)
    bank = ReferenceBank.from_features(maps("references", count=count))
    found, expected = (
        [torch.cat(level) for level in zip(*bank.leave_one_out(images), strict=True)] for images in (None, taken)
    )
    assert_near(found, expected, 0)


def test_leave_one_out_of_a_coreset_takes_the_images_from_the_whole() -> None:
    features = maps("references")
    full = ReferenceBank.from_features(features)
    small = full.coreset(0.5)
    (found,) = small.leave_one_out(full=full)
    assert_near(found, small.residuals(features, exclude=[0, 1, 2, 3]), 0)
    with pytest.raises(ReferencesError, match="coreset"):
        next(small.leave_one_out())


# Making a bank


def test_from_features() -> None:
    features = maps("references")
    bank = ReferenceBank.from_features(features)
    assert (bank.num_images, bank.grids, bank.complete) == (4, [(3, 4), (2, 3)], True)
    assert [tuple(rows.shape) for rows in bank.rows] == [(48, 6), (24, 5)]
    assert torch.equal(bank.rows[0][12 + 4 + 2], features[0][1, :, 1, 2])
    assert bank.image_of_row[1].tolist() == [image for image in range(4) for _ in range(6)]
    assert_near(bank.features(), features, 0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_bank_is_a_copy(layout: torch.memory_format, tmp_path: Path) -> None:
    features = [level.contiguous(memory_format=layout) for level in maps("references")]
    bank = ReferenceBank.from_features([features[0], features[0], features[1]])
    features[0].zero_()
    assert_near(bank.features(), [maps("references")[level] for level in (0, 0, 1)], 0)
    bank.save(tmp_path / "bank.safetensors")


@pytest.mark.parametrize(
    "features",
    [
        [],
        [torch.zeros(0, 3, 2, 2)],
        [torch.zeros(2, 3, 2, 2), torch.zeros(3, 3, 2, 2)],
        [torch.zeros(3, 2, 2)],
        [torch.full((1, 3, 2, 2), torch.nan)],
        [torch.zeros(1, 3, 2, 2), torch.tensor([[[[0.0]], [[torch.inf]]]])],
    ],
    ids=["no levels", "no images", "different counts", "no batch", "NaN", "infinite"],
)
def test_from_features_refuses(features: list[Tensor]) -> None:
    with pytest.raises(InputError):
        ReferenceBank.from_features(features)


def test_extended() -> None:
    features, more = maps("references"), maps("more", count=3)
    first, second = full_bank(geometry=PLAIN), ReferenceBank.from_features(more)
    second.record = BankRecord(
        model=first.model, files=["x", "y", "z"], sha256s=["7", "8", "9"], pixels=["a", "b", "c"]
    )
    both = first.extended(second)
    whole = ReferenceBank.from_features([torch.cat(pair) for pair in zip(features, more, strict=True)])
    assert_near(both.rows, whole.rows, 0)
    assert_near(both.image_of_row, whole.image_of_row, 0)
    assert (both.num_images, both.files, both.sha256s, both.record.pixels) == (
        7,
        FACTS["files"] + ["x", "y", "z"],
        FACTS["sha256s"] + ["7", "8", "9"],
        FACTS["pixels"] + ["a", "b", "c"],
    )
    kept = {name: value for name, value in FACTS.items() if name in ("model", "img_size", "preset", "bit_depth")}
    assert kept.items() <= dataclasses.asdict(both.record).items()
    assert (both.threshold, both.quantile, both.record.normal_scores, both.scales) == (None, None, [], None)
    queries = [level[:4] for level in more]
    assert_near(both.match(queries, exclude=4), whole.match(queries, exclude=4), 0)
    assert (first.num_images, first.threshold) == (4, FACTS["threshold"])


def test_extended_refuses_what_does_not_belong_together() -> None:
    bank = full_bank(geometry=PLAIN)
    for other in (
        full_bank(model="another", geometry=PLAIN),
        bank.coreset(0.5),
        ReferenceBank.from_features(maps("references", grids=((4, 3), (2, 3)))),
    ):
        for pair in ((bank, other), (other, bank)):
            with pytest.raises(ReferencesError, match="joined"):
                pair[0].extended(pair[1])


# Batches of several banks


def test_every_image_has_its_bank_and_its_exclusion() -> None:
    first, second = ReferenceBank.from_features(maps("one")), ReferenceBank.from_features(maps("two", count=3))
    queries = maps("queries", count=5)
    banks, exclude = [first, second, first, second, first], [None, 2, 1, None, 1]
    found = residuals_of_images(queries, banks, exclude)
    for number, (bank, own) in enumerate(zip(banks, exclude, strict=True)):
        alone = bank.residuals([level[number : number + 1] for level in queries], own)
        assert_near([level[number : number + 1] for level in found], alone, 0)
    assert_near(residuals_of_images(queries, [first] * 5), first.residuals(queries), 0)


# Coreset


def greedy(units: Tensor, first: int, count: int) -> list[int]:
    """The k-center search of Sener and Savarese, one distance at a time."""
    chosen = [first]
    while len(chosen) < count:
        distances = [min(1 - float(unit @ units[other]) for other in chosen) for unit in units]
        left = [row for row in range(len(units)) if row not in chosen]
        chosen.append(max(left, key=lambda row: distances[row]))
    return sorted(chosen)


def radius(units: Tensor, chosen: list[int]) -> float:
    return float((1 - units @ units[chosen].T).amin(dim=1).max())


def single_patches(rows: Tensor) -> ReferenceBank:
    """A bank whose images are single patches, so that ``images`` tells which rows were kept."""
    return ReferenceBank.from_features([rows[:, :, None, None]])


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 24),
    channels=st.integers(2, 6),
    fraction=st.floats(0.01, 1),
    twins=st.booleans(),
    start=st.integers(0, 2**31),
)
def test_coreset_is_the_greedy_one(
    seed: int, count: int, channels: int, fraction: float, twins: bool, start: int
) -> None:
    rows = torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))
    if twins:
        rows[count // 2 :] = rows[: count - count // 2] * 2
    bank = single_patches(rows).coreset(fraction, seed=start)
    kept = bank.image_of_row[0].tolist()
    assert len(kept) == max(1, round(fraction * count))
    assert kept == sorted(set(kept))
    assert torch.equal(bank.rows[0], rows[kept])
    units = F.normalize(rows.double(), dim=1)
    naive = [greedy(units, first, len(kept)) for first in range(count)]
    assert radius(units, kept) <= max(radius(units, chosen) for chosen in naive) + 1e-6
    if not twins:
        assert kept in naive
    elif len(kept) >= count - count // 2:
        assert radius(units, kept) < 1e-6, "a twin was kept before every direction was"


def test_coreset_takes_no_twin_while_others_are_uncovered() -> None:
    rows = torch.eye(6).repeat(5, 1) * torch.arange(1.0, 31.0)[:, None]
    for seed in range(5):
        kept = single_patches(rows).coreset(0.2, seed).image_of_row[0]
        assert sorted((kept % 6).tolist()) == [0, 1, 2, 3, 4, 5]
    assert single_patches(rows).coreset(0.5).image_of_row[0].unique().numel() == 15


def test_coreset_depends_on_its_seed_only() -> None:
    bank = full_bank()
    torch.manual_seed(1)
    one = bank.coreset(0.25, seed=3)
    torch.manual_seed(2)
    assert_near(one.rows, bank.coreset(0.25, seed=3).rows, 0)
    assert any(not torch.equal(bank.coreset(0.25, seed=seed).rows[0], one.rows[0]) for seed in range(10))
    assert_near(bank.rows, full_bank().rows, 0)


def test_coreset_keeps_facts_and_drops_what_no_longer_holds() -> None:
    bank = full_bank(geometry=PLAIN)
    small = bank.coreset(0.25)
    assert [len(rows) for rows in small.rows] == [12, 6]
    assert (small.num_images, small.grids) == (bank.num_images, bank.grids)
    assert small.record == dataclasses.replace(bank.record, threshold=None, quantile=None, normal_scores=[])
    assert small.scales is None and not small.complete
    for rows, images, whole, owners in zip(small.rows, small.image_of_row, bank.rows, bank.image_of_row, strict=True):
        for row, image in zip(rows, images, strict=True):
            assert (whole[owners == image] == row).all(dim=1).any()
    with pytest.raises(ReferencesError, match="coreset"):
        small.features()
    assert bank.coreset(1).complete
    assert_near(bank.coreset(1).features(), maps("references"), 0)
    assert not bank.coreset(0.5).coreset(1).complete


def test_coreset_of_a_single_image_cannot_leave_it_out() -> None:
    features = [torch.eye(2)[:, :, None, None]]
    small = ReferenceBank.from_features(features).coreset(0.5)
    kept = int(small.image_of_row[0][0])
    with pytest.raises(ReferencesError, match="single image"):
        small.match([features[0][:1]], exclude=kept)
    assert torch.equal(small.match([features[0][:1]], exclude=1 - kept)[0][0], features[0][kept])


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_coreset_refuses_fractions(fraction: float) -> None:
    with pytest.raises(InputError, match="fraction"):
        full_bank().coreset(fraction)


def test_residuals_are_in_units_of_the_matched_rows() -> None:
    features = maps("references", count=3)
    bank = ReferenceBank.from_features(features)
    plain = bank.residuals(maps("queries", count=2))
    bank.units = [torch.full((len(rows),), 2.0 + level) for level, rows in enumerate(bank.rows)]
    for level, (found, expected) in enumerate(zip(bank.residuals(maps("queries", count=2)), plain, strict=True)):
        assert_near(found, expected / (2 + level), 1e-6)


def test_turned_copies_belong_to_the_images_that_they_are_of() -> None:
    upright, turned = (ReferenceBank.from_features(maps(name, count=3)) for name in ("references", "queries"))
    bank = upright.with_turned([turned])
    assert bank.turned and bank.complete and bank.num_images == 3
    for pair in ((bank, upright), (upright, bank)):
        with pytest.raises(ReferencesError, match="without rotated references"):
            pair[0].extended(pair[1])
    for own, other in zip(bank.leave_one_out(), bank.leave_one_out(full=upright), strict=True):
        assert all(level.abs().amax(dim=(1, 2, 3)).min() > 0 for level in own)
        assert all(torch.equal(left, right) for left, right in zip(own, other, strict=True))
    assert all(float(level.abs().max()) == 0 for level in bank.residuals(maps("queries", count=3)))
    assert not bank.coreset(1).turned and not bank.coreset(1).complete
    assert not upright.coreset(0.5).with_turned([turned]).complete
