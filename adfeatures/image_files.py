"""Image files: which of them are opened, and what one may cost.

Pillow bounds the pixels that a header promises. The bounds here are on the way to them: what is read, in how many
pieces, and how often a format may go over its pixels. All of them count; none depends on the speed of the machine.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import re
import stat
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from .checkpoints import AnyPath, regular_file
from .errors import ImageError

if TYPE_CHECKING:
    import hashlib

with contextlib.suppress(ImportError):  # An extra: phones write HEIC, which Pillow alone cannot read.
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)

Image.init()
# Pillow's names of what is decoded. A closed list, because some other formats of Pillow start external programs.
_TRUSTED = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "HEIF", "AVIF", "WEBP")
FORMATS = tuple(name for name in _TRUSTED if name in Image.OPEN)
_FORMAT_OF = {**Image.EXTENSION, ".mpo": "JPEG"}
# A .pfm holds floating-point numbers: a depth map or an anomaly map, not a photo.
IMAGE_SUFFIXES = tuple(
    sorted(
        (suffix for suffix, name in _FORMAT_OF.items() if name in FORMATS and suffix != ".pfm"),
        key=lambda suffix: (FORMATS.index(_FORMAT_OF[suffix]), suffix),
    )
)
# Just below where Pillow begins to warn of decompression bombs, so that one rule holds and its settings stay untouched.
MAX_PIXELS = 89_000_000
# Each row costs memory of its own, and so does each pixel of the longer side when an image is resized.
MAX_SIDE = 1_000_000
# Uncompressed RGBA of 16 bits takes as much.
_MAX_BYTES = 8 * MAX_PIXELS
# Pieces and bytes that are read to know what an image is, and pieces of its pixels: a hostile file is all small pieces.
_HEADER_READS, _HEADER_BYTES, _READS = 100_000, 8 << 20, 1_000_000
# A TIFF may hold the layers that it was made of, in a tag, all of which Pillow reads, and again when it goes to a page.
_TIFF_HEADER_BYTES = 128 << 20
# A TIFF of more pages than these is no photo with a thumbnail; even tiles of 16 x 16 pixels are fewer.
_MAX_PAGES, _MAX_TILES = 1000, 400_000
# A progressive JPEG is decoded again for each scan, of which encoders write about ten. Small images may have more.
_MAX_SCANNED, _SMALL = 32 * MAX_PIXELS, 1 << 20
# Not zero, which stands for 0xff within pixels, nor a restart of these.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)
# Pillow reads the numbers of plain PNM files one by one, and copies what is left for each comment.
_MAX_PLAIN, _MAX_COMMENTS = 1 << 22, 1000


@contextlib.contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turn whatever decoding raises into an ImageError that names the source."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"Cannot read {name}: {error}") from None
    except UnidentifiedImageError:
        raise ImageError(f"Cannot read {name}: it is not, or no longer, a file of type {', '.join(FORMATS)}.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"Cannot read {name}: more than {MAX_PIXELS:,} pixels (or Pillow's own limit). {error}"
        ) from None
    except MemoryError as error:
        raise ImageError(f"Cannot read {name}: there is too little memory for it. Make it smaller.") from error
    except Exception as error:  # Decoders raise nearly every kind, and a warning is an error under -W error.
        raise ImageError(f"Cannot read {name}: truncated or damaged ({error}).") from error


@contextlib.contextmanager
def open_image(path: AnyPath, digest: hashlib._Hash | None = None) -> Iterator[Image.Image]:
    """Open an image file for a block of code, at its largest page. Pixels are decoded when they are asked for.

    Args:
        path: The file.
        digest: Takes in the file after the block: the very one that was decoded, whatever its name stands for by then.

    Raises:
        ImageError: From here or the block, where the file is missing, no regular file, empty, none of `FORMATS`,
            damaged, or costs more time or memory than any photo.
    """
    regular_file(path, ImageError)
    with refusing(os.fspath(path)), _BoundedFile(path) as stream, Image.open(stream, formats=FORMATS) as image:
        if image.format == "TIFF":
            _seek_largest_page(image, os.fspath(path))
        _check_codec(image, stream)
        stream.allow(_READS, 2 * _MAX_BYTES)
        yield image
        if digest is not None:
            for piece in stream.pieces():
                digest.update(piece)


class _BoundedFile(io.BufferedReader):
    """A regular file with a limit on reads and bytes, at first that of a header."""

    def __init__(self, path: AnyPath) -> None:
        # Given a path, Pillow may map the file into memory, which would keep it locked on Windows.
        super().__init__(io.FileIO(os.fspath(path), opener=_open_regular))
        is_tiff = self.peek(2)[:2] in (b"II", b"MM")
        self.allow(_HEADER_READS, _TIFF_HEADER_BYTES if is_tiff else _HEADER_BYTES)

    def allow(self, reads: int, size: int) -> None:
        """Bound what is read from now on."""
        self._reads, self._size = reads, size

    def pieces(self) -> Iterator[bytes]:
        """The whole file, whatever is allowed."""
        self.seek(0)
        return iter(lambda: io.BufferedReader.read(self, 1 << 20), b"")

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file. All of it may be read at once, since its length is bounded."""
        piece = super().read(size if size is None else min(size, _MAX_BYTES))
        self._reads -= 1
        self._size -= 0 if size is None or size < 0 else len(piece)
        if min(self._reads, self._size) < 0:
            raise ImageError("it is made of more pieces, or has more around its pixels, than any photo. Save it again.")
        return piece


def _open_regular(path: str, flags: int) -> int:
    """Open a file that may have become a pipe since it was looked at, for which nothing waits here."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    facts = os.fstat(descriptor)
    if stat.S_ISREG(facts.st_mode) and 0 < facts.st_size <= _MAX_BYTES:
        return descriptor
    os.close(descriptor)
    raise ImageError(
        "it is no regular file."
        if not stat.S_ISREG(facts.st_mode)
        else f"the file has {facts.st_size:,} bytes, more than {_MAX_BYTES:,}. Save it again, compressed."
        if facts.st_size
        else "the file is empty."
    )


def _seek_largest_page(image: Image.Image, name: str) -> None:
    """Pass over thumbnails that come first."""
    sizes = [image.size]
    with contextlib.suppress(EOFError):
        while len(sizes) < _MAX_PAGES:
            image.seek(len(sizes))
            sizes.append(image.size)
    if len(sizes) == _MAX_PAGES:
        raise ImageError(f"it has {_MAX_PAGES} pages or more; save the one that is meant.")
    page = max(range(len(sizes)), key=lambda number: sizes[number][0] * sizes[number][1])
    image.seek(page)
    if len(sizes) > 1:
        width, height = sizes[page]
        warnings.warn(f"{name} has several pages; page {page + 1}, {width} x {height} pixels, is read.", stacklevel=2)


def _check_codec(image: Image.Image, stream: _BoundedFile) -> None:
    """Refuse what takes long although it has few pixels, where the format is known to allow that."""
    tiles = getattr(image, "tile", None) or [("",)]
    codec, pixels = tiles[0][0], image.width * image.height
    if len(tiles) > _MAX_TILES:
        raise ImageError(f"its {pixels:,} pixels are stored in {len(tiles):,} tiles or strips. Save it again.")
    if codec == "jpeg":
        scans = _count_scans(stream)
        if scans * max(pixels, _SMALL) > _MAX_SCANNED:
            raise ImageError(f"its {pixels:,} pixels are stored in {scans:,} scans. Save it again, not progressive.")
    elif codec == "ppm_plain" and (
        pixels * len(image.getbands()) > _MAX_PLAIN
        or sum(piece.count(b"#") for piece in stream.pieces()) > _MAX_COMMENTS
    ):
        raise ImageError(f"it has more than {_MAX_PLAIN:,} numbers in plain text, or many comments. Save it as PNG.")


def _count_scans(stream: io.BufferedReader) -> int:
    """The scans of a JPEG up to its end, behind which phones put films. Segments beyond a bound count as scans."""
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        scans, at = 0, 2
        for _ in range(_HEADER_READS):
            found = _JPEG_MARKER.search(data, at)
            if found is None or found[1] == b"\xd9":
                return scans
            scans += found[1] == b"\xda"
            at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return _HEADER_READS
