"""From normal images to the reference bank of a product."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .errors import InputError
from .geometry import PLAIN, Geometry, View
from .learned import LearnedScorer
from .predictor import BATCH_SIZE, PRESET, Images, normal_photos, stacked, view_batches
from .records import BankRecord
from .reduction import reduce
from .references import ReferenceBank
from .scoring import Project, cells_of, cosine_distances, image_scores
from .sources import Photo, name_of

if TYPE_CHECKING:
    from .extractor import FeatureExtractor

# Steps of a full turn that references of parts in any orientation are rotated by.
ROTATIONS = 8
# Parts lie in any orientation if this leaves less than this fraction of the distance of one of them to the others. Of
# eight references of a development product that is so for an orange and a mixer, whose defects are found better then.
CLOSER = 0.9

# Pixels of the model's input around a region of interest whose patches see its border, where a part that shifts looks
# different every time.
MARGIN = 32

# Patches of turned views per level, and what counts of the views, bool (B, H, W); None for all.
Turned: TypeAlias = "tuple[list[Tensor], Tensor | None]"


class Encoded(NamedTuple):
    """Normal images as the backbone shows them.

    Attributes:
        full: A bank of all patches of all views.
        counts: What counts of these views, bool (K, H, W); None for all.
    """

    full: ReferenceBank
    counts: Tensor | None

    def bank(self) -> ReferenceBank:
        """A bank of the patches that count, and of those next to a region of interest."""
        if self.counts is None:
            return dataclasses.replace(self.full)
        margin = 0 if self.full.record.geometry.region is None else MARGIN / self.counts.shape[1]
        kept = []
        for rows, grid in zip(self.full.rows, self.full.grids, strict=True):
            near = round(margin * grid[0])
            cells = F.max_pool2d(cells_of(self.counts, grid)[:, None].float(), 2 * near + 1, 1, near)
            kept.append(cells.flatten().nonzero()[:, 0].to(rows.device))
        return self.full.of_rows(kept)


def fit(
    model: FeatureExtractor,
    project: Project,
    images: Images,
    *,
    geometry: Geometry = PLAIN,
    coreset: float | None = None,
    rotations: int | None = None,
) -> ReferenceBank:
    """See ``FeatureExtractor.set_references``; ``project`` takes residuals of all levels to what the scorer takes."""
    upright, *turned = encode(model, images, model.bit_depth, geometry=geometry, rotations=rotations)
    full = bank = upright.full
    if turned or not geometry.is_plain:
        bank = upright.bank()
    if turned:
        bank = bank.with_turned([own.bank() for own in turned])
    if coreset is not None:
        bank = bank.coreset(coreset)
    model.scorer.prepare(bank)
    views = full.views_of(bank.left_out) if bank.num_images > 1 else []
    counts = None if upright.counts is None else upright.counts[[number for number, _ in views]]

    def left_out() -> Iterator[Sequence[Tensor]]:
        return bank.leave_one_out(full=full, compare=model.scorer.compare) if views else iter(())

    bank.scales = model.scorer.scales(left_out(), len(bank.rows), counts)
    if bank is not full:  # Later its images are not whole any more.
        scores = image_scores(left_out(), bank.scales, model.scorer, project, model.backbone.reductions[0], counts)
        of_images: dict[int, list[float]] = {}
        for (_, image), score in zip(views, scores, strict=True):
            of_images.setdefault(image, []).append(score)
        bank.record.normal_scores = [float(np.max(own)) for own in of_images.values()]
    return bank


def encode(
    model: FeatureExtractor,
    images: Images,
    bit_depth: int,
    known: Collection[str] = (),
    *,
    geometry: Geometry = PLAIN,
    rotations: int | None = 1,
) -> list[Encoded]:
    """Normal images, and the same images turned by each further part of a full turn.

    Arguments, warnings and errors as of ``normal_photos``. With rotations None the first images decide.

    Raises:
        InputError: If no image is left.
    """
    preset = None if isinstance(images, Tensor) else PRESET
    record = BankRecord(
        model=model.name,
        form=model.scorer.form,
        img_size=model.img_size,
        preset=preset,
        bit_depth=bit_depth,
    )
    maps: list[list[list[Tensor]]] = []
    counts: list[list[Tensor]] = []
    owners: list[int] = []
    first: dict[float, Turned] = {}
    for photos in _shown(normal_photos(model, images, bit_depth, known, geometry)):
        if rotations is None:
            first = _quarter_turns(model, photos)
            rotations = ROTATIONS if first and _left_when_turned(model, first.values()).min() < CLOSER else 1
        if not owners:
            record.rotations = rotations
            maps, counts = [[] for _ in range(rotations)], [[] for _ in range(rotations)]
        for numbers, views in view_batches(photos, BATCH_SIZE):
            for number in range(rotations):
                turns = number / rotations
                patches, own = first.pop(turns) if turns in first else _patches(model, views, turns)
                maps[number].append(patches)
                counts[number] += [] if own is None else [own]
            owners += [len(record.files) + number for number in numbers]
        if (cut := photos[0].cut) is not None:
            record.geometry = cut.geometry
        record.files += [name_of(photo.source) for photo in photos]
        record.sha256s += [photo.sha256 for photo in photos]
        record.pixels += [photo.pixels for photo in photos]
    if not owners:
        which = "are left that are not references already" if known else "were given"
        raise InputError(f"No reference images {which}. Give at least one normal image, better eight.")
    encoded = []
    for of_turn, own_counts in zip(maps, counts, strict=True):
        levels = [torch.cat(level) for level in zip(*of_turn, strict=True)]
        full = ReferenceBank.from_features(levels, owners, model.scorer.looks)
        full.record = record
        encoded.append(Encoded(full, torch.cat(own_counts) if own_counts else None))
    return encoded


def _shown(batches: Iterable[list[Photo]]) -> Iterator[list[Photo]]:
    """The batches, with progress on a terminal if they take long."""
    with tqdm(desc="references", unit="image", delay=2, leave=False, disable=None) as progress:
        for photos in batches:
            yield photos
            progress.update(len(photos))


def _quarter_turns(model: FeatureExtractor, photos: Sequence[Photo]) -> dict[float, Turned]:
    """Whole photos by the turn; none of a single photo, or for models that CLOSER was not chosen for."""
    views = [view for photo in photos for view in photo.views]
    if not 1 < len(views) == len(photos) or not isinstance(model.scorer, LearnedScorer):
        return {}
    return {turns: _patches(model, views, turns) for turns in (0, 0.25, 0.5, 0.75)}


def _left_when_turned(model: FeatureExtractor, turned: Iterable[Turned]) -> Tensor:
    """What fraction (K,) of the distance of each photo to the others is left when these may be in any of the turns.

    Distances are to as many patches as the model matches with; the first of the turns is none.
    """
    upright, *others = (ReferenceBank.from_features(patches, looks=model.scorer.looks) for patches, _ in turned)
    apart = []
    for bank in (dataclasses.replace(upright), upright.with_turned(others)):
        reduce(bank, LearnedScorer.ROWS)
        levels = zip(*bank.leave_one_out(full=upright), strict=True)
        apart.append(torch.stack([torch.cat([*map(cosine_distances, level)]).mean(dim=(1, 2)) for level in levels]))
    as_they_are, in_any_turn = apart
    return (in_any_turn / as_they_are).log().mean(dim=0).exp()


def _patches(model: FeatureExtractor, views: Sequence[View], turns: float) -> Turned:
    x, counts = stacked([_turned(view, turns) for view in views])
    return model.patches(model.as_input(x)), counts


def _turned(view: View, turns: float) -> View:
    counts = None if view.counts is None else turn(view.counts[None].float(), turns, view.size)[0] > 0.5
    return View(turn(view.x, turns, view.size), counts, view.size)


def turn(x: Tensor, turns: float, size: tuple[float, float]) -> Tensor:
    """A transformed image (3, H, W) turned clockwise by a part of a full turn, mirrored beyond its borders.

    Args:
        x: The image, squashed or not.
        turns: 0 to 1; 0 gives the image itself.
        size: Height and width of the photo before it was squashed, in which the turn is a turn.
    """
    if turns == 0:
        return x
    (height, width), angle = size, 2 * math.pi * turns
    cosine, sine = math.cos(angle), math.sin(angle)
    # Coordinates go from -1 to 1 along either side.
    theta = torch.tensor([[cosine, sine * height / width, 0], [-sine * width / height, cosine, 0]])
    grid = F.affine_grid(theta[None], [1, *x.shape], align_corners=False).to(x)
    return F.grid_sample(x[None], grid, padding_mode="reflection", align_corners=False)[0]
