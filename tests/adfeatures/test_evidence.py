"""What the head sees, against plain loops, and the head itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.golden_values import assert_near
from torch import Tensor

import adfeatures
from adfeatures.catalog import ASSETS, BACKBONES, DEFAULT_MODEL, MODELS, find_model
from adfeatures.errors import CheckpointError
from adfeatures.evidence import LOOKS, SEEN, evidence, looks_of, own_spreads
from adfeatures.factory import load_learned
from adfeatures.learned import Head, LearnedScorer
from adfeatures.matching import nearest_of_groups
from adfeatures.references import ReferenceBank
from adfeatures.scoring import LocalCosineScorer, anomaly_maps

NORMALIZATION = ((0.5, 0.4, 0.3), (0.5, 0.4, 0.2))


def scorer_of(levels: int) -> LearnedScorer:
    return LearnedScorer(((0.4, 0.3, 0.2, 0.1),) * levels, NORMALIZATION, levels).eval()


def patches(count: int, seed: int, grid: tuple[int, int] = (4, 5), channels: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(count, channels, *grid, generator=generator), dim=1)
    return torch.cat([features, torch.randn(count, LOOKS, *grid, generator=generator)], dim=1)


def bank_of(scorer: LearnedScorer, level: Tensor) -> ReferenceBank:
    bank = ReferenceBank.from_features([level], looks=LOOKS)
    scorer.prepare(bank)
    return bank


def by_groups(query: np.ndarray, bank: ReferenceBank, left_out: int | None) -> list[tuple[float, int]]:
    """Distance to the nearest row of each group, and which it is, of those that are there; the nearest first."""
    assert bank.kept is not None
    kept = bank.kept[0].tolist()
    rows, owners = bank.rows[0].numpy().astype(np.float64), bank.image_of_row[0].tolist()
    found = []
    for group in range(bank.groups):
        best = None
        for place, row in enumerate(kept):
            if owners[row] % bank.groups == group and owners[row] != left_out:
                distance = max(0.0, 1 - float(query[:-LOOKS] @ rows[row][:-LOOKS]))
                if best is None or distance < best[0]:
                    best = (distance, place)
        if best is not None:
            found.append(best)
    return sorted(found)


def log(value: float) -> float:
    return float(np.log(value + 1e-4))


def displacements(place: tuple[int, ...], shifts: dict[tuple[int, ...], np.ndarray]) -> list[float]:
    """How far the nearest row lies, and how unlike the three most alike of four neighbors that is, of a 4 x 5 grid."""
    image, y, x = place
    beside = [(y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x)]
    inside = [(image, min(max(row, 0), 3), min(max(column, 0), 4)) for row, column in beside]
    unlike = sorted(float(np.linalg.norm(shifts[neighbor] - shifts[place])) for neighbor in inside)
    lengths = [float(np.linalg.norm(shifts[place])), float(np.mean(unlike[:3]))]
    return [float(np.log(length + 0.01)) for length in lengths]


@pytest.mark.parametrize(("images", "left_out"), [(3, None), (3, 1), (2, 0), (11, None), (11, 9)])
def test_evidence_is_the_plain_formula(images: int, left_out: int | None) -> None:
    scorer = scorer_of(1)
    bank = bank_of(scorer, patches(images, 0))
    assert bank.groups == min(images, 8) and bank.kept is not None and bank.own is not None and bank.units is not None
    query = patches(2, 1)
    (found,) = evidence(bank, [query], left_out)
    assert found.shape == (2, 1 + SEEN, 4, 5)
    tokens = query.permute(0, 2, 3, 1).double().numpy()
    own = [by_groups(bank.rows[0][row].double().numpy(), bank, int(bank.image_of_row[0][row])) for row in bank.kept[0]]
    mean_own = float(np.mean([spread[0][0] for spread in own]))
    matches = {place: by_groups(tokens[place], bank, left_out) for place in np.ndindex(2, 4, 5)}
    colors = {
        place: [tokens[place][-LOOKS:] - bank.rows[0][bank.kept[0][row]].double().numpy()[-LOOKS:] for _, row in match]
        for place, match in matches.items()
    }
    # What all patches of an image differ by from the nearest rows of a group is not of a patch.
    group_of = {place: [int(row) * bank.groups // len(bank.kept[0]) for _, row in m] for place, m in matches.items()}
    common: dict[tuple[int, int], np.ndarray] = {}
    for image, group in itertools.product(range(2), range(bank.groups)):
        of_group = [
            difference
            for place, own_colors in colors.items()
            if place[0] == image
            for difference, owner in zip(own_colors, group_of[place], strict=True)
            if owner == group
        ]
        if of_group:
            common[image, group] = np.mean(of_group, axis=0)
    for place, match in matches.items():
        distances = [distance for distance, _ in match]
        count = len(distances)
        first, half = log(distances[0]), distances[: max(1, count // 2)]
        spread = own[match[0][1]]
        rest = [distance for distance, _ in spread]
        differences = [
            difference - common[place[0], group]
            for difference, group in zip(colors[place], group_of[place], strict=True)
        ]
        shifts = [float(difference[:3].mean()) for difference in differences]
        tints = [
            float(np.linalg.norm(difference[:3] - shift)) for difference, shift in zip(differences, shifts, strict=True)
        ]
        expected = [
            distances[0] / max(rest[0] / mean_own, 0.25) ** 0.35,
            first,
            log(distances[min(1, count - 1)]) - first,
            log(distances[min(count // 2, count - 1)]) - first,
            log(distances[-1]) - first,
            log(float(np.mean(distances))) - first,
            float(np.mean([log(distance) for distance in half])) - first,
            log(rest[0]) - log(mean_own),
            log(rest[min(1, len(rest) - 1)]) - log(rest[0]),
            log(float(np.mean(rest))) - log(rest[0]),
            shifts[0],
            abs(shifts[0]),
            tints[0],
            float(differences[0][3]),
            min(map(abs, shifts)),
            min(tints),
            float(tokens[place][-LOOKS + 3]),
            *displacements(place, {where: own_colors[0][4:] for where, own_colors in colors.items()}),
        ]
        image, y, x = place
        assert_near(found[image, :, y, x], torch.tensor(expected), 1e-3)


def test_a_single_reference_says_nothing_of_others() -> None:
    scorer = scorer_of(1)
    bank = bank_of(scorer, patches(1, 0))
    assert bank.own is None and bank.units is None
    (found,) = evidence(bank, [patches(2, 1)])
    assert not found[:, 2:10].any() and found.isfinite().all()


def test_copies_are_finite() -> None:
    scorer, level = scorer_of(1), patches(1, 0)
    bank = bank_of(scorer, level.expand(3, -1, -1, -1))
    bank.scales = scorer.scales(bank.leave_one_out(compare=scorer.compare), 1)
    compared = scorer.compare(bank, [level])
    assert anomaly_maps(scorer, compared, [bank.scales], (16, 16)).isfinite().all()


def test_groups_are_matched_as_in_loops() -> None:
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(3, 40, 5), dim=2)
    owners = torch.randint(0, 4, (3, 40), dtype=torch.int32)
    owners[2] = 7
    queries = F.normalize(torch.randn(2500, 5), dim=1)
    for barred in (None, torch.randint(-1, 8, (2500,), dtype=torch.int32)):
        distances, places = nearest_of_groups(queries, rows, owners, barred)
        similarity = torch.einsum("qc,gmc->qgm", queries, rows)
        if barred is not None:
            similarity = similarity.masked_fill(owners == barred[:, None, None], -torch.inf)
        best, expected = similarity.max(dim=2)
        there = best.isfinite()
        assert_near(distances[there], (1 - best).clamp_min(0)[there], 1e-5)
        assert torch.equal(places[there], (expected + torch.tensor([0, 40, 80]))[there])
        assert distances[~there].isinf().all()


def test_looks_are_logarithms_of_means_and_of_deviations_and_places() -> None:
    images = torch.rand(2, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    found = looks_of(images, (3, 5))
    for y, x in np.ndindex(3, 5):
        cell = images[:, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].double()
        gray = cell.mean(dim=1).flatten(1)
        expected = torch.cat([cell.mean(dim=(2, 3)) + 0.02, gray.std(dim=1, unbiased=False)[:, None] + 0.01], dim=1)
        assert_near(found[:, :4, y, x], expected.log(), 1e-4)
        assert_near(found[:, 4:, y, x], torch.tensor([[(y + 0.5) / 3, (x + 0.5) / 5]] * 2), 1e-6)
    assert looks_of(torch.zeros(1, 3, 4, 4), (2, 2)).isfinite().all()


def test_own_spreads_of_rows_with_one_other_group() -> None:
    found = own_spreads(torch.tensor([[torch.inf, 0.2], [0.4, torch.inf]]))
    assert_near(found[:, 0], torch.tensor([0.2001, 0.4001]).log() - torch.tensor(0.3001).log(), 1e-5)
    assert not found[:, 1:].any()


def test_patches_carry_the_looks_of_the_image_as_it_was(seed: int = 3) -> None:
    """Weighted means of 3 x 3 cells, of colors before they were normalized."""
    scorer = scorer_of(2)
    rgb = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    mean, deviation = (torch.tensor(part)[:, None, None] for part in NORMALIZATION)
    features = [torch.randn(1, 5, 4, 4), torch.randn(1, 7, 2, 2)]
    described = scorer.described(features, (rgb - mean) / deviation)
    for level, own in zip(described, features, strict=True):
        channels, grid = own.shape[1], (own.shape[2], own.shape[3])
        assert torch.equal(level[:, :channels], own)
        cells = F.pad(looks_of(rgb, grid), (1, 1, 1, 1), mode="replicate")
        kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).expand(LOOKS, 1, 3, 3) / 16
        assert_near(level[:, channels:], F.conv2d(cells, kernel, groups=LOOKS), 1e-4)


def test_an_untrained_head_changes_nothing() -> None:
    torch.manual_seed(0)
    scorer, plain = scorer_of(2), LocalCosineScorer(((0.4, 0.3, 0.2, 0.1),) * 2)
    levels = [patches(3, seed, (6, 6)) for seed in range(2)]
    bank = ReferenceBank.from_features(levels, looks=LOOKS)
    scorer.prepare(bank)
    queries = [patches(2, seed + 9, (6, 6)) for seed in range(2)]
    bank.scales = scorer.scales(bank.leave_one_out(compare=scorer.compare), 2)
    found = anomaly_maps(scorer, scorer.compare(bank, queries), [bank.scales], (24, 24))
    assert_near(found, anomaly_maps(plain, bank.residuals(queries), [bank.scales], (24, 24)), 1e-4)
    assert_near(bank.scales, plain.scales(bank.leave_one_out(), 2), 1e-4)


def test_factors_depend_on_neighbors_and_on_nothing_farther() -> None:
    torch.manual_seed(0)
    head = Head(1)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ones, seen = torch.ones(1, 5, 6), torch.randn(1, SEEN, 5, 6)
    other = seen.clone()
    other[:, :, 2, 3] += 1
    (before,), (after,) = (head([ones], [ones], [own]) for own in (seen, other))
    changed = torch.zeros(5, 6, dtype=torch.bool)
    changed[1:4, 2:5] = True
    assert torch.equal((before != after)[0], changed)


def test_factors_stay_between_the_bounds() -> None:
    head = Head(1)
    torch.nn.init.constant_(head.layers[-1].bias, 50.0)  # type: ignore[arg-type]
    ones = torch.ones(1, 4, 4)
    (found,) = head([ones], [ones], [torch.randn(1, SEEN, 4, 4)])
    assert_near(found, ones * np.exp(Head.MOST), 1e-5)


class TestDefault:
    def test_the_head_counts(self) -> None:
        """The head of the package is trained, and the scores are not those without it."""
        arch, tag = find_model(DEFAULT_MODEL)
        facts = MODELS[arch].tags[str(tag)]
        assert facts.head is not None
        scorer = load_learned(BACKBONES[MODELS[arch].backbone], facts.typical_distances, ASSETS / facts.head)
        last = scorer.head.layers[-1]
        assert isinstance(last, torch.nn.Conv2d) and float(last.weight.abs().max()) > 0.01

    def test_features_have_no_looks(self) -> None:
        model = adfeatures.create_model(img_size=64)
        model.set_references(torch.rand(3, 3, 64, 64) * 2 - 1)
        x = torch.rand(2, 3, 64, 64) * 2 - 1
        channels = list(model.backbone.channels)
        for maps in (model(x), model.residuals(x), model.backbone_features(x), model.reference_features()):
            assert [level.shape[1] for level in maps] == channels
        assert [level.shape[1] for level in model.bank().match(model.backbone_features(x))] == channels
        assert [rows.shape[1] - LOOKS for rows in model.bank().rows] == channels

    def test_a_bank_in_a_file_scores_the_same(self, tmp_path: Path) -> None:
        model = adfeatures.create_model(img_size=64)
        x = torch.rand(2, 3, 64, 64) * 2 - 1
        for count in (1, 3, 10):
            model.set_references(torch.rand(count, 3, 64, 64) * 2 - 1)
            before = model.anomaly_map(x)
            model.bank().save(tmp_path / "part.safetensors")
            model.load_references(tmp_path / "part.safetensors")
            assert model.bank().groups == min(count, 8)
            for found, expected in zip(model.anomaly_map(x), before, strict=True):
                assert torch.equal(found, expected)

    def test_images_of_several_products_in_a_batch(self) -> None:
        model = adfeatures.create_model(img_size=64)
        x = torch.rand(3, 3, 64, 64) * 2 - 1
        for name, count in (("one", 1), ("more", 4)):
            model.set_references(torch.rand(count, 3, 64, 64) * 2 - 1, product=name)
        together = model.anomaly_map(x, ["one", "more", "one"])
        for number, name in enumerate(("one", "more", "one")):
            assert_near(together.maps[number], model.anomaly_map(x[number : number + 1], name).maps[0], 1e-4)

    @pytest.mark.parametrize("damage", ["missing", "other"])
    def test_a_damaged_head_is_refused(self, tmp_path: Path, damage: str) -> None:
        arch, tag = find_model(DEFAULT_MODEL)
        path = tmp_path / "head.safetensors"
        if damage == "other":
            path.write_bytes((ASSETS / "residual_lite.in1k_v1.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match=r"head\.safetensors"):
            load_learned(BACKBONES[MODELS[arch].backbone], MODELS[arch].tags[str(tag)].typical_distances, path)
