"""The greedy search for a coreset as the plain loop that compares all points with each new one."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist


def naive_coreset(points: np.ndarray, count: int, starts: np.ndarray) -> list[int]:
    """Indices of points (N, d), each the farthest from those before it; the first, on average, from ``starts``."""
    distances = cdist(points, points[starts]).mean(axis=1)
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(distances.argmax()))
        distances = np.minimum(distances, np.linalg.norm(points - points[chosen[-1]], axis=1))
        distances[chosen] = -1
    return chosen
