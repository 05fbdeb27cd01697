"""Anomaly maps drawn over their images, against what a viewer must be able to read from the pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import pixels
from PIL import Image, ImageFont

from adfeatures.errors import ImageError, InputError
from adfeatures.overlays import _wrap, colorize, contact_sheet, overlay

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (9, 13, 3), dtype=np.uint8))

# --- colors


def lightness(colors: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB colors."""
    linear = np.where(colors / 255 <= 0.04045, colors / 255 / 12.92, ((colors / 255 + 0.055) / 1.055) ** 2.4)
    return 116 * np.cbrt(linear @ (0.2126, 0.7152, 0.0722)) - 16


def test_colors_rise_evenly_to_red() -> None:
    colors = colorize(np.linspace(0, 1, 256)[None], (0, 1))[0].astype(int)
    assert colors.shape == (256, 3) and len(np.unique(colors, axis=0)) > 200
    assert (np.diff(colors[:, 0]) >= 0).all()
    steps = np.diff(lightness(colors)[::15])
    assert (steps > 0).all() and steps.max() < 3 * steps.min()
    low, high = colors[0], colors[-1]
    assert high[0] > 240 and high[1:].max() < 40
    assert low.argmax() == 2 and low.max() < 100


def test_the_scale_is_fixed_and_clips() -> None:
    values = np.array([[-5.0, 0.0, 1.0, 2.0, 9.0, np.inf, -np.inf]])
    colors = colorize(values, (0, 2))
    assert colors.dtype == np.uint8 and colors.shape == (1, 7, 3)
    assert (colors[0, 0] == colors[0, 1]).all() and (colors[0, 6] == colors[0, 1]).all()
    assert (colors[0, 4] == colors[0, 3]).all() and (colors[0, 5] == colors[0, 3]).all()
    assert (colorize(values[:, 2:3], (0, 2))[0, 0] == colors[0, 2]).all()
    tensor: Any = torch.from_numpy(values)
    assert (colorize(tensor, (0, 2)) == colors).all()


@pytest.mark.parametrize("scale", [(1, 1), (2, 1), (0, float("nan")), (float("-inf"), 1)])
def test_bad_scales(scale: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="scale"):
        colorize(np.zeros((2, 2)), scale)


@pytest.mark.parametrize("bad", [np.array([[0.0, np.nan]]), np.zeros((1, 2, 2)), np.zeros(3), np.zeros((0, 4))])
def test_bad_maps(bad: np.ndarray) -> None:
    with pytest.raises(InputError, match="anomaly map"):
        colorize(bad, (0, 1))
    with pytest.raises(InputError, match="anomaly map"):
        overlay(PICTURE, bad, scale=(0, 1))


# --- overlays


def hill(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.exp(-(((x / width - 0.5) / 0.2) ** 2) - ((y / height - 0.5) / 0.2) ** 2)


SIZES = [(1, 1), (16, 16), (64, 64), (300, 40), (40, 300), (640, 480), (1500, 1000)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("caption", [None, "000.png  score 0.7", "a_very_long_name_without_any_place_to_break_" * 4])
def test_overlays_leave_normal_regions_and_cover_nothing(size: tuple[int, int], caption: str | None) -> None:
    width, height = size
    image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    drawn = overlay(image, np.zeros((height, width)), scale=(0, 1), threshold=0.5, caption=caption)
    assert (pixels(drawn.crop((0, 0, width, height))) == np.asarray(image)).all()
    assert drawn.width > width and drawn.height >= height
    below = np.asarray(drawn.crop((0, height, width, drawn.height)))
    assert (below.size > 0 and below.min() < 128) if caption and width >= 40 else True
    whole = np.asarray(drawn)
    assert whole[:, -2:].min() == 255, "text is cut off at the right"
    assert whole[-1, width:].min() == 255 and (whole[-1].min() == 255 or caption is None), "text is cut off below"


def test_a_long_caption_is_wrapped_not_cut() -> None:
    short = overlay(np.zeros((64, 64), np.uint8), np.zeros((64, 64)), scale=(0, 1), caption="x")
    long = overlay(
        np.zeros((64, 64), np.uint8), np.zeros((64, 64)), scale=(0, 1), caption="many words in one caption " * 5
    )
    assert long.width == short.width and long.height > short.height + 40


def test_heat_grows_towards_red() -> None:
    values = np.linspace(0, 1, 200)[None].repeat(50, 0)
    drawn = pixels(overlay(np.full((50, 200, 3), 128, np.uint8), values, scale=(0, 1)))[25, :200].astype(int)
    distance = np.abs(drawn - (255, 24, 24)).sum(1)
    assert (np.diff(np.abs(drawn - 128).sum(1)[::20]) > 0).all()
    assert distance[-1] < 0.3 * distance[0] and (np.diff(distance[100::20]) < 0).all()
    assert np.abs(drawn[:40] - 128).max() < 12, "normal regions stay readable"


def test_the_same_value_looks_the_same_whatever_else_is_in_the_map() -> None:
    flat = np.full((40, 40), 0.3)
    peak = flat.copy()
    peak[5, 5] = 100
    drawn = [pixels(overlay(np.full((40, 40), 90, np.uint8), values, scale=(0, 1))) for values in (flat, peak)]
    assert (drawn[0][20:] == drawn[1][20:]).all() and (drawn[0][5, 5] != drawn[1][5, 5]).any()


@pytest.mark.parametrize("ground", [0, 128, 255])
def test_the_contour_follows_the_threshold(ground: int) -> None:
    size, values = 240, hill(240, 240)
    image = np.full((size, size), ground, np.uint8)
    plain = pixels(overlay(image, values, scale=(0, 4)))[:size, :size].astype(int)
    lined = pixels(overlay(image, values, scale=(0, 4), threshold=0.5))[:size, :size].astype(int)
    changed = np.abs(lined - plain).max(2) > 20
    radius = np.hypot(*(np.mgrid[:size, :size] - 119.5)) / size
    crossing = 0.2 * np.sqrt(np.log(2))
    assert changed.sum() > 250
    assert np.abs(radius[changed] - crossing).max() < 4 / size
    angles = np.arctan2(*(np.mgrid[:size, :size] - 119.5))[changed]
    assert len(np.unique((angles * 20).astype(int))) > 115, "a closed line"


def test_no_contour_where_nothing_crosses() -> None:
    image, values = np.full((64, 64), 90, np.uint8), np.full((64, 64), 0.6)
    plain = overlay(image, values, scale=(0, 1)).crop((0, 0, 64, 64))
    for threshold in (0.1, 0.6, 3.0):
        assert overlay(image, values, scale=(0, 1), threshold=threshold).crop((0, 0, 64, 64)) == plain


def test_the_legend_shows_the_colors_and_the_tick() -> None:
    image, values = np.full((320, 320), 90, np.uint8), np.zeros((320, 320))
    plain, ticked = (np.asarray(overlay(image, values, scale=(0, 1), threshold=t)).astype(int) for t in (None, 0.25))
    column = plain[:, 320:].reshape(320, -1, 3)
    x = 320 + int(np.argmax((np.abs(column - (255, 24, 24)).sum(2) < 20).any(0))) + 2
    bar = plain[:, x]
    colored = np.flatnonzero((bar != 255).any(1))
    assert bar[colored[0], 0] > 240 and bar[colored[-1], 0] < 30 and len(colored) > 250
    tick = np.flatnonzero((ticked[colored[0] : colored[-1] + 1, x] == 255).all(1)) / len(colored)
    assert len(tick) and np.abs(tick - 0.75).max() < 0.02
    beyond = np.asarray(overlay(image, values, scale=(0, 1), threshold=7.0))
    assert beyond.shape[0] == 320 and (beyond[colored[0], x] == 255).all()


def test_bad_overlays() -> None:
    with pytest.raises(InputError, match=r"\(3, 4\).*\(4, 3\).*resize"):
        overlay(np.zeros((4, 3), np.uint8), np.zeros((3, 4)), scale=(0, 1))
    for threshold in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="threshold"):
            overlay(np.zeros((4, 4), np.uint8), np.zeros((4, 4)), scale=(0, 1), threshold=threshold)
    with pytest.raises(ImageError, match=r"Cannot open .*missing\.png: No such file"):
        overlay("missing.png", np.zeros((4, 4)), scale=(0, 1))


# --- contact sheets


def test_contact_sheet_places_tiles_with_equal_margins() -> None:
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90), (0, 90, 90)]
    sheet = pixels(contact_sheet([Image.new("RGB", (60, 30), color) for color in colors], columns=3, tile_width=240))
    margin = 10
    assert sheet.shape == (3 * margin + 2 * 120, 4 * margin + 3 * 240, 3)
    expected = np.full_like(sheet, 255)
    for i, color in enumerate(colors):
        y, x = margin + i // 3 * (120 + margin), margin + i % 3 * (240 + margin)
        expected[y : y + 120, x : x + 240] = color
    assert (sheet == expected).all()


def test_contact_sheet_of_unlike_tiles() -> None:
    tiles = [Image.new("RGBA", (10, 1000), "red"), Image.new("L", (500, 100)), Image.new("RGB", (100, 100), "blue")]
    sheet = pixels(contact_sheet(tiles, columns=2, tile_width=96))
    assert sheet.shape == (4 + 192 + 4 + 96 + 4, 4 + 2 * (96 + 4), 3)
    assert contact_sheet(tiles[2:], columns=5, tile_width=96).size == (104, 104)


@pytest.mark.parametrize(("count", "columns", "width"), [(0, 1, 10), (1, 0, 10), (1, 1, 0)])
def test_bad_contact_sheets(count: int, columns: int, width: int) -> None:
    with pytest.raises(InputError, match="contact sheet"):
        contact_sheet([PICTURE] * count, columns=columns, tile_width=width)


def test_long_captions_fill_the_width_after_a_few_tries() -> None:
    font, text, measured = ImageFont.load_default(12), "\\udce9" * 250, []

    class Counting:
        def getlength(self, row: str) -> float:
            measured.append(row)
            return font.getlength(row)

    rows = _wrap(text, Counting(), 300)
    assert "".join(rows) == text and max(map(font.getlength, rows)) <= 300
    assert font.getlength(rows[0]) > 270 and len(measured) < 10 * len(rows)


def test_captions_hold_no_boxes() -> None:
    """Letters that the font lacks are drawn as their escapes: exactly the picture that the escapes give."""
    image, scores = Image.new("RGB", (200, 90), "gray"), np.zeros((90, 200))
    for caption, shown in (
        ("\u90e8\u54c1_7.png   score 1", r"\u90e8\u54c1_7.png   score 1"),
        ("caf\udce9.png", r"caf\udce9.png"),
        ("gr\u00fcn \U0001f600", r"gr\u00fcn \U0001f600".replace(r"\u00fc", "\u00fc")),
    ):
        drawn = overlay(image, scores, scale=(0, 1), caption=caption)
        assert drawn.tobytes() == overlay(image, scores, scale=(0, 1), caption=shown).tobytes()
