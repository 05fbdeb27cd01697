"""FeatureNorm against its formula written out, and on images with a planted outlier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.golden_values import assert_near, golden, value
from helpers.method_checks import check_finds_what_is_planted
from helpers.models import tiny_extractor
from helpers.planted import batches, patch_extractor
from scipy.ndimage import gaussian_filter

from adfeatures.errors import InputError
from training.methods import FeatureNorm
from training.methods.base import Loader

EXTRACT = patch_extractor(6, 8, 7, 10)


def test_scores_are_those_of_the_original() -> None:
    features = [value(f"scoring.features.{level}", (3, 32, 16, 16), 0.3) for level in range(4)]
    maps, scores = FeatureNorm(lambda batch: features).predict([{"image": torch.zeros(3, 3, 224, 224)}])
    assert_near(maps, golden("feature_norm")["score_map"])
    assert_near(scores, golden("feature_norm")["image_score"])


def test_raw_features_give_their_norms() -> None:
    (batch,) = batches(2, seed=0, size=(24, 32))
    maps, scores = FeatureNorm(patch_extractor(5)).fit([]).predict([batch])
    assert maps.shape == (2, 24, 32) and maps.dtype == scores.dtype == torch.float32
    (level,) = patch_extractor(5)(batch)
    for image, found, score in zip(level.double().numpy(), maps.numpy(), scores.tolist(), strict=True):
        patches = np.sqrt(np.sqrt((image**2).sum(axis=0)) + 1) - 1
        rows, columns = np.linspace(0, 5, 24), np.linspace(0, 7, 32)  # the corners of the grid are those of the image
        tall = np.stack([np.interp(rows, np.arange(6), column) for column in patches.T], axis=1)
        expected = gaussian_filter(np.stack([np.interp(columns, np.arange(8), row) for row in tall]), 4)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert score == pytest.approx(expected.max(), rel=1e-5)


def test_it_does_not_look_at_the_training_images() -> None:
    test = batches(4, seed=1)
    plain = FeatureNorm(EXTRACT).predict(test)
    loaders: list[Loader] = [[], batches(3, seed=0, planted=True), iter(lambda: pytest.fail("read"), None)]
    for loader in loaders:
        method = FeatureNorm(EXTRACT)
        assert method.fit(loader) is method
        assert torch.equal(method.predict(test).maps, plain.maps)


def test_scores_agree_with_the_model_s_own_anomaly_maps() -> None:
    model = tiny_extractor()
    model.set_references(value("references", (2, 3, 56, 56)))
    images = value("queries", (3, 3, 56, 56))
    found = FeatureNorm(lambda batch: model(batch["image"]), sigma=2).predict(
        [{"image": images[:2]}, {"image": images[2:]}]
    )
    expected = model.anomaly_map(images, sigma=2)
    assert_near(found.maps, expected.maps)
    assert_near(found.scores, expected.scores)


def test_finds_what_is_planted_and_nothing_else() -> None:
    check_finds_what_is_planted(FeatureNorm(EXTRACT), 24, (64, 64))


def test_refuses() -> None:
    with pytest.raises(InputError, match="nothing to score"):
        FeatureNorm(EXTRACT).predict([])
    with pytest.raises(InputError, match="NaN"):
        FeatureNorm(lambda batch: [torch.full((1, 2, 3, 3), torch.nan)]).predict(
            [{"image": torch.zeros(1, 3, 8, 8), "path": ["a.png"]}]
        )
