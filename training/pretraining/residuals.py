"""Residuals of a training batch, in which every image has reference images of its own (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adfeatures.errors import InputError

# Query patches whose similarities are in memory at a time.
QUERIES_PER_CHUNK = 1024


@torch.no_grad()
def batch_residuals(features: Sequence[Tensor], references: Sequence[Tensor]) -> list[Tensor]:
    """Features minus, per patch, the reference patch of highest cosine similarity among those of the same image.

    ``adfeatures.ReferenceBank`` does the same for one bank; here are as many banks as images. Similarities are computed
    in float32, but those of bfloat16 features in bfloat16, as the published training does: near ties fall otherwise.

    Args:
        features: Maps of the queries, one (B, C_l, h_l, w_l) per level.
        references: Maps of the references of each query, one (B, k, C_l, h_l, w_l) per level.

    Returns:
        Residuals of the shapes of the features.

    Raises:
        InputError: If there are no references, or images and channels do not agree.
    """
    for level, bank in zip(features, references, strict=True):
        if bank.ndim != 5 or not bank.shape[1] or (bank.shape[0], bank.shape[2]) != tuple(level.shape[:2]):
            raise InputError(
                f"References of shape {tuple(bank.shape)} do not fit features of shape {tuple(level.shape)}."
            )
    return [_residuals(level, bank) for level, bank in zip(features, references, strict=True)]


def _residuals(level: Tensor, bank: Tensor) -> Tensor:
    queries = level.flatten(2).transpose(1, 2)
    rows = bank.transpose(1, 2).flatten(2).transpose(1, 2)
    if level.dtype == torch.bfloat16:
        directions, units = F.normalize(queries, dim=2), F.normalize(rows, dim=2).transpose(1, 2)
    else:
        # The length of the query does not change which row is nearest, so only the rows are normalized.
        directions, units = queries.float(), F.normalize(rows.float(), dim=2).transpose(1, 2)
    with torch.autocast(level.device.type, enabled=False):
        chunks = directions.split(QUERIES_PER_CHUNK, dim=1)
        nearest = torch.cat([(chunk @ units).argmax(dim=2) for chunk in chunks], dim=1)
    matched = rows.gather(1, nearest[..., None].expand(-1, -1, rows.shape[2]))
    return (queries - matched).transpose(1, 2).unflatten(2, level.shape[2:])
