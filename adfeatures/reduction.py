"""Which rows of a reference bank images are matched with, where all would take too long."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .references import ReferenceBank

# Rows are drawn alike from this many groups of references, or as many as there are references.
GROUPS = 8


def reduce(bank: ReferenceBank, most: int, seed: int = 0) -> None:
    """Let a bank match images with about this many random rows of each level; a complete one keeps the others too.

    At least twice the patches of an image are taken, so that no image holds all of them, and as many of each of at
    most GROUPS groups of images, of a smaller one some twice. A draw treats all images alike, so that a reference that
    is left out scores as a new image does; a coreset would not.
    """
    generator = torch.Generator().manual_seed(seed)
    images = [owners.cpu().unique(return_inverse=True) for owners in bank.image_of_row]
    bank.groups = min(GROUPS, *(len(present) for present, _ in images))
    kept = [
        _drawn(ranks % bank.groups, bank.groups, max(most, 2 * height * width), generator)
        for (_, ranks), (height, width) in zip(images, bank.grids, strict=True)
    ]
    kept = [rows.to(owners.device) for rows, owners in zip(kept, bank.image_of_row, strict=True)]
    if bank.turned:
        kept = _thin(bank, kept)
    if bank.complete:
        bank.kept = kept
    else:
        small = bank.of_rows(kept)
        bank.rows, bank.image_of_row = small.rows, small.image_of_row


def _drawn(group_of_row: Tensor, groups: int, most: int, generator: torch.Generator) -> Tensor:
    """Random rows, as many of each group, in their order; of a group with fewer rows some again. (M,) int32."""
    members = [(group_of_row == group).nonzero()[:, 0] for group in range(groups)]
    count = min(most // groups, max(map(len, members)))
    drawn = [own[torch.randperm(len(own), generator=generator)] for own in members]
    again = [own.repeat(-(-count // len(own)))[:count].sort().values for own in drawn]
    return torch.cat(again).int()


def _thin(bank: ReferenceBank, kept: Sequence[Tensor]) -> list[Tensor]:
    """Keep of the rows of rotated copies these alone. Returns where the rows of these indices are then."""
    places = []
    for level, (own, count) in enumerate(zip(kept, bank.patches_of_images, strict=True)):
        further = own >= count
        picked, order = own[further].unique(return_inverse=True)
        rows = torch.cat([torch.arange(count, device=own.device), picked])
        bank.rows[level], bank.image_of_row[level] = bank.rows[level][rows], bank.image_of_row[level][rows]
        places.append(own.masked_scatter(further, (count + order).to(own.dtype)))
    return places
