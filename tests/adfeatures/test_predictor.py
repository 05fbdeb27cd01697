"""Photos in, predictions out: bit depth of each bank, thresholds that are set only where their name says so."""

from __future__ import annotations

import math
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.golden_values import FOLDER
from helpers.models import CFG, photo, tiny_extractor, write_photos
from PIL import Image

import adfeatures
from adfeatures.errors import ImageError, InputError, UnknownNameError
from adfeatures.extractor import FeatureExtractor
from adfeatures.fitting import turn
from adfeatures.images import ImageSource
from adfeatures.predictor import Prediction, score_photos

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot pin down")


def raw_photo(seed: int, bits: int) -> np.ndarray:
    """A gray picture (60, 80) of so many bits, stored in 16."""
    gray = np.asarray(photo(seed).convert("L"), dtype=np.float64)
    return (gray / 255 * (2**bits - 1)).round().astype(np.uint16)


class TestBitDepth:
    @pytest.fixture
    def model(self) -> FeatureExtractor:
        """Two products whose cameras use 10 and 12 of 16 bits."""
        model = tiny_extractor()
        for product, bits in (("ten", 10), ("twelve", 12)):
            model.bit_depth = bits
            model.set_references([raw_photo(seed, bits) for seed in range(3)], product=product)
        model.bit_depth = 16
        return model

    def test_every_bank_has_its_own(self, model: FeatureExtractor) -> None:
        assert [bank.record.bit_depth for bank in model.references.values()] == [10, 12]
        ten, twelve = model.score([raw_photo(7, 10), raw_photo(7, 12)], ["ten", "twelve"])
        # The same scene: what differs is the rounding of the cameras.
        assert ten.score == pytest.approx(twelve.score, rel=0.02)
        with pytest.raises(InputError, match="raise bit_depth"):
            model.score([raw_photo(7, 12)], "ten")

    def test_saved_with_each_bank(self, model: FeatureExtractor, tmp_path: Path) -> None:
        model.save_references(tmp_path / "banks.safetensors")
        other = tiny_extractor()
        other.load_references(tmp_path / "banks.safetensors")
        assert [bank.record.bit_depth for bank in other.references.values()] == [10, 12]
        scored = [m.score([raw_photo(7, 12)], "twelve")[0].score for m in (model, other)]
        assert scored[0] == scored[1]

    def test_added_references_are_read_like_those_before(self, model: FeatureExtractor) -> None:
        model.add_references([raw_photo(5, 10)], product="ten")
        assert (model.bank("ten").num_images, model.bank("ten").record.bit_depth) == (4, 10)

    def test_the_transform_follows(self, model: FeatureExtractor) -> None:
        image = Image.fromarray(raw_photo(7, 12))
        transform = adfeatures.create_transform(model, product="twelve")
        assert transform(image).max() > 1
        assert adfeatures.create_transform(tiny_extractor())(image).max() < -1, "as 16 bits it is nearly black"
        with pytest.raises(InputError, match=r"\[10, 12\].*name a product"):
            adfeatures.create_transform(model)
        with pytest.raises(UnknownNameError, match="twelve"):
            adfeatures.create_transform(model, product="twelf")


class TestThresholds:
    def test_asking_sets_none_and_warns_of_nothing(self) -> None:
        model = tiny_extractor()
        model.set_references([photo(seed) for seed in range(4)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert model.threshold() is None
        assert model.bank().threshold is None and model.bank().record.normal_scores == []
        fitted = model.fit_threshold(0.5)
        assert model.threshold() == fitted == model.bank().threshold

    def test_scoring_sets_one_that_stays(self) -> None:
        model = tiny_extractor()
        model.set_references([photo(seed) for seed in range(4)])
        first = model.score(photo(9))[0].threshold
        assert first is not None and model.threshold() == first
        assert model.score(photo(8))[0].threshold == first

    def test_one_that_was_set_by_hand_is_kept(self, tmp_path: Path) -> None:
        model = tiny_extractor()
        model.set_references(write_photos(tmp_path / "good", range(3)))
        model.bank().threshold = 0.25
        model.save_references(tmp_path / "bank.safetensors")
        assert adfeatures.ReferenceBank.load(tmp_path / "bank.safetensors").threshold == 0.25
        assert model.score(photo(9))[0].threshold == 0.25


def test_predictions_are_those_of_the_tensors() -> None:
    model = tiny_extractor()
    model.set_references([photo(seed) for seed in range(3)])
    pictures = [photo(7, (50, 40)), photo(8, (90, 30))]
    transform = adfeatures.create_transform(model)
    expected = model.anomaly_map(torch.stack([transform(picture) for picture in pictures]))
    for picture, prediction, score in zip(pictures, model.score(pictures), expected.scores.tolist(), strict=True):
        assert prediction.score == pytest.approx(score, rel=1e-5)
        assert prediction.map.shape == picture.size[::-1]


def test_a_backbone_without_projector_scores_by_itself() -> None:
    backbone = tiny_extractor().backbone
    cfg = tiny_extractor().pretrained_cfg
    model = FeatureExtractor(backbone, None, name="plain", img_size=(56, 56), pretrained_cfg=cfg)
    for references in ([photo(0)], [photo(seed) for seed in range(3)]):
        model.set_references(references)
        good, odd = (model.score(picture)[0].score for picture in (photo(0), photo(30)))
        assert 0 <= good < odd
    assert all(
        torch.allclose(m.norm(dim=1), torch.ones(())) for m in model.backbone_features(torch.randn(1, 3, 56, 56))
    )


def test_a_bank_of_before_gives_the_scores_of_before() -> None:
    """The file and the numbers were made by the last commit before banks had a record of their own."""
    model = adfeatures.create_model("residual_lite.in1k_v1", img_size=(64, 96))
    model.load_references(FOLDER / "bank_of_before.safetensors")
    expected = {"nut": (0.9939777255, 1.0084012747), "bolt": (0.9640356898, 1.0009042025)}
    for product, scores in expected.items():
        assert [p.score for p in model.score([photo(20), photo(21)], product)] == pytest.approx(scores, rel=1e-5)
    assert [bank.threshold for bank in model.references.values()] == [1.1144108533859254, 1.1418405485153198]
    assert [bank.record.bit_depth for bank in model.references.values()] == [16, 12]
    assert [bank.complete for bank in model.references.values()] == [True, False]


def test_the_reference_that_looks_anomalous_is_named_among_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many references only some are left out in turn."""
    monkeypatch.setattr("adfeatures.references.LEAVE_ONE_OUT_IMAGES", 4)
    paths = []
    for number in range(10):
        base = np.asarray(photo(0), dtype=np.int64) + np.random.default_rng(number).integers(-3, 4, (60, 80, 3))
        picture = photo(77) if number == 6 else Image.fromarray(base.clip(0, 255).astype(np.uint8))
        picture.save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    model = tiny_extractor()
    model.set_references(paths)
    assert model.bank().left_out == [0, 3, 6, 9]
    with pytest.warns(UserWarning, match=r"6\.png looks anomalous"):
        model.fit_threshold()
    assert len(model.bank().record.normal_scores) == 4


def test_thresholds_are_scores() -> None:
    model = tiny_extractor()
    model.set_references([photo(0), photo(1)])
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="must be a score"):
            model.bank().threshold = wrong
    model.bank().threshold = np.float32(0.5)
    assert type(model.threshold()) is float


class TestCopies:
    @pytest.fixture
    def lite(self) -> FeatureExtractor:
        """A model that scores cosine distances: an image against itself scores 0."""
        backbone = tiny_extractor().backbone
        return FeatureExtractor(backbone, None, name="lite", img_size=(56, 56), pretrained_cfg=CFG)

    def test_normals_that_are_references_are_left_out(self, lite: FeatureExtractor, tmp_path: Path) -> None:
        paths = write_photos(tmp_path, range(8))
        lite.set_references(paths[:5])
        expected = lite.fit_threshold(0.5, normals=paths[5:])
        photo(0).save(tmp_path / "other.bmp")
        with pytest.warns(UserWarning, match="is a copy") as warned:
            assert lite.fit_threshold(0.5, normals=[*paths, tmp_path / "other.bmp", photo(6)]) == expected
        assert sum("is a copy" in str(warning.message) for warning in warned) == 7
        assert len(lite.bank().record.normal_scores) == 3 and expected > 0.1
        before = lite.bank().record
        with pytest.warns(UserWarning, match="is a copy"), pytest.raises(InputError, match="No normal image is left"):
            lite.fit_threshold(normals=paths[:5])
        assert lite.bank().record == before and lite.threshold() == expected

    def test_references_are_known_by_their_pixels(self, lite: FeatureExtractor, tmp_path: Path) -> None:
        paths = write_photos(tmp_path, range(4))
        copies = write_photos(tmp_path, range(4), suffix=".bmp")
        lite.set_references(paths)
        expected = lite.fit_threshold()
        with pytest.warns(UserWarning, match=r"\.bmp is a copy"):
            lite.set_references([*paths, *copies])
        assert lite.bank().num_images == 4 and lite.fit_threshold() == expected
        predictions = lite.score([*paths, *copies, photo(2), np.asarray(photo(3)), photo(9)])
        assert [prediction.is_reference for prediction in predictions] == [True] * 10 + [False]

    def test_banks_of_earlier_versions_know_their_files(self, lite: FeatureExtractor, tmp_path: Path) -> None:
        paths = write_photos(tmp_path, range(3))
        lite.set_references(paths[:2])
        lite.bank().record.pixels = []
        assert [prediction.is_reference for prediction in lite.score(paths)] == [True, True, False]
        lite.add_references(paths[2:])
        assert [prediction.is_reference for prediction in lite.score(paths)] == [True] * 3

    def test_a_threshold_of_copies_saved_anew_is_never_silent(self, lite: FeatureExtractor, tmp_path: Path) -> None:
        lite.set_references(write_photos(tmp_path / "good", range(4)))
        (tmp_path / "again").mkdir()
        for seed in range(4):
            photo(seed).save(tmp_path / "again" / f"{seed}.jpg", quality=97)
        with pytest.warns(UserWarning, match="almost copies of each other or of references"):
            threshold = lite.fit_threshold(normals=tmp_path / "again")
        assert 0 < threshold < 0.25 * min(lite.leave_one_out_scores())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*almost copies")
            lite.fit_threshold(normals=[photo(seed) for seed in range(10, 14)])

    def test_a_threshold_near_zero_is_never_silent(self, lite: FeatureExtractor) -> None:
        normals = torch.stack([adfeatures.create_transform(lite)(photo(seed)) for seed in range(3)])
        lite.set_references(normals)
        with pytest.warns(UserWarning, match="almost copies of each other"):
            assert lite.fit_threshold(normals=normals) == 0
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*almost copies")
            assert lite.fit_threshold(normals=normals + torch.randn_like(normals)) > 0

    def test_the_default_precision_of_torch_may_be_double(self) -> None:
        expected = adfeatures.create_model(img_size=96)
        torch.set_default_dtype(torch.float64)
        try:
            found = adfeatures.create_model(img_size=96)
            for model in (expected, found):
                model.set_references([photo(seed) for seed in range(3)])
            scores = [[p.score for p in model.score([photo(8), photo(9)])] for model in (expected, found)]
        finally:
            torch.set_default_dtype(torch.float32)
        assert scores[0] == pytest.approx(scores[1], rel=1e-3)

    def test_numbers_of_numpy_are_saved(self, lite: FeatureExtractor, tmp_path: Path) -> None:
        lite.set_references([photo(seed) for seed in range(3)])
        threshold = lite.fit_threshold(np.float32(0.5))
        lite.save_references(tmp_path / "bank.safetensors")
        bank = adfeatures.ReferenceBank.load(tmp_path / "bank.safetensors")
        assert (bank.threshold, bank.quantile) == (threshold, 0.5)


class TestWrongImages:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
    def test_tensors_of_pixels_are_refused(self, dtype: torch.dtype) -> None:
        model = tiny_extractor()
        pixels = torch.ones(2, 3, 56, 56, dtype=dtype)
        with pytest.raises(InputError, match="create_transform"):
            model.set_references(pixels)
        model.set_references([photo(0), photo(1)])
        for call in (model, model.anomaly_map, model.residuals, model.backbone_features):
            with pytest.raises(InputError, match="create_transform"):
                call(pixels)
        with pytest.raises(InputError, match="create_transform"):
            model.fit_threshold(normals=pixels)

    @pytest.mark.parametrize("scale", [1, 255])
    def test_tensors_that_no_transform_gives_are_warned_of(self, scale: int) -> None:
        pixels = np.stack([np.asarray(photo(seed, (56, 56))) for seed in range(2)])
        raw = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 * scale
        model = tiny_extractor()
        with pytest.warns(UserWarning, match="which the model's transform does not give"):
            model.set_references(raw)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            transform = adfeatures.create_transform(model)
            model.set_references(torch.stack([transform(photo(seed)) for seed in range(2)]))
            model.set_references(torch.zeros(1, 3, 56, 56))

    @pytest.mark.parametrize("size", [0, -1])
    def test_batches_hold_an_image_at_least(self, size: int) -> None:
        model = tiny_extractor()
        model.set_references([photo(0), photo(1)])
        with pytest.raises(InputError, match=f"batch_size is {size}"):
            model.score([photo(2)], batch_size=size)

    def test_a_score_that_is_not_finite_is_no_decision(self) -> None:
        model = tiny_extractor()
        model.set_references([photo(0), photo(1)])
        model.fit_threshold()
        model.bank().rows[0][:] = torch.nan
        with pytest.raises(InputError, match="score of .* is nan"):
            model.score([photo(2)])

    def test_large_images_are_held_one_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """While a batch is read, what is kept of an image are the model's input and a small picture."""
        alive: list[weakref.ref[Image.Image]] = []
        most = 0

        def read(_: object, source: object, __: object) -> Image.Image:
            nonlocal most
            image = Image.new("RGB", (3000, 2000), (9, 9, int(str(source))))
            most = max(most, sum(ref() is not None for ref in alive))
            alive.append(weakref.ref(image))
            return image

        model = tiny_extractor()
        model.set_references([photo(0), photo(1)])
        monkeypatch.setattr("adfeatures.images.ImageTransform.read", read)
        results = list(score_photos(model, [str(n) for n in range(6)], [None] * 6, 6, side=100))
        for prediction, picture in results:
            assert isinstance(prediction, Prediction) and prediction.map.shape == (67, 100)
            assert picture is not None and picture.size == (100, 67)
        assert len(alive) == 6 and most <= 1

    def test_the_pictures_of_a_batch_are_gone_before_the_next_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[weakref.ref[Image.Image]] = []
        alive: list[int] = []

        def read(_: object, source: ImageSource, __: object) -> Image.Image:
            alive.append(sum(ref() is not None for ref in given))
            return photo(len(alive))

        model = tiny_extractor()
        model.set_references([photo(0), photo(1)])
        monkeypatch.setattr("adfeatures.images.ImageTransform.read", read)
        for _, picture in score_photos(model, [photo(seed) for seed in range(6)], [None] * 6, 3, side=40):
            assert picture is not None
            given.append(weakref.ref(picture))
            del picture
        assert alive == [0] * 6

    def test_the_limit_of_a_model_holds_for_all_that_it_reads(self) -> None:
        model = tiny_extractor()
        model.set_references([photo(0), photo(1)])
        model.max_pixels = 80 * 60 - 1
        transform = adfeatures.create_transform(model)
        calls = (model.score, model.set_references, lambda image: model.fit_threshold(normals=image), transform)
        for call in calls:
            with pytest.raises(ImageError, match="80 x 60 pixels are more than 4,799"):
                call(photo(2))
        model.max_pixels += 1
        assert model.score(photo(2))[0].score == model.score(photo(2))[0].score > 0


class TestTurns:
    def test_a_quarter_is_that_of_the_pixels(self) -> None:
        x = torch.randn(3, 8, 8)
        assert turn(x, 0, (8, 8)) is x
        torch.testing.assert_close(turn(x, 0.25, (8, 8)), x.rot90(-1, (1, 2)), atol=1e-5, rtol=0)

    def test_a_squashed_photo_turns_as_the_photo(self) -> None:
        """A wide photo, squashed to a square: what is a circle in the photo stays one."""
        y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
        circle = torch.exp(-((2 * x) ** 2 + y**2) / 0.05).expand(3, -1, -1)
        assert (turn(circle, 0.125, (32, 64)) - circle).abs().mean() < 0.1 * circle.mean()
        assert (turn(circle, 0.125, (64, 64)) - circle).abs().mean() > 0.3 * circle.mean()

    def test_references_in_another_pose_match(self) -> None:
        model = tiny_extractor()
        normals = torch.stack([adfeatures.create_transform(model)(photo(seed)) for seed in range(3)])
        model.set_references(normals, rotations=4)
        turned = torch.stack([turn(x, 0.25, (56, 56)) for x in normals])
        assert float(model.residuals(turned)[0].abs().max()) < 1e-4
        assert len(model.bank().record.normal_scores) == 3 and model.fit_threshold() > 0
        model.set_references(normals)
        assert float(model.residuals(turned)[0].abs().max()) > 1e-2

    @pytest.mark.parametrize("rotations", [0, -1, 65, 1.5, "8"])
    def test_unreasonable_numbers(self, rotations: Any) -> None:
        with pytest.raises(InputError, match="rotations must lie in 1 to 64"):
            tiny_extractor().set_references([photo(0)], rotations=rotations)


def test_many_photos_above_all_normal_ones_are_told_of_once() -> None:
    model = FeatureExtractor(tiny_extractor().backbone, None, name="lite", img_size=(56, 56), pretrained_cfg=CFG)
    model.set_references([photo(seed) for seed in range(4)])
    model.bank().record.normal_scores, model.bank().threshold = [1e-3], 1e-3
    others = [photo(seed) for seed in range(10, 20)]
    with pytest.warns(UserWarning, match="lighting, focus or position") as warned:
        model.score(others)
    assert len(warned) == 1
    for scored in (others[:9], [*others, photo(0)]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.score(scored)
