"""Matching patches with the rows of a bank: the row of highest cosine similarity, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .coreset import greedy_coreset

# One block of similarities, 1024 x 2048, stays in the processor's cache: larger ones are slower, and the whole matrix
# may not fit at all.
QUERIES_PER_CHUNK = 1024
ROWS_PER_CHUNK = 2048


def nearest_rows(queries: Tensor, rows: Tensor, owners: Tensor, barred: Tensor | None) -> Tensor:
    """Index (Q,) of the row of highest cosine similarity to each query.

    Args:
        queries: (Q, C).
        rows: (N, C).
        owners: The image of each row, (N,) int32.
        barred: The image of each query whose rows are left out, (Q,); None for no such images.
    """
    # A compiled graph takes any number of images, and so no fixed number of chunks.
    if torch.compiler.is_compiling():
        return _nearest_of_chunk(queries, rows, owners, barred)
    chunks = queries.split(QUERIES_PER_CHUNK)
    images = [None] * len(chunks) if barred is None else barred.split(QUERIES_PER_CHUNK)
    return torch.cat([_nearest_of_chunk(chunk, rows, owners, own) for chunk, own in zip(chunks, images, strict=True)])


def _nearest_of_chunk(queries: Tensor, rows: Tensor, owners: Tensor, barred: Tensor | None) -> Tensor:
    """Index (Q,) of the row of highest cosine similarity to each query, rows of its barred image left out."""
    queries = queries.float()
    best = torch.full(queries.shape[:1], -torch.inf, device=queries.device)
    nearest = torch.zeros(queries.shape[:1], dtype=torch.long, device=queries.device)
    for start in range(0, len(rows), ROWS_PER_CHUNK):
        chunk = rows[start : start + ROWS_PER_CHUNK].float()
        # The length of the query does not change which row is nearest, so only the rows are normalized.
        with torch.autocast(queries.device.type, enabled=False):
            similarity = queries @ F.normalize(chunk, dim=1).T
        if barred is not None:
            similarity.masked_fill_(owners[start : start + ROWS_PER_CHUNK] == barred[:, None], -torch.inf)
        value, index = similarity.max(dim=1)
        better = value > best
        best = torch.where(better, value, best)
        nearest = torch.where(better, index + start, nearest)
    return nearest


def nearest_of_groups(
    queries: Tensor, rows: Tensor, owners: Tensor, barred: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine distance of each query to the nearest row of every group, (Q, G), and the index of that row among all.

    Where all rows of a group are left out, the distance is infinite.

    Args:
        queries: (Q, C), of unit length.
        rows: (G, M, C), of unit length.
        owners: The image of each row, (G, M) int32.
        barred: The image of each query whose rows are left out, (Q,); None for no such images.
    """
    if torch.compiler.is_compiling():
        return _of_groups(queries, rows, owners, barred)
    chunks = queries.split(QUERIES_PER_CHUNK)
    images = [None] * len(chunks) if barred is None else barred.split(QUERIES_PER_CHUNK)
    parts = [_of_groups(chunk, rows, owners, own) for chunk, own in zip(chunks, images, strict=True)]
    distances, places = (torch.cat(column) for column in zip(*parts, strict=True))
    return distances, places


def _of_groups(queries: Tensor, rows: Tensor, owners: Tensor, barred: Tensor | None) -> tuple[Tensor, Tensor]:
    queries, nearest = queries.float(), []
    for group, images in zip(rows, owners, strict=True):
        with torch.autocast(queries.device.type, enabled=False):
            similarity = queries @ group.float().T
        if barred is not None:
            similarity.masked_fill_(images == barred[:, None], -torch.inf)
        nearest.append(similarity.max(dim=1))
    values, places = (torch.stack(column, dim=1) for column in zip(*nearest, strict=True))
    places = places + torch.arange(len(rows), device=places.device) * rows.shape[1]
    # Half the squares of differences tell small distances, where 1 minus the similarity is mostly rounding.
    distances = (queries[:, None] - rows.flatten(0, 1)[places].float()).square().sum(dim=2) / 2
    return distances.masked_fill(values.isneginf(), torch.inf), places


def farthest_rows(rows: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Indices of a fraction of the rows, each the farthest from those before it, in ascending order."""
    count = max(1, round(fraction * len(rows)))
    start = torch.randint(len(rows), (1,), generator=generator).to(rows.device)
    # Between vectors of unit length, Euclidean distances are ordered as cosine distances are.
    chosen = greedy_coreset(F.normalize(rows.float(), dim=1), count, start)
    return torch.cat([start, chosen[chosen != start][: count - 1]]).sort().values


def as_maps(tokens: Tensor, level: Tensor) -> Tensor:
    """Patches (B * h * w, C) as maps of the size of a level."""
    return tokens.unflatten(0, (level.shape[0], *level.shape[2:])).permute(0, 3, 1, 2)


def tokens_of(level: Tensor) -> Tensor:
    """Maps (B, C, h, w) as patches (B * h * w, C)."""
    return level.permute(0, 2, 3, 1).flatten(0, 2)


def image_of_each_patch(level: Tensor, image_of_each_map: Sequence[int]) -> Tensor:
    """The image (B * h * w,) of every patch of maps (B, C, h, w), of the image of each map."""
    patches = level.shape[2] * level.shape[3]
    return torch.tensor(image_of_each_map, dtype=torch.int32, device=level.device).repeat_interleave(patches)
