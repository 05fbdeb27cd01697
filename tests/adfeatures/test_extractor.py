"""FeatureExtractor: the surface that users and timm rely on."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.golden_values import golden, value
from helpers.models import CFG, photo, tiny_extractor, write_photos
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import adfeatures
from adfeatures.backbones import create_backbone
from adfeatures.errors import CheckpointError, ImageError, InputError, ReferencesError, UnknownNameError
from adfeatures.extractor import FeatureExtractor
from adfeatures.predictor import Images
from adfeatures.projector import ResidualProjector
from adfeatures.sources import ImageSource

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot pin down")


def images(seed: int, count: int, size: tuple[int, int] = (56, 56)) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> FeatureExtractor:
    extractor = tiny_extractor()
    extractor.set_references(images(1, 4))
    return extractor


def golden_extractor() -> FeatureExtractor:
    state = {
        key: value(f"dinov2.{key}", tensor.shape, 0.05)
        + float("norm" in key and key.endswith("weight") or key.endswith("gamma"))
        for key, tensor in create_backbone("dinov2_base", embed_dim=64, depth=4, num_heads=2).state_dict().items()
    }
    backbone = create_backbone("dinov2_base", weights=state, embed_dim=64, depth=4, num_heads=2)
    projector = ResidualProjector(backbone.channels)
    projector.load_state_dict(
        {k: value(f"e2e.projector.{k}", v.shape, 0.05) for k, v in projector.state_dict().items()}
    )
    return FeatureExtractor(backbone, projector, name="golden", img_size=(224, 224), pretrained_cfg=CFG)


def test_whole_path_equals_the_original() -> None:
    expected, model = golden("end_to_end"), golden_extractor()
    model.set_references(value("e2e.references", (8, 3, 224, 224), 1.0))
    query = value("e2e.query", (2, 3, 224, 224), 1.0)
    for level, projected in enumerate(model(query)):
        torch.testing.assert_close(
            projected,
            expected[f"projected.{level}"],
            rtol=0,
            atol=1e-4 * expected[f"projected.{level}"].abs().max().item(),
        )
    maps, scores = model.anomaly_map(query)
    torch.testing.assert_close(maps, expected["score_map"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores, expected["score_map"].amax(dim=(1, 2)), rtol=1e-4, atol=1e-4)


def test_shapes_and_feature_info(model: FeatureExtractor) -> None:
    features = model(images(2, 3, (56, 84)))
    assert [tuple(level.shape) for level in features] == [(3, 32, 4, 6)] * 4
    assert model.feature_info.channels() == [32] * 4
    assert model.feature_info.reduction() == [14] * 4
    assert (model.num_features, model.patch_size, model.levels) == (32, 14, (1, 2, 3, 4))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_features_are_backbone_minus_nearest_reference_then_projector(model: FeatureExtractor) -> None:
    x, references = images(2, 2), images(1, 4)
    raw, bank = model.backbone_features(x), model.backbone_features(references)
    for level, residual in enumerate(model.residuals(x)):
        rows = bank[level].permute(0, 2, 3, 1).reshape(-1, 32)
        queries = raw[level].permute(0, 2, 3, 1).reshape(-1, 32)
        nearest = rows[nn.functional.cosine_similarity(queries[:, None], rows[None], dim=2).argmax(dim=1)]
        torch.testing.assert_close(residual.permute(0, 2, 3, 1).reshape(-1, 32), queries - nearest)
    assert model.projector is not None
    for level, projected in enumerate(model.projector(model.residuals(x))):
        torch.testing.assert_close(model(x)[level], projected)


def test_without_references_it_says_what_to_call() -> None:
    with pytest.raises(ReferencesError, match=r"set_references.*load_references"):
        tiny_extractor()(images(0, 1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_pixels_that_are_not_finite_are_refused(model: FeatureExtractor, bad: float) -> None:
    x = images(0, 1)
    x[0, 0, 3, 3] = bad
    for use in (model, model.anomaly_map, model.set_references, model.forward_intermediates):
        with pytest.raises(InputError, match="NaN"):
            use(x)


@pytest.mark.parametrize("shape", [(1, 3, 57, 56), (1, 1, 56, 56), (3, 56, 56), (1, 3, 7, 56)])
def test_wrong_shapes_are_refused(model: FeatureExtractor, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="multiples of 14|shape"):
        model(torch.zeros(shape))


def test_out_indices_choose_what_forward_returns_but_not_the_scores() -> None:
    whole, last_two = tiny_extractor(), tiny_extractor(out_indices=(-2, -1))
    for extractor in (whole, last_two):
        extractor.set_references(images(1, 4))
    x = images(2, 2)
    assert last_two.feature_info.out_indices == (2, 3) and last_two.feature_info.channels() == [32, 32]
    for expected, found in zip(whole(x)[2:], last_two(x), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(last_two.anomaly_map(x).maps, whole.anomaly_map(x).maps)
    assert len(last_two.residuals(x)) == 4


@pytest.mark.parametrize("indices", [(4,), (-5,), (), 0, 5])
def test_levels_that_do_not_exist_are_refused(model: FeatureExtractor, indices: int | tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="4 levels"):
        model.forward_intermediates(images(2, 1), indices=indices)


class TestForwardIntermediates:
    def test_defaults(self, model: FeatureExtractor) -> None:
        x = images(2, 2)
        final, intermediates = model.forward_intermediates(x)
        for expected, found in zip(model(x), intermediates, strict=True):
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(final, intermediates[-1])

    @pytest.mark.parametrize(("indices", "chosen"), [(2, [2, 3]), ([0, -2], [0, 2]), (None, [0, 1, 2, 3]), ((1,), [1])])
    def test_indices_and_final_value(
        self, model: FeatureExtractor, indices: int | Sequence[int] | None, chosen: list[int]
    ) -> None:
        x = images(2, 2)
        final, intermediates = model.forward_intermediates(x, indices=indices)
        everything = model(x)
        for expected, found in zip([everything[i] for i in chosen], intermediates, strict=True):
            torch.testing.assert_close(found, expected)
        torch.testing.assert_close(final, everything[3])

    def test_tokens_have_the_order_of_the_map(self, model: FeatureExtractor) -> None:
        x = images(2, 2, (56, 84))
        tokens = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        assert isinstance(tokens, list)
        for level, expected in zip(tokens, model(x), strict=True):
            assert level.shape == (2, 24, 32)
            torch.testing.assert_close(level[1, 6 + 2], expected[1, :, 1, 2])

    def test_timm_calls_it_alike(self, model: FeatureExtractor) -> None:
        assert len(model.forward_intermediates(images(2, 1), [3], False, False, True, "NCHW", True)) == 1
        assert len(model.forward_intermediates(images(2, 1), attn_mask=None, intermediates_only=True)) == 4

    @pytest.mark.parametrize(
        "argument",
        [{"norm": True}, {"return_prefix_tokens": True}, {"attn_mask": torch.ones(1)}, {"output_fmt": "NHWC"}],
    )
    def test_what_cannot_be_met_is_refused_by_name(self, model: FeatureExtractor, argument: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=next(iter(argument))):
            model.forward_intermediates(images(2, 1), **argument)


class TestProducts:
    @pytest.fixture
    def model(self) -> FeatureExtractor:
        extractor = tiny_extractor()
        extractor.set_references(images(1, 3), product="v1.2 nut")
        extractor.set_references(images(5, 2), product="bolt")
        return extractor

    def test_each_image_meets_its_own_references(self, model: FeatureExtractor) -> None:
        x, products = images(2, 3), ["bolt", "v1.2 nut", "bolt"]
        together = model(x, products)
        maps = model.anomaly_map(x, products)
        for i, product in enumerate(products):
            for all_images, alone in zip(together, model(x[i : i + 1], product), strict=True):
                torch.testing.assert_close(all_images[i], alone[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                maps.maps[i], model.anomaly_map(x[i : i + 1], product).maps[0], atol=1e-5, rtol=1e-4
            )
        assert not torch.allclose(model(x, "bolt")[0], model(x, "v1.2 nut")[0])

    def test_the_product_must_be_named_and_known(self, model: FeatureExtractor) -> None:
        with pytest.raises(UnknownNameError, match="bolt, v1.2 nut"):
            model(images(2, 1))
        with pytest.raises(UnknownNameError, match="Did you mean 'bolt'"):
            model(images(2, 1), "blot")
        with pytest.raises(InputError, match="2 products.*3 images"):
            model(images(2, 3), ["bolt", "bolt"])

    def test_saved_together(self, model: FeatureExtractor, tmp_path: Path) -> None:
        model.save_references(tmp_path / "banks.safetensors")
        other = tiny_extractor()
        other.load_references(tmp_path / "banks.safetensors")
        x = images(2, 2)
        assert list(other.references) == ["v1.2 nut", "bolt"]
        torch.testing.assert_close(other(x, "bolt"), model(x, "bolt"), rtol=0, atol=0)
        with pytest.raises(CheckpointError, match="several products"):
            adfeatures.ReferenceBank.load(tmp_path / "banks.safetensors")


class TestReferences:
    def test_every_kind_of_source_gives_the_same_bank(self, tmp_path: Path) -> None:
        paths = write_photos(tmp_path / "good", range(3))
        pictures = [Image.open(path).convert("RGB") for path in paths]
        transform = adfeatures.images.build_transform((56, 56), CFG["mean"], CFG["std"])
        sources: list[Images] = [
            torch.stack([transform(picture) for picture in pictures]),
            pictures,
            [np.asarray(picture) for picture in pictures],
            paths,
            [str(path) for path in paths],
            tmp_path / "good",
        ]
        banks = []
        for source in sources:
            model = tiny_extractor()
            model.set_references(source)
            banks.append(model.references["default"])
        for bank in banks[1:]:
            assert bank.num_images == 3
            for rows, expected in zip(bank.rows, banks[0].rows, strict=True):
                torch.testing.assert_close(rows, expected)
        assert banks[-1].files == [str(path) for path in paths]
        assert all(len(digest) == 64 for digest in banks[-1].sha256s)

    def test_adding_equals_setting_together(self, tmp_path: Path) -> None:
        paths = write_photos(tmp_path, range(4))
        together, one_by_one = tiny_extractor(), tiny_extractor()
        together.set_references(paths)
        for path in paths:
            one_by_one.add_references([path])
        x = images(2, 2)
        torch.testing.assert_close(one_by_one(x), together(x))
        assert one_by_one.references["default"].files == together.references["default"].files
        assert one_by_one.fit_threshold() == pytest.approx(together.fit_threshold(), rel=1e-5)

    def test_adding_takes_a_new_threshold(self, tmp_path: Path) -> None:
        model = tiny_extractor()
        model.set_references(write_photos(tmp_path, range(3)))
        before = model.fit_threshold(0.5)
        model.add_references([photo(9)])
        assert model.references["default"].threshold is None
        assert model.fit_threshold(0.5) != before

    def test_copies_are_left_out_and_named(self, tmp_path: Path) -> None:
        paths = write_photos(tmp_path, range(3))
        (tmp_path / "copy.png").write_bytes(paths[1].read_bytes())
        model = tiny_extractor()
        with pytest.warns(UserWarning, match=r"copy\.png is a copy"):
            model.set_references([*paths, tmp_path / "copy.png"])
        with pytest.warns(UserWarning, match=r"001\.png is a copy"):
            model.add_references([paths[1], photo(7)])
        assert model.references["default"].num_images == 4

    def test_none_are_refused_and_clearing_forgets(self, model: FeatureExtractor, tmp_path: Path) -> None:
        nothings: list[Images] = [[], images(0, 0)]
        for nothing in nothings:
            with pytest.raises(InputError, match="No reference images"):
                model.set_references(nothing)
        with pytest.raises(ImageError, match="No images in"):
            model.set_references(tmp_path)
        model.clear_references()
        assert model.references == {}
        with pytest.raises(ReferencesError):
            model.save_references(tmp_path / "bank.safetensors")

    def test_a_failed_change_keeps_the_old_ones(self, model: FeatureExtractor, tmp_path: Path) -> None:
        (tmp_path / "broken.png").write_bytes(b"no image")
        before = model(images(2, 1))
        with pytest.raises(ImageError, match=r"broken\.png"):
            model.set_references([photo(1), tmp_path / "broken.png"])
        torch.testing.assert_close(model(images(2, 1)), before)

    def test_leave_one_out_features(self, model: FeatureExtractor) -> None:
        references = images(1, 4)
        features = model.reference_features()
        for i in range(4):
            others = tiny_extractor()
            others.set_references(references[[j for j in range(4) if j != i]])
            for level, expected in zip(features, others(references[i : i + 1]), strict=True):
                torch.testing.assert_close(level[i], expected[0], atol=1e-5, rtol=1e-4)
        # Matched with itself an image shows nothing at all, which is why the own rows are left out.
        assert all(level.abs().max() == 0 for level in model.residuals(references))

    def test_leave_one_out_needs_two(self) -> None:
        model = tiny_extractor()
        model.set_references(images(1, 1))
        with pytest.raises(ReferencesError, match="second"):
            model.reference_features()

    def test_are_no_part_of_the_state_dict(self, model: FeatureExtractor) -> None:
        fresh = tiny_extractor(seed=3)
        fresh.load_state_dict(model.state_dict(), strict=True)
        fresh.set_references(images(1, 4))
        torch.testing.assert_close(fresh(images(2, 1)), model(images(2, 1)))

    def test_coreset_is_smaller_and_keeps_threshold_and_scores(self, tmp_path: Path) -> None:
        paths = write_photos(tmp_path, range(4))
        model = tiny_extractor()
        model.set_references(paths, coreset=0.25)
        bank = model.references["default"]
        assert [len(rows) for rows in bank.rows] == [16] * 4
        assert len(bank.record.normal_scores) == 4
        assert model.fit_threshold(1.0) == max(bank.record.normal_scores)
        with pytest.raises(ReferencesError, match="coreset"):
            model.reference_features()
        model.save_references(tmp_path / "bank.safetensors")
        other = tiny_extractor()
        other.load_references(tmp_path / "bank.safetensors")
        assert other.threshold() == model.threshold()


class TestSavedReferences:
    def test_keep_everything_for_months(self, tmp_path: Path) -> None:
        model = tiny_extractor()
        model.bit_depth = 12
        paths = write_photos(tmp_path, range(3))
        model.set_references(paths)
        threshold = model.fit_threshold(0.9)
        model.save_references(tmp_path / "bank.safetensors")
        bank = adfeatures.ReferenceBank.load(tmp_path / "bank.safetensors")
        assert bank.num_images == 3 and bank.files == [str(path) for path in paths] and len(bank.sha256s) == 3
        assert (bank.model, bank.record.preset, bank.threshold, bank.quantile, bank.record.bit_depth) == (
            "tiny",
            "squash",
            threshold,
            0.9,
            12,
        )
        fresh = tiny_extractor()
        fresh.load_references(tmp_path / "bank.safetensors")
        assert fresh.threshold() == threshold and fresh.bank().record.bit_depth == 12
        torch.testing.assert_close(fresh(images(2, 1)), model(images(2, 1)), rtol=0, atol=0)

    def test_saving_takes_the_threshold(self, model: FeatureExtractor, tmp_path: Path) -> None:
        model.save_references(tmp_path / "bank.safetensors")
        assert adfeatures.ReferenceBank.load(tmp_path / "bank.safetensors").threshold is not None

    @pytest.mark.parametrize(
        ("other", "says"),
        [
            (lambda: tiny_extractor(seed=1), "other weights"),
            (lambda: tiny_extractor(img_size=(70, 56)), r"\(56, 56\).*\(70, 56\)"),
            (lambda: golden_extractor(), "made with tiny, not with golden"),
        ],
    )
    def test_of_another_model_are_refused(
        self, model: FeatureExtractor, tmp_path: Path, other: Callable[[], FeatureExtractor], says: str
    ) -> None:
        model.save_references(tmp_path / "bank.safetensors")
        with pytest.raises(ReferencesError, match=says):
            other().load_references(tmp_path / "bank.safetensors")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_serve_the_same_model_in_half_precision(
        self, model: FeatureExtractor, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        model.save_references(tmp_path / "bank.safetensors")
        half = tiny_extractor().to(dtype)
        half.load_references(tmp_path / "bank.safetensors")
        assert half.references["default"].rows[0].dtype == dtype
        half.save_references(tmp_path / "half.safetensors")
        model.load_references(tmp_path / "half.safetensors")
        assert model.references["default"].rows[0].dtype == torch.float32

    def test_damaged_files_are_refused_and_nothing_is_lost(self, model: FeatureExtractor, tmp_path: Path) -> None:
        path = tmp_path / "bank.safetensors"
        model.save_references(path)
        before, content = model(images(2, 1)), path.read_bytes()
        for cut in (0, 7, 100, len(content) - 1):
            path.write_bytes(content[:cut])
            with pytest.raises(CheckpointError, match=r"bank\.safetensors"):
                model.load_references(path)
        with pytest.raises(CheckpointError, match="Cannot open .*To make a bank: adfeatures fit"):
            model.load_references(tmp_path / "missing.safetensors")
        torch.testing.assert_close(model(images(2, 1)), before, rtol=0, atol=0)

    def test_nan_in_a_bank_is_refused(self, model: FeatureExtractor, tmp_path: Path) -> None:
        from safetensors import safe_open

        path = tmp_path / "bank.safetensors"
        model.save_references(path)
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors["0.rows.2"][3, 4] = torch.nan
        save_file(tensors, path, metadata)
        with pytest.raises(CheckpointError, match="NaN"):
            model.load_references(path)


class TestScores:
    def test_do_not_depend_on_the_batch(self, model: FeatureExtractor) -> None:
        x = images(2, 5)
        together = model.anomaly_map(x)
        for i in range(5):
            alone = model.anomaly_map(x[i : i + 1])
            torch.testing.assert_close(together.maps[i], alone.maps[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.scores, together.maps.amax(dim=(1, 2)))
        assert together.maps.shape == (5, 56, 56)

    def test_maps_have_the_size_of_the_image(self, model: FeatureExtractor, tmp_path: Path) -> None:
        paths = write_photos(tmp_path, range(2))
        sources: list[ImageSource] = [photo(5, (300, 40)), np.asarray(photo(6, (31, 200))), paths[0], str(paths[1])]
        predictions = model.score(sources, batch_size=3)
        assert [p.map.shape for p in predictions] == [(40, 300), (200, 31), (60, 80), (60, 80)]
        transform = adfeatures.images.build_transform((56, 56), CFG["mean"], CFG["std"])
        expected = model.anomaly_map(transform(photo(5, (300, 40)))[None])
        assert predictions[0].score == pytest.approx(expected.scores.item(), rel=1e-5)
        # The score is taken before the map is resized.
        assert predictions[0].map.max() <= predictions[0].score + 1e-6

    def test_decision_follows_the_threshold(self, model: FeatureExtractor) -> None:
        pictures = [photo(seed) for seed in range(6)]
        scores = [p.score for p in model.score(pictures)]
        model.references["default"].threshold = float(np.median(scores))
        for prediction in model.score(pictures):
            assert prediction.threshold == float(np.median(scores))
            assert prediction.is_anomalous is (prediction.score > float(np.median(scores)))

    def test_threshold_is_the_quantile_of_leave_one_out_scores(self) -> None:
        references = images(1, 5)
        model = tiny_extractor()
        model.set_references(references)
        scores = []
        for i in range(5):
            others = tiny_extractor()
            others.set_references(references[[j for j in range(5) if j != i]])
            scores.append(others.anomaly_map(references[i : i + 1]).scores.item())
        assert model.fit_threshold(0.8) == pytest.approx(np.quantile(scores, 0.8), rel=1e-4)
        assert model.references["default"].quantile == 0.8

    def test_threshold_of_held_out_normals(self, model: FeatureExtractor) -> None:
        held_out = images(7, 6)
        expected = np.quantile(model.anomaly_map(held_out).scores.tolist(), 0.7)
        assert model.fit_threshold(0.7, normals=held_out) == pytest.approx(expected, rel=1e-5)
        assert len(model.references["default"].record.normal_scores) == 6
        pictures = [photo(seed) for seed in range(3)]
        expected = max(p.score for p in model.score(pictures))
        assert model.fit_threshold(1.0, normals=pictures) == pytest.approx(expected, rel=1e-5)

    def test_one_reference_gives_maps_but_no_decision(self) -> None:
        model = tiny_extractor()
        model.set_references([photo(1)])
        (prediction,) = model.score(photo(2))
        assert prediction.threshold is None and prediction.is_anomalous is None and np.isfinite(prediction.map).all()
        with pytest.raises(ReferencesError, match="single reference"):
            model.fit_threshold()

    @pytest.mark.filterwarnings("default:.*cannot pin down")
    def test_few_normals_are_warned_about_with_their_number(self, model: FeatureExtractor) -> None:
        with pytest.warns(UserWarning, match="4 normal images cannot pin down the 0.99 quantile.*one false alarm in 5"):
            model.fit_threshold(0.99)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.fit_threshold(0.75)

    @pytest.mark.parametrize("quantile", [0.0, -0.1, 1.01, float("nan")])
    def test_impossible_quantiles_are_refused(self, model: FeatureExtractor, quantile: float) -> None:
        with pytest.raises(InputError, match="quantile"):
            model.fit_threshold(quantile)

    def test_an_odd_reference_is_named(self, tmp_path: Path) -> None:
        paths = []
        for seed in range(8):
            noise = np.random.RandomState(seed).randint(-3, 4, (60, 80, 3))
            Image.fromarray((np.asarray(photo(1)) * 0.9 + 5 + noise).clip(0, 255).astype(np.uint8)).save(
                tmp_path / f"{seed}.png"
            )
            paths.append(tmp_path / f"{seed}.png")
        photo(99).save(paths[5])
        model = tiny_extractor()
        model.set_references(paths)
        with pytest.warns(UserWarning, match=r"5\.png looks anomalous"):
            model.fit_threshold()

    def test_a_scored_reference_is_flagged(self, tmp_path: Path) -> None:
        paths = write_photos(tmp_path, range(3))
        model = tiny_extractor()
        model.set_references(paths)
        (tmp_path / "renamed.png").write_bytes(paths[0].read_bytes())
        flags = [p.is_reference for p in model.score([paths[1], tmp_path / "renamed.png", photo(8)])]
        assert flags == [True, True, False]
        model.set_references([photo(1), photo(2)])
        assert [p.is_reference for p in model.score([photo(2), photo(3)])] == [True, False]

    def test_unreadable_images_and_tensors_are_refused(self, model: FeatureExtractor, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match=r"gone\.png"):
            model.score([tmp_path / "gone.png"])
        with pytest.raises(InputError, match="anomaly_map"):
            model.score(images(0, 1))

    def test_colors_of_a_bgr_mix_up_would_show(self, model: FeatureExtractor) -> None:
        picture = photo(4)
        swapped = Image.fromarray(np.asarray(picture)[:, :, ::-1].copy())
        assert model.score(picture)[0].score != model.score(swapped)[0].score


class TestAsAModule:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_moves_take_the_bank_along(self, model: FeatureExtractor, dtype: torch.dtype) -> None:
        expected = model(images(2, 2))
        model.to(dtype)
        assert {rows.dtype for rows in model.references["default"].rows} == {dtype}
        features = model(images(2, 2).to(dtype))
        tolerance = {torch.float16: 0.05, torch.bfloat16: 0.3, torch.float64: 1e-4}[dtype]
        assert features[0].dtype == dtype
        assert (features[0].float() - expected[0]).abs().mean() < tolerance * expected[0].abs().mean()
        assert model.anomaly_map(images(2, 2).to(dtype)).maps.dtype == torch.float32
        assert len(model.score([photo(1)])) == 1

    @pytest.mark.gpu
    def test_on_a_gpu(self, model: FeatureExtractor) -> None:
        expected = model(images(2, 2))
        model.to("cuda")
        torch.testing.assert_close(model(images(2, 2).cuda())[0].cpu(), expected[0], atol=1e-3, rtol=1e-3)
        assert np.isfinite(model.score([photo(1)])[0].score)

    def test_heads_can_be_trained_on_the_features(self, model: FeatureExtractor) -> None:
        head = nn.Conv2d(32, 1, 1)
        before = model.state_dict()["backbone.pos_embed"].clone()
        optimizer = torch.optim.SGD(nn.ModuleList([model, head]).parameters(), lr=0.1)
        loss = head(model(images(2, 2))[0]).square().mean()
        loss.backward()
        optimizer.step()
        assert head.weight.grad is not None and head.weight.grad.abs().sum() > 0
        torch.testing.assert_close(model.state_dict()["backbone.pos_embed"], before, rtol=0, atol=0)

    def test_stays_in_eval_mode_within_a_model_in_training(self, model: FeatureExtractor) -> None:
        whole = nn.Sequential(model).train()
        assert whole.training and not model.training and not model.backbone.training

    def test_copies_and_pickles_are_independent(self, model: FeatureExtractor) -> None:
        x = images(2, 1)
        expected = model(x)
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        model.clear_references()
        for other in (copied, pickled):
            torch.testing.assert_close(other(x), expected)

    def test_new_weights_are_used_at_once(self, model: FeatureExtractor) -> None:
        x = images(2, 1)
        model(x)
        other = tiny_extractor(seed=5)
        other.set_references(images(1, 4))
        model.load_state_dict(other.state_dict())
        model.set_references(images(1, 4))
        torch.testing.assert_close(model(x), other(x))


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))
def test_any_split_into_batches_gives_the_same_scores(count: int, rows: int, columns: int, batch_size: int) -> None:
    model = tiny_extractor(img_size=(14 * rows, 14 * columns))
    model.set_references([photo(50), photo(51)])
    pictures = [photo(seed, (20 + seed, 30)) for seed in range(count)]
    whole = model.score(pictures, batch_size=64)
    for expected, found in zip(whole, model.score(pictures, batch_size=batch_size), strict=True):
        assert found.score == pytest.approx(expected.score, rel=1e-4, abs=1e-6)
        assert found.map.shape == expected.map.shape
