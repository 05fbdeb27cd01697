"""Reading, transforming and drawing images, against formulas written out here and against files built byte by byte."""

import io
import os
import pickle
import struct
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, features

from adfeatures import images
from adfeatures.errors import ImageError, InputError, UnknownNameError
from adfeatures.images import (
    BACKGROUND,
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    PRESETS,
    build_transform,
    list_images,
    read_image,
)
from adfeatures.overlays import colorize, contact_sheet, overlay

RNG = np.random.default_rng(0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NOISE = RNG.integers(0, 256, (9, 13, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)


def pixels(image):
    assert type(image) is Image.Image and image.mode == "RGB"
    return np.asarray(image)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(strips, size, bits, photometric, *, order="<", planar=1, extra=()):
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


def png_file(width, height, bits, color, rows, *chunks):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(chunk(*c) for c in chunks)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def scaled(values, bit_depth):
    """The stated rule in exact arithmetic. No value lies halfway, since 2**n - 1 is odd."""
    return np.array([round(Fraction(int(v) * 255, 2**bit_depth - 1)) for v in values.flat], np.uint8).reshape(
        values.shape
    )


def gray(values):
    return np.repeat(values[..., None], 3, 2)


@pytest.fixture
def write(tmp_path):
    def write(data, name="image.bin"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("images") / "scratch"


# --- what is read


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_files_give_their_pixels(write, kind):
    path = write(encoded(PICTURE, kind))
    assert (pixels(read_image(path)) == NOISE).all()
    assert (pixels(read_image(str(path))) == NOISE).all()
    with Image.open(path) as opened:
        assert (pixels(read_image(opened)) == NOISE).all()


def test_the_suffix_does_not_matter(write):
    assert (pixels(read_image(write(encoded(PICTURE, "PNG"), "photo.jpg"))) == NOISE).all()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_files_are_close(write, kind):
    smooth = Image.fromarray(np.linspace(0, 200, 40 * 50 * 3).reshape(40, 50, 3).astype(np.uint8))
    read = pixels(read_image(write(encoded(smooth, kind))))
    assert np.abs(read.astype(int) - np.asarray(smooth)).mean() < 8


def test_arrays():
    assert (pixels(read_image(NOISE)) == NOISE).all()
    assert (pixels(read_image(NOISE[::2, ::-1])) == NOISE[::2, ::-1]).all()
    assert (pixels(read_image(NOISE[..., 0])) == gray(NOISE[..., 0])).all()
    assert (pixels(read_image(NOISE[..., :1])) == gray(NOISE[..., 0])).all()
    assert pixels(read_image(NOISE[:1, :1])).shape == (1, 1, 3)


def test_the_result_is_independent_of_the_source():
    array = NOISE[..., 0].copy()
    read = read_image(array)
    array[:] = 0
    assert (pixels(read) == gray(NOISE[..., 0])).all()
    source = PICTURE.copy()
    read_image(source).putpixel((0, 0), tuple(255 - NOISE[0, 0]))
    assert (np.asarray(source) == NOISE).all()


def test_alpha_is_laid_over_the_background(write):
    rgba = RNG.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    rgba[0, 0, 3], rgba[0, 1, 3] = 0, 255
    alpha = rgba[..., 3:].astype(np.float64) / 255
    expected = rgba[..., :3] * alpha + np.array(BACKGROUND) * (1 - alpha)
    assert BACKGROUND == (255, 255, 255)
    for source in (rgba, Image.fromarray(rgba), write(encoded(Image.fromarray(rgba), "PNG"))):
        read = pixels(read_image(source))
        assert np.abs(read - expected).max() <= 1
        assert tuple(read[0, 0]) == BACKGROUND and (read[0, 1] == rgba[0, 1, :3]).all()


def test_gray_with_alpha(write):
    values, alpha = RNG.integers(0, 256, (2, 8, 8), dtype=np.uint8)
    image = Image.merge("LA", [Image.fromarray(values), Image.fromarray(alpha)])
    expected = gray(values * (alpha / 255) + 255 * (1 - alpha / 255))
    assert np.abs(pixels(read_image(image)) - expected).max() <= 1
    assert np.abs(pixels(read_image(write(encoded(image, "PNG")))) - expected).max() <= 1
    premultiplied = pixels(read_image(image.convert("La")))
    assert (
        np.abs(premultiplied[alpha > 32] - expected[alpha > 32]).max() <= 5
    )  # Division by a small alpha magnifies rounding.


@pytest.mark.parametrize("transparent", [None, 3, bytes([0, 255, 128, 64])])
def test_palettes(write, transparent):
    indices = RNG.integers(0, 4, (8, 8), dtype=np.uint8)
    palette = np.array([[200, 10, 10], [10, 200, 10], [10, 10, 200], [90, 90, 90]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    alpha = {None: [255] * 4, 3: [255, 255, 255, 0]}.get(
        transparent, list(transparent) if isinstance(transparent, bytes) else None
    )
    weight = np.array(alpha)[indices][..., None] / 255
    options = {} if transparent is None else {"transparency": transparent}
    read = pixels(read_image(write(encoded(image, "PNG", **options))))
    assert np.abs(read - (palette[indices] * weight + 255 * (1 - weight))).max() <= 1


def test_a_transparent_color_is_background(write):
    array = np.full((4, 4, 3), 7, np.uint8)
    array[1, 2] = (1, 2, 3)
    read = pixels(read_image(write(encoded(Image.fromarray(array), "PNG", transparency=(1, 2, 3)))))
    assert tuple(read[1, 2]) == BACKGROUND and (np.delete(read.reshape(-1, 3), 6, 0) == 7).all()


def test_palette_with_an_alpha_channel():
    image = Image.new("PA", (2, 1))
    image.putpalette([200, 10, 10, 10, 200, 10])
    image.putpixel((0, 0), (0, 255))
    image.putpixel((1, 0), (1, 0))
    assert pixels(read_image(image)).tolist() == [[[200, 10, 10], [255, 255, 255]]]


def test_cmyk(write):
    cmyk = RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    ink = 1 - cmyk / 255
    expected = 255 * ink[..., :3] * ink[..., 3:]
    image = Image.merge("CMYK", [Image.fromarray(np.ascontiguousarray(cmyk[..., i])) for i in range(4)])
    assert np.abs(pixels(read_image(image)) - expected).max() <= 2
    assert np.abs(pixels(read_image(write(encoded(image, "TIFF")))) - expected).max() <= 2
    flat = Image.new("CMYK", (16, 16), (20, 200, 100, 30))
    expected = [255 * (1 - c / 255) * (1 - 30 / 255) for c in (20, 200, 100)]
    assert np.abs(pixels(read_image(write(encoded(flat, "JPEG", quality=95)))) - expected).max() <= 4


def test_other_color_modes():
    y, cb, cr = 120, 90, 160
    expected = (y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128))
    assert np.abs(pixels(read_image(Image.new("YCbCr", (2, 2), (y, cb, cr)))) - expected).max() <= 2
    assert pixels(read_image(Image.new("L", (1, 1), 77))).tolist() == [[[77] * 3]]
    assert pixels(read_image(Image.new("1", (1, 1), 1))).tolist() == [[[255] * 3]]
    assert pixels(read_image(Image.new("HSV", (1, 1), (0, 255, 255)))).tolist() == [[[255, 0, 0]]]


@pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow has no color management")
def test_lab():
    assert np.abs(pixels(read_image(Image.new("LAB", (2, 2), (255, 128, 128)))).astype(int) - 255).max() <= 3
    red = pixels(read_image(Image.new("LAB", (2, 2), (136, 208, 195))))[0, 0].astype(int)  # L* 53.2, a* 80, b* 67
    assert np.abs(red - (255, 0, 0)).max() <= 12


# --- 16 bits


@pytest.mark.parametrize("bit_depth", range(9, 17))
def test_every_16_bit_value_has_its_fixed_place(bit_depth):
    values = np.arange(2**bit_depth, dtype=np.uint16).reshape(-1, 2 ** (bit_depth // 2))
    expected = gray(scaled(values, bit_depth))
    assert (pixels(read_image(values, bit_depth=bit_depth)) == expected).all()
    assert (pixels(read_image(values.astype(">u2"), bit_depth=bit_depth)) == expected).all()
    assert expected.min() == 0 and expected.max() == 255


def test_the_scale_does_not_depend_on_the_image():
    dark = np.full((4, 4), 300, np.uint16)
    mixed = dark.copy()
    mixed[0, 0] = 65535
    assert pixels(read_image(dark))[1, 1, 0] == pixels(read_image(mixed))[1, 1, 0] == 1


@pytest.mark.parametrize("bit_depth", [10, 12, 16])
def test_16_bit_gray_files(write, bit_depth):
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
def test_files_that_state_their_own_maximum(write, bit_depth):
    values = RNG.integers(0, 4096, (4, 6)).astype(np.uint16)
    expected = gray(scaled(values, 12))
    pairs = values.reshape(-1, 2).astype(int)
    packed = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in pairs.tolist())
    plain = "P2 6 4 4095\n" + " ".join(map(str, values.flat))
    for data in (b"P5 6 4 4095\n" + values.astype(">u2").tobytes(), plain.encode(), tiff([packed], (6, 4), [12], 1)):
        read = pixels(read_image(write(data), bit_depth=bit_depth)).astype(int)
        assert np.abs(read - expected).max() <= 1  # Pillow rounds to 16 bits in between.


def test_transparent_gray_of_16_bits(write):
    values = np.array([[0, 513], [514, 65535]], np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    png = png_file(2, 2, 16, 0, rows, (b"tRNS", struct.pack(">H", 513)))
    assert pixels(read_image(write(png)))[..., 0].tolist() == [[0, 255], [2, 255]]


def deep_color_files():
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


def test_16_bit_color_is_read_at_full_scale_only(write):
    values, files = deep_color_files()
    for name, data in files.items():
        read = pixels(read_image(write(data))).astype(float)
        assert np.abs(read - values / 65535 * 255).max() <= 1, name
        with pytest.raises(ImageError, match="bit_depth=16 only"):
            read_image(write(data), bit_depth=12)
        with Image.open(io.BytesIO(data)) as opened, pytest.raises(ImageError, match="bit_depth=16 only"):
            read_image(opened, bit_depth=12)


def test_16_bit_color_with_a_transparent_color_is_refused(write):
    rows = b"".join(b"\0" + bytes(6) for _ in range(2))
    assert pixels(read_image(write(png_file(1, 2, 16, 2, rows)))).max() == 0
    with pytest.raises(ImageError, match="transparent"):
        read_image(write(png_file(1, 2, 16, 2, rows, (b"tRNS", struct.pack(">3H", 255, 255, 255)))))


def test_planes_of_16_bits_are_refused_but_of_8_read(write):
    planes = RNG.integers(0, 256, (3, 6, 4), dtype=np.uint8)
    strips = [plane.tobytes() for plane in planes]
    assert (pixels(read_image(write(tiff(strips, (4, 6), [8] * 3, 2, planar=2)))) == planes.transpose(1, 2, 0)).all()
    strips = [plane.astype(np.uint16).tobytes() for plane in planes]
    with pytest.raises(ImageError, match="interleaved"):
        read_image(write(tiff(strips, (4, 6), [16] * 3, 2, planar=2)))


def test_values_above_the_bit_depth_are_refused(write):
    values = np.array([[0, 4096]], np.uint16)
    for source in (values, Image.fromarray(values), write(encoded(Image.fromarray(values), "PNG"))):
        assert read_image(source, bit_depth=13).size == (2, 1)
        with pytest.raises(ImageError, match="4096.*4095.*raise bit_depth"):
            read_image(source, bit_depth=12)
    for value in (-1, 65536):
        with pytest.raises(ImageError, match="save it with 8 or 16 bits"):
            read_image(Image.fromarray(np.array([[0, value]], np.int32)))


def test_16_bit_color_arrays_are_scaled_exactly():
    values = RNG.integers(0, 4096, (5, 4, 3)).astype(np.uint16)
    assert (pixels(read_image(values, bit_depth=12)) == scaled(values, 12)).all()
    assert (pixels(read_image(values[..., :1], bit_depth=12)) == gray(scaled(values[..., 0], 12))).all()


@pytest.mark.parametrize("bit_depth", [0, 8, 17, -1, 12.5, None, "12"])
def test_bit_depths_out_of_range(bit_depth):
    with pytest.raises(InputError, match="9 to 16") as caught:
        read_image(PICTURE, bit_depth=bit_depth)
    assert not isinstance(caught.value, ImageError)


# --- orientation and frames

UPRIGHT = {
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
def test_exif_orientation(write, kind, orientation):
    stored = np.kron(NOISE, np.ones((8, 8, 1), np.uint8)) if kind == "JPEG" else NOISE
    image = Image.fromarray(stored)
    if (kind, orientation) == ("TIFF lzw", 9):
        pytest.skip("libtiff does not write it")
    if kind == "16-bit PNG":
        image, stored = Image.fromarray(stored[..., 0].astype(np.uint16) * 257), gray(stored[..., 0])
    options = {
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
def test_damaged_exif_leaves_the_picture_as_it_is(write, blob):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (pixels(read_image(write(encoded(PICTURE, "PNG", exif=blob)))) == NOISE).all()


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP", "MPO"])
def test_the_first_of_several_frames(write, kind):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime")]
    path = write(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert np.abs(pixels(read_image(path)).astype(int) - (255, 0, 0)).max() <= 3


# --- what is refused


def refused(source, reason, **options):
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(source, **options)
    if isinstance(source, (str, Path)):
        assert str(source) in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_images(write, tmp_path):
    refused(tmp_path / "missing.png", "no such file")
    refused(str(tmp_path / "missing.png"), "no such file")
    refused(tmp_path / ("x" * 5000), "no such file|too long|truncated")
    refused(tmp_path, "folder")
    refused(write(b""), "empty")
    refused(write(b"not an image", "note.png"), "PNG")
    refused(write(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "drawing.svg"), "JPEG")
    refused(write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"), "it is not, or no longer")
    refused(write(encoded(PICTURE, "ICO"), "icon.ico"), "it is not, or no longer")


@pytest.mark.parametrize("source", [None, 3, b"image.png", [[1, 2], [3, 4]], torch.zeros(3, 4, 4)])
def test_other_objects(source):
    refused(source, f"Cannot read an image from {type(source).__name__}")


def test_floating_point_is_refused_with_what_is_accepted(write):
    for source in (
        Image.new("F", (4, 4)),
        write(encoded(Image.new("F", (4, 4)), "TIFF")),
        np.zeros((4, 4)),
        np.zeros((4, 4, 3), np.float32),
    ):
        refused(source, "uint8 or uint16")


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int16, np.int64, np.uint32, complex, object])
def test_other_types_of_arrays(dtype):
    refused(np.zeros((4, 4), dtype), "uint8 or uint16")


@pytest.mark.parametrize("shape", [(), (4,), (4, 4, 2), (3, 8, 8), (4, 4, 5), (1, 4, 4, 3), (4, 4, 0)])
def test_other_shapes_of_arrays(shape):
    for dtype in (np.uint8, np.uint16):
        refused(np.zeros(shape, dtype), r"\(H, W\)")


@pytest.mark.parametrize("shape", [(0, 4), (4, 0, 3), (0, 0, 1)])
def test_zero_sized_images(shape):
    for dtype in (np.uint8, np.uint16):
        refused(np.zeros(shape, dtype), "pixels are no image")
    refused(Image.new("RGB", (0, 3)), "pixels are no image")


@pytest.mark.parametrize("side", [10_000, 20_000])
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_too_many_pixels_are_refused_undecoded(write, side, action):
    """Of 100 million pixels Pillow warns, of 400 million it raises; here both are one refusal."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    path = write(png_file(side, side, 8, 2, b""))
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        refused(path, f"more than {MAX_PIXELS:,}")
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    refused(np.broadcast_to(np.uint8(0), (side, side)), f"more than {MAX_PIXELS:,}")


def test_the_limit_is_the_stated_number(monkeypatch):
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    assert read_image(np.zeros((10, 10), np.uint8)).size == (10, 10)
    refused(np.zeros((10, 11), np.uint8), "11 x 10 pixels are more than 100")
    refused(Image.new("L", (101, 1)), "more than 100")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_no_file_is_left_open(write):
    good = write(encoded(PICTURE, "TIFF", save_all=True, append_images=[PICTURE]), "good")
    bad = write(encoded(PICTURE, "TIFF", compression="tiff_lzw")[:-40], "bad")
    before = os.listdir("/proc/self/fd")
    read = read_image(good)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(bad, "bad")
    assert os.listdir("/proc/self/fd") == before and read.size == PICTURE.size


# --- damage


def real_files():
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


def read_or_refuse(path, data):
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return pixels(read_image(path))
        except ImageError as error:
            assert str(path) in str(error)
            return None


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_refused_or_whole(scratch, name):
    data = FILES[name]
    whole = read_or_refuse(scratch, data)
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
def test_any_bytes_are_read_or_refused(scratch, start, rest):
    read_or_refuse(scratch, start + rest)


@settings(RELAXED, max_examples=250)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(scratch, data):
    content = bytearray(FILES[data.draw(st.sampled_from(sorted(FILES)))])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content), data.draw(st.sampled_from([40, 300, 10**6]))) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        content = content or bytearray(b"-")
    read_or_refuse(scratch, bytes(content))


@settings(RELAXED, max_examples=60)
@given(mode=st.sampled_from(["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV", "I", "I;16", "I;16B"]),
       width=st.integers(1, 9), height=st.integers(1, 9))  # fmt: skip
def test_every_mode_of_pillow_keeps_its_size(mode, width, height):
    assert pixels(read_image(Image.new(mode, (width, height)))).shape == (height, width, 3)


# --- folders


@pytest.fixture
def folder(tmp_path):
    for name in (
        "b.PNG",
        "a.jpg",
        "c.tiff",
        ".hidden.png",
        "notes.txt",
        "sub/z.bmp",
        "sub/.x.png",
        ".cache/y.png",
        "sub/deep/w.webp",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def test_listing(folder):
    assert list_images(folder) == [folder / name for name in ("a.jpg", "b.PNG", "c.tiff")]
    assert list_images(str(folder)) == list_images(folder)
    expected = [folder / name for name in ("a.jpg", "b.PNG", "c.tiff", "sub/deep/w.webp", "sub/z.bmp")]
    assert list_images(folder, recursive=True) == expected


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_listed_suffix_can_be_read(tmp_path, suffix):
    image = PICTURE.convert("L") if suffix == ".pgm" else PICTURE
    path = tmp_path / f"image{suffix.upper()}"
    image.save(path)
    assert list_images(tmp_path) == [path]
    assert read_image(path).size == PICTURE.size


def test_folders_without_images(tmp_path):
    with pytest.raises(ImageError, match="not there"):
        list_images(tmp_path / "missing")
    (tmp_path / "file.png").touch()
    with pytest.raises(ImageError, match="file.png is a file"):
        list_images(tmp_path / "file.png")
    empty = tmp_path / "empty"
    (empty / "sub").mkdir(parents=True)
    with pytest.raises(ImageError, match=r"empty \(looked for .bmp .*webp\)\.$"):
        list_images(empty, recursive=True)
    (empty / "sub" / "x.png").touch()
    with pytest.raises(ImageError, match="sub-folders hold 1: take them with recursive=True"):
        list_images(empty)
    assert len(list_images(empty, recursive=True)) == 1


# --- transforms


def normalized(image):
    values = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
    return (values - np.array(MEAN, np.float32)[:, None, None]) / np.array(STD, np.float32)[:, None, None]


def test_squash_is_the_plain_bicubic_resize():
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
def test_crop_presets(preset, width, height):
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
def test_crop_presets_equal_torchvision(preset, size):
    from torchvision import transforms as T

    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    resize = T.Resize(int(preset[6:9]), T.InterpolationMode.BICUBIC)
    expected = T.Compose([resize, T.CenterCrop(224), T.ToTensor(), T.Normalize(MEAN, STD)])(image)
    assert torch.equal(build_transform((320, 320), MEAN, STD, preset=preset)(image), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_transforms_take_any_mode_and_travel(preset):
    transform = build_transform([224, 224], list(MEAN), STD, preset=preset)
    assert pickle.loads(pickle.dumps(transform)) == transform and preset in repr(transform) and "224" in repr(transform)
    rgba = Image.new("RGBA", (30, 40), (10, 20, 30, 0))
    white = Image.new("RGB", (224, 224), BACKGROUND)
    np.testing.assert_allclose(transform(rgba), normalized(white), atol=1e-6)


def test_extreme_aspect_ratios():
    line = Image.new("RGB", (9000, 1), "red")
    assert build_transform((32, 32), MEAN, STD)(line).shape == (3, 32, 32)
    with pytest.raises(ImageError, match="squash"):
        build_transform((224, 224), MEAN, STD, preset="resize256_crop224")(line)


def test_bad_transforms():
    with pytest.raises(UnknownNameError, match="Did you mean 'squash'"):
        build_transform((224, 224), MEAN, STD, preset="squish")
    for size in ((0, 224), (224,), (224, -1), (1, 2, 3)):
        with pytest.raises(InputError, match="height and a width"):
            build_transform(size, MEAN, STD)


# --- colors


def lightness(colors):
    """CIE L* of sRGB colors."""
    linear = np.where(colors / 255 <= 0.04045, colors / 255 / 12.92, ((colors / 255 + 0.055) / 1.055) ** 2.4)
    return 116 * np.cbrt(linear @ (0.2126, 0.7152, 0.0722)) - 16


def test_colors_rise_evenly_to_red():
    colors = colorize(np.linspace(0, 1, 256)[None], (0, 1))[0].astype(int)
    assert colors.shape == (256, 3) and len(np.unique(colors, axis=0)) > 200
    assert (np.diff(colors[:, 0]) >= 0).all()
    steps = np.diff(lightness(colors)[::15])
    assert (steps > 0).all() and steps.max() < 3 * steps.min()
    low, high = colors[0], colors[-1]
    assert high[0] > 240 and high[1:].max() < 40
    assert low.argmax() == 2 and low.max() < 100


def test_the_scale_is_fixed_and_clips():
    values = np.array([[-5.0, 0.0, 1.0, 2.0, 9.0, np.inf, -np.inf]])
    colors = colorize(values, (0, 2))
    assert colors.dtype == np.uint8 and colors.shape == (1, 7, 3)
    assert (colors[0, 0] == colors[0, 1]).all() and (colors[0, 6] == colors[0, 1]).all()
    assert (colors[0, 4] == colors[0, 3]).all() and (colors[0, 5] == colors[0, 3]).all()
    assert (colorize(values[:, 2:3], (0, 2))[0, 0] == colors[0, 2]).all()
    assert (colorize(torch.from_numpy(values), (0, 2)) == colors).all()


@pytest.mark.parametrize("scale", [(1, 1), (2, 1), (0, float("nan")), (float("-inf"), 1)])
def test_bad_scales(scale):
    with pytest.raises(InputError, match="scale"):
        colorize(np.zeros((2, 2)), scale)


@pytest.mark.parametrize("bad", [np.array([[0.0, np.nan]]), np.zeros((1, 2, 2)), np.zeros(3), np.zeros((0, 4))])
def test_bad_maps(bad):
    with pytest.raises(InputError, match="anomaly map"):
        colorize(bad, (0, 1))
    with pytest.raises(InputError, match="anomaly map"):
        overlay(PICTURE, bad, scale=(0, 1))


# --- overlays


def hill(width, height):
    y, x = np.mgrid[:height, :width]
    return np.exp(-(((x / width - 0.5) / 0.2) ** 2) - ((y / height - 0.5) / 0.2) ** 2)


SIZES = [(1, 1), (16, 16), (64, 64), (300, 40), (40, 300), (640, 480), (1500, 1000)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("caption", [None, "000.png  score 0.7", "a_very_long_name_without_any_place_to_break_" * 4])
def test_overlays_leave_normal_regions_and_cover_nothing(size, caption):
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


def test_a_long_caption_is_wrapped_not_cut():
    short = overlay(np.zeros((64, 64), np.uint8), np.zeros((64, 64)), scale=(0, 1), caption="x")
    long = overlay(
        np.zeros((64, 64), np.uint8), np.zeros((64, 64)), scale=(0, 1), caption="many words in one caption " * 5
    )
    assert long.width == short.width and long.height > short.height + 40


def test_heat_grows_towards_red():
    values = np.linspace(0, 1, 200)[None].repeat(50, 0)
    drawn = pixels(overlay(np.full((50, 200, 3), 128, np.uint8), values, scale=(0, 1)))[25, :200].astype(int)
    distance = np.abs(drawn - (255, 24, 24)).sum(1)
    assert (np.diff(np.abs(drawn - 128).sum(1)[::20]) > 0).all()
    assert distance[-1] < 0.3 * distance[0] and (np.diff(distance[100::20]) < 0).all()
    assert np.abs(drawn[:40] - 128).max() < 12, "normal regions stay readable"


def test_the_same_value_looks_the_same_whatever_else_is_in_the_map():
    flat = np.full((40, 40), 0.3)
    peak = flat.copy()
    peak[5, 5] = 100
    drawn = [pixels(overlay(np.full((40, 40), 90, np.uint8), values, scale=(0, 1))) for values in (flat, peak)]
    assert (drawn[0][20:] == drawn[1][20:]).all() and (drawn[0][5, 5] != drawn[1][5, 5]).any()


@pytest.mark.parametrize("ground", [0, 128, 255])
def test_the_contour_follows_the_threshold(ground):
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


def test_no_contour_where_nothing_crosses():
    image, values = np.full((64, 64), 90, np.uint8), np.full((64, 64), 0.6)
    plain = overlay(image, values, scale=(0, 1)).crop((0, 0, 64, 64))
    for threshold in (0.1, 0.6, 3.0):
        assert overlay(image, values, scale=(0, 1), threshold=threshold).crop((0, 0, 64, 64)) == plain


def test_the_legend_shows_the_colors_and_the_tick():
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


def test_bad_overlays():
    with pytest.raises(InputError, match=r"\(3, 4\).*\(4, 3\).*resize"):
        overlay(np.zeros((4, 3), np.uint8), np.zeros((3, 4)), scale=(0, 1))
    for threshold in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="threshold"):
            overlay(np.zeros((4, 4), np.uint8), np.zeros((4, 4)), scale=(0, 1), threshold=threshold)
    with pytest.raises(ImageError, match="no such file"):
        overlay("missing.png", np.zeros((4, 4)), scale=(0, 1))


# --- contact sheets


def test_contact_sheet_places_tiles_with_equal_margins():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90), (0, 90, 90)]
    sheet = pixels(contact_sheet([Image.new("RGB", (60, 30), color) for color in colors], columns=3, tile_width=240))
    margin = 10
    assert sheet.shape == (3 * margin + 2 * 120, 4 * margin + 3 * 240, 3)
    expected = np.full_like(sheet, 255)
    for i, color in enumerate(colors):
        y, x = margin + i // 3 * (120 + margin), margin + i % 3 * (240 + margin)
        expected[y : y + 120, x : x + 240] = color
    assert (sheet == expected).all()


def test_contact_sheet_of_unlike_tiles():
    tiles = [Image.new("RGBA", (10, 1000), "red"), Image.new("L", (500, 100)), Image.new("RGB", (100, 100), "blue")]
    sheet = pixels(contact_sheet(tiles, columns=2, tile_width=96))
    assert sheet.shape == (4 + 192 + 4 + 96 + 4, 4 + 2 * (96 + 4), 3)
    assert contact_sheet(tiles[2:], columns=5, tile_width=96).size == (104, 104)


@pytest.mark.parametrize(("count", "columns", "width"), [(0, 1, 10), (1, 0, 10), (1, 1, 0)])
def test_bad_contact_sheets(count, columns, width):
    with pytest.raises(InputError, match="contact sheet"):
        contact_sheet([PICTURE] * count, columns=columns, tile_width=width)
