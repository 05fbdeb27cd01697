"""PatchCore against its formula written out in loops and float64, scipy, and images with a planted outlier."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.coreset import naive_coreset
from helpers.golden_values import assert_near, value
from helpers.method_checks import check_finds_what_is_planted
from helpers.models import tiny_extractor
from helpers.planted import batches, patch_extractor
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from torch import Tensor

from adfeatures.errors import InputError, ReferencesError
from adfeatures.scoring import auroc
from training.methods import PatchCore, patchcore
from training.methods.patchcore import nearest_distances

EXTRACT = patch_extractor(6, 8, 7, 10)


def naive_vectors(levels: list[Tensor], dim: int) -> np.ndarray:
    """Patch vectors (B, h, w, dim) of levels of one grid: 3 x 3 neighborhoods averaged, then the levels."""
    count, _, height, width = levels[0].shape
    vectors = torch.empty(count, height, width, dim, dtype=torch.float64)
    padded = [F.pad(level.double(), (1, 1, 1, 1)) for level in levels]
    for image, y, x in np.ndindex(count, height, width):
        around = [
            F.adaptive_avg_pool1d(level[image, :, y : y + 3, x : x + 3].reshape(1, 1, -1), dim) for level in padded
        ]
        vectors[image, y, x] = F.adaptive_avg_pool1d(torch.cat(around, dim=2), dim)[0, 0]
    return vectors.numpy()


def naive_scores(
    queries: np.ndarray, rows: np.ndarray, size: tuple[int, int], neighbors: int = 1
) -> tuple[np.ndarray, float]:
    """Map and score of one image from its vectors (h, w, d) and the rows to compare with."""
    squared = np.sort(((queries[:, :, None] - rows) ** 2).sum(axis=-1), axis=-1)
    patches = squared[:, :, :neighbors].mean(axis=-1)
    large = F.interpolate(torch.from_numpy(patches)[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    return gaussian_filter(large.numpy(), 4), patches.max()


@pytest.mark.parametrize("neighbors", [1, 3])
def test_equals_the_naive_formula(neighbors: int) -> None:
    train, test = batches(5, seed=0, batch_size=2), batches(3, seed=1)
    method = PatchCore(EXTRACT, dim=12, coreset=1, neighbors=neighbors).fit(train)
    maps, scores = method.predict(test)
    assert maps.dtype == scores.dtype == torch.float32
    rows = np.concatenate([naive_vectors(EXTRACT(batch)[-3:], 12).reshape(-1, 12) for batch in train])
    for found, score, vectors in zip(maps, scores, naive_vectors(EXTRACT(test[0])[-3:], 12), strict=True):
        expected_map, expected = naive_scores(vectors, rows, (32, 32), neighbors)
        np.testing.assert_allclose(found, expected_map, rtol=1e-5)
        assert float(score) == pytest.approx(expected, rel=1e-5)


def test_takes_what_there_is_of_the_last_levels() -> None:
    train, test = batches(2, seed=0), batches(2, seed=1)
    settings = {"dim": 8, "coreset": 1}
    two = PatchCore(lambda batch: EXTRACT(batch)[:2], **settings).fit(train).predict(test)
    assert torch.equal(
        two.maps, PatchCore(lambda batch: EXTRACT(batch)[:2], levels=2, **settings).fit(train).predict(test).maps
    )
    last = PatchCore(EXTRACT, levels=1, **settings).fit(train).predict(test)
    assert torch.equal(last.maps, PatchCore(lambda batch: EXTRACT(batch)[3:], **settings).fit(train).predict(test).maps)


# The coreset


def test_keeps_the_stated_part_reproducibly() -> None:
    train, test = batches(6, seed=0), batches(2, seed=1)

    def maps(coreset: float = 0.1, seed: int = 42) -> Tensor:
        method = PatchCore(EXTRACT, dim=32, coreset=coreset, seed=seed).fit(train)
        assert len(method._rows) == len(method._images) == int(coreset * 6 * 64)
        return method.predict(test).maps

    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
    first = maps()
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(
        np.random.get_state(legacy=False)["state"]["key"], states[1]
    )
    torch.manual_seed(2)
    assert torch.equal(first, maps())
    assert not torch.equal(first, maps(seed=1))
    assert (maps(coreset=0.5) <= first * (1 + 1e-6)).float().mean() > 0.9
    for tiny in (
        PatchCore(EXTRACT, dim=8, coreset=1e-4).fit(train),
        PatchCore(EXTRACT, dim=8, coreset=1e-4).fit(batches(1, seed=0)),
    ):
        assert len(tiny._rows) == 1


def test_chosen_in_all_dimensions_the_coreset_is_that_of_the_plain_loop() -> None:
    """With a projection it is that of the projected patches, so farther from some."""
    train = batches(8, seed=0)
    vectors = np.concatenate([naive_vectors(EXTRACT(batch)[-3:], 24).reshape(-1, 24) for batch in train])
    method = PatchCore(EXTRACT, dim=24, projection=None).fit(train)
    starts = torch.randperm(512, generator=torch.Generator().manual_seed(42))[:10].numpy()
    chosen = naive_coreset(vectors, 51, starts)
    np.testing.assert_allclose(method._rows, vectors[sorted(chosen)], atol=1e-5)
    projected = PatchCore(EXTRACT, dim=24, projection=2).fit(train)
    radius, other = (cdist(vectors, m._rows).min(axis=1).max() for m in (method, projected))
    assert radius < other


@pytest.mark.parametrize("size", [1, 3])
def test_projected_the_coreset_is_chosen_among_products_with_default_weights_of_a_linear_layer(size: int) -> None:
    """Distances are of the products, what is kept are the patches themselves."""
    train = batches(6, seed=0)
    vectors = np.concatenate([naive_vectors(EXTRACT(batch)[-3:], 24).reshape(-1, 24) for batch in train])
    method = PatchCore(EXTRACT, dim=24, projection=size, seed=5).fit(train)
    generator = torch.Generator().manual_seed(5)
    starts = torch.randperm(384, generator=generator)[:10].numpy()
    bound = 1 / 24**0.5
    weights = (2 * torch.rand(24, size, generator=generator) - 1) * bound
    layer = torch.nn.Linear(24, 10_000, bias=False).weight
    assert 0.99 * bound < layer.abs().max().item() <= bound
    assert layer.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    chosen = naive_coreset(vectors @ weights.double().numpy(), 38, starts)
    np.testing.assert_allclose(method._rows, vectors[sorted(chosen)], atol=1e-5)


# The search


@pytest.mark.parametrize(("offset", "spread"), [(0, 1), (100, 0.01), (3, 1e-3)])
@pytest.mark.parametrize("count", [1, 4])
def test_distances_are_exact(offset: float, spread: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patchcore, "QUERIES_PER_CHUNK", 40)
    monkeypatch.setattr(patchcore, "ROWS_PER_CHUNK", 64)
    generator = torch.Generator().manual_seed(0)
    queries, rows = (offset + spread * torch.randn(n, 96, generator=generator) for n in (100, 300))
    # Close pairs among far ones, and the very same vector.
    queries[:50] = rows[:50] + 1e-4 * spread * torch.randn(50, 96, generator=generator)
    queries[50] = rows[50]
    found = nearest_distances(queries, rows, count)
    expected = np.sort(cdist(queries.double(), rows.double(), "sqeuclidean"), axis=1)[:, :count]
    assert found[50, 0] == 0
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_fewer_rows_than_neighbors() -> None:
    queries, rows = torch.randn(5, 3), torch.randn(2, 3)
    np.testing.assert_allclose(
        nearest_distances(queries, rows, 4), np.sort(cdist(queries, rows, "sqeuclidean"), axis=1), rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory of a process is read from /proc")
def test_memory_of_the_search_is_bounded() -> None:
    code = """
import torch
from training.methods.patchcore import nearest_distances
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
torch.set_num_threads(1)
queries, rows = torch.randn(10_000, 16), torch.randn(20_000, 16)
nearest_distances(queries[:10], rows[:10], 1)
before = peak()
nearest_distances(queries, rows, 1)
print(peak() - before)
"""
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    )
    # The matrix of all distances would take 763 MB.
    assert float(child.stdout) < 150


# Leaving one out


@pytest.mark.parametrize("coreset", [1, 0.2])
def test_each_image_is_compared_with_the_others_alone(coreset: float) -> None:
    train = batches(5, seed=0, batch_size=2)
    method = PatchCore(EXTRACT, dim=12, coreset=coreset).fit(train)
    kept, owners = method._rows.double().numpy(), method._images.numpy()
    # In another order, as a loader that shuffles gives them: the images are known by their paths.
    found = [method.predict([batch], leave_one_out=True) for batch in reversed(train)]
    for batch, (maps, scores) in zip(reversed(train), found, strict=True):
        for vectors, path, map, score in zip(
            naive_vectors(EXTRACT(batch)[-3:], 12), batch["path"], maps, scores, strict=True
        ):
            own = int(Path(path).stem)
            if coreset == 1:
                np.testing.assert_allclose(kept[owners == own], vectors.reshape(-1, 12), atol=1e-5)
            expected_map, expected = naive_scores(vectors, kept[owners != own], (32, 32))
            np.testing.assert_allclose(map, expected_map, rtol=1e-5)
            assert float(score) == pytest.approx(expected, rel=1e-5)


def test_scores_of_left_out_images_are_those_of_new_ones() -> None:
    """A threshold of scores with the images' own patches would call every new normal image anomalous."""
    train = batches(12, seed=0)
    method = PatchCore(EXTRACT, dim=32, coreset=1).fit(train)
    assert method.predict(train).scores.max() == 0
    left_out, new = method.predict(train, leave_one_out=True).scores, method.predict(batches(12, seed=1)).scores
    assert 0.25 < auroc(torch.cat([left_out, new]).tolist(), [0] * 12 + [1] * 12) < 0.75


def test_references_can_be_the_training_images() -> None:
    """Few-shot: the bank is made of the references' own features, each matched with the others."""
    model = tiny_extractor()
    model.set_references(value("references", (4, 3, 56, 56)))
    features = model.reference_features()
    loader = [
        {"image": torch.zeros(2, 3, 56, 56), "path": ["a", "b"], "slice": slice(0, 2)},
        {"image": torch.zeros(2, 3, 56, 56), "path": ["c", "d"], "slice": slice(2, 4)},
    ]
    method = PatchCore(lambda batch: [level[batch["slice"]] for level in features], dim=16, coreset=1).fit(loader)
    _, scores = method.predict(loader, leave_one_out=True)
    vectors = naive_vectors(features[-3:], 16)
    for image in range(4):
        _, expected = naive_scores(vectors[image], np.delete(vectors, image, axis=0).reshape(-1, 16), (56, 56))
        assert float(scores[image]) == pytest.approx(expected, rel=1e-5)


# Behavior


def test_finds_what_is_planted_and_nothing_else() -> None:
    check_finds_what_is_planted(PatchCore(EXTRACT, dim=32).fit(batches(24, seed=0, size=(64, 64))), 24, (64, 64))


def test_scores_do_not_depend_on_the_batches() -> None:
    one, other = (
        PatchCore(EXTRACT, dim=16).fit(batches(6, seed=0, batch_size=size)).predict(batches(5, seed=1, batch_size=size))
        for size in (1, 4)
    )
    assert_near(one.maps, other.maps)
    assert_near(one.scores, other.scores)


def test_half_precision_features_are_scored_in_float32() -> None:
    test = batches(2, seed=1)
    half = (
        PatchCore(lambda batch: [level.bfloat16() for level in EXTRACT(batch)], dim=16)
        .fit(batches(3, seed=0))
        .predict(test)
    )
    rounded = (
        PatchCore(lambda batch: [level.bfloat16().float() for level in EXTRACT(batch)], dim=16)
        .fit(batches(3, seed=0))
        .predict(test)
    )
    assert torch.equal(half.maps, rounded.maps)


def test_autocast_changes_nothing() -> None:
    train, test = batches(3, seed=0), batches(2, seed=1)
    plain = PatchCore(EXTRACT, dim=16).fit(train).predict(test)
    features = {id(batch): EXTRACT(batch) for batch in (*train, *test)}
    with torch.autocast("cpu", torch.bfloat16):
        found = PatchCore(lambda batch: features[id(batch)], dim=16).fit(train).predict(test)
    assert torch.equal(found.maps, plain.maps)


def test_a_fit_that_fails_leaves_nothing_behind() -> None:
    good, bad = batches(2, seed=0), batches(3, seed=1, batch_size=1)
    bad[2]["image"] = bad[2]["image"] / 0
    method = PatchCore(EXTRACT, dim=8).fit(good)
    with pytest.raises(InputError, match="NaN"):
        method.fit(bad)
    with pytest.raises(ReferencesError, match="call fit first"):
        method.predict(good)


def test_refuses() -> None:
    for setting in ({"coreset": 0}, {"coreset": 1.5}, {"neighbors": 0}, {"levels": 0}, {"dim": 0}, {"projection": 0}):
        with pytest.raises(InputError, match="got"):
            PatchCore(EXTRACT, **setting)
    train = batches(2, seed=0)
    with pytest.raises(ReferencesError, match="call fit first"):
        PatchCore(EXTRACT).predict(train)
    with pytest.raises(InputError, match="gives none"):
        PatchCore(EXTRACT).fit([])
    with pytest.raises(InputError, match="NaN"):
        PatchCore(lambda batch: [level / 0 for level in EXTRACT(batch)]).fit(train)
    method = PatchCore(EXTRACT, dim=8).fit(train)
    with pytest.raises(InputError, match="nothing to score"):
        method.predict([])
    with pytest.raises(InputError, match="other/000.png cannot be left out"):
        method.predict(batches(1, seed=0, product="other"), leave_one_out=True)
    with pytest.raises(ReferencesError, match="more images"):
        PatchCore(EXTRACT, dim=8).fit(batches(1, seed=0)).predict(batches(1, seed=0), leave_one_out=True)
