"""Pictures for people: anomaly maps over their images on a fixed color scale, and sheets of them."""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from .checkpoints import atomic_path
from .errors import InputError
from .images import BACKGROUND, read_image

# Dark blue, violet, crimson, red. The lightness rises evenly, so that the order is also seen in gray and by the
# color-blind.
_ANCHORS = ((10, 20, 80), (96, 20, 140), (176, 14, 116), (255, 24, 24))
_STEPS = np.linspace(0, 1, 256)
_COLORS = (
    np.stack([np.interp(_STEPS, (0, 0.35, 0.65, 1), channel) for channel in zip(*_ANCHORS, strict=True)], 1)
    .round()
    .astype(np.uint8)
)
# Grows slowly at first, so that normal regions look as they are.
_OPACITY = (0.75 * 255 * _STEPS**1.5).round().astype(np.uint8)
_INK, _DIMMED = (40, 40, 40), (128, 128, 128)


def colorize(map: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Color an anomaly map: dark blue (low) over violet to red (high).

    Args:
        map: Shape (H, W). Values outside the scale are clipped.
        scale: Values of the lowest and the highest color: one pair for all images that are compared.

    Returns:
        uint8 array (H, W, 3).

    Raises:
        InputError: If the map is not two-dimensional, is empty or holds NaN, or the scale is not finite and increasing.
    """
    return _COLORS[_levels(map, scale)]


def _levels(map: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Steps 0 to 255 of the scale, uint8 (H, W)."""
    low, high = scale
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"The scale {scale} must be two finite numbers, the lower one first.")
    values = np.asarray(map, dtype=np.float32)
    if values.ndim != 2 or not values.size:
        raise InputError(f"An anomaly map has the shape (H, W), not {values.shape}.")
    if np.isnan(values).any():
        raise InputError("The anomaly map holds NaN.")
    return ((values.clip(low, high) - low) * (255 / (high - low))).round().astype(np.uint8)


def overlay(
    image: str | os.PathLike[str] | Image.Image | np.ndarray,
    anomaly_map: np.ndarray,
    *,
    scale: tuple[float, float],
    threshold: float | None = None,
    caption: str | None = None,
    region: np.ndarray | None = None,
) -> Image.Image:
    """Lay an anomaly map over its image, with a legend.

    The image keeps its size, at the top left; the legend stands to its right and the caption below, covering nothing.

    Args:
        image: Whatever `read_image` takes, H x W pixels once upright.
        anomaly_map: Shape (H, W).
        scale: Values of the lowest and the highest color, see `colorize`.
        threshold: A line is drawn around the pixels above it, and a tick in the legend.
        caption: Text, wrapped where it is longer than the picture is wide. Letters that the font lacks are escaped.
        region: What counts of the image, bool (H, W). The rest is dimmed.

    Returns:
        RGB image.

    Raises:
        InputError: If map and image differ in size, the threshold is not finite, or `colorize` refuses the map or the
            scale.
        ImageError: As `read_image`.
    """
    picture, levels = read_image(image), _levels(anomaly_map, scale)
    if levels.shape != picture.size[::-1]:
        raise InputError(
            f"The anomaly map is {levels.shape}, the image {picture.size[::-1]} (height, width); resize the map."
        )
    picture = Image.composite(Image.fromarray(_COLORS[levels]), picture, Image.fromarray(_OPACITY[levels]))
    if region is not None:
        picture.paste(Image.blend(picture, Image.new("RGB", picture.size, _DIMMED), 0.6), mask=Image.fromarray(~region))
    if threshold is not None:
        if not math.isfinite(threshold):
            raise InputError(f"The threshold is {threshold}; it must be finite.")
        _draw_contour(picture, np.asarray(anomaly_map) > threshold)
    return _with_legend(picture, scale, threshold, caption)


def _draw_contour(picture: Image.Image, inside: np.ndarray) -> None:
    """White line with a dark rim, seen on any ground. It lies where a blurred mask passes its middle."""
    radius = max(0.3, math.sqrt(inside.size) / 600)
    mask = Image.fromarray(inside).convert("L")
    for color, width, strength in (((0, 0, 0), radius + max(1, radius), 0.8), ((255, 255, 255), radius, 1.0)):
        ridge = [round(strength * min(255, 2 * (255 - abs(2 * value - 255)))) for value in range(256)]
        picture.paste(color, mask=mask.filter(ImageFilter.BoxBlur(width)).point(ridge))


def _with_legend(
    picture: Image.Image, scale: tuple[float, float], threshold: float | None, caption: str | None
) -> Image.Image:
    (width, height), (low, high) = picture.size, scale
    size = max(10, round(math.sqrt(width * height) / 26))
    font, line, gap = ImageFont.load_default(size), round(1.3 * size), round(0.6 * size)
    left, text_left, top = width + gap, width + 3 * gap + size, line // 2
    bottom = top + max(4 * line, min(height, 40 * size) - line)
    labels = [(f"{high:.3g}", top), (f"{low:.3g}", bottom)]
    tick = bottom
    if threshold is not None:
        tick -= round((bottom - top) * (min(max(threshold, low), high) - low) / (high - low))
        # The label gives way to those at the ends, the tick does not. Small pictures have no room for the word.
        word = "  threshold" if width > 12 * size else ""
        labels.append((f"{threshold:.3g}{word}", min(max(tick, top + line), bottom - line)))
    total = math.ceil(text_left + max(font.getlength(text) for text, _ in labels)) + gap
    rows = _wrap(_drawable(caption or "", font), font, total - 2 * gap)
    body = max(height, bottom + line // 2)
    canvas = Image.new("RGB", (total, body + (len(rows) * line + gap if rows else 0)), BACKGROUND)
    canvas.paste(picture)
    canvas.paste(
        Image.fromarray(colorize(np.linspace(high, low, bottom - top)[:, None].repeat(size, 1), scale)), (left, top)
    )
    draw = ImageDraw.Draw(canvas)
    if threshold is not None:
        draw.line([(left, tick), (left + size - 1, tick)], "white", max(1, size // 8))
        draw.line([(left + size, tick), (text_left - gap // 2, labels[-1][1])], _INK, max(1, size // 12))
    for text, y in labels:
        draw.text((text_left, y), text, _INK, font, anchor="lm")
    for number, row in enumerate(rows):
        draw.text((gap, body + gap // 2 + number * line), row, _INK, font)
    return canvas


def _drawable(text: str, font: Any) -> str:
    """The text with escapes for what the font has no picture of, such as names in Chinese."""
    missing = _picture_of("\uffff", font)
    shown = [" " if letter.isspace() else letter for letter in text]
    return "".join(
        letter.encode("ascii", "backslashreplace").decode() if _picture_of(letter, font) == missing else letter
        for letter in shown
    )


def _picture_of(letter: str, font: Any) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    columns = max(1, len(text))
    rows = textwrap.wrap(text, columns)
    while columns > 1 and (longest := max(map(font.getlength, rows), default=0)) > width:
        columns = max(1, min(columns - 1, int(columns * width / longest)))
        rows = textwrap.wrap(text, columns)
    return rows


def contact_sheet(tiles: Sequence[Image.Image], *, columns: int, tile_width: int) -> Image.Image:
    """Arrange pictures in rows on white, with equal margins.

    Args:
        tiles: Pictures, read from left to right and from top to bottom.
        columns: Pictures in a row.
        tile_width: Width of each picture in pixels, see `tile`.

    Returns:
        RGB image.

    Raises:
        InputError: If there are no tiles, or columns or tile_width is below 1.
    """
    if not tiles or columns < 1 or tile_width < 1:
        raise InputError(
            f"A contact sheet needs pictures, columns and a width; got {len(tiles)}, {columns} and {tile_width}."
        )
    fitted = [tile(picture, tile_width) for picture in tiles]
    rows = [fitted[start : start + columns] for start in range(0, len(fitted), columns)]
    margin = max(4, tile_width // 24)
    heights = [margin + max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (margin + len(rows[0]) * (tile_width + margin), margin + sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            x = margin + column * (tile_width + margin) + (tile_width - picture.width) // 2
            sheet.paste(picture, (x, margin + sum(heights[:number])))
    return sheet


def encoded(picture: Image.Image, suffix: str, **options: Any) -> bytes:
    """A picture as a file of a format, by its suffix; options as of Pillow."""
    stream = io.BytesIO()
    picture.save(stream, Image.registered_extensions()[suffix], **options)
    return stream.getvalue()


def save_picture(picture: Image.Image, path: str | os.PathLike[str], **options: Any) -> None:
    """Write a picture in the format of the suffix, atomically; options as of Pillow.

    Raises:
        AdfeaturesError: If it cannot be written.
    """
    # Not by Pillow itself, which does not notice when a full disk takes only a part of what it writes.
    content = encoded(picture, os.path.splitext(path)[1], **options)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def tile(picture: Image.Image, width: int) -> Image.Image:
    """The picture scaled to a width in pixels, or to a height of twice as many where it is taller."""
    return ImageOps.contain(read_image(picture), (width, 2 * width), Image.Resampling.LANCZOS)
