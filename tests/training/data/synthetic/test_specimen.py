"""Parts and their pictures: masks, determinism, and what counts as changed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from training.data.synthetic import DEFECTS, PRODUCTS, VIEWS, render
from training.data.synthetic.specimen import BUILDERS, Specimen, build, changed, stream


@pytest.mark.slow
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_defect_is_seen_from_above_and_the_mask_is_exact(product: str) -> None:
    sound, nothing = render(product, 4, size=48)
    assert nothing is None and sound.size == (48, 48) and sound.mode == "RGB"
    for defect in DEFECTS:
        flawed, mask = render(product, 4, defect, size=48)
        assert mask is not None and mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}, defect
        difference = np.abs(np.asarray(flawed, int) - np.asarray(sound, int)).max(2)
        assert not difference[~ndimage.binary_dilation(mask > 0, np.ones((5, 5)))].any(), defect
        assert (difference[mask > 0] > 0).mean() > 0.5, defect
        assert (difference[mask == 0] > 14).sum() <= 0.1 * (mask > 0).sum(), defect
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        assert min(ndimage.maximum(difference, labels, range(1, count + 1))) >= 4, defect


@pytest.mark.parametrize("product", ["gear", "circuit_board", "linen"])
def test_masks_are_exact_in_every_view_and_absent_where_nothing_is_to_be_seen(product: str) -> None:
    seen = Counter[bool]()
    for seed in range(3):
        for view in range(1, VIEWS + 1):
            sound, _ = render(product, seed, view=view, size=64)
            flawed, mask = render(product, seed, "AK", view, size=64)
            difference = np.abs(np.asarray(flawed, int) - np.asarray(sound, int)).max(2)
            if mask is None:
                assert not difference.any()
            else:
                assert not difference[~ndimage.binary_dilation(mask > 0, np.ones((5, 5)))].any()
            seen[mask is not None] += 1
    assert seen[True] >= 6


def test_views_and_parts_differ() -> None:
    pictures = [
        np.asarray(render("hex_nut", seed, view=view, size=64)[0], float) for seed in (0, 1) for view in (1, 2, 3)
    ]
    for index, first in enumerate(pictures):
        for second in pictures[:index]:
            assert np.abs(first - second).mean() > 4


def test_render_is_deterministic() -> None:
    (first, mask), (second, again) = (render("circuit_board", 7, "QS", 2, 64) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert mask is not None and again is not None and (mask == again).all()


def test_the_first_products_are_of_all_kinds() -> None:
    # A sheet, hardware, a thing, and so on.
    surfaces = [build(BUILDERS[name], (0,), 32).surface for name in PRODUCTS[:6]]
    assert surfaces == [True, False, False] * 2


def test_streams_depend_on_part_and_purpose_alone() -> None:
    draws = {purpose: stream((1, 2, 3), *purpose).random(4).tolist() for purpose in ((0,), (1,), (1, 2), (1, 2, 3))}
    assert len({tuple(values) for values in draws.values()}) == 4
    assert stream((1, 2, 3), 1, 2).random(4).tolist() == draws[1, 2] != stream((1, 2, 4), 1, 2).random(4).tolist()


def test_a_missing_piece_is_missing_where_it_was() -> None:
    whole = build(BUILDERS["building_brick"], (5,), 64)
    for number in range(whole.pieces.count):
        part = build(BUILDERS["building_brick"], (5,), 64, missing=number)
        lost = np.flatnonzero((whole.height - part.height > 0.03).any(0))
        # One stud of eight: nothing beyond its width of 0.105, as seen on the canvas.
        assert 0 < np.ptp(lost) * whole.texel < 0.25


def disc_changes(radius: float, contrast: float, size: int = 256) -> np.ndarray:
    rows, columns = np.ogrid[:size, :size]
    flawed = np.zeros((3, size, size), np.float32)
    flawed[1, np.hypot(rows - 100, columns - 60) <= radius] = contrast
    return changed(np.zeros_like(flawed), flawed)


def test_what_changes_clearly_is_marked_to_the_pixel() -> None:
    rows, columns = np.ogrid[:256, :256]
    np.testing.assert_array_equal(disc_changes(9, 0.2), np.hypot(rows - 100, columns - 60) <= 9)


@pytest.mark.parametrize(
    ("radius", "contrast", "seen"), [(9, 0.02, False), (9, 0.03, False), (9, 0.06, True), (1, 0.5, False)]
)
def test_faint_areas_and_specks_are_not_marked(radius: float, contrast: float, seen: bool) -> None:
    assert disc_changes(radius, contrast).any() == seen


def test_gaps_are_closed_and_edges_kept() -> None:
    flawed = np.zeros((3, 64, 64), np.float32)
    flawed[:, :10, 20:40] = 0.3
    flawed[:, 4, 25:35] = 0
    result = changed(np.zeros_like(flawed), flawed)
    expected = np.zeros((64, 64), bool)
    expected[:10, 20:40] = True
    np.testing.assert_array_equal(result, expected)


def test_pictures_are_made_once() -> None:
    specimen = Specimen.make("hex_nut", (0, 0, 0), "HS", 32)
    first, _ = specimen.photograph(1)
    kept = dict(specimen.exposed)
    assert first.tobytes() == specimen.photograph(1)[0].tobytes()
    assert all(specimen.exposed[key] is value for key, value in kept.items()) and set(kept) == {(1, False), (1, True)}
