"""Damage: it stays in one place, on the product, and grows with its strength."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from training.data.synthetic.canvas import BODY, HEIGHT, Part
from training.data.synthetic.defects import DEFECTS, Damage, dent, holes, rust, scratch
from training.data.synthetic.shapes import box, noise

DAMAGES = {**{code: damage for code, (_, damage) in DEFECTS.items()}, "dent": dent, "holes": holes, "rust": rust}


def plate(surface: bool = False) -> Part:
    """A gray plate that is twice as wide as tall on darker ground; a sheet fills the canvas."""
    part = Part.blank(96)
    part.color[...] = 0.1
    part.floor = part.maps.copy()
    part.surface, part.core = surface, (0.5, 0.4, 0.3)
    distance = np.full(part.shape, -1, np.float32) if surface else box(part.x, part.y, 0.7, 0.35)
    part.solid(distance, 0.15, 0.45, gloss=0.5)
    return part


def spoil(part: Part, damage: Damage, seed: int, strength: float) -> Part:
    flawed = replace(part, maps=part.maps.copy())
    damage(flawed, np.random.default_rng(seed), strength)
    return flawed


@pytest.mark.parametrize("surface", [False, True])
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_visible_local_and_leaves_maps_in_range(name: str, surface: bool) -> None:
    part = plate(surface)
    for seed in range(12):
        flawed = spoil(part, DAMAGES[name], seed, strength=0.5)
        assert np.isfinite(flawed.maps).all()
        difference = np.abs(flawed.maps - part.maps)
        touched = difference.max(0) > 0.01
        assert touched.any(), seed
        # At most what its largest size covers: a square of 1.2 of the 2 of the canvas.
        rows, columns = (np.flatnonzero(touched.any(axis)) for axis in (1, 0))
        assert max(np.ptp(rows), np.ptp(columns)) * part.texel < 1.5, seed
        assert touched.mean() < 0.2, seed
        for layer in flawed.maps[HEIGHT + 1 :]:
            assert layer.min() >= -1e-3 and layer.max() <= 1 + 1e-3, seed
        assert (difference[:, ~touched].max(initial=0)) <= 0.01


@pytest.mark.parametrize("name", ["AK", "CH", "HS", "ZW", "dent", "holes", "rust"])
def test_what_acts_on_the_product_leaves_the_ground_alone(name: str) -> None:
    part = plate()
    ground = part.body == 0
    for seed in range(12):
        np.testing.assert_array_equal(spoil(part, DAMAGES[name], seed, 0.8).maps[:, ground], part.maps[:, ground])


@pytest.mark.parametrize("damage", [dent, scratch, rust])
def test_stronger_damage_changes_more(damage: Damage) -> None:
    part = plate()
    weak, strong = (
        np.mean([np.abs(spoil(part, damage, seed, strength).maps - part.maps).sum() for seed in range(10)])
        for strength in (0.0, 1.0)
    )
    assert strong > 2 * weak


def test_a_dent_is_a_hollow_with_a_rim() -> None:
    part = plate(surface=True)
    change = spoil(part, dent, 1, 1.0).height - part.height
    row, column = np.unravel_index(change.argmin(), change.shape)
    around = np.hypot(part.x - part.x[row, column], part.y - part.y[row, column])
    deepest, rim = change.min(), change.max()
    assert 0.1 * -deepest < rim < 0.4 * -deepest
    assert around.flat[change.argmax()] > 0.04


def test_material_is_gone_where_a_piece_is_missing() -> None:
    part, areas = plate(), []
    for seed in range(10):
        flawed = spoil(part, DAMAGES["QS"], seed, 0.5)
        lost = flawed.maps[BODY] < part.maps[BODY] - 0.5
        np.testing.assert_allclose(flawed.maps[BODY], np.minimum(flawed.maps[BODY], part.maps[BODY]), atol=1e-6)
        np.testing.assert_allclose(flawed.color[:, lost], part.floor[1:4][:, lost], atol=0.25)
        areas.append(lost.sum() * part.texel**2)
    assert 0.002 < np.mean(areas) < 0.2


def test_what_is_moved_is_neither_lost_nor_copied() -> None:
    part = plate(surface=True)
    part.color[...] = 0.3 + 0.1 * noise(np.random.default_rng(0), part.shape, 12)
    for seed in range(8):
        flawed = spoil(part, DAMAGES["BX"], seed, 0.3)
        touched = np.abs(flawed.color - part.color).max(0) > 1e-4
        assert flawed.color[:, touched].mean() == pytest.approx(part.color[:, touched].mean(), abs=0.03)
        assert flawed.color.max() <= part.color.max() + 1e-5 and flawed.color.min() >= part.color.min() - 1e-5
