"""What is opened as an image file, and files that are made to cost time or memory."""

from __future__ import annotations

import io
import os
import signal
import socket
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.models import photo
from PIL import Image, TiffImagePlugin

from adfeatures import image_files
from adfeatures.errors import ImageError, InputError
from adfeatures.image_files import FORMATS, MAX_SIDE, open_image, refusing
from adfeatures.images import build_transform, read_image
from adfeatures.sources import Photo, image_sources, list_images, read_photo
from adfeatures.worklist import find_images
from training.data.images import read_mask
from training.data.manifest import read_manifest
from training.evaluation.feature_cache import content_key

PICTURE = photo(0)


def encoded(kind: str, image: Image.Image = PICTURE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, before: bytes = b"", pixels: bytes | None = None) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes((width + 1) * height))) if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + header + before + body + chunk(b"IEND", b"")


def gif(before: bytes) -> bytes:
    data = encoded("GIF", Image.new("1", (64, 64)))
    start = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return data[:start] + before + data[start:]


def scans(side: int, count: int) -> bytes:
    """A progressive JPEG whose last scan stands there so many times more."""
    data = encoded("JPEG", Image.new("L", (side, side)), progressive=True)
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * count + data[-2:]


def strips(count: int) -> bytes:
    """A TIFF of 10 x 10 pixels that names the same row so many times."""
    table, at = struct.pack("<I", 8) * count, 8 + 16
    tags = {256: (4, 1, 10), 257: (4, 1, 10), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
    tags |= {273: (4, count, at), 277: (3, 1, 1), 278: (4, 1, 1)}
    entries = b"".join(struct.pack("<HHII", tag, *value) for tag, value in tags.items())
    return (
        b"II*\0"
        + struct.pack("<I", at + len(table))
        + bytes(16)
        + table
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
    )


JPEG = encoded("JPEG")
COSTLY: dict[str, tuple[Callable[[], bytes], str]] = {
    "fill bytes before a JPEG": (lambda: JPEG[:2] + b"\xff" * 200_000 + JPEG[2:], "more pieces"),
    "empty comments of a JPEG": (lambda: JPEG[:2] + b"\xff\xfe\0\2" * 100_000 + JPEG[2:], "more pieces"),
    "metadata of 9 MB": (lambda: JPEG[:2] + (b"\xff\xef\xff\xff" + bytes(65533)) * 140 + JPEG[2:], "more around"),
    "empty chunks of a PNG": (lambda: png(8, 8, chunk(b"gAMA", bytes(4)) * 60_000), "more pieces"),
    "empty pixels of a PNG": (lambda: png(8, 8, pixels=chunk(b"IDAT", b"") * 8000), "more pieces"),
    "text of a PNG": (lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50 << 20)))), "too large"),
    "profile of a PNG": (lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50 << 20)))), "too large"),
    "texts of a PNG": (lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000))) * 90), "text chunks"),
    "a comment of a GIF": (lambda: gif(b"\x21\xfe" + (b"\xff" + b"x" * 255) * 40_000 + b"\0"), "more around"),
    "comments of a GIF": (lambda: gif(b"\x21\xfe\1x\0" * 60_000), "more pieces"),
    "blanks of a PPM": (lambda: b"P6" + b" " * 200_000 + b"2 2 255\n" + bytes(12), "more pieces"),
    "comments of a PPM": (lambda: b"P6\n" + b"#\n" * 100_000 + b"2 2 255\n" + bytes(12), "more pieces"),
    "a large plain PGM": (lambda: b"P2 2049 2048 255\n" + b"7 " * 100, "numbers in plain text"),
    "a large plain PPM": (lambda: b"P3 1200 1200 255\n" + b"7 " * 100, "numbers in plain text"),
    "a large plain PBM": (lambda: b"P1 2049 2048\n" + b"1" * 100, "numbers in plain text"),
    "comments of a plain PGM": (lambda: b"P2 2 2 255\n" + b"#\n" * 1001 + b"7 7 7 7", "comments"),
    "scans of a small JPEG": (lambda: scans(64, 3000), "4,096 pixels are stored in 3,0.. scans"),
    "segments between scans": (
        lambda: JPEG[:-2] + b"\xff\xfe\0\2" * 100_000 + JPEG[-2:],
        "100,000 scans",
    ),
    "scans of a large JPEG": (lambda: scans(2000, 750), "scans"),
    "a column": (lambda: png(1, MAX_SIDE + 1, pixels=b""), f"{MAX_SIDE:,} on a side"),
    "a line": (lambda: png(88_000_000, 1, pixels=b""), f"{MAX_SIDE:,} on a side"),
    "strips of a TIFF": (lambda: strips(1001), "1,001 tiles or strips"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_costly_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make, reason = COSTLY[name]
    monkeypatch.setattr(image_files, "_READS", 10_000)
    monkeypatch.setattr(image_files, "_MAX_TILES", 1000)
    path = tmp_path / "costly"
    path.write_bytes(make())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImageError, match=rf"Cannot read .*costly: (?i:.*{reason})"):
            read_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "JPEG2000"])
def test_sparse_files_are_refused_by_their_length(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(encoded(kind))
    os.truncate(path, 4 << 30)
    with pytest.raises(ImageError, match=r"sparse: the file has 4,294,967,296 bytes, more than 712,000,000"):
        read_image(path)


def test_animations_cost_their_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), (number % 256, number // 256, 0)) for number in range(200)]
    for kind in ("GIF", "PNG", "WEBP"):
        (tmp_path / kind).write_bytes(encoded(kind, frames[0], save_all=True, append_images=frames[1:]))
        assert np.asarray(read_image(tmp_path / kind)).max() <= 2
    with pytest.warns(UserWarning, match="several pages; page 1,"):
        (tmp_path / "pages").write_bytes(encoded("TIFF", frames[0], save_all=True, append_images=frames[1:]))
        assert read_image(tmp_path / "pages").size == (16, 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_what_photos_carry_costs_nothing_of_this(tmp_path: Path, kind: str) -> None:
    """A profile of 900 KB and EXIF data of 60 KB; PNG in pieces of 8 KB, TIFF in strips of a row."""
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    picture = photo(1, (600, 900))
    options: dict[str, Any] = {
        "JPEG": {"progressive": True},
        # by libtiff, since older versions of Pillow write several strips in no other way
        "TIFF": {"tiffinfo": {278: 1, 270: "x" * 60_000}, "compression": "packbits"},
        "WEBP": {"lossless": True},
    }
    data = encoded(kind, picture, icc_profile=bytes(900_000), exif=exif, **options.get(kind, {}))
    if kind == "PNG":
        head, end = data.index(b"IDAT") - 4, data.rindex(b"IEND") - 4
        with Image.open(io.BytesIO(data)) as opened:
            rows = np.asarray(opened)
        stored = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
        pieces = (stored[start : start + 8192] for start in range(0, len(stored), 8192))
        data = data[:head] + b"".join(chunk(b"IDAT", piece) for piece in pieces) + data[end:]
    (tmp_path / "photo").write_bytes(data)
    read = np.asarray(read_image(tmp_path / "photo"))
    with Image.open(tmp_path / "photo") as opened:
        assert np.array_equal(read, np.asarray(opened.convert("RGB")))


def test_films_behind_a_photo_hold_no_scans(tmp_path: Path) -> None:
    picture = photo(1, (1200, 900))
    for name, options in {"plain.jpg": {}, "progressive.jpg": {"progressive": True}}.items():
        film = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes() + b"\xff\xda" * 5000
        (tmp_path / name).write_bytes(encoded("JPEG", picture, **options) + film)
        assert read_image(tmp_path / name).size == picture.size


def test_a_tag_may_hold_the_layers_of_a_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = TiffImagePlugin.ImageFileDirectory_v2()
    layers[37724] = bytes(20 << 20)
    layers.tagtype[37724] = 7  # bytes
    PICTURE.save(tmp_path / "a.tif", tiffinfo=layers)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.tif")), np.asarray(PICTURE))
    monkeypatch.setattr(image_files, "_TIFF_HEADER_BYTES", 8 << 20)
    with pytest.raises(ImageError, match="more around its pixels"):
        read_image(tmp_path / "a.tif")


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """A guard against waiting for ever."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_pipes_and_devices_hang_no_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "null.png").symlink_to("/dev/null")
    (tmp_path / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as server, within(60):
        server.bind(str(tmp_path / "socket.png"))
        for path in tmp_path.iterdir():
            for read in (read_image, hashed, read_mask, read_manifest, content_key):
                with pytest.raises(
                    InputError, match=rf"Cannot open {path}: it is a (pipe or device|folder), not a file"
                ):
                    read(str(path))
        assert len(list_images(tmp_path)) == 4 and image_sources(tmp_path / "pipe.png") == [tmp_path / "pipe.png"]
        with pytest.raises(ImageError, match="no regular file"):
            image_files._BoundedFile(tmp_path / "pipe.png")  # As if it had been a file when it was looked at.


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A photo in a folder that this process may not enter."""
    (tmp_path / "closed").mkdir()
    PICTURE.save(tmp_path / "closed" / "photo.png")
    user = os.geteuid()
    (tmp_path / "closed").chmod(0)
    os.seteuid(65534 if user == 0 else user)
    try:
        yield tmp_path / "closed" / "photo.png"
    finally:
        os.seteuid(user)
        (tmp_path / "closed").chmod(0o755)


def hashed(path: str | Path) -> Photo:
    return read_photo(path, build_transform((8, 8), (0.5,) * 3, (0.5,) * 3))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has other permissions")
def test_what_may_not_be_read_is_an_error_of_ours(closed: Path) -> None:
    for read in (read_image, hashed, lambda path: read_image(image_sources(path)[0])):
        with pytest.raises(ImageError, match=f"Cannot open {closed}: Permission denied"):
            read(closed)
    with pytest.raises(ImageError, match=f"{closed.parent}"):
        list_images(closed.parent)
    assert list(find_images([str(closed)], False)) == [str(closed)]


def test_names_that_are_too_long_are_errors_of_ours(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300 + ".png")
    for read in (read_image, hashed, list_images, lambda path: read_image(image_sources(path)[0])):
        with pytest.raises(ImageError, match="x" * 300):
            read(long)
    with pytest.raises(ImageError, match="null"):
        read_image("a\0.png")


@pytest.mark.parametrize(
    "error",
    [
        *(struct.error, SyntaxError, RecursionError, OverflowError, ZeroDivisionError, MemoryError, AttributeError),
        *(NotImplementedError, RuntimeError, SystemError, KeyError, OSError, UnicodeError, zlib.error, EOFError),
        *(Image.DecompressionBombError, Image.DecompressionBombWarning, UserWarning),
    ],
)
def test_whatever_a_decoder_raises_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("odd")

    PICTURE.save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageError, match=r"Cannot read .*a\.png: "):
        read_image(tmp_path / "a.png")


def test_interrupts_pass() -> None:
    with pytest.raises(KeyboardInterrupt), refusing("a.png"):
        raise KeyboardInterrupt


def test_the_file_is_closed_and_the_block_is_told_of(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    with open_image(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.size == PICTURE.size
        stream = vars(image)["fp"]
        image.load()
    assert stream.closed
    with pytest.raises(ImageError, match=r"a\.png: truncated or damaged \(in it\)"), open_image(tmp_path / "a.png"):
        raise ValueError("in it")


def test_no_format_starts_a_program() -> None:
    assert {"EPS", "IPTC", "FITS", "WMF", "PDF"}.isdisjoint(FORMATS)
    assert image_files.MAX_PIXELS == 89_000_000
