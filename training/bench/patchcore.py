"""PatchCore's coreset against the plain loop that compares all patches with one chosen patch after another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adfeatures.coreset import greedy_coreset
from adfeatures.demo import SAMPLES
from adfeatures.factory import create_model, create_transform
from adfeatures.images import read_image

from ..methods.patchcore import STARTS
from ..methods.patches import neighborhood_vectors
from .timing import Row, seconds

DIM, PROJECTION = 1024, 128
# The loop is run to its end with ``quick``. Otherwise its first steps stand for all, which take the same time each.
STEPS = 200


@torch.no_grad()
def rows(quick: bool = False) -> Iterator[Row]:
    """Table rows: 10 % of 50,000 patches (quick: 10,000), in a projection (the default) and in all dimensions."""
    points = patches(10_000 if quick else 50_000)
    count = len(points) // 10
    steps = count if quick else min(STEPS, count)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randperm(len(points), generator=generator)[:STARTS]
    projected = points @ torch.empty(DIM, PROJECTION).uniform_(-1, 1, generator=generator)
    greedy_coreset(projected[:1000], 100, torch.arange(STARTS))  # warms up
    for where, searched in ((f"projected to {PROJECTION}", projected), ("in all dimensions", points)):
        found: dict[str, Tensor] = {}
        ours = seconds(
            lambda found=found, searched=searched: found.update(ours=greedy_coreset(searched, count, starts))
        )
        plain = seconds(lambda found=found, searched=searched: found.update(plain=plain_loop(searched, steps, starts)))
        same = int((found["ours"][:steps] == found["plain"]).sum())
        radius = f"{cover_radius(points, found['ours']):.4f}"
        other = f"{cover_radius(points, found['plain']):.4f}" if steps == count else "not run to its end"
        naive = plain * count / steps
        yield Row(
            f"coreset {where}, {count:,} of {len(points):,} x {DIM:,}",
            ours,
            naive,
            naive / ours,
            f"cover radius {radius}, naive {other}; {same} of {steps} steps alike",
        )


def patches(count: int) -> Tensor:
    """Patch vectors (count, DIM) of the sample images, in four orientations, as the default model sees them."""
    model = create_model()
    transform = create_transform(model)
    images = [transform(read_image(path)) for path in sorted((SAMPLES / "references").iterdir())]
    images = [image.rot90(turns, dims=(1, 2)) for image in images for turns in range(4)]
    vectors = torch.cat(
        [neighborhood_vectors(model.backbone_features(image[None]), DIM).flatten(0, 2) for image in images]
    )
    return vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:count]]


def plain_loop(points: Tensor, count: int, starts: Tensor) -> Tensor:
    """Indices of points (N, d), each the farthest from those before it."""
    distances = torch.cdist(points, points[starts]).mean(dim=1)
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(distances.argmax()))
        # Of the ways to compute one column of distances in torch, the fastest but for products with norms that are
        # kept.
        new = torch.cdist(points, points[chosen[-1:]], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
        distances = torch.minimum(distances, new)
    return torch.tensor(chosen)


def cover_radius(points: Tensor, chosen: Tensor) -> float:
    """The largest distance of a point from the nearest chosen one."""
    return max(float(torch.cdist(part, points[chosen]).amin(dim=1).max()) for part in points.split(1024))
