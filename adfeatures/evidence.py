"""What is seen of a patch beside its distance to the nearest reference patch.

That distance says little by itself. It says more beside those to each group of references alone, those of the matched
patch to other references, how the two differ in color, and how far apart they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .matching import as_maps, nearest_of_groups, tokens_of
from .references import Exclude, ReferenceBank

# Channels of ``looks_of``, of ``own_spreads``, and of the evidence after the distance.
LOOKS, OWN, SEEN = 6, 3, 18
# Of the looks, what depends on light.
_SHADES = 4
# Of distances, brightness and shifts, so that their logarithms are finite, in half precision too.
_LEAST, _BLACK, _SHIFT = 1e-4, 0.02, 0.01
# A distance that none is as large as: that to a group of which nothing is left.
_ABSENT = 4.0


def looks_of(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """How every patch looks, and where it is.

    Logarithms of its mean red, green and blue and of the deviation of its brightness; row and column in [0, 1].

    Args:
        images: (B, 3, H, W) in [0, 1].
        grid: Height and width of the maps, of which those of the images are multiples.

    Returns:
        (B, LOOKS, h, w).
    """
    cells = images.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))
    colors, gray = cells.mean(dim=(3, 5)), cells.mean(dim=1, keepdim=True)
    deviation = (gray - gray.mean(dim=(3, 5), keepdim=True)).square().mean(dim=(3, 5)).sqrt()
    shades = torch.cat([colors.clamp_min(0) + _BLACK, deviation + _BLACK / 2], dim=1).log()
    return torch.cat([shades, _middles(grid, images.device).to(shades).expand(shades.shape[0], -1, -1, -1)], dim=1)


def _middles(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Row and column (2, h, w) of the middles of patches, in [0, 1]."""
    rows, columns = ((torch.arange(length, device=device) + 0.5) / length for length in grid)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))


def own_spreads(distances: Tensor) -> Tensor:
    """Logarithms (M, OWN) of distances (M, G) of rows to groups of other images.

    That of the nearest, as a multiple of the mean over all rows; those of the second and of the mean over groups, as
    multiples of the nearest.
    """
    ordered, count = _ordered(distances)
    nearest, second = (_log(_at(ordered, place, count)) for place in (0, 1))
    mean = _log(_mean(ordered, count))
    return torch.stack([nearest - _log(ordered[:, 0].mean()), second - nearest, mean - nearest], dim=1)


def evidence(bank: ReferenceBank, patches: Sequence[Tensor], exclude: Exclude = None) -> list[Tensor]:
    """What is seen of every patch.

    Args:
        bank: References, with ``own``.
        patches: Features of unit length with their looks behind, one (B, C_l + LOOKS, h_l, w_l) per level.
        exclude: As of ``ReferenceBank.match``.

    Returns:
        One (B, 1 + SEEN, h_l, w_l) per level: the distance to the nearest row in the units of the bank, and the rest.
    """
    return [_of_level(bank, index, level, bank.barred(level, index, exclude)) for index, level in enumerate(patches)]


def _of_level(bank: ReferenceBank, index: int, level: Tensor, barred: Tensor | None) -> Tensor:
    rows, owners, own_looks = bank.grouped(index)
    patches = tokens_of(level.float())
    features, seen = patches[:, : rows.shape[2]], patches[:, rows.shape[2] :]
    distances, places = nearest_of_groups(features, rows, owners, barred)
    ordered, count = _ordered(distances)
    nearest = distances.argmin(dim=1, keepdim=True)
    matched = places.gather(1, nearest)[:, 0]
    columns = [
        *_spread(ordered, count),
        *(torch.zeros_like(patches[:, :OWN]) if bank.own is None else bank.own[index].float()[matched]).unbind(dim=1),
        *_differences(
            seen[:, :_SHADES], own_looks[:, :_SHADES].float()[places], nearest, distances < _ABSENT, level.shape[0]
        ),
        seen[:, _SHADES - 1],
        *_displacements(as_maps(own_looks[:, _SHADES:].float()[matched] - seen[:, _SHADES:], level)),
    ]
    distance = ordered[:, 0]
    if bank.units is not None:
        # Distances are half the squares of residuals.
        distance = distance / bank.units[index].float()[matched].square()
    return as_maps(torch.stack([distance, *columns], dim=1), level)


def _spread(ordered: Tensor, count: Tensor) -> list[Tensor]:
    """Logarithms of the smallest distance, and of others as multiples of it."""
    nearest, second, middle, last = (_log(_at(ordered, place, count)) for place in (0, 1, count // 2, count - 1))
    places = torch.arange(ordered.shape[1], device=ordered.device)
    half = places < (count // 2).clamp_min(1)
    of_half = (_log(ordered) * half).sum(dim=1) / half.sum(dim=1)
    mean = _log(_mean(ordered, count))
    return [nearest, second - nearest, middle - nearest, last - nearest, mean - nearest, of_half - nearest]


def _differences(seen: Tensor, own: Tensor, nearest: Tensor, there: Tensor, batch: int) -> list[Tensor]:
    """How shades (Q, 4) of patches differ from those (Q, G, 4) of the nearest rows, but for what all of an image do.

    Brightness, color and contrast against the nearest of all, and the least of brightness and of color.
    """
    difference = (seen[:, None] - own).unflatten(0, (batch, -1))
    difference = (difference - difference.mean(dim=1, keepdim=True)).flatten(0, 1)
    brightness = difference[..., :3].mean(dim=2)
    color = (difference[..., :3] - brightness[..., None]).square().sum(dim=2).sqrt()
    shift, tint, contrast = (part.gather(1, nearest)[:, 0] for part in (brightness, color, difference[..., 3]))
    least = (part.masked_fill(~there, torch.inf).amin(dim=1) for part in (brightness.abs(), color))
    return [shift, shift.abs(), tint, contrast, *least]


def _displacements(shifts: Tensor) -> list[Tensor]:
    """Logarithms of how far the nearest row lies from where a patch does, and of how unlike its neighbors' that is.

    Args:
        shifts: From the patches to their nearest rows, (B, 2, h, w).
    """
    height, width = shifts.shape[2:]
    padded = F.pad(shifts, (1, 1, 1, 1), mode="replicate")
    places = ((0, 1), (2, 1), (1, 0), (1, 2))
    neighbors = [padded[:, :, top : top + height, left : left + width] for top, left in places]
    apart = torch.stack([_length(neighbor - shifts) for neighbor in neighbors])
    # One of the four may belong to something else.
    unlike = (apart.sum(dim=0) - apart.amax(dim=0)).clamp_min(0) / 3
    return [(length + _SHIFT).log().flatten() for length in (_length(shifts), unlike)]


def _length(vectors: Tensor) -> Tensor:
    return vectors.square().sum(dim=1).sqrt()


def _ordered(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (Q, G) in ascending order, absent ones last, and how many are there (Q, 1), at least one."""
    ordered = distances.clamp_max(_ABSENT).sort(dim=1).values
    return ordered, (ordered < _ABSENT).sum(dim=1, keepdim=True).clamp_min(1)


def _at(ordered: Tensor, place: Tensor | int, count: Tensor) -> Tensor:
    """The distances (Q,) at a place (Q, 1), or the last that is there."""
    return ordered.gather(1, torch.minimum(torch.zeros_like(count) + place, count - 1))[:, 0]


def _mean(ordered: Tensor, count: Tensor) -> Tensor:
    there = torch.arange(ordered.shape[1], device=ordered.device) < count
    return (ordered * there).sum(dim=1) / count[:, 0]


def _log(distances: Tensor) -> Tensor:
    return (distances + _LEAST).log()
