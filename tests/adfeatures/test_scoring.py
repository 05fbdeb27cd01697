"""Scores against the original's numbers (goldens), scipy, scikit-learn, numpy, and loops written out below."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers.golden_values import assert_near, fill, golden, shapes, value
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score
from torch import Tensor

from adfeatures import scoring
from adfeatures.backbones import create_backbone
from adfeatures.errors import InputError, ReferencesError
from adfeatures.geometry import Geometry
from adfeatures.projector import ResidualProjector
from adfeatures.references import ReferenceBank


def features(count: int = 2) -> list[Tensor]:
    return [value(f"features.{level}", (count, 5, 3 + level, 4)) for level in range(3)]


# Anomaly maps


def test_golden_feature_norm() -> None:
    expected = golden("feature_norm")
    maps = scoring.feature_norm_map(
        [value(f"scoring.features.{level}", (3, 32, 16, 16), 0.3) for level in range(4)], (224, 224)
    )
    assert_near(maps, expected["score_map"])
    assert_near(maps.amax(dim=(1, 2)), expected["image_score"])


@torch.no_grad()
def test_golden_end_to_end() -> None:
    """Backbone, bank, projector and score together."""
    weights = fill(shapes("backbone_dinov2"), "dinov2.")
    backbone = create_backbone("dinov2_base", weights=weights, embed_dim=64, depth=4, num_heads=2)
    projector = ResidualProjector([64] * 4)
    projector.load_state_dict(
        fill({key: list(tensor.shape) for key, tensor in projector.state_dict().items()}, "e2e.projector.")
    )
    bank = ReferenceBank.from_features(backbone(value("e2e.references", (8, 3, 224, 224))))
    projected = projector(bank.residuals(backbone(value("e2e.query", (2, 3, 224, 224)))))
    expected = golden("end_to_end")
    assert_near(projected, [expected[f"projected.{level}"] for level in range(4)])
    assert_near(scoring.feature_norm_map(projected, (224, 224)), expected["score_map"])


def test_patch_norms() -> None:
    (level, *_) = features()
    found = scoring.patch_norms(level)
    for image, y, x in np.ndindex(*found.shape):
        norm = sum(float(v) ** 2 for v in level[image, :, y, x]) ** 0.5
        assert found[image, y, x] == pytest.approx((norm + 1) ** 0.5 - 1, rel=1e-5)
    assert not scoring.patch_norms(torch.zeros(1, 5, 2, 2)).any()


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_low_precision_features_are_scored_in_float32(dtype: torch.dtype) -> None:
    levels = [level.to(dtype) for level in features()]
    maps = scoring.feature_norm_map(levels, (28, 28))
    assert maps.dtype == torch.float32
    assert_near(maps, scoring.feature_norm_map([level.float() for level in levels], (28, 28)), 0)
    assert scoring.cosine_distances(levels[0]).dtype == torch.float32


def test_cosine_distances() -> None:
    one, other = (torch.nn.functional.normalize(value(f"units.{i}", (2, 7, 3, 4)), dim=1) for i in range(2))
    assert_near(scoring.cosine_distances(one - other), 1 - (one * other).sum(dim=1), 1e-5)


def upsampled(level: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation with aligned corners, one pixel at a time."""
    result = np.zeros((len(level), *size))
    for y, x in np.ndindex(*size):
        at = [
            place * (cells - 1) / (pixels - 1)
            for place, cells, pixels in zip((y, x), level.shape[1:], size, strict=True)
        ]
        for row, column in np.ndindex(*level.shape[1:]):
            weight = max(1 - abs(at[0] - row), 0) * max(1 - abs(at[1] - column), 0)
            result[:, y, x] += weight * level[:, row, column].double().numpy()
    return result


@pytest.mark.parametrize("size", [(12, 9), (3, 4), (20, 20)])
@pytest.mark.parametrize("sigma", [0, 1.0, 4.0])
def test_fuse(size: tuple[int, int], sigma: float) -> None:
    levels = [scoring.patch_norms(level) for level in features()]
    mean = np.mean([upsampled(level, size) for level in levels], axis=0)
    expected = np.stack([gaussian_filter(image, sigma) for image in mean]) if sigma else mean
    assert_near(scoring.fuse(levels, size, sigma), torch.from_numpy(expected))
    assert_near(scoring.feature_norm_map(features(), size, sigma), torch.from_numpy(expected))


def test_default_sigma() -> None:
    assert_near(scoring.feature_norm_map(features(), (40, 40)), scoring.feature_norm_map(features(), (40, 40), 4.0), 0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (2, 3), (5, 33), (16, 16), (17, 64), (80, 50)])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.3, 4.0, 7.5])
def test_smooth_is_scipys(shape: tuple[int, int], sigma: float) -> None:
    maps = value(f"smooth.{shape}", (2, *shape))
    expected = np.stack([gaussian_filter(image.double().numpy(), sigma) for image in maps])
    assert_near(scoring.smooth(maps, sigma), torch.from_numpy(expected))


def test_smooth_keeps_what_is_even_and_the_batch_apart() -> None:
    assert_near(scoring.smooth(torch.full((2, 9, 30), 0.7), 4.0), torch.full((2, 9, 30), 0.7))
    maps = value("apart", (3, 20, 20))
    assert_near(scoring.smooth(maps, 4.0)[1:2], scoring.smooth(maps[1:2], 4.0))
    assert scoring.smooth(maps, 0) is maps
    assert scoring.smooth(maps.double(), 2.0).dtype == torch.float64


def test_autocast_does_not_coarsen_the_maps() -> None:
    expected = scoring.feature_norm_map(features(), (40, 40))
    with torch.autocast("cpu", torch.bfloat16):
        found = scoring.feature_norm_map(features(), (40, 40))
    assert found.dtype == torch.float32
    assert_near(found, expected)


@pytest.mark.parametrize("sigma", [-1.0, float("nan"), float("inf")])
def test_smooth_refuses_sigma(sigma: float) -> None:
    with pytest.raises(InputError, match="sigma"):
        scoring.smooth(torch.zeros(1, 4, 4), sigma)


# Rings


def ring(y: int, x: int, height: int, width: int) -> int:
    return min(y, x, height - 1 - y, width - 1 - x, scoring.RINGS)


@pytest.mark.parametrize("shapes", [[(10, 12), (9, 8)], [(2 * scoring.RINGS + 1, 40)], [(2, 7), (1, 1), (6, 6)]])
def test_ring_scales(shapes: list[tuple[int, int]]) -> None:
    levels = [torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) + 0.1 for shape in shapes]
    for level in levels:
        for y, x in np.ndindex(*level.shape[1:]):
            level[:, y, x] *= 3 - 2 * ring(y, x, *level.shape[1:]) / scoring.RINGS
    found = scoring.ring_scales(levels)
    assert found.shape == (len(levels), scoring.RINGS + 1)
    for level, scales in zip(levels, found, strict=True):
        height, width = level.shape[1:]
        cells: list[list[float]] = [[] for _ in range(scoring.RINGS + 1)]
        for y, x in np.ndindex(height, width):
            cells[ring(y, x, height, width)] += level[:, y, x].tolist()
        means = [np.mean(own) if own else float(level.mean()) for own in cells]
        expected = [means[-1] * max((mean / means[-1]) ** 2, 1) for mean in means]
        assert scales.tolist() == pytest.approx(expected, rel=1e-5)
    assert (found >= found[:, -1:] * (1 - 1e-6)).all()


def test_ring_scales_of_nothing_can_be_divided_by() -> None:
    scales = scoring.ring_scales([torch.zeros(2, 9, 9)])
    assert (scales > 0).all() and torch.isfinite(scales).all()
    assert not (torch.zeros(1, 9, 9) / scoring.of_cells(scales, torch.zeros(1, 4, 9, 9))).any()


@pytest.mark.parametrize("shape", [(9, 12), (5, 5), (1, 3), (2, 2)])
def test_every_cell_has_the_scale_of_its_ring(shape: tuple[int, int]) -> None:
    scales = torch.arange(1.0, scoring.RINGS + 2)
    found = scoring.of_cells(torch.stack([scales, scales * 3]), torch.zeros(2, 4, *shape))
    for y, x in np.ndindex(*shape):
        assert_near(found[:, y, x], scales[ring(y, x, *shape)] * torch.tensor([1.0, 3.0]))


def test_normal_images_come_out_level() -> None:
    """After the division, normal patches of the interior are 1 on average, and no ring stands out above them."""
    distances = torch.rand(50, 12, 12, generator=torch.Generator().manual_seed(0)) + 0.5
    border = torch.tensor([[ring(y, x, 12, 12) == 0 for x in range(12)] for y in range(12)])
    distances[:, border] *= 5
    (scales,) = scoring.ring_scales([distances])
    level = distances / scoring.of_cells(scales, distances)
    inside = slice(scoring.RINGS, -scoring.RINGS)
    assert level[:, inside, inside].mean() == pytest.approx(1, rel=1e-4)
    assert level[:, border].mean() <= 1 + 1e-4


# Ranks


@st.composite
def labeled(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    labels = draw(
        st.lists(st.integers(0, 1), min_size=2, max_size=60).filter(lambda found: 0 < sum(found) < len(found))
    )
    some = draw(st.sampled_from([st.integers(0, 3).map(float), st.floats(-1e3, 1e3)]))
    return draw(st.lists(some, min_size=len(labels), max_size=len(labels))), labels


@given(labeled())
def test_auroc_is_sklearns(case: tuple[list[float], list[int]]) -> None:
    values, labels = case
    assert scoring.auroc(values, labels) == pytest.approx(roc_auc_score(labels, values), abs=1e-12)
    normal, anomalous = ([v for v, label in zip(values, labels, strict=True) if label == kind] for kind in (0, 1))
    wins = sum((a > n) + 0.5 * (a == n) for a in anomalous for n in normal)
    assert scoring.auroc(np.array(values), np.array(labels, dtype=bool)) == pytest.approx(
        wins / len(normal) / len(anomalous), abs=1e-12
    )


def test_auroc_of_maps_and_of_many() -> None:
    random = np.random.RandomState(0)
    values, labels = random.randint(0, 50, (4, 100, 100)) / 50, random.rand(4, 100, 100) > 0.97
    assert scoring.auroc(values, labels) == pytest.approx(roc_auc_score(labels.ravel(), values.ravel()), abs=1e-12)
    assert (
        scoring.auroc([0, 1], [False, True]) == 1
        and scoring.auroc([1, 0], [0, 1]) == 0
        and scoring.auroc([1, 1], [0, 1]) == 0.5
    )


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1.0, 2.0], [1, 1]),
        ([1.0, 2.0], [0, 0]),
        ([], []),
        ([1.0], [0, 1]),
        ([1.0, float("nan")], [0, 1]),
        ([float("inf"), 0.0], [1, 0]),
    ],
)
def test_auroc_refuses(values: list[float], labels: list[int]) -> None:
    with pytest.raises(InputError, match="AUROC"):
        scoring.auroc(values, labels)


# Scorers


def bank_of(maps: list[torch.Tensor]) -> ReferenceBank:
    return ReferenceBank.from_features(maps)


def test_cosine_rings_are_the_plain_formula() -> None:
    scorer = scoring.CosineRingScorer()
    references = scorer.features([torch.randn(4, 6, 9, 8), torch.randn(4, 5, 7, 7)])
    queries = scorer.features([torch.randn(2, 6, 9, 8), torch.randn(2, 5, 7, 7)])
    bank = bank_of(references)
    scales = scorer.scales(bank.leave_one_out(), 2)
    found = scoring.anomaly_maps(scorer, bank.residuals(queries), [scales] * 2, (36, 32), 0)
    expected = torch.zeros(2, 36, 32)
    for index, (query, reference) in enumerate(zip(queries, references, strict=True)):
        height, width = query.shape[2:]
        rows = reference.permute(0, 2, 3, 1).flatten(0, 2)
        similarity = torch.einsum("bchw,nc->bhwn", query, rows).amax(dim=3)
        distances = 1 - similarity
        for y, x in np.ndindex(height, width):
            distances[:, y, x] /= scales[index, ring(y, x, height, width)]
        resized = torch.nn.functional.interpolate(distances[:, None], (36, 32), mode="bilinear", align_corners=True)
        expected += resized[:, 0] / 2
    assert_near(found, expected, 1e-4)


def test_cosine_rings_of_one_image_take_the_typical_distances() -> None:
    typical = ((0.4, 0.3, 0.2, 0.1),)
    assert scoring.CosineRingScorer(typical).scales((), 1).tolist() == [pytest.approx(typical[0])]
    assert scoring.CosineRingScorer().scales((), 2).tolist() == [[1.0] * 4] * 2


def test_every_image_is_divided_by_the_scales_of_its_own_bank() -> None:
    scorer, residuals = scoring.CosineRingScorer(), [torch.randn(2, 6, 8, 8)]
    scales = [torch.rand(1, scoring.RINGS + 1) + 0.1 for _ in range(2)]
    together = scoring.anomaly_maps(scorer, residuals, scales, (16, 16), 2.0)
    for index, own in enumerate(scales):
        alone = scoring.anomaly_maps(scorer, [residuals[0][index : index + 1]], [own], (16, 16), 2.0)
        assert_near(together[index : index + 1], alone, 1e-6)
    with pytest.raises(ReferencesError, match="scores otherwise"):
        scorer.patch_scores(residuals, [scales[0], None])


def test_feature_norm_scorer_takes_maps_as_they_are_and_nothing_from_the_bank() -> None:
    maps = [torch.randn(2, 6, 4, 4)]
    scorer: scoring.Scorer = scoring.FeatureNormScorer()
    assert scorer.features(maps)[0] is maps[0] and scorer.scales([maps], 1) is None
    assert_near(
        scoring.anomaly_maps(scorer, maps, [None] * 2, (8, 8), 1.0), scoring.feature_norm_map(maps, (8, 8), 1.0), 0
    )


def test_local_cosine_is_the_plain_formula() -> None:
    """Weighted means of 3 x 3 patches, and distances in powers of what the matched rows differ from others by."""
    scorer, maps = scoring.LocalCosineScorer(), [torch.randn(4, 6, 9, 8)]
    (found,) = scorer.features(maps)
    for y, x in np.ndindex(9, 8):
        window = torch.zeros(4, 6)
        for dy, dx in itertools.product((-1, 0, 1), repeat=2):
            weight = (2 - abs(dy)) * (2 - abs(dx)) / 16
            window += weight * maps[0][:, :, min(max(y + dy, 0), 8), min(max(x + dx, 0), 7)]
        assert_near(found[:, :, y, x], window / window.norm(dim=1, keepdim=True), 1e-5)
    bank = bank_of([found])
    scorer.prepare(bank)
    (query,) = scorer.features([torch.randn(2, 6, 9, 8)])
    rows = found.permute(0, 2, 3, 1).flatten(0, 2)
    similarity = (rows @ rows.T).view(len(rows), 4, 72)
    similarity[torch.arange(len(rows)), torch.arange(len(rows)) // 72] = -1
    own = 1 - similarity.flatten(1).amax(dim=1)
    best, place = torch.einsum("bchw,nc->bhwn", query, rows).max(dim=3)
    expected = (1 - best) / (own / own.mean()).clamp_min(0.25)[place] ** 0.35
    assert_near(scoring.cosine_distances(bank.residuals([query])[0]), expected, 1e-3)


def test_local_cosine_maps_count_by_the_root_of_their_mean() -> None:
    """Of values up to 1.5, so that what is far off everywhere is not taken for a change of light; no less than 0.25."""
    scorer, rings = scoring.LocalCosineScorer(), scoring.CosineRingScorer()
    residuals = [torch.randn(5, 6, 9, 8) * torch.tensor([0, 0.01, 0.3, 0.5, 9]).view(5, 1, 1, 1)]
    scales = [torch.ones(1, scoring.RINGS + 1)] * 5
    plain = scoring.anomaly_maps(rings, residuals, scales, (32, 32), 1.0)
    found = scoring.anomaly_maps(scorer, residuals, scales, (32, 32), 1.0)
    for own, expected in zip(found, plain, strict=True):
        mean = np.minimum(expected.double().numpy(), 1.5).mean()
        assert_near(own, expected / max(mean, 0.25) ** 0.5, 1e-5)
    assert bool((found[0] == 0).all())
    # The farthest is divided by no more than what the ceiling says, whatever its distance.
    assert_near(found[4], plain[4] / 1.5**0.5, 1e-5)

    # Where something does not count, it is neither in the map nor in its mean.
    counts = torch.zeros(5, 32, 32, dtype=torch.bool)
    counts[:, :20, 8:] = True
    plain = scoring.anomaly_maps(rings, residuals, scales, (32, 32), 1.0, counts)
    found = scoring.anomaly_maps(scorer, residuals, scales, (32, 32), 1.0, counts)
    for own, expected in zip(found, plain, strict=True):
        mean = np.minimum(expected[:20, 8:].double().numpy(), 1.5).mean()
        assert_near(own, expected / max(mean, 0.25) ** 0.5, 1e-5)


def test_local_cosine_of_copies_and_of_one_image_is_finite() -> None:
    scorer = scoring.LocalCosineScorer(((0.4, 0.3, 0.2, 0.1),))
    (level,) = scorer.features([torch.randn(1, 6, 8, 8)])
    for copies in (1, 3):
        bank = bank_of([level.expand(copies, -1, -1, -1)])
        scorer.prepare(bank)
        bank.scales = scorer.scales(bank.leave_one_out() if copies > 1 else (), 1)
        assert scoring.anomaly_maps(scorer, bank.residuals([level]), [bank.scales], (16, 16), 1.0).isfinite().all()


def test_more_rows_for_photos_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many times more as the tiles of a photo are more than twelve, and never more than sixteen times."""
    monkeypatch.setattr(scoring.LocalCosineScorer, "ROWS", 20)
    for tiles, expected in ((5, 20), (12, 20), (30, 50), (400, 320)):
        features = torch.randn(2 * tiles, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        bank = ReferenceBank.from_features([features], [0] * tiles + [1] * tiles)
        bank.record.geometry = Geometry(tile=64)
        scoring.LocalCosineScorer().prepare(bank)
        assert len(bank.rows[0]) == min(expected, 8 * tiles) and bank.kept is None and bank.units is not None
        bank = ReferenceBank.from_features([features])
        scoring.LocalCosineScorer().prepare(bank)
        # Two of each of eight groups.
        assert bank.kept is not None and len(bank.kept[0]) == 16 and len(bank.rows[0]) == 8 * tiles
