"""PaDiM against numpy's covariance and inverse, scipy's Mahalanobis distance, and on images with a planted outlier."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.golden_values import assert_near
from helpers.method_checks import check_finds_what_is_planted
from helpers.planted import batches, patch_extractor
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import mahalanobis
from torch import Tensor

from adfeatures.errors import InputError, ReferencesError
from training.methods import PaDiM, padim
from training.methods.padim import Gaussians

EXTRACT = patch_extractor(6, 8, 7, 10)


def naive_distances(train: np.ndarray, test: np.ndarray, epsilon: float = 0.01) -> np.ndarray:
    """Distances (B, h, w) of maps (B, C, h, w) from the distributions of maps (N, C, h, w), float64."""
    found = np.empty((len(test), *test.shape[2:]))
    for y, x in np.ndindex(*test.shape[2:]):
        patches = train[:, :, y, x]
        mean = patches.mean(axis=0)
        # A single image has no sample covariance: epsilon I is what remains.
        covariance = np.cov(patches, rowvar=False).reshape(patches.shape[1], -1) if len(patches) > 1 else 0
        inverse = np.linalg.inv(covariance + epsilon * np.eye(patches.shape[1]))
        found[:, y, x] = [mahalanobis(image[:, y, x], mean, inverse) for image in test]
    return found


def fitted(maps: Tensor, batch: int = 3, epsilon: float = 0.01) -> Gaussians:
    gaussians = Gaussians(maps, epsilon)
    for part in maps.split(batch):
        gaussians.add(part)
    gaussians.finish()
    return gaussians


@pytest.mark.parametrize("count", [1, 2, 6, 30])
def test_equals_the_naive_formula(count: int) -> None:
    """Levels of 6 to 10 channels, from fewer and from more images than that."""
    train, test = batches(count, seed=0, batch_size=4, size=(32, 24)), batches(3, seed=1, size=(32, 24))
    maps, scores = PaDiM(EXTRACT).fit(iter(train)).predict(test)
    assert maps.dtype == scores.dtype == torch.float32
    large = []
    for level, queries in enumerate(EXTRACT(test[0])):
        normal = torch.cat([EXTRACT(batch)[level] for batch in train]).double().numpy()
        distances = torch.from_numpy(naive_distances(normal, queries.double().numpy()))
        large.append(F.interpolate(distances[:, None], size=(32, 24), mode="bilinear", align_corners=True)[:, 0])
    for found, score, expected in zip(maps, scores, torch.stack(large).mean(dim=0).numpy(), strict=True):
        expected = gaussian_filter(expected, 4)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert float(score) == pytest.approx(expected.max(), rel=1e-5)


@settings(max_examples=50)
@given(
    count=st.integers(1, 40),
    channels=st.integers(1, 24),
    batch=st.integers(1, 12),
    chunk=st.sampled_from([1, 2000, 2**20]),
    block=st.sampled_from([1, 4, 64]),
    epsilon=st.sampled_from([0.01, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_distances_of_any_number_of_images(
    count: int, channels: int, batch: int, chunk: int, block: int, epsilon: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(channels, 1, 1, generator=generator) * 5
    train, test = (20 + scales * torch.randn(n, channels, 2, 3, generator=generator) for n in (count, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padim, "CHUNK_BYTES", chunk)
        patch.setattr(padim, "BLOCK", block)
        patch.setattr(padim, "SUMMED", 2 * block)
        found = fitted(train, batch, epsilon).distances(torch.cat([test, train[:1]]))
    expected = naive_distances(train.double().numpy(), torch.cat([test, train[:1]]).double().numpy(), epsilon)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [9, 50])
def test_covariances_in_float32_are_nearly_as_good(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padim, "LEVEL_BYTES", 0)
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 16, 3, 3, generator=generator) for n in (count, 5))
    gaussians = fitted(train)
    assert gaussians.factors.dtype == torch.float32
    np.testing.assert_allclose(
        gaussians.distances(test), naive_distances(train.double().numpy(), test.double().numpy()), rtol=1e-5
    )


@pytest.mark.parametrize(("count", "scale"), [(2, 1e3), (2, 1e6), (7, 1e3), (7, 2e6), (11, 4e6)])
def test_rounding_gives_no_nan(count: int, scale: float) -> None:
    """The images of the fit lie in the span of the samples, where large features leave no digits of the difference."""
    train = scale * torch.randn(count, 30, 16, 16, generator=torch.Generator().manual_seed(0))
    found = fitted(train).distances(train)
    assert torch.isfinite(found).all() and (found >= 0).all()
    if scale == 1e3:
        # N points of general position all have this distance from their mean, where epsilon is as nothing.
        assert_near(found, torch.full_like(found, (count - 1) / count**0.5), 1e-5)


def test_features_beyond_the_precision_are_refused() -> None:
    with pytest.raises(InputError, match="Use a larger one"):
        fitted(1e12 * torch.randn(20, 30, 2, 2))


# Memory


_CHILD = """
import torch
from training.methods.padim import Gaussians
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
torch.set_num_threads(1)
def run(count, channels, side):
    gaussians = Gaussians(torch.empty(1, channels, side, side), 0.01)
    for start in range(0, count, 4):
        gaussians.add(torch.randn(min(4, count - start), channels, side, side))
    gaussians.finish()
    gaussians.distances(torch.randn(4, channels, side, side))
run(min({count}, 20), 8, 2)
before = peak()
run({count}, {channels}, 16)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory of a process is read from /proc")
@pytest.mark.parametrize(
    ("count", "channels", "bound"),
    [
        pytest.param(8, 640, 60, id="few images: the covariances would take 800 MB"),
        pytest.param(1600, 128, 100, id="many images: their features would take 200 MB"),
    ],
)
def test_memory_is_bounded(count: int, channels: int, bound: float) -> None:
    code = _CHILD.format(count=count, channels=channels)
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    )
    assert float(child.stdout) < bound


# Behavior


def test_finds_what_is_planted_and_nothing_else() -> None:
    check_finds_what_is_planted(PaDiM(EXTRACT).fit(batches(40, seed=0, size=(64, 64))), 24, (64, 64))


@pytest.mark.parametrize("count", [4, 20])
def test_scores_depend_on_neither_the_batches_nor_the_other_images(count: int) -> None:
    one, other = (
        PaDiM(EXTRACT).fit(batches(count, seed=0, batch_size=size)).predict(batches(5, seed=1, batch_size=size))
        for size in (1, 4)
    )
    assert_near(one.maps, other.maps)
    assert_near(one.scores, other.scores)


def test_the_loader_may_reuse_its_tensors() -> None:
    buffer = torch.empty(1, 5, 3, 3)

    def loader(maps: Tensor) -> Any:
        for image in maps:
            yield {"image": torch.zeros(1, 3, 6, 6), "maps": buffer.copy_(image[None])}

    maps = torch.randn(4, 5, 3, 3)
    found = PaDiM(lambda batch: [batch["maps"]]).fit(loader(maps)).predict(loader(maps))
    assert_near(found.maps, PaDiM(lambda batch: [batch["maps"]]).fit(loader(maps.clone())).predict(loader(maps)).maps)
    assert_near(
        fitted(maps).distances(maps), torch.from_numpy(naive_distances(maps.double().numpy(), maps.double().numpy()))
    )


@pytest.mark.parametrize("fitted_before", [False, True])
def test_a_fit_that_fails_leaves_nothing_behind(fitted_before: bool) -> None:
    good, bad = batches(2, seed=0), batches(3, seed=1, batch_size=1)
    bad[2]["image"] = bad[2]["image"] / 0
    method = PaDiM(EXTRACT)
    if fitted_before:
        method.fit(good)
    with pytest.raises(InputError, match="NaN"):
        method.fit(bad)
    with pytest.raises(ReferencesError, match="call fit first"):
        method.predict(good)


def test_refuses() -> None:
    for epsilon in (0, -1, float("nan")):
        with pytest.raises(InputError, match="epsilon above 0"):
            PaDiM(EXTRACT, epsilon=epsilon)
    train = batches(2, seed=0)
    with pytest.raises(ReferencesError, match="call fit first"):
        PaDiM(EXTRACT).predict(train)
    with pytest.raises(InputError, match="gives none"):
        PaDiM(EXTRACT).fit([])
    with pytest.raises(InputError, match="NaN"):
        PaDiM(lambda batch: [level / 0 for level in EXTRACT(batch)]).fit(train)
    with pytest.raises(InputError, match="images of one size"):
        PaDiM(EXTRACT).fit(train).predict(batches(2, seed=0, size=(32, 24)))
    with pytest.raises(InputError, match="nothing to score"):
        PaDiM(EXTRACT).fit(train).predict([])
