"""Photos in, predictions out: bit depth of each bank, thresholds that are set only where their name says so."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.golden_values import FOLDER
from helpers.models import photo, tiny_extractor, write_photos
from PIL import Image

import adfeatures
from adfeatures.errors import InputError, UnknownNameError
from adfeatures.extractor import FeatureExtractor

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
    model = adfeatures.create_model(img_size=(64, 96))
    model.load_references(FOLDER / "bank_of_before.safetensors")
    expected = {"nut": (0.9939777255, 1.0084012747), "bolt": (0.9640356898, 1.0009042025)}
    for product, scores in expected.items():
        assert [p.score for p in model.score([photo(20), photo(21)], product)] == pytest.approx(scores, rel=1e-5)
    assert [bank.threshold for bank in model.references.values()] == [1.1144108533859254, 1.1418405485153198]
    assert [bank.record.bit_depth for bank in model.references.values()] == [16, 12]
    assert [bank.complete for bank in model.references.values()] == [True, False]
