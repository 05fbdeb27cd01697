"""Distances, letters and noise, against points on outlines and plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from training.data.synthetic.shapes import (
    box,
    disc,
    grain,
    lettering,
    noise,
    pebbles,
    polygon,
    ring,
    rounded,
    sample,
    segment,
    smooth,
)


def test_shapes_have_the_distances_of_their_outlines() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.uniform(-1, 1, (2, 1, 400)).astype(np.float32)
    t = np.linspace(0, 1, 4001)
    side_x, side_y = np.concatenate([0.5 * (2 * t - 1)] * 2), np.repeat((0.3, -0.3), t.size)
    top_x, top_y = np.repeat((0.5, -0.5), t.size), np.concatenate([0.3 * (2 * t - 1)] * 2)
    outline = np.stack([np.concatenate([side_x, top_x]), np.concatenate([side_y, top_y])])
    nearest = np.hypot(x.T - outline[0], y.T - outline[1]).min(1)
    inside = (np.abs(x) < 0.5) & (np.abs(y) < 0.3)
    np.testing.assert_allclose(box(x, y, 0.5, 0.3)[0], np.where(inside[0], -nearest, nearest), atol=1e-3)
    line = np.stack([-0.4 + 0.9 * t, 0.2 - 0.5 * t])
    np.testing.assert_allclose(
        segment(x, y, (-0.4, 0.2), (0.5, -0.3))[0], np.hypot(x.T - line[0], y.T - line[1]).min(1), atol=1e-3
    )


def test_pebbles_of_a_regular_grid_are_where_they_should_be() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.uniform(0, 1, (2, 20, 20)).astype(np.float32)
    near, far, cell, total = pebbles(rng, x, y, 4, irregular=0)
    u, v = (x - x.min()) * 4 % 1 - 0.5, (y - y.min()) * 4 % 1 - 0.5
    np.testing.assert_allclose(near, np.hypot(u, v), atol=1e-4)
    np.testing.assert_allclose(far, np.hypot(1 - np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))), atol=1e-4)
    assert cell.min() >= 0 and cell.max() < total


def test_noise_has_unit_spread() -> None:
    values = noise(np.random.default_rng(4), (400, 400), 40)
    assert abs(float(values.mean())) < 0.1 and float(values.std()) == pytest.approx(1, abs=0.15)


def plane(count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.random.default_rng(5).uniform(-1, 1, (2, count)).astype(np.float32)
    return x, y


def test_round_shapes_have_the_distances_of_points_on_them() -> None:
    x, y = plane()
    angles = np.linspace(0, 2 * math.pi, 4001)
    unit = np.stack([np.cos(angles), np.sin(angles)])

    def nearest(radius: float) -> np.ndarray:
        return np.hypot(x[:, None] - radius * unit[0], y[:, None] - radius * unit[1]).min(1)

    inside = np.hypot(x, y) < 0.6
    np.testing.assert_allclose(disc(x, y, 0.6), np.where(inside, -1, 1) * nearest(0.6), atol=1e-3)
    within = inside & (np.hypot(x, y) > 0.3)
    expected = np.where(within, -1, 1) * np.minimum(nearest(0.3), nearest(0.6))
    np.testing.assert_allclose(ring(x, y, 0.3, 0.6), expected, atol=1e-3)


@pytest.mark.parametrize("sides", [3, 6])
def test_a_polygon_is_the_cut_of_its_half_planes(sides: int) -> None:
    x, y = plane()
    normals = (np.arange(sides) + 0.5) * 2 * math.pi / sides
    expected = (x[:, None] * np.cos(normals) + y[:, None] * np.sin(normals) - 0.4).max(1)
    np.testing.assert_allclose(polygon(x, y, sides, 0.4), expected, atol=1e-5)


def test_a_rounded_box_is_a_smaller_box_grown() -> None:
    x, y = plane()
    np.testing.assert_allclose(box(x, y, 0.5, 0.3, 0.1), box(x, y, 0.4, 0.2) - 0.1, atol=1e-6)


def test_edges_are_a_quarter_circle_and_steps_have_no_corners() -> None:
    depth = np.linspace(0, 0.1, 11)
    # Height over a wall that is a circle of radius 0.1 around (0.1, 0).
    circle = np.sqrt(np.maximum(0.01 - (0.1 - depth) ** 2, 0)) / 0.1
    np.testing.assert_allclose(rounded(-depth, 0.1), circle, atol=1e-7)
    assert rounded(np.array([0.05, -0.2]), 0.1).tolist() == [0, 1]
    t = np.linspace(-0.5, 1.5, 2001)
    slope = np.gradient(smooth(t), t)
    assert smooth(np.array([-1.0, 0.0, 0.5, 1.0, 2.0])).tolist() == [0, 0, 0.5, 1, 1]
    assert slope.min() > -1e-9 and np.abs(np.diff(slope)).max() < 0.01


def test_maps_are_read_bilinearly() -> None:
    rng = np.random.default_rng(6)
    maps = rng.random((2, 7, 9), dtype=np.float32)
    x, y = rng.uniform(-0.8, 0.8, (2, 5, 5)).astype(np.float32)
    at = [(y + 1) * 7 / 2 - 0.5, (x + 1) * 9 / 2 - 0.5]
    expected = [ndimage.map_coordinates(layer, at, order=1) for layer in maps]
    np.testing.assert_allclose(sample(maps, x, y), expected, atol=1e-5)
    assert not sample(maps, x + 9, y, "zeros").any()


def test_letters_are_as_tall_as_asked_and_read_along_x() -> None:
    steps = (np.arange(400, dtype=np.float32) + 0.5) / 200 - 1
    x, y = np.meshgrid(steps, steps)
    cover = lettering("HI", x, y, 0.4)
    rows, columns = np.flatnonzero((cover > 0.5).any(1)), np.flatnonzero((cover > 0.5).any(0))
    assert np.ptp(steps[rows]) == pytest.approx(0.4, abs=0.04) and abs(steps[rows].mean()) < 0.02
    assert cover.min() >= 0 and cover.max() <= 1 and abs(steps[columns[[0, -1]]].mean()) < 0.02
    # The bar of the H is left of the middle, and the I right of it stands alone.
    middle = cover[200] > 0.5
    assert ndimage.label(middle)[1] == 2 and ndimage.label(cover[120] > 0.5)[1] == 0
    first, second = ndimage.find_objects(ndimage.label(middle)[0])
    assert np.ptp(steps[first]) > 3 * np.ptp(steps[second])
    small = lettering("HI", x, y, 0.2)
    assert small.sum() == pytest.approx(cover.sum() / 4, rel=0.05)


def test_noise_has_bumps_of_the_size_asked_for() -> None:
    def spacing(cells: tuple[float, float], axis: int) -> float:
        values = noise(np.random.default_rng(7), (240, 240), cells)
        crossings = np.diff(np.signbit(values), axis=axis).mean()
        return 1 / float(crossings)

    down, across = (spacing((6, 24), axis) for axis in (0, 1))
    assert 3 < down / across < 5
    assert grain(np.random.default_rng(8), (300, 300)).std() == pytest.approx(1, abs=0.01)
    rough, fine = (noise(np.random.default_rng(9), (240, 240), 6, octaves) for octaves in (1, 4))
    assert np.abs(np.diff(fine)).mean() > 1.5 * np.abs(np.diff(rough)).mean()
