"""Contenders, against the public interface and against plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.models import photo

import adfeatures
from training.judging.contenders import Coreset, Model, Plain, Remembered

NAME = "residual_lite.in1k_v1"


@pytest.fixture(scope="module")
def model() -> Model:
    contender = Model(NAME, {})
    contender.take([photo(seed, (320, 320)) for seed in range(4)], [photo(seed, (320, 320)) for seed in (8, 9)])
    return contender


def test_a_model_says_what_its_public_interface_says(model: Model) -> None:
    extractor = adfeatures.create_model(NAME)
    extractor.set_references([photo(seed, (320, 320)) for seed in (0, 2, 3)])
    with pytest.warns(UserWarning):
        threshold = extractor.fit_threshold()
    verdict = model.judge((0, 2, 3))[NAME]
    for prediction, score, found in zip(
        extractor.score([photo(seed, (320, 320)) for seed in (8, 9)]), verdict.scores, verdict.maps, strict=True
    ):
        assert score == pytest.approx(prediction.score, rel=1e-4)
        np.testing.assert_allclose(found, prediction.map, rtol=1e-3, atol=1e-3)
    assert verdict.threshold == pytest.approx(threshold, rel=1e-4)
    assert math.isnan(model.judge((1,))[NAME].threshold)


def test_an_image_is_encoded_once(model: Model) -> None:
    calls = []
    hook = model.encode.backbone.register_forward_hook(lambda *_: calls.append(1))
    model.encode.forget()
    first = model.encode(model.tests)
    again = model.encode(model.tests.flip(0))
    hook.remove()
    assert len(calls) == 2
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two.flip(0))
    shared: dict[str, Remembered] = {}
    assert Model(NAME, shared).encode is Model(NAME, shared).encode and len(shared) == 1


def test_plain_ways_are_the_formulas(model: Model) -> None:
    found = Plain(model).judge((0, 1))
    encoded = [model.encode(model.tests), model.encode(model.references[[0, 1]])]
    tests, rows = ([level.permute(0, 2, 3, 1).flatten(1, 2).double() for level in levels] for levels in encoded)
    norms, cosines = [], []
    for own, bank in zip(tests, rows, strict=True):
        bank = bank.flatten(0, 1)
        similarity = (own[0] / own[0].norm(dim=1, keepdim=True)) @ (bank / bank.norm(dim=1, keepdim=True)).T
        best = similarity.max(dim=1)
        norms.append((own[0] - bank[best.indices]).norm(dim=1).mean())
        cosines.append((1 - best.values).mean())
    # Neither resizing nor smoothing moves the mean of a map by much.
    assert found["raw residual norm"].maps[0].mean() == pytest.approx(float(torch.stack(norms).mean()), rel=0.02)
    assert found["cosine matching"].maps[0].mean() == pytest.approx(float(torch.stack(cosines).mean()), rel=0.02)
    for verdict in found.values():
        np.testing.assert_array_equal(verdict.scores, verdict.maps.max(axis=(1, 2)))


@pytest.mark.parametrize("kind", [Plain, Coreset])
def test_thresholds_are_of_the_references_left_out(model: Model, kind: type[Plain] | type[Coreset]) -> None:
    other = Model(NAME, {})
    # The references as tests, each against the other one.
    images = [photo(seed, (320, 320)) for seed in (0, 1)]
    other.take(images, images)
    contender = kind(other)
    alone = [contender.judge((index,)) for index in (0, 1)]
    for name, verdict in contender.judge((0, 1)).items():
        # PatchCore keeps a tenth of the patches, so that these images are not at distance 0.
        assert verdict.scores.max() < (1e-2 if kind is Plain else 0.5) * verdict.threshold
        crossed = [alone[1][name].scores[0], alone[0][name].scores[1]]
        tolerance = 1e-3 if kind is Plain else 0.2
        assert verdict.threshold == pytest.approx(np.quantile(crossed, 0.99), rel=tolerance)
        assert math.isnan(alone[0][name].threshold)
