"""PaDiM against its plain form: at each position a covariance matrix and its inverse, and a distance for each image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.spatial.distance import mahalanobis
from torch import Tensor

from adfeatures.measuring import NOT_MEASURED, Measurement, compare, in_child, peak_megabytes, seconds, timed

from ..methods.padim import Gaussians

EPSILON = 0.01


def rows(quick: bool = False) -> Iterator[Measurement]:
    """Fit and score on one level of 768 channels, 16 x 16 (quick: 6 x 6), 200 images; and memory at 1024 channels."""
    count, channels, side, tests = 200, 768, 6 if quick else 16, 40
    train, test = features(count + tests, channels, side).split([count, tests])
    size = f"{channels} channels, {side} x {side}"
    fit(train[:8])  # warms up
    (ours, fitted), (naive, plain) = timed(lambda: fit(train)), timed(lambda: plain_fit(train))
    yield Measurement.of_runs(f"PaDiM fit, {count} images, {size}", [ours], [naive])

    def score() -> np.ndarray:
        return torch.cat([fitted.distances(chunk) for chunk in test.split(8)]).numpy()

    expected = plain_distances(plain, test)
    note = f"distances differ by up to {float((np.abs(score() - expected) / expected).max()):.1e}"
    yield compare(f"PaDiM score, {tests} images, {size}", score, lambda: plain_distances(plain, test), note=note)

    for count in (40,) if quick else (300, 400):
        took, peak = in_child(large_fit, count) or (None, None)
        note = NOT_MEASURED if peak is None else f"peak of the process {peak / 1000:.2f} GB"
        yield Measurement(f"PaDiM fit, {count} images, 4 levels of 1024 channels, 16 x 16", "s", took, note=note)


def features(count: int, channels: int, side: int) -> Tensor:
    """Maps (count, channels, side, side) whose channels are correlated."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(channels, channels // 4, generator=generator) / channels**0.5
    latent = torch.randn(count, channels // 4, side, side, generator=generator)
    noise = torch.randn(count, channels, side, side, generator=generator)
    return torch.einsum("cd,ndhw->nchw", mixing, latent) + 0.1 * noise


def fit(maps: Tensor) -> Gaussians:
    """The distributions of maps (N, C, h, w)."""
    gaussians = Gaussians(maps, EPSILON)
    for chunk in maps.split(8):
        gaussians.add(chunk)
    gaussians.finish()
    return gaussians


def plain_fit(maps: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and inverse of the covariance at each position of maps (N, C, h, w)."""
    positions = maps.flatten(2).permute(2, 0, 1).double().numpy()
    ridge = EPSILON * np.eye(maps.shape[1])
    return [(own.mean(axis=0), np.linalg.inv(np.cov(own, rowvar=False) + ridge)) for own in positions]


def plain_distances(distributions: list[tuple[np.ndarray, np.ndarray]], maps: Tensor) -> np.ndarray:
    """Distances (N, h, w) of maps (N, C, h, w)."""
    images = maps.flatten(2).mT.double().numpy()
    pairs = ((patch, own) for image in images for patch, own in zip(image, distributions, strict=True))
    distances = [mahalanobis(patch, *own) for patch, own in pairs]
    return np.array(distances).reshape(len(maps), *maps.shape[2:])


def large_fit(count: int, levels: int = 4, channels: int = 1024, side: int = 16) -> tuple[float, float | None]:
    """Seconds of a fit and of scoring one batch in a process of its own, and the most megabytes that it ever held."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(8, channels, side, side, generator=generator)
    gaussians = [Gaussians(batch, EPSILON) for _ in range(levels)]

    def whole() -> None:
        for start in range(0, count, len(batch)):
            for level in gaussians:
                level.add(batch.normal_(generator=generator)[: count - start])
        for level in gaussians:
            level.finish()
            level.distances(batch)

    return seconds(whole), peak_megabytes()
