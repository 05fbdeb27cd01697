"""What is looked for in the data before a training begins."""

from __future__ import annotations

import io
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adfeatures.errors import ImageError, InputError
from training.data.items import ANOMALOUS, NORMAL, Item
from training.pretraining.checks import check_labels, check_masks

SHAPE = (40, 40)


def anomalous(folder: Path, name: str, mask: np.ndarray | Image.Image) -> Item:
    (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(folder / name)
    return Item(str(folder / f"image_{name}"), ANOMALOUS, "nut", str(folder / name))


def defect() -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[8:20, 10:25] = 255
    return mask


def through_jpeg(mask: np.ndarray) -> Image.Image:
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, "JPEG", quality=75)
    return Image.open(stream)


def test_sound_masks_are_passed_in_silence(tmp_path: Path) -> None:
    items = [anomalous(tmp_path, f"{number}.png", defect()) for number in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_masks([*items, Item("good.png", NORMAL, "nut")])


def test_black_masks_are_named(tmp_path: Path) -> None:
    black = [anomalous(tmp_path, f"black{number}.png", np.zeros(SHAPE, np.uint8)) for number in range(5)]
    with pytest.warns(UserWarning, match=r"5 masks without a defect: .*black0\.png, .*black1\.png, .* and 2 more"):
        check_masks([anomalous(tmp_path, "sound.png", defect()), *black])
    with pytest.raises(InputError, match=r"All masks are black everywhere.*nothing to contrast: .*black0\.png"):
        check_masks(black)


def test_masks_that_went_through_jpeg_or_are_inverted_are_named(tmp_path: Path) -> None:
    items = [
        anomalous(tmp_path, "sound.png", defect()),
        anomalous(tmp_path, "lossy.png", through_jpeg(defect())),
        anomalous(tmp_path, "inverted.png", 255 - defect()),
    ]
    with pytest.warns(UserWarning) as caught:
        check_masks(items)
    found = sorted(str(warning.message) for warning in caught)
    assert len(found) == 2
    assert "1 masks that look inverted" in found[0] and "inverted.png" in found[0]
    assert "as JPEG leaves them" in found[1] and "lossy.png" in found[1]


def test_a_mask_of_several_images_is_named(tmp_path: Path) -> None:
    item = anomalous(tmp_path, "000.png", defect())
    with pytest.warns(UserWarning, match=r"000\.png is that of several images: .*image_000\.png, other\.jpg"):
        check_masks([item, replace(item, image="other.jpg")])


def test_masks_that_cannot_be_read_stop_it_before_it_begins(tmp_path: Path) -> None:
    item = anomalous(tmp_path, "mask.png", defect())
    Path(str(item.mask)).write_bytes(b"no image")
    for workers in (0, 2):
        with pytest.raises(ImageError, match=r"^Cannot read .*mask\.png: [^\n]*$"):
            check_masks([item, *(anomalous(tmp_path, f"{number}.png", defect()) for number in range(20))], workers)


def test_an_anomalous_image_without_a_mask_is_refused(tmp_path: Path) -> None:
    good, bad = Item("good.png", NORMAL, "nut"), anomalous(tmp_path, "mask.png", defect())
    check_labels([good, bad])
    with pytest.raises(InputError, match=r"which these lack: .*image_mask\.png"):
        check_labels([good, replace(bad, mask=None)])
    with pytest.raises(InputError, match=r"None of the 1 training images, such as good\.png, .*nothing to contrast"):
        check_labels([good])
