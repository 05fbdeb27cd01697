"""Choosing a few of many points that lie close to all others."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

# Points that compete for the next places before all points are compared with those that were chosen.
CONTENDERS = 512
POINTS_PER_CHUNK = 4096


def greedy_coreset(points: Tensor, count: int, starts: Tensor) -> Tensor:
    """Choose points one after another, each the farthest from those chosen before.

    This is greedy k-center search (Sener and Savarese 2018). A plain loop compares all points with each new one as it
    comes. Here a few of the farthest points compete for the next places among themselves, for as long as the farthest
    of them is farther than all other points were, which can only have come closer since. Then all points are compared
    with all those new ones in one product of matrices. The choice is that of the plain loop.

    Args:
        points: (N, d), finite.
        count: How many to choose, at most N.
        starts: Points (S,) that the first distances are the mean over, as PatchCore does it. They are not chosen by
            that.

    Returns:
        Indices (count,) in the order in which they are chosen, each at most once.
    """
    points = points - points.mean(dim=0)
    squares = points.square().sum(dim=1)
    distances = torch.cdist(points, points[starts]).mean(dim=1).square()
    chosen = torch.empty(0, dtype=torch.long, device=points.device)
    with tqdm(total=count, desc="coreset", leave=False, disable=None) as progress:
        while len(chosen) < count:
            bounds, contenders = distances.topk(min(CONTENDERS + 1, len(points)))
            limit = float(bounds[CONTENDERS]) if len(bounds) > CONTENDERS else -math.inf
            bounds, contenders = bounds[:CONTENDERS], contenders[:CONTENDERS]
            between = _squared_distances(
                points[contenders], squares[contenders], points[contenders], squares[contenders]
            )
            places = _compete(between.cpu().numpy(), bounds.cpu().numpy(), limit, count - len(chosen))
            new = contenders[torch.tensor(places, device=points.device)]
            for start in range(0, len(points), POINTS_PER_CHUNK):
                chunk = slice(start, start + POINTS_PER_CHUNK)
                nearest = _squared_distances(points[chunk], squares[chunk], points[new], squares[new]).amin(dim=1)
                torch.minimum(distances[chunk], nearest, out=distances[chunk])
            distances[new] = -math.inf
            chosen = torch.cat([chosen, new])
            progress.update(len(new))
    return chosen


def _compete(between: np.ndarray, distances: np.ndarray, limit: float, most: int) -> list[int]:
    """Choose contenders as the greedy search does, until the farthest is no farther than ``limit``.

    Args:
        between: Squared distances between the contenders, (M, M).
        distances: Their squared distances to what is chosen already, (M,).
        limit: No other point is farther than this (squared).
        most: How many to choose at most.

    Returns:
        Their indices in the order in which they are chosen, at least one.
    """
    places: list[int] = []
    while len(places) < most:
        farthest = int(distances.argmax())
        if places and distances[farthest] <= limit:
            break
        places.append(farthest)
        distances = np.minimum(distances, between[farthest])
        distances[places] = -np.inf
    return places


def _squared_distances(first: Tensor, first_squares: Tensor, second: Tensor, second_squares: Tensor) -> Tensor:
    with torch.autocast(first.device.type, enabled=False):
        return torch.addmm(second_squares, first, second.T, alpha=-2) + first_squares[:, None]
