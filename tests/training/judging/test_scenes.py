"""Scenes: what lies where, and what a flaw of pieces does."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.photographs import Noise
from scipy import ndimage

from training.judging.camera import SCENE
from training.judging.scenes import Objects, Rendered, Scene, Texture, Whole, smooth_noise

TRAY = Objects(("a", "b"), (0.1, 0.1, 0.1), side=0.25, grid=(3, 3), turn=180, other="c")


def scene(setting: Objects | Texture | Whole | Rendered, seed: int = 0, flaw: str | None = None) -> Scene:
    return setting.scene(Noise(), np.random.default_rng(seed), flaw=flaw)


def test_objects_lie_in_their_places_at_their_size() -> None:
    whole = scene(TRAY)
    labels, count = ndimage.label(whole.body)
    assert count == 9 and TRAY.pieces
    middles = np.sort(np.array(ndimage.center_of_mass(whole.body, labels, range(1, 10))), axis=0)
    expected = np.repeat([1 / 6, 1 / 2, 5 / 6], 3) * SCENE
    np.testing.assert_allclose(middles[:, 0], expected, atol=3)
    areas = ndimage.sum_labels(whole.body, labels, range(1, 10))
    # Ellipses whose longer axis is a quarter of the scene, the shorter one 3/4 of it.
    np.testing.assert_allclose(areas, math.pi / 4 * 0.75 * (0.25 * SCENE) ** 2, rtol=0.05)


@pytest.mark.parametrize("flaw", ["missing", "swapped"])
def test_one_piece_alone_is_missing_or_swapped(flaw: str) -> None:
    for seed in range(2):
        whole, flawed = scene(TRAY, seed), scene(TRAY, seed, flaw)
        changed = np.abs(whole.colors - flawed.colors).max(axis=2) > 0.02
        rows, columns = np.nonzero(changed)
        assert 0.02 < changed.mean() < 0.08
        # An object and its shadow.
        assert max(np.ptp(rows), np.ptp(columns)) < 0.33 * SCENE
        lost = (whole.body & ~flawed.body).sum()
        assert lost > 3000 if flaw == "missing" else lost < 200


def test_a_heap_lies_anywhere_and_a_single_object_is_no_tray() -> None:
    heap = Objects(("a",), (0.1, 0.1, 0.1), side=0.2, grid=(5, 5), turn=180, heap=True)
    first, second = scene(heap, 0), scene(heap, 1)
    assert 0.3 < first.body.mean() < 0.7
    assert (first.body ^ second.body).mean() > 0.2
    assert not Objects(("a",), (0.1, 0.1, 0.1), side=0.5).pieces


def test_crops_of_a_texture_are_of_its_photograph() -> None:
    photo = Noise().photo("", "sand")
    setting = Texture("", "sand", 512)
    np.testing.assert_allclose(scene(setting).colors.mean(), photo.mean(), atol=0.01)
    crops = [scene(Texture("", "sand", 200), seed).colors for seed in range(3)]
    assert np.abs(crops[0] - crops[1]).mean() > 0.05 < np.abs(crops[0] - crops[2]).mean()


def test_a_box_of_a_photograph() -> None:
    photo = Noise().photo("", "page")
    part = scene(Whole("", "page", (100, 50, 100 + SCENE, 50 + SCENE)))
    np.testing.assert_allclose(part.colors, photo[50 : 50 + SCENE, 100 : 100 + SCENE], atol=0.003)
    assert part.body.all()


def test_rendered_parts_differ() -> None:
    first, second = (scene(Rendered("denim"), seed).colors for seed in (0, 1))
    assert first.shape == (SCENE, SCENE, 3) and np.abs(first - second).mean() > 0.01


def test_noise_crosses_zero_as_often_as_asked_and_has_unit_deviation() -> None:
    coarse, fine = (smooth_noise(np.random.default_rng(0), often) for often in (8, 30))
    assert [coarse.std(), fine.std()] == pytest.approx([1, 1], abs=1e-3)
    crossings = [np.diff(np.signbit(noise), axis=1).sum(axis=1).mean() for noise in (coarse, fine)]
    assert crossings == pytest.approx([8, 30], rel=0.25)
