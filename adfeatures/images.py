"""Reading images safely and turning them into tensors.

Whatever comes in as an image passes `read_image`, so that files, PIL images and arrays give the same pixels and bad
input is refused in one place and in one way.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from .catalog import unknown
from .errors import ImageError, InputError, UnknownNameError
from .image_files import MAX_PIXELS, MAX_SIDE, open_image, refusing

if TYPE_CHECKING:
    from torch import Tensor

ImageSource: TypeAlias = "str | os.PathLike[str] | Image.Image | np.ndarray"

Color: TypeAlias = tuple[int, int, int]
# Laid behind transparent pixels of photos.
BACKGROUND: Color = (255, 255, 255)

_SHORTER_SIDE = {"resize224_crop224": 224, "resize256_crop224": 256}
PRESETS = ("squash", *_SHORTER_SIDE)

_ACCEPTED = "Accepted are images of 8 bits in any color mode or of 16 bits, and arrays of uint8 or uint16."
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_EXTRA_SAMPLES = 258, 262, 338
_TIFF_WHITE_IS_ZERO, _TIFF_ALPHAS = 0, {1, 2, 999}
# So many rows of an image are copied at once: a large one must not be as a whole.
_ROWS = 256
# Cameras put so few bits into 16 that an image looks black when they are not told.
_FEW_BITS = 14
# Less of a photo that is seen through its alpha channel is no part.
_MOSTLY = 0.01
_strictly = threading.Lock()


def read_image(
    source: str | os.PathLike[str] | Image.Image | np.ndarray,
    *,
    bit_depth: int = 16,
    max_pixels: int = MAX_PIXELS,
    digest: hashlib._Hash | None = None,
    background: Color = BACKGROUND,
) -> Image.Image:
    """Read an image, upright and in RGB.

    The EXIF orientation is applied, and transparent pixels are laid over the background; alpha that hides every pixel
    is ignored with a warning. Of several frames the first is taken, of the pages of a TIFF the largest, with a warning.
    16-bit samples are scaled by 255 / (2**bit_depth - 1) and rounded, whatever the image holds; a warning says where
    few of the bits are used.

    Args:
        source: A file, a PIL image, or a uint8 or uint16 array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4 =
            RGBA).
        bit_depth: Bits in use, 9 to 16, of samples stored in 16: 12 for a camera that gives 0 to 4095. Files of 8 bits,
            and files that state their own maximum, are not concerned.
        max_pixels: Pixels that may be decoded, at most `MAX_PIXELS`. Decoding takes up to 20 bytes for each, above what
            the file takes.
        digest: Takes in the bytes of the very file that is decoded. Images in memory are not concerned.
        background: Red, green and blue, 0 to 255.

    Returns:
        A new image of mode RGB that keeps no file open and carries no metadata.

    Raises:
        ImageError: If the source is missing, empty, truncated, no image, of an unsupported kind, has more
            than max_pixels, or a side above `MAX_SIDE`; or if the file costs more time or memory than any photo.
        InputError: If bit_depth is not 9 to 16, or max_pixels is out of range.
    """
    if bit_depth not in range(9, 17):
        raise InputError(f"bit_depth is {bit_depth!r}; it must be a whole number from 9 to 16.")
    if not isinstance(max_pixels, (int, np.integer)) or not 1 <= max_pixels <= MAX_PIXELS:
        raise InputError(f"max_pixels is {max_pixels!r}; it must be a whole number from 1 to {MAX_PIXELS:,}.")
    if isinstance(source, np.ndarray):
        name = f"array of shape {source.shape} and type {source.dtype}"
        with refusing(name):
            return _from_array(source, bit_depth, max_pixels, name, background)
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or f"PIL image of mode {source.mode}"
        with refusing(name):
            return _from_pillow(source, bit_depth, max_pixels, name, background)
    if isinstance(source, (str, os.PathLike)):
        with open_image(source, digest) as image:
            return _from_pillow(image, bit_depth, max_pixels, os.fspath(source), background)
    raise ImageError(f"Cannot read an image from {type(source).__name__}; give a path, a PIL image or a numpy array.")


@contextlib.contextmanager
def _whole_files_only() -> Iterator[None]:
    """Have truncated files refused, also where another package has told Pillow to fill them up with gray."""
    with _strictly:  # Else the setting of another thread here would be taken for that of the other package.
        lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    if not lenient:
        yield
        return
    with _strictly:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = True


def _from_array(array: np.ndarray, bit_depth: int, max_pixels: int, name: str, background: Color) -> Image.Image:
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise ImageError(_ACCEPTED)
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ImageError("the shape must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).")
    _check_size(array.shape[1], array.shape[0], max_pixels)
    samples = array
    if array.dtype.itemsize == 2:
        samples = _to_8_bits(array, 2**bit_depth - 1)
        if bit_depth == 16:
            _warn_of_few_bits(int(array.max()))
    image = Image.fromarray(samples[..., 0] if samples.shape[2:] == (1,) else samples)
    return _from_pillow(image, bit_depth, max_pixels, name, background)


def _from_pillow(image: Image.Image, bit_depth: int, max_pixels: int, name: str, background: Color) -> Image.Image:
    _check_size(*image.size, max_pixels)
    if image.mode == "F":
        raise ImageError(f"floating-point pixels have no fixed scale. {_ACCEPTED}")
    (white, stated), undeclared = _white(image, bit_depth), _has_undeclared_channel(image)
    with _whole_files_only():
        image.load()
    if bit_depth == 16 and not stated and not _is_inverted(image):
        _warn_of_few_bits(_highest(image))
    if image.mode.startswith("I"):
        rgb = _from_gray16(image, white, background)
    elif image.has_transparency_data and not undeclared:
        rgb = _over_background(image, name, background)
    else:
        rgb = image.convert("RGB")
    rgb.info = {}  # Else the orientation would be applied once more when the result is read again.
    rgb.getexif()[ExifTags.Base.Orientation] = _orientation(image)
    ImageOps.exif_transpose(rgb, in_place=True)
    rgb.getexif().clear()
    return rgb


def _over_background(image: Image.Image, name: str, background: Color) -> Image.Image:
    # Pillow has no direct way from premultiplied gray to RGBA.
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    alpha = rgba.getchannel("A")
    visible = sum(alpha.histogram()[128:]) / (image.width * image.height)
    if 0 < visible < _MOSTLY or (not visible and alpha.getbbox()):
        warnings.warn(f"The alpha channel of {name} hides nearly every pixel, and these are not read.", stacklevel=2)
    if not alpha.getbbox():
        warnings.warn(f"The alpha channel of {name} hides every pixel and is ignored.", stacklevel=2)
        return rgba.convert("RGB")
    rgb = Image.new("RGB", image.size, background)
    rgb.paste(rgba, mask=rgba)
    return rgb


def _has_undeclared_channel(image: Image.Image) -> bool:
    """Whether the last channel of a TIFF is not declared to be alpha, which Pillow takes it for."""
    tags = getattr(image, "tag_v2", {})
    return bool(tags) and _TIFF_ALPHAS.isdisjoint(tags.get(_TIFF_EXTRA_SAMPLES, ()))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{width} x {height} pixels are not an image.")
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{width} x {height} pixels are more than {max_pixels:,}, or {MAX_SIDE:,} on a side; make it smaller or "
            "cut it into parts."
        )


def _white(image: Image.Image, bit_depth: int) -> tuple[int, bool]:
    """The 16-bit sample that means white, and whether the samples are of 8 bits or the file itself says so.

    To be asked before loading, when Pillow drops what it knows of the samples.
    """
    codec, _, _, args = (getattr(image, "tile", None) or [("", None, 0, "")])[0]
    layout = args if args and isinstance(args, tuple) else (args,)
    if codec == "jpeg2k" or (codec.startswith("ppm") and layout[-1] != 65535):
        return 65535, True  # The file states its maximum, and Pillow has scaled by it.
    if layout[0] == "I;12":
        return 4095, True
    if image.mode.startswith("I"):
        return 2**bit_depth - 1, False
    deep = codec.startswith("ppm") or bool(re.search(r";16[BLN]$", str(layout[0])))
    if not deep and max(getattr(image, "tag_v2", {}).get(_TIFF_BITS, (8,))) > 8:
        # Pillow would decode these into noise.
        raise ImageError("color planes of 16 bits stored one after the other are not supported; save it interleaved.")
    if deep and (bit_depth != 16 or "transparency" in image.info):
        # Pillow keeps the upper 8 bits: nothing is left of 9-bit samples, and a transparent color cannot be told.
        raise ImageError(
            "16-bit color is read at bit_depth=16 only, and without a transparent color; convert it to 8 bits."
        )
    return 65535, not deep


def _from_gray16(image: Image.Image, white: int, background: Color) -> Image.Image:
    samples = np.asarray(image)
    if _is_inverted(image):
        samples = white - samples.astype(np.int32)  # Pillow inverts 8 bits only.
    rgb = Image.fromarray(_to_8_bits(samples, white)).convert("RGB")
    if "transparency" in image.info:
        rgb.paste(background, mask=Image.fromarray(samples == image.info["transparency"]))
    return rgb


def _is_inverted(image: Image.Image) -> bool:
    return getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO


def _to_8_bits(samples: np.ndarray, white: int) -> np.ndarray:
    low, high = int(samples.min()), int(samples.max())
    if low < 0 or high > white:
        hint = "raise bit_depth" if low >= 0 and high <= 65535 else "save it with 8 or 16 bits"
        raise ImageError(f"it holds values from {low} to {high}, outside 0 to {white}; {hint}.")
    scaled = np.empty(samples.shape, dtype=np.uint8)
    for top in range(0, len(samples), _ROWS):
        rows = samples[top : top + _ROWS].astype(np.uint32)
        scaled[top : top + _ROWS] = (rows * 255 + white // 2) // white
    return scaled


def _highest(image: Image.Image) -> int:
    """The highest sample, on the scale of 16 bits, of which Pillow has kept 8 in color."""
    if image.mode.startswith("I"):
        return int(np.asarray(image).max())
    return int((max(high for _, high in image.convert("RGB").getextrema()) - 0.5) * 257)  # type: ignore[misc]


def _warn_of_few_bits(highest: int) -> None:
    bits = max(9, highest.bit_length())
    if 0 < highest < 256:
        warnings.warn("16-bit images hold values of 8 bits and are read as black. Save them with 8 bits.", stacklevel=2)
    elif highest > 0 and bits <= _FEW_BITS:
        warnings.warn(
            f"16-bit images use {bits} of their bits and are read as almost black. If the camera gives {bits} bits, "
            f"say so: bit_depth={bits}, or --bit-depth {bits}. (Color images of 16 bits must be saved with 8 then.)",
            stacklevel=2,
        )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1  # Damaged metadata around sound pixels: upright, as viewers take it.


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """The image, or a smaller one of its aspect ratio where a side is longer than ``side`` pixels."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BOX, reducing_gap=2)


@dataclass(frozen=True)
class ImageTransform:
    """The way from an image to a model's input, made by `build_transform`. Can be pickled and compared."""

    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preset: str = "squash"
    bit_depth: int = 16
    max_pixels: int = MAX_PIXELS

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform an image of any mode into a float32 tensor (3, H, W).

        Raises:
            ImageError: As `read_image`, and if the image is too long and narrow to be resized within max_pixels.
        """
        return self.of_rgb(self.read(image))

    def read(self, image: ImageSource, digest: hashlib._Hash | None = None) -> Image.Image:
        """Read an image for the transform. Result and errors as of `read_image`."""
        return read_image(image, bit_depth=self.bit_depth, max_pixels=self.max_pixels, digest=digest)

    def of_rgb(self, rgb: Image.Image) -> Tensor:
        """Transform what ``read`` gave. Result and errors as in a call."""
        return self.normalized(self.resized(rgb))

    def resized(self, rgb: Image.Image) -> Image.Image:
        """What ``read`` gave with the size and the geometry of an input, still in 8 bits. Errors as in a call."""
        from torchvision.transforms import functional as F

        side = _SHORTER_SIDE.get(self.preset)
        if side is None:
            return F.resize(rgb, list(self.img_size), F.InterpolationMode.BICUBIC)
        if side**2 * max(rgb.size) > self.max_pixels * min(rgb.size):
            raise ImageError(
                f"{rgb.width} x {rgb.height} pixels are too long and narrow for {self.preset}; take the preset squash."
            )
        return F.center_crop(F.resize(rgb, side, F.InterpolationMode.BICUBIC), [224, 224])

    def normalized(self, rgb: Image.Image) -> Tensor:
        """The pixels of an image in RGB as they are, as a float32 tensor (3, H, W)."""
        import torch

        return normalized(torch.from_numpy(np.array(rgb)), self.mean, self.std)


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels (..., H, W, 3) of 8 bits as float32 input (..., 3, H, W) of a model, with the same bits on any device.

    Args:
        pixels: From 0 to 255.
        mean: Of each channel, for values in [0, 1].
        std: Of each channel, for values in [0, 1].
    """
    from torchvision.transforms import functional as F

    images = pixels.movedim(-1, -3).contiguous().float()
    # By a tensor: CUDA multiplies by the rounded reciprocal of a number.
    tensor: Tensor = F.normalize(images / images.new_tensor(255), list(mean), list(std))
    return tensor


def hash_of_pixels(image: Image.Image | np.ndarray) -> str:
    """SHA-256 of the shape and pixels of an image in memory."""
    if isinstance(image, Image.Image):
        bands = len(image.getbands())
        shape: tuple[int, ...] = (image.height, image.width, bands) if bands > 1 else (image.height, image.width)
    else:
        shape = image.shape
    total = hashlib.sha256(repr(shape).encode())
    for top in range(0, shape[0], _ROWS):
        bottom = min(top + _ROWS, shape[0])
        rows = image[top:bottom] if isinstance(image, np.ndarray) else image.crop((0, top, shape[1], bottom))
        total.update(np.asarray(rows).tobytes())
    return total.hexdigest()


def build_transform(
    img_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    preset: str = "squash",
    bit_depth: int = 16,
    max_pixels: int = MAX_PIXELS,
) -> ImageTransform:
    """Build the way from a PIL image to a model's input.

    "squash" resizes the whole image to img_size. "resize224_crop224" and "resize256_crop224" resize the shorter side to
    224 or 256 pixels, keeping the aspect ratio, and cut out the central 224 x 224, whatever img_size is. Resizing is
    Pillow's bicubic on uint8; the result is scaled to [0, 1] and normalized.

    Args:
        img_size: Height and width in pixels.
        mean: Of each channel, for values in [0, 1].
        std: Of each channel, for values in [0, 1].
        preset: One of `PRESETS`.
        bit_depth: Bits in use of 16-bit images, see `read_image`.
        max_pixels: Pixels that may be decoded, see `read_image`.

    Raises:
        UnknownNameError: For an unknown preset.
        InputError: If img_size is not two positive numbers.
    """
    if preset not in PRESETS:
        raise UnknownNameError(unknown("preset", preset, PRESETS))
    if len(img_size) != 2 or min(img_size) < 1:
        raise InputError(f"img_size is {img_size!r}; it must be a height and a width in pixels.")
    size = (int(img_size[0]), int(img_size[1]))
    return ImageTransform(size, tuple(map(float, mean)), tuple(map(float, std)), preset, bit_depth, max_pixels)
