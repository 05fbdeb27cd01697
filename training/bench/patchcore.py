"""PatchCore's coreset against the plain loop that compares all patches with one chosen patch after another."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from adfeatures.coreset import greedy_coreset
from adfeatures.demo import SAMPLES
from adfeatures.factory import create_model, create_transform
from adfeatures.images import read_image
from adfeatures.measuring import Measurement, timed

from ..methods.patchcore import STARTS
from ..methods.patches import neighborhood_vectors

DIM, PROJECTION = 1024, 128
# Where not quick, the loop's first steps stand for all, which take the same time each.
STEPS = 200


@torch.no_grad()
def rows(quick: bool = False) -> Iterator[Measurement]:
    """10 % of 50,000 patches (quick: 10,000), chosen in a projection, which is the default, and in all dimensions."""
    points = patches(10_000 if quick else 50_000)
    count = len(points) // 10
    steps = count if quick else min(STEPS, count)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randperm(len(points), generator=generator)[:STARTS]
    projected = points @ torch.empty(DIM, PROJECTION).uniform_(-1, 1, generator=generator)
    greedy_coreset(projected[:1000], 100, torch.arange(STARTS))  # warms up
    for where, searched in ((f"projected to {PROJECTION}", projected), ("in all dimensions", points)):
        ours, chosen = timed(partial(greedy_coreset, searched, count, starts))
        naive, plain = timed(partial(plain_loop, searched, steps, starts))
        radius, same = cover_radius(points, chosen), int((chosen[:steps] == plain).sum())
        other = f"{cover_radius(points, plain):.4f}" if steps == count else "not run to its end"
        note = f"cover radius {radius:.4f}, naive {other}; {same} of {steps} steps alike"
        what = f"coreset {where}, {count:,} of {len(points):,} x {DIM:,}"
        yield Measurement.of_runs(what, [ours], [naive * count / steps], note=note)


def patches(count: int) -> Tensor:
    """Patch vectors (count, DIM) of the sample images, in four orientations, as the default model sees them."""
    model = create_model()
    transform = create_transform(model)
    images = [transform(read_image(path)) for path in sorted((SAMPLES / "references").iterdir())]
    images = [image.rot90(turns, dims=(1, 2)) for image in images for turns in range(4)]
    of_images = [neighborhood_vectors(model.backbone_features(image[None]), DIM).flatten(0, 2) for image in images]
    vectors = torch.cat(of_images)
    return vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:count]]


def plain_loop(points: Tensor, count: int, starts: Tensor) -> Tensor:
    """Indices of points (N, d), each the farthest from those before it."""
    distances = torch.cdist(points, points[starts]).mean(dim=1)
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(distances.argmax()))
        # The fastest of torch's ways to compute one column of distances, but for products with norms that are kept.
        new = torch.cdist(points, points[chosen[-1:]], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
        distances = torch.minimum(distances, new)
    return torch.tensor(chosen)


def cover_radius(points: Tensor, chosen: Tensor) -> float:
    """The largest distance of a point from the nearest chosen one."""
    return max(float(torch.cdist(chunk, points[chosen]).amin(dim=1).max()) for chunk in points.split(1024))
