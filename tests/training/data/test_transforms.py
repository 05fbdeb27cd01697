"""Masks stay on the pixels of their images, and the two views of an image are augmented by a seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import photo
from PIL import Image, ImageFilter
from scipy import ndimage
from torchvision import transforms

from adfeatures.errors import UnknownNameError
from adfeatures.images import PRESETS, build_transform
from training.data.transforms import MaskTransform, two_views

NOT_NORMALIZED: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def cropped(image: Image.Image, shorter_side: int, resample: Image.Resampling) -> Image.Image:
    """Resize of the shorter side and central crop of 224, in plain Pillow."""
    width, height = image.size
    scale = shorter_side / min(width, height)
    size = (shorter_side, int(height * scale + 1e-9)) if width <= height else (int(width * scale + 1e-9), shorter_side)
    left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    return image.resize(size, resample).crop((left, top, left + 224, top + 224))


@pytest.mark.parametrize("size", [(300, 200), (200, 333), (97, 97), (640, 230)])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_square_in_image_and_mask_lands_on_the_same_pixels(preset: str, size: tuple[int, int]) -> None:
    width, height = size
    box = (width // 2 - 20, height // 2 - 35, width // 2 + 25, height // 2 + 15)
    image, mask = Image.new("RGB", size), Image.new("L", size)
    image.paste((255, 255, 255), box)
    mask.paste(255, box)

    if preset == "squash":
        expected = mask.resize((80, 48), Image.Resampling.NEAREST)
    else:
        expected = cropped(mask, {"resize224_crop224": 224, "resize256_crop224": 256}[preset], Image.Resampling.NEAREST)
    found = MaskTransform((48, 80), preset)(mask)
    assert found.dtype == torch.uint8 and found.shape == (1, expected.height, expected.width)
    assert np.array_equal(found[0], np.asarray(expected) > 0)

    # The image is smooth at the border of the square; beyond a pixel of it, both must tell the same.
    drawn = build_transform((48, 80), **NOT_NORMALIZED, preset=preset)(image).mean(dim=0).numpy() > 0.5
    inside = found[0].numpy().astype(bool)
    assert drawn.shape == inside.shape and 50 < inside.sum() < inside.size
    around = np.ones((3, 3))
    assert (
        drawn[ndimage.binary_erosion(inside, around)].all()
        and not drawn[~ndimage.binary_dilation(inside, around)].any()
    )


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="'resize224_crop224'"):
        MaskTransform((32, 32), "resize224")


# Views

IMG_SIZE = (28, 32)


def test_views_are_those_of_plain_transforms_bit_for_bit() -> None:
    """Of those that the published code names, each of the whole image."""
    jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    gray = transforms.RandomGrayscale(0.2)
    image = photo(0, (57, 41))
    for seed in range(80):
        found = two_views(image, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for view in found:
                plain = gray(jitter(image))
                if not torch.rand(1) > 0.5:
                    plain = plain.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0))))
                assert np.array_equal(view, np.asarray(plain))


def test_views_are_augmentations_of_the_image() -> None:
    """Without jitter, grayscale and blur, as in 1 of 12.5 views, the image itself is left."""
    image = photo(0, IMG_SIZE[::-1])
    plain = np.asarray(image)
    views = np.stack([two_views(image, seed) for seed in range(60)])
    assert views.shape == (60, 2, *IMG_SIZE, 3) and views.dtype == np.uint8
    same = (views == plain).all(axis=(2, 3, 4))
    assert 1 <= same.sum() <= 30
    gray = (views == views[..., :1]).all(axis=(2, 3, 4))
    assert 0.2 * 120 - 20 < gray.sum() < 0.2 * 120 + 20
    # the two views of an image are drawn independently
    assert (gray[:, 0] != gray[:, 1]).any()
    assert (views[:, 0] != views[:, 1]).any(axis=(1, 2, 3)).mean() > 0.8


def test_views_do_not_move_anything() -> None:
    """A bright square stays where it is, whatever else happens."""
    image = Image.new("RGB", (IMG_SIZE[1], IMG_SIZE[0]), (60, 60, 60))
    image.paste((200, 200, 200), (20, 4, 28, 12))
    for seed in range(20):
        for view in two_views(image, seed):
            brightness = view.mean(axis=2)
            inside = np.zeros(IMG_SIZE, bool)
            inside[4:12, 20:28] = True
            middle = (brightness.min() + brightness.max()) / 2
            assert ((brightness > middle) != inside).mean() < 0.03


def test_views_depend_on_the_seed_alone_and_leave_the_global_generators() -> None:
    image = photo(1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = two_views(image, 2**62)
    assert torch.equal(torch.rand(3), expected)
    assert np.array_equal(two_views(image, 2**62), first)
    assert not np.array_equal(two_views(image, 2**62 + 1), first)
