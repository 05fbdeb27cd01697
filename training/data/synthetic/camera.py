"""Photographs of a part: light, what hides what, the projection of a tilted camera, the faults of a sensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from .canvas import Part
from .shapes import Map, Rng, grain, sample, smooth

VIEWS = 5
# Texels per pixel: the picture is made at twice its size and averaged.
OVERSAMPLING = 1.5
# Half the width of what the camera sees, for sheets and for objects, from above and from the side.
WINDOWS = {(True, True): 0.82, (True, False): 0.60, (False, True): 0.85, (False, False): 0.82}
CONTRAST = 0.4
SHADOW_REACHES = (0.012, 0.025, 0.04, 0.06, 0.085, 0.115, 0.15, 0.19, 0.24)


@dataclass(frozen=True)
class View:
    """One camera position with its light. Vectors are (right, down, up) on the canvas.

    Attributes:
        yaw, tilt: Direction that the camera looks from: around the part, and away from straight above.
        window: Half of the width seen.
        center: What the camera points at.
        tall: Height of the product without a defect. The camera points at its middle.
        key: Direction towards the main light.
        strengths: Brightness of main light, second light and surroundings.
        tint: Color of the main light.
        vignette: Loss of light in the corners.
        blur: Share of the light of a pixel that each neighbor gets.
        noise: Standard deviation of the sensor noise, of 1.
        reflections: Phases of what polished surfaces mirror.
    """

    yaw: float
    tilt: float
    window: float
    center: tuple[float, float]
    tall: float
    key: Map
    strengths: tuple[float, float, float]
    tint: Map
    vignette: float
    blur: float
    noise: float
    reflections: tuple[float, float]

    @classmethod
    def of(cls, number: int, rng: Rng, part: Part) -> View:
        """Camera 1 looks from above, 2 to 5 from the four sides; nothing is ever in quite the same place."""
        above, surface = number == 1, part.surface
        azimuth = math.radians(-125 + rng.normal(0, 9) + (0 if above else rng.normal(0, 12)))
        elevation = math.radians(np.clip(rng.normal(52, 4), 40, 66))
        across = math.cos(elevation)
        reach = 0.14 if surface and not above else 0.015
        return cls(
            yaw=math.radians((0 if above else 90 * (number - 2)) + rng.normal(0, 1.2 if above else 3)),
            tilt=math.radians(rng.uniform(1, 4) if above else np.clip(rng.normal(33 if surface else 39, 2.5), 26, 45)),
            window=WINDOWS[surface, above] * rng.uniform(0.97, 1.02),
            center=(rng.uniform(-reach, reach), rng.uniform(-reach, reach)),
            tall=float(part.height.max()),
            key=np.array((across * math.cos(azimuth), across * math.sin(azimuth), math.sin(elevation)), np.float32),
            strengths=(rng.uniform(0.72, 0.9), rng.uniform(0.10, 0.2), rng.uniform(0.24, 0.34)),
            tint=np.array([1, 1, 1], np.float32) + rng.normal(0, 0.02, 3).astype(np.float32),
            vignette=rng.uniform(0.05, 0.16),
            blur=rng.uniform(0.03, 0.11),
            noise=rng.uniform(0.005, 0.012),
            reflections=(rng.uniform(0, 0.8), rng.uniform(0, 0.8)),
        )


@dataclass(frozen=True)
class Relief:
    """What light needs to know of a part, the same for all its views.

    Height without the steps of the texels, normals (3, H, W) and how open each point is to the surroundings.
    """

    part: Part
    height: Map
    normal: Map
    openness: Map

    @classmethod
    def of(cls, part: Part) -> Relief:
        """The relief of a part."""
        height = ndimage.gaussian_filter(part.height, 0.6, truncate=2)
        normal = np.empty((3, *height.shape), np.float32)
        normal[1], normal[0] = np.gradient(-height, part.texel)
        # Beyond the edges there is nothing to tell a slope from.
        normal[0][:, [0, -1]], normal[1][[0, -1]] = normal[0][:, [1, -2]], normal[1][[1, -2]]
        normal[2] = 1 / np.sqrt(1 + normal[0] ** 2 + normal[1] ** 2)
        normal[:2] *= normal[2]
        half = _halved(height)
        buried = np.zeros_like(half)
        for width, weight in ((0.03, 12), (0.12, 3.5)):
            side = 2 * round(width / part.texel / 4) + 1
            around = ndimage.uniform_filter(ndimage.uniform_filter(half, side), side)
            buried += weight * np.clip(around - half, 0, 0.25)
        return cls(part, height, normal, _doubled(np.exp(-buried)))


def _halved(map: Map) -> Map:
    return F.avg_pool2d(torch.from_numpy(map)[None, None], 2)[0, 0].numpy()


def _doubled(map: Map) -> Map:
    return F.interpolate(torch.from_numpy(map)[None, None], scale_factor=2.0, mode="bilinear")[0, 0].numpy()


def _sunlit(height: Map, key: Map) -> Map:
    """How much of the main light reaches each point: 0 in full shadow to 1, with a rim that widens with distance."""
    half, texel = _halved(height), 4 / height.shape[0]
    across = math.hypot(key[0], key[1])
    pad = math.ceil(SHADOW_REACHES[-1] / texel) + 1
    padded, (rows, columns) = np.pad(half, pad, mode="edge"), half.shape
    hidden = np.zeros_like(half)
    for reach in SHADOW_REACHES:
        down, right = (pad + round(float(reach * key[axis] / across / texel)) for axis in (1, 0))
        above = padded[down : down + rows, right : right + columns] - half
        above -= reach * float(key[2]) / across
        above *= 1 / (0.006 + 0.22 * reach)
        np.maximum(hidden, above, out=hidden)
    return _doubled(1 - smooth(hidden))


def shade(relief: Relief, view: View) -> Map:
    """Linear light (3, H, W) that each texel sends to the camera."""
    part, (nx, ny, nz), open_ = relief.part, relief.normal, relief.openness
    key, (strong, weak, around) = view.key, view.strengths
    # Towards the camera.
    aside, vz = math.sin(view.tilt), math.cos(view.tilt)
    vx, vy = math.sin(view.yaw) * aside, math.cos(view.yaw) * aside
    sunlit = _sunlit(relief.height, key)
    # The lamp is near: its direction, and with it the highlight, moves over the part.
    lx, ly = key[0] - 0.22 * part.x, key[1] - 0.22 * part.y
    direct = strong * np.clip(nx * lx + ny * ly + nz * key[2], 0, None) * sunlit
    second = weak * np.clip(nz * 0.6 - nx * key[0] - ny * key[1], 0, None)
    ambient = (around * (0.65 + 0.35 * nz) + second) * open_
    # Roughness of the microfacets (Beckmann), as slopes.
    rough = 0.55 - 0.47 * part.gloss
    square = rough * rough
    steep = 1 / np.maximum(nz, 0.05)
    dx, dy = nx * steep - (lx + vx) / (key[2] + vz), ny * steep - (ly + vy) / (key[2] + vz)
    highlight = np.exp(-(dx * dx + dy * dy) / (square + 0.012)) * (0.5 + 0.5 * sunlit)
    facing = nx * vx + ny * vy + nz * vz
    rx, ry, rz = 2 * facing * nx - vx, 2 * facing * ny - vy, 2 * facing * nz - vz
    waves = np.sin(3.1 * rx + view.reflections[0]), np.sin(2.3 * ry + 0.6 + view.reflections[1])
    mirrored = 0.26 + 0.5 * smooth(rz * 1.25 - 0.1) + (0.26 * part.gloss) * waves[0] * waves[1]
    mirrored *= 0.35 + 0.65 * open_
    grazing = np.clip(1 - facing, 0, 1)
    fresnel = 0.03 + 0.5 * grazing * grazing * grazing
    coat = part.gloss * (0.02 / (square + 0.02) * highlight * strong + fresnel * mirrored)
    bright = mirrored + 0.11 / (square + 0.07) * highlight * strong
    dull = 1 - part.metal
    warm, cold = dull * direct, dull * ambient + part.metal * bright
    coat *= dull
    light = np.empty_like(part.color)
    for channel, tint in enumerate(view.tint):
        light[channel] = part.color[channel] * (warm * tint + cold) + coat * tint
    return light


def project(height: Map, view: View, size: int) -> tuple[Map, Map]:
    """Which point of the canvas each pixel shows, as coordinates x and y of shape (size, size).

    The camera looks along columns of the table. Each is walked from near to far: what does not rise above all that came
    before is hidden.
    """
    sin, cos, window = math.sin(view.tilt), math.cos(view.tilt), view.window
    step = 2 * window / size
    aim = 0.4 * view.tall * sin
    # Tall things stand in front of what the camera points at, and defects may stand out.
    near = -(1.06 * window + 0.6 * view.tall * sin) / cos - 0.1
    count = math.ceil(((1.06 * window + aim) / cos - near) / step)
    across = ((np.arange(size, dtype=np.float32) + 0.5) * step - window)[None]
    far = near + np.arange(count, dtype=np.float32)[:, None] * step
    risen = sample(height[None], *_on_table(across, far, view))[0]
    risen *= sin
    risen += _deepened(far, view) * cos
    top = np.empty_like(risen)
    top[0] = risen[0]
    for row in range(1, count):
        np.maximum(top[row - 1], risen[row], out=top[row])
    # For each column, how many of its points lie below each line of sight.
    line = np.clip((top + (window - aim)) / step + 0.5, 0, size).astype(np.int64)
    line *= size
    line += np.arange(size)
    passed = np.bincount(line.ravel(), minlength=(size + 1) * size).reshape(size + 1, size)[:size].cumsum(0)
    first = np.clip(passed, 1, count - 1) * size + np.arange(size)
    flat = risen.ravel()
    before, after = flat.take(first - size), flat.take(first)
    sight = (np.arange(size, dtype=np.float32)[:, None] + 0.5) * step - (window - aim)
    share = np.clip((sight - before) / np.maximum(after - before, 1e-6), 0, 1)
    distance = near + (first // size - 1 + share).astype(np.float32) * step
    # The first line of sight is the lowest row of the picture.
    return _on_table(across, distance[::-1], view)


def _deepened(far: Map, view: View) -> Map:
    return far * (1 + 0.08 * math.sin(view.tilt) * far)


def _on_table(across: Map, far: Map, view: View) -> tuple[Map, Map]:
    """Canvas coordinates of points seen ``across`` and ``far``, with the perspective that makes far things small."""
    sin, cos = math.sin(view.yaw), math.cos(view.yaw)
    across, far = across * (1 + 0.16 * math.sin(view.tilt) * far), _deepened(far, view)
    return view.center[0] + cos * across - sin * far, view.center[1] - sin * across - cos * far


def expose(relief: Relief, view: View, size: int) -> Map:
    """The picture as (3, size, size) of sRGB values from 0 to 1, without noise."""
    large = round(size * OVERSAMPLING)
    light = sample(shade(relief, view), *project(relief.height, view, large))
    light = F.adaptive_avg_pool2d(torch.from_numpy(light)[None], size)[0].numpy()
    for axis in (1, 2):
        light = _blurred(light, view.blur, axis)
    corner = np.linspace(-1, 1, size, dtype=np.float32) ** 2
    light *= 1 - view.vignette * (corner[:, None] + corner)
    # The shoulder of a film curve keeps highlights from burning out.
    light *= 1.32 / (1 + 0.42 * light)
    encoded = np.clip(light, 0, 1) ** np.float32(1 / 2.2)
    return encoded + CONTRAST * (encoded * encoded * (3 - 2 * encoded) - encoded)


def _blurred(light: Map, share: float, axis: int) -> Map:
    at = np.arange(light.shape[axis])
    beside = light.take(at - 1, axis, mode="clip") + light.take(at + 1, axis, mode="clip")
    return (1 - 2 * share) * light + share * beside


def develop(picture: Map, view: View, rng: Rng) -> np.ndarray:
    """Add the noise of the sensor, and round: uint8 (size, size, 3)."""
    noisy = picture + view.noise * (grain(rng, picture.shape[1:]) + 0.5 * grain(rng, picture.shape))
    return (np.clip(noisy, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
