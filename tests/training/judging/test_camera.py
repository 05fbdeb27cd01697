"""Exposures: a mask is seen where its defect is."""

from __future__ import annotations

import numpy as np
import pytest

from training.judging.camera import PICTURE, SCENE, Shot, to_bytes


def test_a_mask_is_seen_where_its_defect_is() -> None:
    rows, columns = np.mgrid[:SCENE, :SCENE]
    middles = []
    for seed in range(5):
        disc = np.hypot(rows - 150, columns - 230) < 30
        scene = np.where(disc[..., None], 0.8, 0.2).astype(np.float32).repeat(3, axis=2)
        picture = np.asarray(Shot(np.random.default_rng(seed)).picture(scene, gray=False), float)
        mask = Shot(np.random.default_rng(seed)).mask(disc)
        assert picture.shape == (PICTURE, PICTURE, 3) and mask.shape == (PICTURE, PICTURE)
        seen = picture.mean(axis=2) > 127
        assert (seen & mask).sum() / (seen | mask).sum() > 0.93
        middles.append(np.argwhere(mask).mean(axis=0))
    # Every exposure is shifted and turned otherwise, by a little.
    spread = np.ptp(middles, axis=0)
    assert (spread > 2).all() and (spread < 40).all()


def test_the_light_changes_and_a_gray_camera_sees_gray() -> None:
    scene = np.full((SCENE, SCENE, 3), 0.5, np.float32)
    tones = [
        np.asarray(Shot(np.random.default_rng(seed)).picture(scene, gray=False)).mean((0, 1)) for seed in range(24)
    ]
    assert 0.045 < np.std(tones, axis=0).mean() / np.mean(tones) < 0.11
    # White balance moves the channels apart.
    assert 2 < np.ptp(tones, axis=1).mean() < 20
    gray = np.asarray(Shot(np.random.default_rng(0)).picture(scene, gray=True)).astype(int)
    assert np.ptp(gray, axis=2).max() <= 1


def test_bytes_are_rounded_and_clipped() -> None:
    assert to_bytes(np.array([-1.0, 0.001, 0.5, 2.0])).tolist() == pytest.approx([0, 0, 128, 255])
