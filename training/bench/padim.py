"""PaDiM against its plain form: a covariance matrix and its inverse at each position, and a distance for each position of each image."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.distance import mahalanobis
from torch import Tensor

from ..methods.padim import Gaussians
from .timing import Row, compare, seconds

EPSILON = 0.01
STATUS = Path("/proc/self/status")


def rows(quick: bool = False) -> Iterator[Row]:
    """Rows of the table: fit and score on one level of 768 channels, 16 x 16 (quick: 6 x 6), 200 images; and memory at 1024 channels."""
    count, channels, side, tests = 200, 768, 6 if quick else 16, 40
    train, test = features(count + tests, channels, side).split([count, tests])
    size = f"{channels} channels, {side} x {side}"
    fit(train[:8])  # warms up
    fitted: list[Gaussians] = []
    plain: list[tuple[np.ndarray, np.ndarray]] = []
    ours = seconds(lambda: fitted.append(fit(train)))
    naive = seconds(lambda: plain.extend(plain_fit(train)))
    yield Row(f"PaDiM fit, {count} images, {size}", ours, naive, naive / ours)

    def score() -> np.ndarray:
        return torch.cat([fitted[0].distances(part) for part in test.split(8)]).numpy()

    expected = plain_distances(plain, test)
    note = f"distances differ by up to {float((np.abs(score() - expected) / expected).max()):.1e}"
    yield compare(f"PaDiM score, {tests} images, {size}", score, lambda: plain_distances(plain, test), note=note)

    for count in (40,) if quick else (300, 400):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            took, peak = pool.submit(large_fit, count).result()
        note = "no count of memory on this system" if peak is None else f"peak of the process {peak / 1e9:.2f} GB"
        yield Row(f"PaDiM fit, {count} images, 4 levels of 1024 channels, 16 x 16", took, note=note)


def features(count: int, channels: int, side: int) -> Tensor:
    """Maps (count, channels, side, side) whose channels are correlated."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(channels, channels // 4, generator=generator) / channels**0.5
    latent = torch.randn(count, channels // 4, side, side, generator=generator)
    noise = torch.randn(count, channels, side, side, generator=generator)
    return torch.einsum("cd,ndhw->nchw", mixing, latent) + 0.1 * noise


def fit(maps: Tensor) -> Gaussians:
    gaussians = Gaussians(maps, EPSILON)
    for part in maps.split(8):
        gaussians.add(part)
    gaussians.finish()
    return gaussians


def plain_fit(maps: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and inverse of the covariance at each position of maps (N, C, h, w)."""
    patches = maps.flatten(2).double().numpy()
    ridge = EPSILON * np.eye(patches.shape[1])
    return [
        (patches[:, :, p].mean(axis=0), np.linalg.inv(np.cov(patches[:, :, p], rowvar=False) + ridge))
        for p in range(patches.shape[2])
    ]


def plain_distances(distributions: list[tuple[np.ndarray, np.ndarray]], maps: Tensor) -> np.ndarray:
    """Distances (N, h, w) of maps (N, C, h, w)."""
    patches = maps.flatten(2).double().numpy()
    distances = [
        [mahalanobis(image[:, p], *distribution) for p, distribution in enumerate(distributions)] for image in patches
    ]
    return np.array(distances).reshape(len(maps), *maps.shape[2:])


def large_fit(count: int, levels: int = 4, channels: int = 1024, side: int = 16) -> tuple[float, int | None]:
    """Seconds of a fit and of scoring one batch in a process of its own, and the most bytes that this process ever held."""
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

    took = seconds(whole)
    kibibytes = (
        [line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
        if STATUS.exists()
        else []
    )
    return took, int(kibibytes[0]) * 1024 if kibibytes else None
