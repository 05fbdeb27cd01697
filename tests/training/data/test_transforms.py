"""The two augmented views of an image: color changes, places do not, and the seed alone decides."""

from __future__ import annotations

import torch
from helpers.models import photo
from PIL import Image

from adfeatures.images import build_transform
from training.data.transforms import TwoViews

IMG_SIZE, MEAN, STD = (28, 32), (0.48, 0.45, 0.40), (0.22, 0.25, 0.27)
VIEWS, PLAIN = TwoViews(IMG_SIZE, MEAN, STD), build_transform(IMG_SIZE, MEAN, STD)


def test_views_are_augmentations_of_the_resized_image() -> None:
    """Without jitter, grayscale and blur, as in 1 of 12.5 views, nothing but resizing and normalization is left."""
    image = photo(0, (60, 44))
    plain = PLAIN(image)
    views = torch.stack([VIEWS(image, seed) for seed in range(60)])
    assert views.shape == (60, 2, 3, *IMG_SIZE) and views.dtype == torch.float32
    same = (views - plain).abs().amax(dim=(2, 3, 4)) < 1e-5
    assert 1 <= same.sum() <= 30
    pixels = views * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5
    gray = (pixels - pixels.mean(dim=2, keepdim=True)).abs().amax(dim=(2, 3, 4)) < 1e-3
    assert 0.2 * 120 - 20 < gray.sum() < 0.2 * 120 + 20
    # the two views of an image are drawn independently
    assert (gray[:, 0] != gray[:, 1]).any()
    assert ((views[:, 0] - views[:, 1]).abs().amax(dim=(1, 2, 3)) > 1e-3).float().mean() > 0.8


def test_views_do_not_move_anything() -> None:
    """A bright square stays where it is, whatever else happens."""
    image = Image.new("RGB", (IMG_SIZE[1], IMG_SIZE[0]), (60, 60, 60))
    image.paste((200, 200, 200), (20, 4, 28, 12))
    for seed in range(20):
        for view in VIEWS(image, seed):
            brightness = view.mean(dim=0)
            inside = torch.zeros(IMG_SIZE, dtype=torch.bool)
            inside[4:12, 20:28] = True
            middle = (brightness.min() + brightness.max()) / 2
            assert ((brightness > middle) != inside).float().mean() < 0.03


def test_views_depend_on_the_seed_alone_and_leave_the_global_generators() -> None:
    image = photo(1)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = VIEWS(image, 2**62)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(VIEWS(image, 2**62), first)
    assert not torch.equal(VIEWS(image, 2**62 + 1), first)
