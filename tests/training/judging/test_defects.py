"""Defects: visible, local, on the product."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.photographs import Noise

from training.judging import defects
from training.judging.camera import SCENE
from training.judging.defects import FIRST, FIRST_GLOBAL, SECOND, SECOND_GLOBAL, changed
from training.judging.scenes import Scene

LOCAL = [(table, kind) for table in (FIRST, SECOND) for kind in table]


def textured(gray: bool = False) -> Scene:
    colors = Noise().photo("", "ground")[:SCENE, :SCENE]
    body = np.zeros((SCENE, SCENE), bool)
    body[60:-60, 60:-60] = True
    return Scene(colors.mean(axis=2, keepdims=True).repeat(3, axis=2) if gray else colors, body)


@pytest.mark.parametrize(("table", "kind"), LOCAL)
def test_local_defects_stay_local(table: dict[str, defects.Damage], kind: str) -> None:
    sound = textured()
    before, areas = sound.colors.copy(), []
    for seed in range(6):
        flawed = table[kind](sound, np.random.default_rng(seed))
        np.testing.assert_array_equal(sound.colors, before)
        mask = changed(sound.colors, np.clip(flawed, 0, 1))
        areas.append(mask.sum())
        rows, columns = np.nonzero(mask)
        assert np.isfinite(flawed).all() and max(np.ptp(rows), np.ptp(columns)) < 200
        # What lies beside is as it was.
        assert (np.abs(flawed - sound.colors).max(axis=2) > 0.001).mean() < 0.2
    assert 15 < np.median(areas) < 0.1 * SCENE**2
    if kind in ("small", "speck"):
        assert max(areas) < 600


@pytest.mark.parametrize(("table", "kind"), [pair for pair in LOCAL if pair[1] != "color"])
def test_gray_stays_gray(table: dict[str, defects.Damage], kind: str) -> None:
    flawed = table[kind](textured(gray=True), np.random.default_rng(1))
    # Of an erased place the ground is drawn anew, in the noise of three channels.
    assert np.ptp(flawed, axis=2).max() < 0.02


@pytest.mark.parametrize("table", [FIRST, SECOND])
def test_another_color_is_about_as_bright(table: dict[str, defects.Damage]) -> None:
    sound = textured()
    flawed = table["color"](sound, np.random.default_rng(2))
    luma = np.abs((flawed - sound.colors).mean(axis=2))
    assert luma.max() < 0.01 < np.abs(flawed - sound.colors).max()


@pytest.mark.parametrize(("table", "kind"), [(t, k) for t in (FIRST_GLOBAL, SECOND_GLOBAL) for k in t])
def test_global_changes_are_everywhere(table: dict[str, defects.Damage], kind: str) -> None:
    sound = textured()
    flawed = table[kind](sound, np.random.default_rng(0))
    assert (np.abs(flawed - sound.colors).max(axis=2) > 0.02).mean() > 0.6


def test_the_generators_share_no_shape_of_what_they_lay_on() -> None:
    assert set(FIRST) & set(SECOND) == {"color", "missing", "swapped"}
    assert not set(FIRST_GLOBAL) & set(SECOND_GLOBAL)


def test_what_changed_is_marked_and_gaps_are_closed() -> None:
    sound = np.zeros((SCENE, SCENE, 3), np.float32)
    flawed = sound.copy()
    flawed[100:120, 50:90, 1] = 0.5
    flawed[110, 60:70] = 0
    mask = changed(sound, flawed)
    assert mask[100:120, 50:90].all() and mask.sum() < 1.2 * 20 * 40
    assert not changed(sound, sound + 0.02).any()
