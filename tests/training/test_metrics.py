"""The seven metrics against the original's numbers, scikit-learn, and AUPRO's formula, threshold by threshold."""

from __future__ import annotations

import math
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import astuple, fields
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.golden_values import golden
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import rankdata
from skimage.measure import label, regionprops
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from adfeatures.errors import InputError
from training import metrics
from training.metrics import Metrics, aupro, aupro_original, curves, evaluate


def pro_by_formula(maps: np.ndarray, masks: np.ndarray) -> list[tuple[float, float]]:
    """(FPR, PRO) at each distinct score, after (0, 0)."""
    regions = [
        (image, region.coords)
        for image, mask in enumerate(masks)
        for region in regionprops(label(mask > 0, connectivity=2))
    ]
    normal = maps[masks == 0]
    curve = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        overlaps = [
            np.mean([maps[image, row, column] >= threshold for row, column in pixels]) for image, pixels in regions
        ]
        curve.append((float(np.mean(normal >= threshold)), float(np.mean(overlaps))))
    return curve


def aupro_by_formula(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """One trapezoid for each pair of points."""
    area = 0.0
    for (left, low), (right, high) in pairwise(pro_by_formula(maps, masks)):
        if left >= limit:
            break
        if right > limit:
            right, high = limit, low + (high - low) * (limit - left) / (right - left)
        area += (right - left) * (low + high) / 2
    return area / limit


def ranking_by_sklearn(positive: np.ndarray, scores: np.ndarray) -> list[float]:
    """AUROC, AP and F1-max."""
    precision, recall, _ = precision_recall_curve(positive, scores)
    f1 = [2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True) if p + r > 0]
    return [roc_auc_score(positive, scores), average_precision_score(positive, scores), max(f1)]


@st.composite
def tied_maps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Maps of few distinct values, so with many ties, and random masks whose regions touch at corners and borders."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(2, 6)))
    steps = draw(arrays(np.int8, shape, elements=st.integers(-4, draw(st.integers(-3, 60)))))
    masks = draw(arrays(np.bool_, shape, elements=st.booleans()).filter(lambda masks: masks.any() and not masks.all()))
    return (steps / 8).astype(draw(st.sampled_from([np.float32, np.float64]))), masks


# Of the images of a class in how many parts: one image at a time, two, all.
parts = st.sampled_from([1, 72, 2**23])


def some_maps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ten maps of 32 x 32, float32, half of them with two defects."""
    random = np.random.default_rng(1)
    masks = np.zeros((10, 32, 32), np.uint8)
    masks[::2, 3:9, 4:10] = masks[::2, 20:22, 15:30] = 1
    maps = random.standard_normal(masks.shape).astype(np.float32) + masks
    return maps, masks, np.any(masks, axis=(1, 2)).astype(np.int64)


class TestGolden:
    def test_seven_numbers(self) -> None:
        stored = golden("metrics")
        found = evaluate(stored["scores"], stored["masks"], stored["labels"])
        # The original rounds these to five decimals.
        assert astuple(found)[:6] == pytest.approx(stored["values"][:6].tolist(), abs=5.1e-6)
        assert aupro_original(stored["scores"], stored["masks"]) == pytest.approx(float(stored["values"][6]), abs=1e-9)
        maps, masks = stored["scores"].numpy()[:, ::4, ::4], stored["masks"].numpy()[:, ::4, ::4]
        assert evaluate(maps, masks, stored["labels"]).aupro == pytest.approx(
            aupro_by_formula(maps, masks, 0.3), abs=1e-12
        )

    def test_order_and_type_of_the_fields(self) -> None:
        names = ["image_auroc", "image_ap", "image_f1", "pixel_auroc", "pixel_ap", "pixel_f1", "aupro"]
        assert [field.name for field in fields(Metrics)] == names
        assert {type(number) for number in astuple(evaluate(*some_maps()))} == {float}
        assert type(aupro(*some_maps()[:2])) is type(aupro_original(*some_maps()[:2])) is float


class TestAupro:
    @given(tied_maps(), st.floats(0.01, 1) | st.sampled_from([0.1, 0.25, 0.3, 0.5, 1.0]), parts)
    def test_is_the_formula(self, example: tuple[np.ndarray, np.ndarray], limit: float, pixels_per_part: int) -> None:
        maps, masks = example
        with mock.patch.object(metrics, "PIXELS_PER_CHUNK", pixels_per_part):
            assert aupro(maps, masks, limit) == pytest.approx(aupro_by_formula(maps, masks, limit), abs=1e-9)

    @given(tied_maps(), st.sampled_from(["exp", "cube", "ranks", "shrink"]))
    def test_depends_on_the_order_alone(self, example: tuple[np.ndarray, np.ndarray], name: str) -> None:
        maps, masks = example
        transforms: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "exp": np.exp,
            "cube": lambda x: x**3 - 1,
            "ranks": lambda x: rankdata(x, method="dense").reshape(x.shape),
            "shrink": lambda x: 1e-9 * x + 0.5,
        }
        transform = transforms[name]
        assert aupro(transform(maps.astype(np.float64)), masks) == pytest.approx(aupro(maps, masks), abs=1e-12)

    def test_by_hand(self) -> None:
        # Two regions, for corners join: {4, 2} and {1}. Normal pixels: 3, 2, 0, 0, 0. Points (FPR, PRO) as the
        # threshold falls: 4 (0, 1/4), 3 (1/5, 1/4), 2 (2/5, 1/2), 1 (2/5, 1), 0 (1, 1).
        maps = np.array([[[4.0, 3, 0, 1], [2, 2, 0, 0]]])
        masks = np.array([[[1, 0, 0, 1], [0, 1, 0, 0]]])
        assert aupro(maps, masks, 0.2) == pytest.approx(1 / 4)
        assert aupro(maps, masks, 0.3) == pytest.approx((0.2 / 4 + 0.1 * (1 / 4 + 3 / 8) / 2) / 0.3)
        assert aupro(maps, masks, 1.0) == pytest.approx(0.2 / 4 + 0.2 * 3 / 8 + 0.6)

    def test_perfect_constant_and_worst_maps(self) -> None:
        _, masks, _ = some_maps()
        assert aupro(masks.astype(np.float32), masks) == pytest.approx(1)
        # One threshold passes all pixels at once: the diagonal from (0, 0) to (1, 1), at 0.3 of height 0.3.
        assert aupro(np.ones(masks.shape), masks) == pytest.approx(0.15)
        assert aupro(np.ones(masks.shape), masks, limit=1) == pytest.approx(0.5)
        assert aupro(-masks.astype(np.float32), masks) == 0

    def test_regions_count_alike_whatever_their_size(self) -> None:
        masks = np.zeros((2, 20, 20), bool)
        masks[0, :10, :10] = masks[1, 15, 15] = True
        assert aupro(np.where(masks, [[[1.0]], [[0.0]]], 0.5), masks) == pytest.approx(0.5)

    @pytest.mark.parametrize("limit", [0, -0.1, 1.5, math.nan])
    def test_limit_out_of_range(self, limit: float) -> None:
        with pytest.raises(InputError, match="false positive rate"):
            aupro(*some_maps()[:2], limit=limit)


class TestAuproOriginal:
    def test_constant_maps(self) -> None:
        _, masks, _ = some_maps()
        assert aupro_original(np.full(masks.shape, 3.0), masks) == 0.5

    @pytest.mark.parametrize(
        ("lowest", "times"), [(0.2525, 51), (0.0, 0)], ids=["above all normal pixels", "as low as they are"]
    )
    def test_kept_points_of_one_rate(self, lowest: float, times: int) -> None:
        # No normal pixel is ever above a threshold 0, 0.005, ... 0.995, and the 4 defect pixels are above so many of
        # these:
        maps, masks = np.zeros((1, 4, 4)), np.zeros((1, 4, 4))
        maps[0, 0], masks[0, 0] = [lowest, 0.5025, 0.7525, 1], 1
        assert aupro_original(maps, masks) == pytest.approx((times + 101 + 151 + 200) / 4 / 200)

    @pytest.mark.parametrize(
        ("normal", "kept", "expected"), [(1, 0, 0.5), (0.992, 1, 0.5), (0.987, 2, 0.5), (0.983, 3, 0.75)]
    )
    def test_two_points_or_fewer(self, normal: float, kept: int, expected: float) -> None:
        # FPR is 0 at those of the thresholds 0.985, 0.99, 0.995 that no normal pixel is above, 1 at all others; 3 of 4
        # defect pixels are always found.
        maps, masks = np.full((1, 4, 4), normal), np.zeros((1, 4, 4))
        maps[0, 0], masks[0, 0] = [1, 1, 1, 0], 1
        assert sum(normal <= threshold for threshold in (0.98, 0.985, 0.99, 0.995)) == kept
        assert aupro_original(maps, masks) == expected

    def test_rate_at_the_limit_is_left_out(self) -> None:
        # 3 of 10 normal pixels are always found, and so is the defect pixel.
        maps = np.array([[[1.0] * 4 + [0] * 7]])
        masks = np.arange(11).reshape(maps.shape) == 0
        assert aupro_original(maps, masks) == 0.5

    def test_differences_below_a_step_of_the_type(self) -> None:
        maps, masks = np.full((1, 4, 4), 1e4, np.float32), np.zeros((1, 4, 4))
        masks[0, 0] = 1
        maps[0, 0] = np.nextafter(np.float32(1e4), np.float32(2e4))
        assert aupro_original(maps, masks) == 1
        assert aupro_original(np.where(masks, np.float32(1e-45), np.float32(0)), masks) == 0.5


class TestRanking:
    @given(tied_maps(), parts)
    def test_pixels_as_scikit_learn(self, example: tuple[np.ndarray, np.ndarray], pixels_per_part: int) -> None:
        maps, masks = example
        with mock.patch.object(metrics, "PIXELS_PER_CHUNK", pixels_per_part), warnings.catch_warnings():
            warnings.simplefilter("ignore", UndefinedMetricWarning)
            found = evaluate(maps, masks, np.any(masks, axis=(1, 2)))
        assert astuple(found)[3:6] == pytest.approx(ranking_by_sklearn(masks.ravel(), maps.ravel()), abs=1e-12)

    @given(arrays(np.int8, st.integers(2, 12), elements=st.integers(-3, 5)), st.data())
    def test_images_as_scikit_learn(self, scores: np.ndarray, data: st.DataObject) -> None:
        labels = data.draw(
            arrays(np.int64, len(scores), elements=st.integers(0, 1)).filter(
                lambda labels: 0 < labels.sum() < len(labels)
            )
        )
        maps = np.zeros((len(scores), 2, 2))
        masks = np.zeros_like(maps)
        maps[:, 0, 1], masks[:, 0, 0] = scores, labels
        expected = ranking_by_sklearn(labels, scores)
        assert astuple(evaluate(maps, masks, labels, scores))[:3] == pytest.approx(expected, abs=1e-12)
        maps[:, 1] = maps[:, 0, 0] = -5
        assert astuple(evaluate(maps, masks, labels))[:3] == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("pixels_per_part", [1, 3 * 16 * 16, 2**23])
    def test_parts_do_not_show(self, monkeypatch: pytest.MonkeyPatch, pixels_per_part: int) -> None:
        maps, masks, labels = some_maps()
        maps, masks = maps[:, 1:17, 8:24], masks[:, 1:17, 8:24]
        monkeypatch.setattr(metrics, "PIXELS_PER_CHUNK", pixels_per_part)
        found = astuple(evaluate(maps, masks, labels))
        assert found[3:6] == pytest.approx(ranking_by_sklearn(masks.ravel(), maps.ravel()), abs=1e-12)
        assert found[6] == pytest.approx(aupro_by_formula(maps, masks, 0.3), abs=1e-9)


class TestCurves:
    @given(tied_maps(), st.lists(st.floats(0, 1), min_size=1, max_size=5))
    def test_lie_on_the_formula(self, example: tuple[np.ndarray, np.ndarray], rates: list[float]) -> None:
        maps, masks = example
        # Between the rates that n normal pixels can have: at those the curves may rise straight up.
        normal = int((~masks).sum())
        off = np.array([(min(int(rate * normal), normal - 1) + 0.5) / normal for rate in rates])
        roc, pro = curves(maps, masks, off)
        false, true, _ = roc_curve(masks.ravel(), maps.ravel(), drop_intermediate=False)
        assert roc == pytest.approx(np.interp(off, false, true), abs=1e-12)
        x, y = np.array(pro_by_formula(maps, masks)).T
        assert pro == pytest.approx(np.interp(off, x, y), abs=1e-12)

    def test_start_and_end(self) -> None:
        maps, masks, _ = some_maps()
        for curve in curves(masks.astype(np.float32), masks, np.array([0.0, 1.0])):
            assert curve == pytest.approx([1, 1])
        for curve in curves(np.zeros(maps.shape), masks, np.array([0.0, 1.0])):
            assert curve == pytest.approx([0, 1])

    def test_one_kind_only(self) -> None:
        with pytest.warns(UndefinedMetricWarning, match="^curves: NaN, since no pixel"):
            assert np.isnan(curves(np.ones((1, 4, 4)), np.zeros((1, 4, 4)), np.array([0.1]))).all()


class TestArguments:
    def test_scores_of_the_method_replace_the_maxima(self) -> None:
        maps, masks, labels = some_maps()
        found = evaluate(maps, masks, labels, scores=-labels)
        assert found.image_auroc == 0
        assert astuple(found)[3:] == astuple(evaluate(maps, masks, labels))[3:]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_tensors(self, dtype: torch.dtype) -> None:
        maps, masks, labels = map(torch.from_numpy, some_maps())
        maps = maps.to(dtype)
        expected = evaluate(maps.double().numpy(), masks.numpy(), labels.numpy())
        assert evaluate(maps.requires_grad_(), masks, labels, maps.amax(dim=(1, 2))) == expected
        assert evaluate(maps[:, None], masks[:, None], labels) == expected
        assert evaluate(maps[:, None], masks, labels.bool()) == expected

    @pytest.mark.parametrize("dtype", [np.uint8, np.int32])
    def test_maps_of_integers(self, dtype: type) -> None:
        maps, masks, labels = some_maps()
        maps = (20 * maps + 100).astype(dtype)
        assert evaluate(maps, masks, labels) == evaluate(maps.astype(np.float64), masks, labels)
        assert aupro_original(maps, masks) == pytest.approx(aupro_original(maps.astype(np.float64), masks), abs=1e-2)

    def test_arguments_stay_as_they_are(self) -> None:
        arguments = some_maps()
        evaluate(*arguments), aupro(*arguments[:2]), aupro_original(*arguments[:2])
        for used, fresh in zip(arguments, some_maps(), strict=True):
            np.testing.assert_array_equal(used, fresh)

    @pytest.mark.parametrize("gray", [0.01, 1 / 255, 37, 255])
    def test_every_gray_is_a_defect(self, gray: float) -> None:
        maps, masks, labels = some_maps()
        # Two grays that touch are one region.
        grays = masks * np.where(np.arange(32) % 2, 1.0, gray)
        assert evaluate(maps, grays, labels) == evaluate(maps, masks, labels)
        assert aupro(maps, grays) == aupro(maps, masks)
        assert aupro_original(maps, grays) == aupro_original(maps, masks)

    def test_defined_metrics_come_without_a_warning(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert all(math.isfinite(number) for number in astuple(evaluate(*some_maps())))
            aupro(*some_maps()[:2]), aupro_original(*some_maps()[:2])


IMAGE, PIXEL = ["image_auroc", "image_ap", "image_f1"], ["pixel_auroc", "pixel_ap", "pixel_f1", "aupro"]


class TestOneKindOnly:
    @pytest.mark.parametrize(("kind", "why"), [(0, "no image"), (1, "every image")])
    def test_images(self, kind: int, why: str) -> None:
        maps, masks, labels = some_maps()
        with pytest.warns(UndefinedMetricWarning, match=f"{', '.join(IMAGE)}: NaN, since {why} is anomalous") as caught:
            found = evaluate(maps, masks, np.full_like(labels, kind))
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert [name for name in IMAGE + PIXEL if math.isnan(getattr(found, name))] == IMAGE

    @pytest.mark.parametrize(("kind", "why"), [(0, "no pixel"), (1, "every pixel")])
    def test_pixels(self, kind: int, why: str) -> None:
        maps, masks, labels = some_maps()
        masks[:] = kind
        with pytest.warns(UndefinedMetricWarning, match=f"{', '.join(PIXEL)}: NaN, since {why} is anomalous") as caught:
            found = evaluate(maps, masks, labels)
        assert len(caught) == 1
        assert [name for name in IMAGE + PIXEL if math.isnan(getattr(found, name))] == PIXEL
        for function in (aupro, aupro_original):
            with pytest.warns(UndefinedMetricWarning, match=f"^{function.__name__}: NaN, since {why}") as caught:
                assert math.isnan(function(maps, masks))
            assert caught[0].filename == __file__

    def test_a_single_normal_image(self) -> None:
        with pytest.warns(UndefinedMetricWarning) as caught:
            found = evaluate(np.ones((1, 8, 8)), np.zeros((1, 8, 8)), np.zeros(1))
        assert len(caught) == 2
        assert all(map(math.isnan, astuple(found)))


class TestRefused:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_scores_that_are_not_finite(self, bad: float) -> None:
        maps, masks, labels = some_maps()
        scores = maps.max(axis=(1, 2))
        scores[3] = bad
        with pytest.raises(InputError, match="Image scores hold NaN or infinite"):
            evaluate(maps, masks, labels, scores)
        maps[2, 5, 6] = bad
        for function in (aupro, aupro_original, lambda maps, masks: evaluate(maps, masks, labels)):
            with pytest.raises(InputError, match="Maps hold NaN or infinite"):
                function(maps, masks)

    @pytest.mark.parametrize(
        ("maps", "masks"),
        [((2, 4, 4), (2, 4, 5)), ((2, 4, 4), (3, 4, 4)), ((4, 4), (4, 4)), ((2, 2, 4, 4),) * 2, ((0, 4, 4),) * 2],
    )
    def test_shapes_of_maps_and_masks(self, maps: tuple[int, ...], masks: tuple[int, ...]) -> None:
        for function in (aupro, aupro_original, lambda maps, masks: evaluate(maps, masks, np.zeros(2))):
            with pytest.raises(InputError, match=r"one shape \(N, H, W\)"):
                function(np.zeros(maps), np.zeros(masks))

    @pytest.mark.parametrize(
        ("labels", "scores"), [((9,), (10,)), ((10,), (9,)), ((10, 1), (10,)), ((10,), (10, 1)), ((), (10,))]
    )
    def test_shapes_of_labels_and_scores(self, labels: tuple[int, ...], scores: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match="as many labels and image scores"):
            evaluate(*some_maps()[:2], np.ones(labels), np.zeros(scores))


def test_memory_of_a_large_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte per pixel, and 12 per pixel of a chunk, 100 MB, or 130 per defect pixel: less than the maps themselves."""
    assert 12 * metrics.PIXELS_PER_CHUNK < 101e6
    random = np.random.default_rng(2)
    maps = random.standard_normal((80, 128, 128), dtype=np.float32)
    masks = np.zeros(maps.shape, np.uint8)
    masks[::4, 10:40, 10:50] = 1
    labels = np.any(masks, axis=(1, 2))
    chunk = maps.size // 16
    monkeypatch.setattr(metrics, "PIXELS_PER_CHUNK", chunk)
    bound = maps.size + max(12 * chunk, 130 * int(masks.sum())) + 2**16
    assert bound < maps.nbytes
    for function in (aupro, aupro_original, lambda maps, masks: evaluate(maps, masks, labels)):
        function(maps, masks)
        tracemalloc.start()
        try:
            function(maps, masks)
            assert tracemalloc.get_traced_memory()[1] < bound
        finally:
            tracemalloc.stop()
