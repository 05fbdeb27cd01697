"""Retrieved references: the stated rule in loops, images alike by construction, residuals against those retrieved."""

from __future__ import annotations

import math
import weakref
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers.golden_values import assert_near, value
from helpers.models import tiny_extractor
from torch import Tensor

from adfeatures.errors import InputError, ReferencesError
from training.methods import FeatureNorm, retrieval
from training.methods.base import Batch
from training.methods.retrieval import RetrievedReferences, VisualWords, most_similar, patches_of


def retrieve(train: Tensor, test: Tensor, count: int = 10, *, seed: int = 0) -> Tensor:
    """Indices (N, count) of the training images most like each test image, by first-level maps (M or N, C, h, w)."""
    words = VisualWords(patches_of(train), seed)
    return most_similar(words.histograms(test), words.histograms(train), count)


def naive_histograms(maps: np.ndarray, centers: np.ndarray) -> np.ndarray:
    count, _, height, width = maps.shape
    found = np.zeros((count, 25, len(centers)))
    for image, cell in np.ndindex(count, 25):
        top, bottom = cell // 5 * height // 5, math.ceil((cell // 5 + 1) * height / 5)
        left, right = cell % 5 * width // 5, math.ceil((cell % 5 + 1) * width / 5)
        patches = maps[image, :, top:bottom, left:right].reshape(maps.shape[1], -1).T
        for patch in patches:
            word = np.argmin(((patch - centers) ** 2).sum(axis=1))
            found[image, cell, word] += 1 / len(patches)
    return 0.95 * found + 0.05 / len(centers)


def naive_ranking(test: np.ndarray, train: np.ndarray) -> list[list[int]]:
    ranking = []
    for own in test:
        distances = []
        for other in train:
            cells = sorted(
                sum(p * math.log(p / q) for p, q in zip(a, b, strict=True)) for a, b in zip(own, other, strict=True)
            )
            distances.append(sum(cells[:20]) / 20)
        ranking.append(sorted(range(len(train)), key=distances.__getitem__))
    return ranking


@pytest.mark.parametrize("grid", [(5, 5), (16, 16), (7, 11), (3, 4)], ids=str)
def test_equals_the_rule_in_loops(grid: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 6, *grid, generator=generator) for n in (9, 4))
    words = VisualWords(patches_of(train))
    assert words.centers.shape == (12, 6)
    expected = [naive_histograms(maps.numpy(), words.centers.numpy()) for maps in (test, train)]
    histograms = [words.histograms(maps) for maps in (test, train)]
    for found, naive in zip(histograms, expected, strict=True):
        np.testing.assert_allclose(found, naive, rtol=1e-5)
    # In float64, where no two of these distances are equal up to rounding.
    doubles = [torch.from_numpy(naive) for naive in expected]
    assert most_similar(doubles[0], doubles[1], 9).tolist() == naive_ranking(*expected)
    assert retrieve(train, test, 4).tolist() == [row[:4] for row in naive_ranking(*expected)]


def test_the_words_are_the_kinds_of_patches() -> None:
    kinds = 10 * torch.eye(12)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(12, (8, 6, 6), generator=generator)
    maps = (kinds[labels] + 0.1 * torch.randn(8, 6, 6, 12, generator=generator)).permute(0, 3, 1, 2)
    centers = VisualWords(patches_of(maps)).centers
    assert sorted(centers.argmax(dim=1).tolist()) == list(range(12))
    np.testing.assert_allclose(centers.max(dim=1).values, 10, atol=0.2)


def poses(count: int, pose: int, seed: int) -> Tensor:
    """Maps of a part in one of three poses: bright to the left, to the right, or at the top."""
    generator = torch.Generator().manual_seed(seed)
    maps = 0.3 * torch.randn(count, 4, 10, 10, generator=generator)
    rows, columns = [(slice(None), slice(0, 5)), (slice(None), slice(5, 10)), (slice(0, 5), slice(None))][pose]
    maps[:, 0, rows, columns] += 3
    return maps


def test_images_of_the_same_pose_are_retrieved() -> None:
    train = torch.cat([poses(6, pose, seed=pose) for pose in range(3)])
    for pose in range(3):
        test = poses(4, pose, seed=10 + pose)
        assert (retrieve(train, test, 6) // 6 == pose).all()
        # What differs most is left out: a defect in up to 5 of the 25 cells changes nothing of that.
        test[:, 1, 4:6] -= 9
        assert (retrieve(train, test, 6) // 6 == pose).all()


def test_reproducible_and_on_its_own() -> None:
    train, test = poses(20, 0, seed=0), poses(5, 0, seed=1)
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
    first = retrieve(train, test)
    assert first.shape == (5, 10)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(
        np.random.get_state(legacy=False)["state"]["key"], states[1]
    )
    assert torch.equal(first, retrieve(train, test))
    assert not torch.equal(first, retrieve(train, test, seed=1))


def test_few_images_and_few_patches() -> None:
    assert retrieve(poses(3, 0, seed=0), poses(2, 0, seed=1)).shape == (2, 3)
    assert retrieve(torch.randn(2, 3, 2, 2), torch.randn(1, 3, 2, 2)).shape == (1, 2)


# As an extractor


def entries(name: str, images: Tensor) -> list[dict[str, Any]]:
    return [{"image": image, "path": f"{name}/{number}.png", "label": 0} for number, image in enumerate(images)]


def test_features_are_residuals_against_the_retrieved_images() -> None:
    model = tiny_extractor()
    images, queries = value("train", (12, 3, 56, 56)), value("test", (3, 3, 56, 56))
    train = entries("train", images)
    extractor = RetrievedReferences(
        lambda batch: model.backbone_features(batch["image"]), model.projector, train, count=4
    )
    batches = [{"image": queries[:2], "path": ["a", "b"]}, {"image": queries[2:], "path": ["c"]}]
    found = [torch.cat(level) for level in zip(*(extractor(batch) for batch in batches), strict=True)]
    chosen = retrieve(model.backbone_features(images)[0], model.backbone_features(queries)[0], 4)
    assert extractor.lists == {
        name: [f"train/{i}.png" for i in row] for name, row in zip("abc", chosen.tolist(), strict=True)
    }
    assert len({tuple(row) for row in extractor.lists.values()}) > 1
    expected = []
    for query, row in zip(queries, chosen, strict=True):
        model.set_references(images[row])
        expected.append(model(query[None]))
    assert_near(found, [torch.cat(level) for level in zip(*expected, strict=True)])
    residuals = RetrievedReferences(extractor.features, None, train, count=4)(batches[1])
    assert_near(residuals, model.residuals(queries[2:]))
    maps, scores = FeatureNorm(extractor).fit([]).predict(batches)
    assert_near(maps[2:], model.anomaly_map(queries[2:]).maps)
    assert scores.shape == (3,)


def test_training_images_are_compared_with_the_others_alone() -> None:
    train = entries("train", poses(9, 0, seed=0))
    paths = [entry["path"] for entry in train]
    batch: dict[str, Any] = {"image": torch.stack([entry["image"] for entry in train]), "path": paths}
    extractor = RetrievedReferences(lambda batch: [batch["image"]], None, train, count=8)
    (residuals,) = extractor(batch)
    assert {path: sorted(references) for path, references in extractor.lists.items()} == {
        path: [other for other in paths if other != path] for path in paths
    }
    assert (residuals.norm(dim=1) > 0).all()
    with pytest.raises(ReferencesError, match=r"train/0\.png is the only training image"):
        RetrievedReferences(extractor.features, None, train[:1])({"image": batch["image"][:1], "path": paths[:1]})


def test_the_words_are_of_some_patches_and_one_batch_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    train = entries("train", poses(30, 0, seed=0))
    held: list[weakref.ref[Tensor]] = []
    words = Mock(wraps=VisualWords)
    monkeypatch.setattr(retrieval, "PATCHES", 300)
    monkeypatch.setattr(retrieval, "VisualWords", words)

    def features(batch: Batch) -> list[Tensor]:
        assert sum(reference() is not None for reference in held) <= 1
        maps = batch["image"] + 0
        held.append(weakref.ref(maps))
        return [maps]

    RetrievedReferences(features, None, train)
    assert len(held) == 8
    ((patches, _), _) = words.call_args
    words.assert_called_once()
    every = patches_of(torch.stack([entry["image"] for entry in train]))
    known = {tuple(patch): number // 100 for number, patch in enumerate(every.tolist())}
    batches = [known[tuple(patch)] // 8 for patch in patches.tolist()]
    assert [batches.count(number) for number in range(4)] == [80, 80, 80, 60]


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(InputError, match="there are none"):
        RetrievedReferences(lambda batch: [batch["image"]], None, [])
