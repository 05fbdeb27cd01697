"""Light and cameras, against brute force and plain formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from training.data.synthetic.camera import SHADOW_REACHES, Relief, View, develop, expose, project, shade
from training.data.synthetic.canvas import Part
from training.data.synthetic.shapes import noise


def test_projection_finds_the_nearest_point_on_each_line_of_sight() -> None:
    rng = np.random.default_rng(0)
    part = Part.blank(64)
    part.height[...] = 0.15 * np.clip(noise(rng, part.shape, 5), 0, 2)
    part.height[20:30, 30:44] += 0.3
    view = replace(View.of(2, rng, part), yaw=0.4)
    size, dense = 24, 6000
    x, y = project(part.height, view, size)
    sin, cos, window = math.sin(view.tilt), math.cos(view.tilt), view.window
    aim = 0.4 * view.tall * sin
    far = np.linspace(-2, 2, dense)
    wrong = 0
    for column in range(size):
        across = ((column + 0.5) / size * 2 - 1) * window
        depth = far * (1 + 0.08 * sin * far)
        spread = across * (1 + 0.16 * sin * far)
        canvas_x = view.center[0] + math.cos(view.yaw) * spread - math.sin(view.yaw) * depth
        canvas_y = view.center[1] - math.sin(view.yaw) * spread - math.cos(view.yaw) * depth
        pixels = [(canvas_y + 1) * 32 - 0.5, (canvas_x + 1) * 32 - 0.5]
        height = ndimage.map_coordinates(part.height, pixels, order=1, mode="reflect")
        risen = depth * cos + height * sin
        for row in range(size):
            sight = aim + (1 - (row + 0.5) / size * 2) * window
            start = int(np.argmax(far >= -1.6))
            hit = start + int(np.argmax(risen[start:] >= sight))
            # A step of the projection is 2 * window / size along the table.
            wrong += (
                math.hypot(x[row, column] - canvas_x[hit], y[row, column] - canvas_y[hit]) > 1.5 * 2 * window / size
            )
    assert wrong / size**2 < 0.03


@pytest.fixture
def flat() -> Part:
    part = Part.blank(96)
    part.color[...] = 0.3
    return part


def from_above(part: Part) -> View:
    return replace(View.of(1, np.random.default_rng(0), part), yaw=0.0, tilt=0.0, center=(0.0, 0.0))


def test_normals_are_those_of_the_slope(flat: Part) -> None:
    flat.height[...] = 0.3 * flat.x - 0.2 * flat.y
    expected = np.array((-0.3, 0.2, 1)) / math.sqrt(1 + 0.3**2 + 0.2**2)
    normal = Relief.of(flat).normal
    np.testing.assert_allclose(normal[:, 4:-4, 4:-4], np.broadcast_to(expected[:, None, None], (3, 88, 88)), atol=1e-3)
    np.testing.assert_allclose(np.square(normal).sum(0), 1, atol=1e-5)


def test_open_ground_is_open_and_the_bottom_of_a_pit_is_not(flat: Part) -> None:
    assert Relief.of(flat).openness.min() == 1
    pit, before = np.hypot(flat.x, flat.y) < 0.05, 1.0
    for _ in range(3):
        flat.height -= 0.05 * pit
        openness = Relief.of(flat).openness
        assert openness[48, 48] < 0.95 * before and openness[5, 5] == 1
        before = openness[48, 48]


def test_a_post_throws_its_shadow_away_from_the_lamp(flat: Part) -> None:
    view = from_above(flat)
    light = shade(Relief.of(flat), view)
    post = np.hypot(flat.x, flat.y) < 0.06
    flat.height += 0.3 * post
    darker = light.mean(0) - shade(Relief.of(flat), view).mean(0)
    # Only what is far from the walls, where nothing but the shadow changes.
    distance = np.hypot(flat.x, flat.y)
    away = -(flat.x * view.key[0] + flat.y * view.key[1]) / math.hypot(view.key[0], view.key[1])
    shadow = (darker > 0.1 * light.mean()) & (distance > 0.12)
    assert shadow.any() and (away[shadow] > 0.9 * distance[shadow] - 0.06).all()
    assert distance[shadow].max() < SHADOW_REACHES[-1] + 0.1


def test_a_camera_from_above_shows_the_canvas_as_it_is(flat: Part) -> None:
    view = from_above(flat)
    x, y = project(flat.height, view, 40)
    steps = ((np.arange(40) + 0.5) / 20 - 1) * view.window
    np.testing.assert_allclose(x, np.broadcast_to(steps, (40, 40)), atol=1e-5)
    np.testing.assert_allclose(y, np.broadcast_to(steps[:, None], (40, 40)), atol=view.window / 40)


def test_more_light_is_brighter_and_corners_are_darker(flat: Part) -> None:
    view = replace(from_above(flat), vignette=0.16, strengths=(0.8, 0.1, 0.3))
    relief = Relief.of(flat)
    dim, bright = (expose(relief, replace(view, strengths=(s, 0.1, 0.3)), 32) for s in (0.4, 0.8))
    assert (bright > dim).all() and bright.min() > 0 and bright.max() < 1
    even = expose(relief, replace(view, vignette=0.0), 32)
    np.testing.assert_allclose(bright[:, 15:17, 15:17], even[:, 15:17, 15:17], atol=1e-3)
    assert (bright[:, 0, 0] < even[:, 0, 0] - 0.02).all()


def test_blur_spreads_light_to_the_neighbors(flat: Part) -> None:
    flat.color[:, 40:56, 40:56] = 0.8
    relief, view = Relief.of(flat), from_above(flat)
    light = np.linspace(0, 2, 20001)
    film = np.clip(1.32 * light / (1 + 0.42 * light), 0, 1) ** (1 / 2.2)
    film = film + 0.4 * (film * film * (3 - 2 * film) - film)
    sharp, soft = (
        np.interp(expose(relief, replace(view, blur=blur, vignette=0.0), 32), film, light) for blur in (0.0, 0.11)
    )
    for axis in (1, 2):
        sharp = ndimage.convolve1d(sharp, (0.11, 0.78, 0.11), axis, mode="nearest")
    np.testing.assert_allclose(soft, sharp, atol=1e-3)


def test_the_sensor_adds_noise_of_its_deviation(flat: Part) -> None:
    view = replace(from_above(flat), noise=0.01)
    picture = np.full((3, 200, 200), 0.5, np.float32)
    image = develop(picture, view, np.random.default_rng(3)).astype(float) / 255
    assert image.shape == (200, 200, 3) and image.mean() == pytest.approx(0.5, abs=0.002)
    # One part is common to the channels, and half as much is each one's own; rounding adds a twelfth of a step.
    common = np.cov((image - 0.5).reshape(-1, 3).T)
    np.testing.assert_allclose(common, 1e-4 * (1 + 0.25 * np.eye(3)) + np.eye(3) / 255**2 / 12, rtol=0.05)
    np.testing.assert_array_equal(develop(picture * 2.1, view, np.random.default_rng(3)), 255)
