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
from training.pretraining.checks import check_bit_depth, check_labels, check_masks

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
    with pytest.warns(UserWarning, match=r"Of 6 masks 5 .*black0\.png, .*black1\.png, .*black2\.png and 2 more"):
        check_masks([anomalous(tmp_path, "sound.png", defect()), *black])
    with (
        pytest.warns(UserWarning, match="Of 5 masks 5"),
        pytest.raises(InputError, match=r"All 5 masks, .*black0\.png, are black everywhere.*nothing to contrast"),
    ):
        check_masks(black)


def test_masks_that_went_through_jpeg_are_named(tmp_path: Path) -> None:
    lossy = anomalous(tmp_path, "lossy.png", through_jpeg(defect()))
    with pytest.warns(UserWarning, match=r"Of 2 masks 1 .*gray.*lossy\.png") as caught:
        check_masks([anomalous(tmp_path, "sound.png", defect()), lossy])
    assert len(caught) == 1


def test_masks_that_cannot_be_read_stop_it_before_it_begins(tmp_path: Path) -> None:
    item = anomalous(tmp_path, "mask.png", defect())
    Path(str(item.mask)).write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"mask\.png"):
        check_masks([item])


def test_an_anomalous_image_without_a_mask_is_refused(tmp_path: Path) -> None:
    good, bad = Item("good.png", NORMAL, "nut"), anomalous(tmp_path, "mask.png", defect())
    check_labels([good, bad])
    with pytest.raises(InputError, match=r"image_mask\.png is anomalous without a mask"):
        check_labels([good, replace(bad, mask=None)])
    with pytest.raises(InputError, match=r"None of the 1 training images, such as good\.png, .*nothing to contrast"):
        check_labels([good])


def images(folder: Path, highest: int, count: int = 100) -> list[Item]:
    samples = np.random.RandomState(0).randint(0, highest + 1, SHAPE, dtype=np.uint16)
    samples[0, 0] = highest
    items = [Item(str(folder / f"{number:03d}.png"), NORMAL, "nut") for number in range(count)]
    for item in items:
        Image.fromarray(samples).save(item.image)
    return items


@pytest.mark.parametrize(("highest", "bits"), [(4000, 12), (1023, 10), (30, 9)])
def test_16_bit_images_that_use_fewer_bits_get_a_hint(tmp_path: Path, highest: int, bits: int) -> None:
    items = images(tmp_path, highest)
    Path(items[0].image).write_bytes(b"no image")
    with pytest.warns(UserWarning, match=rf"\.png, is above {highest}: {bits} bits .* 16 are read.*--bit-depth"):
        check_bit_depth(items, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_bit_depth(items, bits)


def test_images_that_use_their_bits_get_none(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_bit_depth(images(tmp_path, 40_000), 16)
        Image.new("RGB", SHAPE, (9, 9, 9)).save(tmp_path / "eight.png")
        check_bit_depth([Item(str(tmp_path / "eight.png"), NORMAL, "nut")], 16)
