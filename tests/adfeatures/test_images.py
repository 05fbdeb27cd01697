"""Reading and transforming images, against formulas written out here and against files built byte by byte."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pytest
import torch
from helpers.models import pixels
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features

from adfeatures.errors import ImageError, InputError, UnknownNameError
from adfeatures.images import (
    BACKGROUND,
    MAX_PIXELS,
    PRESETS,
    build_transform,
    hash_of_pixels,
    read_image,
)

RNG = np.random.default_rng(0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NOISE = RNG.integers(0, 256, (9, 13, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)

Write: TypeAlias = "Callable[..., Path]"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(
    strips: Sequence[bytes],
    size: tuple[int, int],
    bits: Sequence[int],
    photometric: int,
    *,
    order: str = "<",
    planar: int = 1,
    extra: Sequence[int] = (),
) -> bytes:
    """A TIFF file of uncompressed strips, for layouts that Pillow reads but does not write."""
    offsets = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    tags = {256: size[:1], 257: size[1:], 258: bits, 259: [1], 262: [photometric], 273: offsets}
    tags |= {277: [len(bits)], 278: size[1:], 279: [len(strip) for strip in strips], 284: [planar]}
    tags |= {338: extra} if extra else {}
    data = b"".join(strips)
    entries, tail = b"", b""
    tail_at = 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, values in tags.items():
        packed = struct.pack(f"{order}{len(values)}H", *values).ljust(4, b"\0")
        if len(packed) > 4:
            packed, tail = struct.pack(f"{order}I", tail_at + len(tail)), tail + packed
        entries += struct.pack(f"{order}HHI", tag, 3, len(values)) + packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + tail


def png_file(width: int, height: int, bits: int, color: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(chunk(*c) for c in chunks)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def scaled(values: np.ndarray, bit_depth: int) -> np.ndarray:
    """The stated rule in exact arithmetic. No value lies halfway, since 2**n - 1 is odd."""
    return np.array([round(Fraction(int(v) * 255, 2**bit_depth - 1)) for v in values.flat], np.uint8).reshape(
        values.shape
    )


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, 2)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(data: bytes, name: str = "image.bin") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images") / "scratch"


# --- what is read


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_files_give_their_pixels(write: Write, kind: str) -> None:
    path = write(encoded(PICTURE, kind))
    assert (pixels(read_image(path)) == NOISE).all()
    assert (pixels(read_image(str(path))) == NOISE).all()
    with Image.open(path) as opened:
        assert (pixels(read_image(opened)) == NOISE).all()


def test_the_suffix_does_not_matter(write: Write) -> None:
    assert (pixels(read_image(write(encoded(PICTURE, "PNG"), "photo.jpg"))) == NOISE).all()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_files_are_close(write: Write, kind: str) -> None:
    smooth = Image.fromarray(np.linspace(0, 200, 40 * 50 * 3).reshape(40, 50, 3).astype(np.uint8))
    read = pixels(read_image(write(encoded(smooth, kind))))
    assert np.abs(read.astype(int) - np.asarray(smooth)).mean() < 8


def test_arrays() -> None:
    assert (pixels(read_image(NOISE)) == NOISE).all()
    assert (pixels(read_image(NOISE[::2, ::-1])) == NOISE[::2, ::-1]).all()
    assert (pixels(read_image(NOISE[..., 0])) == gray(NOISE[..., 0])).all()
    assert (pixels(read_image(NOISE[..., :1])) == gray(NOISE[..., 0])).all()
    assert pixels(read_image(NOISE[:1, :1])).shape == (1, 1, 3)


def test_the_result_is_independent_of_the_source() -> None:
    array = NOISE[..., 0].copy()
    read = read_image(array)
    array[:] = 0
    assert (pixels(read) == gray(NOISE[..., 0])).all()
    source = PICTURE.copy()
    read_image(source).putpixel((0, 0), tuple(255 - NOISE[0, 0]))
    assert (np.asarray(source) == NOISE).all()


def test_alpha_is_laid_over_the_background(write: Write) -> None:
    rgba = RNG.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    rgba[0, 0, 3], rgba[0, 1, 3] = 0, 255
    alpha = rgba[..., 3:].astype(np.float64) / 255
    expected = rgba[..., :3] * alpha + np.array(BACKGROUND) * (1 - alpha)
    assert BACKGROUND == (255, 255, 255)
    for source in (rgba, Image.fromarray(rgba), write(encoded(Image.fromarray(rgba), "PNG"))):
        read = pixels(read_image(source))
        assert np.abs(read - expected).max() <= 1
        assert tuple(read[0, 0]) == BACKGROUND and (read[0, 1] == rgba[0, 1, :3]).all()


def test_gray_with_alpha(write: Write) -> None:
    values, alpha = RNG.integers(0, 256, (2, 8, 8), dtype=np.uint8)
    image = Image.merge("LA", [Image.fromarray(values), Image.fromarray(alpha)])
    expected = gray(values * (alpha / 255) + 255 * (1 - alpha / 255))
    assert np.abs(pixels(read_image(image)) - expected).max() <= 1
    assert np.abs(pixels(read_image(write(encoded(image, "PNG")))) - expected).max() <= 1
    premultiplied = pixels(read_image(image.convert("La")))
    assert (
        np.abs(premultiplied[alpha > 32] - expected[alpha > 32]).max() <= 5
    )  # Division by a small alpha magnifies rounding.


@pytest.mark.parametrize(
    ("transparent", "alpha"),
    [(None, [255] * 4), (3, [255, 255, 255, 0]), (bytes([0, 255, 128, 64]), [0, 255, 128, 64])],
)
def test_palettes(write: Write, transparent: int | bytes | None, alpha: list[int]) -> None:
    indices = RNG.integers(0, 4, (8, 8), dtype=np.uint8)
    palette = np.array([[200, 10, 10], [10, 200, 10], [10, 10, 200], [90, 90, 90]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    weight = np.array(alpha)[indices][..., None] / 255
    options = {} if transparent is None else {"transparency": transparent}
    read = pixels(read_image(write(encoded(image, "PNG", **options))))
    assert np.abs(read - (palette[indices] * weight + 255 * (1 - weight))).max() <= 1


def test_a_transparent_color_is_background(write: Write) -> None:
    array = np.full((4, 4, 3), 7, np.uint8)
    array[1, 2] = (1, 2, 3)
    read = pixels(read_image(write(encoded(Image.fromarray(array), "PNG", transparency=(1, 2, 3)))))
    assert tuple(read[1, 2]) == BACKGROUND and (np.delete(read.reshape(-1, 3), 6, 0) == 7).all()


def test_palette_with_an_alpha_channel() -> None:
    image = Image.new("PA", (2, 1))
    image.putpalette([200, 10, 10, 10, 200, 10])
    image.putpixel((0, 0), (0, 255))
    image.putpixel((1, 0), (1, 0))
    assert pixels(read_image(image)).tolist() == [[[200, 10, 10], [255, 255, 255]]]


def test_cmyk(write: Write) -> None:
    cmyk = RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    ink = 1 - cmyk / 255
    expected = 255 * ink[..., :3] * ink[..., 3:]
    image = Image.merge("CMYK", [Image.fromarray(np.ascontiguousarray(cmyk[..., i])) for i in range(4)])
    assert np.abs(pixels(read_image(image)) - expected).max() <= 2
    assert np.abs(pixels(read_image(write(encoded(image, "TIFF")))) - expected).max() <= 2
    flat = Image.new("CMYK", (16, 16), (20, 200, 100, 30))
    printed = [255 * (1 - c / 255) * (1 - 30 / 255) for c in (20, 200, 100)]
    assert np.abs(pixels(read_image(write(encoded(flat, "JPEG", quality=95)))) - printed).max() <= 4


def test_other_color_modes() -> None:
    y, cb, cr = 120, 90, 160
    expected = (y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128))
    assert np.abs(pixels(read_image(Image.new("YCbCr", (2, 2), (y, cb, cr)))) - expected).max() <= 2
    assert pixels(read_image(Image.new("L", (1, 1), 77))).tolist() == [[[77] * 3]]
    assert pixels(read_image(Image.new("1", (1, 1), 1))).tolist() == [[[255] * 3]]
    assert pixels(read_image(Image.new("HSV", (1, 1), (0, 255, 255)))).tolist() == [[[255, 0, 0]]]


@pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow has no color management")
def test_lab() -> None:
    assert np.abs(pixels(read_image(Image.new("LAB", (2, 2), (255, 128, 128)))).astype(int) - 255).max() <= 3
    red = pixels(read_image(Image.new("LAB", (2, 2), (136, 208, 195))))[0, 0].astype(int)  # L* 53.2, a* 80, b* 67
    assert np.abs(red - (255, 0, 0)).max() <= 12


# --- 16 bits


@pytest.mark.parametrize("bit_depth", range(9, 17))
def test_every_16_bit_value_has_its_fixed_place(bit_depth: int) -> None:
    values = np.arange(2**bit_depth, dtype=np.uint16).reshape(-1, 2 ** (bit_depth // 2))
    expected = gray(scaled(values, bit_depth))
    assert (pixels(read_image(values, bit_depth=bit_depth)) == expected).all()
    assert (pixels(read_image(values.astype(">u2"), bit_depth=bit_depth)) == expected).all()
    assert expected.min() == 0 and expected.max() == 255


def test_the_scale_does_not_depend_on_the_image() -> None:
    dark = np.full((4, 4), 300, np.uint16)
    mixed = dark.copy()
    mixed[0, 0] = 65535
    assert pixels(read_image(dark))[1, 1, 0] == pixels(read_image(mixed))[1, 1, 0] == 1


@pytest.mark.parametrize("bit_depth", [10, 12, 16])
def test_16_bit_gray_files(write: Write, bit_depth: int) -> None:
    values = RNG.integers(0, 2**bit_depth, (7, 5)).astype(np.uint16)
    little, big = values.tobytes(), values.astype(">u2").tobytes()
    files = {
        "png": encoded(Image.fromarray(values), "PNG"),
        "tiff": encoded(Image.fromarray(values), "TIFF"),
        "lzw": encoded(Image.fromarray(values), "TIFF", compression="tiff_lzw"),
        "little": tiff([little], (5, 7), [16], 1),
        "big": tiff([big], (5, 7), [16], 1, order=">"),
        "pgm": b"P5 5 7 65535\n" + big,
    }
    for name, data in files.items():
        assert (pixels(read_image(write(data), bit_depth=bit_depth)) == gray(scaled(values, bit_depth))).all(), name
    inverted = tiff([(2**bit_depth - 1 - values).astype("<u2").tobytes()], (5, 7), [16], 0)
    assert (pixels(read_image(write(inverted), bit_depth=bit_depth)) == gray(scaled(values, bit_depth))).all()
    as_integers = Image.fromarray(values.astype(np.int32))
    assert as_integers.mode == "I"
    assert (pixels(read_image(as_integers, bit_depth=bit_depth)) == gray(scaled(values, bit_depth))).all()


@pytest.mark.parametrize("bit_depth", [9, 12, 16])
def test_files_that_state_their_own_maximum(write: Write, bit_depth: int) -> None:
    values = RNG.integers(0, 4096, (4, 6)).astype(np.uint16)
    expected = gray(scaled(values, 12))
    pairs = values.reshape(-1, 2).astype(int)
    packed = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in pairs.tolist())
    plain = "P2 6 4 4095\n" + " ".join(map(str, values.flat))
    for data in (b"P5 6 4 4095\n" + values.astype(">u2").tobytes(), plain.encode(), tiff([packed], (6, 4), [12], 1)):
        read = pixels(read_image(write(data), bit_depth=bit_depth)).astype(int)
        assert np.abs(read - expected).max() <= 1  # Pillow rounds to 16 bits in between.


def test_transparent_gray_of_16_bits(write: Write) -> None:
    values = np.array([[0, 513], [514, 65535]], np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    png = png_file(2, 2, 16, 0, rows, (b"tRNS", struct.pack(">H", 513)))
    assert pixels(read_image(write(png)))[..., 0].tolist() == [[0, 255], [2, 255]]


def deep_color_files() -> tuple[np.ndarray, dict[str, bytes]]:
    values = RNG.integers(0, 65536, (4, 4, 3)).astype(np.uint16)
    rgba = np.concatenate([values, np.full((4, 4, 1), 65535, np.uint16)], 2)
    ppm = b"P6 4 4 65535\n" + values.astype(">u2").tobytes()
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgba)
    files = {
        "ppm": ppm,
        "little": tiff([values.tobytes()], (4, 4), [16] * 3, 2),
        "big": tiff([values.astype(">u2").tobytes()], (4, 4), [16] * 3, 2, order=">"),
        "alpha": tiff([rgba.tobytes()], (4, 4), [16] * 4, 2, extra=[2]),
        "png": png_file(4, 4, 16, 6, rows),
    }
    return values, files


def test_16_bit_color_is_read_at_full_scale_only(write: Write) -> None:
    values, files = deep_color_files()
    for name, data in files.items():
        read = pixels(read_image(write(data))).astype(float)
        assert np.abs(read - values / 65535 * 255).max() <= 1, name
        with pytest.raises(ImageError, match="bit_depth=16 only"):
            read_image(write(data), bit_depth=12)
        with Image.open(io.BytesIO(data)) as opened, pytest.raises(ImageError, match="bit_depth=16 only"):
            read_image(opened, bit_depth=12)


def test_16_bit_color_with_a_transparent_color_is_refused(write: Write) -> None:
    rows = b"".join(b"\0" + bytes(6) for _ in range(2))
    assert pixels(read_image(write(png_file(1, 2, 16, 2, rows)))).max() == 0
    with pytest.raises(ImageError, match="transparent"):
        read_image(write(png_file(1, 2, 16, 2, rows, (b"tRNS", struct.pack(">3H", 255, 255, 255)))))


def test_planes_of_16_bits_are_refused_but_of_8_read(write: Write) -> None:
    planes = RNG.integers(0, 256, (3, 6, 4), dtype=np.uint8)
    strips = [plane.tobytes() for plane in planes]
    assert (pixels(read_image(write(tiff(strips, (4, 6), [8] * 3, 2, planar=2)))) == planes.transpose(1, 2, 0)).all()
    strips = [plane.astype(np.uint16).tobytes() for plane in planes]
    with pytest.raises(ImageError, match="interleaved"):
        read_image(write(tiff(strips, (4, 6), [16] * 3, 2, planar=2)))


def test_values_above_the_bit_depth_are_refused(write: Write) -> None:
    values = np.array([[0, 4096]], np.uint16)
    for source in (values, Image.fromarray(values), write(encoded(Image.fromarray(values), "PNG"))):
        assert read_image(source, bit_depth=13).size == (2, 1)
        with pytest.raises(ImageError, match="4096.*4095.*raise bit_depth"):
            read_image(source, bit_depth=12)
    for value in (-1, 65536):
        with pytest.raises(ImageError, match="save it with 8 or 16 bits"):
            read_image(Image.fromarray(np.array([[0, value]], np.int32)))


def test_16_bit_color_arrays_are_scaled_exactly() -> None:
    values = RNG.integers(0, 4096, (5, 4, 3)).astype(np.uint16)
    assert (pixels(read_image(values, bit_depth=12)) == scaled(values, 12)).all()
    assert (pixels(read_image(values[..., :1], bit_depth=12)) == gray(scaled(values[..., 0], 12))).all()


@pytest.mark.parametrize("bit_depth", [0, 8, 17, -1, 12.5, None, "12"])
def test_bit_depths_out_of_range(bit_depth: Any) -> None:
    with pytest.raises(InputError, match="9 to 16") as caught:
        read_image(PICTURE, bit_depth=bit_depth)
    assert not isinstance(caught.value, ImageError)


# --- orientation and frames

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
    9: lambda a: a,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF lzw", "WEBP", "JPEG", "16-bit PNG"])
def test_exif_orientation(write: Write, kind: str, orientation: int) -> None:
    stored = np.kron(NOISE, np.ones((8, 8, 1), np.uint8)) if kind == "JPEG" else NOISE
    image = Image.fromarray(stored)
    if (kind, orientation) == ("TIFF lzw", 9):
        pytest.skip("libtiff does not write it")
    if kind == "16-bit PNG":
        image, stored = Image.fromarray(stored[..., 0].astype(np.uint16) * 257), gray(stored[..., 0])
    options: dict[str, dict[str, Any]] = {
        "TIFF lzw": {"compression": "tiff_lzw"},
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 98, "subsampling": 0},
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(
        encoded(image, kind.split()[-1] if "PNG" in kind else kind.split()[0], exif=exif, **options.get(kind, {}))
    )
    expected = UPRIGHT[orientation](stored).astype(int)
    read = read_image(path)
    assert read.size == expected.shape[1::-1]
    assert np.abs(pixels(read) - expected).max() <= (12 if kind == "JPEG" else 0)
    assert not read.info and not dict(read.getexif())
    assert (pixels(read_image(read)) == pixels(read)).all()
    with Image.open(path) as opened:
        assert (pixels(read_image(opened)) == pixels(read)).all()


@pytest.mark.parametrize(
    "blob", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0"]
)
def test_damaged_exif_leaves_the_picture_as_it_is(write: Write, blob: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (pixels(read_image(write(encoded(PICTURE, "PNG", exif=blob)))) == NOISE).all()


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP", "MPO"])
def test_the_first_of_several_frames(write: Write, kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime")]
    path = write(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert np.abs(pixels(read_image(path)).astype(int) - (255, 0, 0)).max() <= 3


# --- what is refused


def refused(source: Any, reason: str) -> str:
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(source)
    if isinstance(source, (str, Path)):
        assert str(source) in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_images(write: Write, tmp_path: Path) -> None:
    refused(tmp_path / "missing.png", r"Cannot open .*missing\.png: No such file")
    refused(str(tmp_path / "missing.png"), r"Cannot open .*missing\.png: No such file")
    refused(tmp_path / ("x" * 1000), "Cannot open .*too long")
    refused(tmp_path, "folder")
    refused(write(b""), "empty")
    refused(write(b"not an image", "note.png"), "PNG")
    refused(write(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "drawing.svg"), "JPEG")
    refused(
        write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"),
        "it is not, or no longer, a file of type",
    )
    refused(write(encoded(PICTURE, "ICO"), "icon.ico"), "it is not, or no longer, a file of type")


@pytest.mark.parametrize("source", [None, 3, b"image.png", [[1, 2], [3, 4]], torch.zeros(3, 4, 4)])
def test_other_objects(source: object) -> None:
    refused(source, f"Cannot read an image from {type(source).__name__}")


def test_floating_point_is_refused_with_what_is_accepted(write: Write) -> None:
    for source in (
        Image.new("F", (4, 4)),
        write(encoded(Image.new("F", (4, 4)), "TIFF")),
        np.zeros((4, 4)),
        np.zeros((4, 4, 3), np.float32),
    ):
        refused(source, "uint8 or uint16")


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int16, np.int64, np.uint32, complex, object])
def test_other_types_of_arrays(dtype: type) -> None:
    refused(np.zeros((4, 4), dtype), "uint8 or uint16")


@pytest.mark.parametrize("shape", [(), (4,), (4, 4, 2), (3, 8, 8), (4, 4, 5), (1, 4, 4, 3), (4, 4, 0)])
def test_other_shapes_of_arrays(shape: tuple[int, ...]) -> None:
    for dtype in (np.uint8, np.uint16):
        refused(np.zeros(shape, dtype), r"\(H, W\)")


@pytest.mark.parametrize("shape", [(0, 4), (4, 0, 3), (0, 0, 1)])
def test_zero_sized_images(shape: tuple[int, ...]) -> None:
    for dtype in (np.uint8, np.uint16):
        refused(np.zeros(shape, dtype), "pixels are not an image")
    refused(Image.new("RGB", (0, 3)), "pixels are not an image")


@pytest.mark.parametrize("side", [10_000, 20_000])
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_too_many_pixels_are_refused_undecoded(write: Write, side: int, action: Literal["ignore", "error"]) -> None:
    """Of 100 million pixels Pillow warns, of 400 million it raises; here both are one refusal."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    path = write(png_file(side, side, 8, 2, b""))
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        refused(path, f"more than {MAX_PIXELS:,}")
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    refused(np.broadcast_to(np.uint8(0), (side, side)), f"more than {MAX_PIXELS:,}")


def test_the_limit_is_the_stated_number(write: Write) -> None:
    assert Image.MAX_IMAGE_PIXELS is not None and MAX_PIXELS < Image.MAX_IMAGE_PIXELS
    transform = build_transform((14, 14), MEAN, STD, max_pixels=100)
    for source in (
        np.zeros((10, 10), np.uint8),
        Image.new("L", (20, 5)),
        write(encoded(Image.new("L", (10, 10)), "PNG")),
    ):
        read = read_image(source, max_pixels=100)
        assert read.width * read.height == 100 and torch.equal(
            transform.of_rgb(transform.read(source)), transform.of_rgb(read)
        )
    for large in (np.zeros((10, 11), np.uint8), Image.new("L", (101, 1)), write(encoded(PICTURE, "PNG"))):
        with pytest.raises(ImageError, match="pixels are more than 100"):
            read_image(large, max_pixels=100)
        with pytest.raises(ImageError, match="pixels are more than 100"):
            transform.read(large)


@pytest.mark.parametrize("max_pixels", [0, -1, MAX_PIXELS + 1, 0.5, None, "9"])
def test_limits_out_of_range(max_pixels: Any) -> None:
    with pytest.raises(InputError, match="max_pixels is .*from 1 to 89,000,000") as caught:
        read_image(PICTURE, max_pixels=max_pixels)
    assert not isinstance(caught.value, ImageError)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_no_file_is_left_open(write: Write) -> None:
    good = write(encoded(PICTURE, "TIFF", save_all=True, append_images=[PICTURE]), "good")
    bad = write(encoded(PICTURE, "TIFF", compression="tiff_lzw")[:-40], "bad")
    before = os.listdir("/proc/self/fd")
    read = read_image(good)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(bad, "bad")
    assert os.listdir("/proc/self/fd") == before and read.size == PICTURE.size


# --- damage


def real_files() -> dict[str, bytes]:
    color, values = (
        Image.fromarray(np.kron(NOISE, np.ones((2, 2, 1), np.uint8))),
        Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257),
    )
    indexed = color.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "png": encoded(color, "PNG", exif=exif),
        "png palette": encoded(indexed, "PNG", transparency=3),
        "png alpha": encoded(color.convert("RGBA"), "PNG"),
        "png 16": encoded(values, "PNG"),
        "jpeg": encoded(color, "JPEG", exif=exif),
        "jpeg progressive": encoded(color, "JPEG", progressive=True),
        "jpeg cmyk": encoded(color.convert("CMYK"), "JPEG"),
        "tiff": encoded(color, "TIFF", exif=exif),
        "tiff 16": encoded(values, "TIFF"),
        "tiff lzw": encoded(color, "TIFF", compression="tiff_lzw"),
        "tiff deflate": encoded(values, "TIFF", compression="tiff_adobe_deflate"),
        "bmp": encoded(color, "BMP"),
        "bmp palette": encoded(indexed, "BMP"),
        "webp": encoded(color, "WEBP", exif=exif),
        "webp lossless": encoded(color.convert("RGBA"), "WEBP", lossless=True),
        "gif": encoded(indexed, "GIF"),
        "gif animated": encoded(indexed, "GIF", save_all=True, append_images=[indexed.rotate(90)]),
        "ppm": encoded(color, "PPM"),
        "pgm": b"P5 13 9 4095\n" + (NOISE[..., 0].astype(">u2")).tobytes(),
    }


FILES = real_files()


def read_or_refuse(path: Path, data: bytes) -> np.ndarray | None:
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return pixels(read_image(path))
        except ImageError as error:
            assert str(path) in str(error)
            return None


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_refused_or_whole(scratch: Path, name: str) -> None:
    data = FILES[name]
    whole = read_or_refuse(scratch, data)
    assert whole is not None
    cuts = sorted({*range(0, len(data), max(1, len(data) // 60)), *range(max(0, len(data) - 12), len(data))})
    read = {cut: read_or_refuse(scratch, data[:cut]) for cut in cuts}
    assert all(part is None or np.array_equal(part, whole) for part in read.values())
    assert all(part is None for cut, part in read.items() if cut < 0.45 * len(data))


RELAXED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
MAGIC = st.sampled_from(
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"BM",
        b"GIF89a",
        b"II*\0",
        b"MM\0*",
        b"RIFF0000WEBP",
        b"P6 ",
        b"P2 2 2 ",
    ]
)


@settings(RELAXED, max_examples=100)
@given(start=MAGIC, rest=st.binary(max_size=200))
@example(b"P6 ", b"99999999999 1 255\n")
@example(b"P2 2 2 ", b"255\n1 2 3 \xff")
def test_any_bytes_are_read_or_refused(scratch: Path, start: bytes, rest: bytes) -> None:
    read_or_refuse(scratch, start + rest)


@settings(RELAXED, max_examples=250)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(scratch: Path, data: st.DataObject) -> None:
    content = bytearray(FILES[data.draw(st.sampled_from(sorted(FILES)))])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content), data.draw(st.sampled_from([40, 300, 10**6]))) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        content = content or bytearray(b"-")
    read_or_refuse(scratch, bytes(content))


MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV", "I", "I;16", "I;16B"]


@settings(RELAXED, max_examples=60)
@given(mode=st.sampled_from(MODES), width=st.integers(1, 9), height=st.integers(1, 9))
def test_every_mode_of_pillow_keeps_its_size(mode: str, width: int, height: int) -> None:
    assert pixels(read_image(Image.new(mode, (width, height)))).shape == (height, width, 3)


# --- nothing silently wrong


def rgba_tiff(pixels: np.ndarray, extra: list[int]) -> bytes:
    height, width, channels = pixels.shape
    return tiff([pixels.tobytes()], (width, height), [8] * channels, 2, extra=extra)


def bmp_with_alpha(rgba: np.ndarray) -> bytes:
    """A BMP of version 4 that names a mask of the alpha channel, as cameras write it."""
    height, width, _ = rgba.shape
    data = rgba[::-1, :, [2, 1, 0, 3]].tobytes()
    header = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(data), 0, 0, 0, 0)
    header += struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + bytes(52)
    return b"BM" + struct.pack("<IHHI", 122 + len(data), 0, 0, 122) + header + data


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_alpha_that_hides_every_pixel_is_no_alpha(write: Write, kind: str) -> None:
    hidden = Image.fromarray(np.dstack([NOISE, np.zeros(NOISE.shape[:2], np.uint8)]))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    path = write(bmp_with_alpha(np.asarray(hidden)) if kind == "BMP" else encoded(hidden, kind, **options))
    with pytest.warns(UserWarning, match="hides every pixel and is ignored"):
        assert (pixels(read_image(path)) == NOISE).all()
    with pytest.warns(UserWarning, match="hides every pixel"):
        assert (pixels(read_image(np.asarray(hidden))) == NOISE).all()


@pytest.mark.parametrize("alpha", [1, 100, "one pixel"])
def test_alpha_that_hides_nearly_every_pixel_is_told(alpha: int | str) -> None:
    channel = np.zeros((20, 30), np.uint8) if isinstance(alpha, str) else np.full((20, 30), alpha, np.uint8)
    channel[0, 0] = 255 if isinstance(alpha, str) else alpha
    rgb = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    with pytest.warns(UserWarning, match="hides nearly every pixel"):
        read_image(np.dstack([rgb, channel]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        channel[:1] = 255
        read_image(np.dstack([rgb, channel]))


@pytest.mark.parametrize("fill", [0, 7, 255])
@pytest.mark.parametrize("extra", [[], [0]])
def test_a_fourth_channel_that_is_not_declared_is_not_alpha(write: Write, fill: int, extra: list[int]) -> None:
    path = write(rgba_tiff(np.dstack([NOISE, np.full(NOISE.shape[:2], fill, np.uint8)]), extra))
    assert (pixels(read_image(path)) == NOISE).all()


def test_a_fourth_channel_that_is_declared_is_alpha(write: Write) -> None:
    alpha = np.where(np.arange(NOISE[..., 0].size).reshape(NOISE.shape[:2]) % 2, 255, 0).astype(np.uint8)
    path = write(rgba_tiff(np.dstack([NOISE, alpha]), [2]))
    assert (pixels(read_image(path)) == np.where(alpha[..., None] > 0, NOISE, 255)).all()


def test_the_largest_page_of_a_tiff_is_the_photo(write: Write) -> None:
    thumbnail, mask = PICTURE.resize((4, 3)), PICTURE.resize((6, 5))
    data = encoded(thumbnail, "TIFF", save_all=True, append_images=[PICTURE, mask])
    path = write(data, "pages.tif")
    with pytest.warns(UserWarning, match=r"pages\.tif has several pages; page 2, 13 x 9 pixels, is read"):
        assert (pixels(read_image(path)) == NOISE).all()
    for end in range(8, len(data) - 100, 7):
        # Never the thumbnail of a file whose photo is cut off.
        with pytest.raises(ImageError, match="truncated|no longer"):
            read_image(write(data[:end], "cut.tif"))
    same = encoded(PICTURE, "TIFF", save_all=True, append_images=[PICTURE.rotate(180)])
    with pytest.warns(UserWarning, match="page 1"):
        assert (pixels(read_image(write(same))) == NOISE).all()


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_few_bits_of_16_are_hinted_at(write: Write, bits: int) -> None:
    samples = RNG.integers(0, 2**bits, (9, 13)).astype(np.uint16)
    samples[0, 0] = 2**bits - 1
    data = encoded(Image.fromarray(samples), "PNG")
    with pytest.warns(UserWarning, match=f"use {bits} of their bits.*bit_depth={bits}, or --bit-depth {bits}"):
        read_image(write(data))
    with pytest.warns(UserWarning, match=f"use {bits} of their bits"):
        read_image(samples)
    color = b"P6 9 13 65535\n" + np.repeat(samples, 3).astype(">u2").tobytes()
    with pytest.warns(UserWarning, match="saved with 8"):
        read_image(write(color))


def test_no_hint_where_the_bits_are_told_or_used(write: Write) -> None:
    low = np.full((4, 6), 4095, np.uint16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_image(low, bit_depth=12)
        read_image(low * 16)
        read_image(np.zeros((4, 6), np.uint16))
        read_image(write(b"P5 6 4 4095\n" + (low // 16).astype(">u2").tobytes()))
        read_image(PICTURE.point(lambda value: value // 64))


def test_truncated_files_are_refused_also_where_another_package_allows_them(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
    path = write(data[: len(data) // 2])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="truncated"):
        read_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert read_image(write(data)).size == (64, 64)


def test_transforms_are_float32_whatever_the_default_is() -> None:
    transform = build_transform((14, 14), MEAN, STD)
    expected = transform(PICTURE)
    torch.set_default_dtype(torch.float64)
    try:
        found = transform(PICTURE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


# --- identity


def test_files_are_known_by_their_bytes_and_images_by_their_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PICTURE.save(path)
    for source in (path, str(path)):
        read_image(source, digest=(found := hashlib.sha256()))
        assert found.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    for shape in ((9, 13, 3), (700, 4), (256, 3, 4), (257, 2)):
        array = RNG.integers(0, 256, shape, dtype=np.uint8)
        expected = hashlib.sha256(repr(shape).encode() + array.tobytes()).hexdigest()
        for same in (array, np.asfortranarray(array), Image.fromarray(array)):
            assert hash_of_pixels(same) == expected
        for other in (array[::-1], array.reshape(shape[0], -1, 1)):
            assert hash_of_pixels(other) != expected
    with pytest.raises(ImageError, match=r"Cannot open .*gone\.png: No such file"):
        read_image(tmp_path / "gone.png", digest=hashlib.sha256())


# --- transforms


def normalized(image: Image.Image) -> np.ndarray:
    values = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
    return (values - np.array(MEAN, np.float32)[:, None, None]) / np.array(STD, np.float32)[:, None, None]


def test_squash_is_the_plain_bicubic_resize() -> None:
    image = Image.fromarray(RNG.integers(0, 256, (61, 97, 3), dtype=np.uint8))
    tensor = build_transform((28, 42), MEAN, STD)(image)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 28, 42)
    np.testing.assert_allclose(tensor, normalized(image.resize((42, 28), Image.Resampling.BICUBIC)), atol=1e-6)
    same = build_transform((61, 97), MEAN, STD)(image)
    np.testing.assert_allclose(same, normalized(image), atol=1e-6)


@settings(RELAXED, max_examples=25)
@given(preset=st.sampled_from(PRESETS[1:]), width=st.integers(20, 700), height=st.integers(20, 700))
@example("resize224_crop224", 224, 224)
@example("resize224_crop224", 333, 500)
@example("resize256_crop224", 700, 20)
@example("resize256_crop224", 257, 256)
def test_crop_presets(preset: str, width: int, height: int) -> None:
    side = int(preset[6:9])
    image = Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))
    short, long = min(width, height), max(width, height)
    sides = {short: side, long: int(side * long / short)}
    resized = image.resize((sides[width], sides[height]), Image.Resampling.BICUBIC)
    left, top = int(round((resized.width - 224) / 2.0)), int(round((resized.height - 224) / 2.0))
    tensor = build_transform((224, 224), MEAN, STD, preset=preset)(image)
    np.testing.assert_allclose(tensor, normalized(resized.crop((left, top, left + 224, top + 224))), atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS[1:])
@pytest.mark.parametrize("size", [(224, 224), (301, 200), (199, 640), (1024, 31)])
def test_crop_presets_equal_torchvision(preset: str, size: tuple[int, int]) -> None:
    from torchvision import transforms as T

    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    resize = T.Resize(int(preset[6:9]), T.InterpolationMode.BICUBIC)
    expected = T.Compose([resize, T.CenterCrop(224), T.ToTensor(), T.Normalize(MEAN, STD)])(image)
    assert torch.equal(build_transform((320, 320), MEAN, STD, preset=preset)(image), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_transforms_take_any_mode_and_travel(preset: str) -> None:
    size: Any = [224, 224]
    transform = build_transform(size, list(MEAN), STD, preset=preset)
    assert pickle.loads(pickle.dumps(transform)) == transform and preset in repr(transform) and "224" in repr(transform)
    gray = Image.new("LA", (30, 40), (10, 255))
    np.testing.assert_allclose(transform(gray), normalized(Image.new("RGB", (224, 224), (10, 10, 10))), atol=1e-6)


def test_extreme_aspect_ratios() -> None:
    line = Image.new("RGB", (9000, 1), "red")
    assert build_transform((32, 32), MEAN, STD)(line).shape == (3, 32, 32)
    with pytest.raises(ImageError, match="squash"):
        build_transform((224, 224), MEAN, STD, preset="resize256_crop224")(line)


def test_bad_transforms() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'squash'"):
        build_transform((224, 224), MEAN, STD, preset="squish")
    sizes: tuple[Any, ...] = ((0, 224), (224,), (224, -1), (1, 2, 3))
    for size in sizes:
        with pytest.raises(InputError, match="height and a width"):
            build_transform(size, MEAN, STD)


PEAK = """
import sys
from adfeatures.images import read_image

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

read_image(sys.argv[1])
before = peak()
read_image(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory of a process is read from /proc")
@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGB", ".jpg"), ("RGBA", ".png"), ("I;16", ".png"), ("P", ".png"), ("CMYK", ".tif")]
)
def test_decoding_takes_at_most_twenty_bytes_a_pixel(tmp_path: Path, mode: str, suffix: str) -> None:
    side, paths = 3000, [tmp_path / f"small{suffix}", tmp_path / f"large{suffix}"]
    for path, size in zip(paths, (8, side), strict=True):
        image = Image.effect_noise((8, 8), 90).resize((size, size))
        if mode == "RGBA":
            image = Image.merge("RGBA", [image] * 4)
        elif mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 256)
        else:
            image = image.convert(mode)
        image.save(path)
    done = subprocess.run([sys.executable, "-c", PEAK, *map(str, paths)], capture_output=True, text=True, check=True)
    assert 3 * side**2 < int(done.stdout) < 20 * side**2 + paths[1].stat().st_size
