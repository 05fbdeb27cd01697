"""Pictures: which images are shown, on which scale; curves against scikit-learn and a naive count of regions."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers.models import photo
from PIL import Image
from skimage.measure import label
from sklearn.metrics import auc, roc_curve

from adfeatures.images import build_transform, read_image
from adfeatures.overlays import colorize
from training.data.items import ANOMALOUS, NORMAL, Item
from training.evaluation import pictures
from training.evaluation.pictures import (
    COLUMNS,
    PRO_RATES,
    RATES,
    curves,
    draw_detection_curves,
    draw_maps,
    extremes,
    map_scale,
    seen,
)
from training.methods.base import Predictions

STATISTICS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def predictions(count: int = 6, seed: int = 0) -> tuple[Predictions, torch.Tensor, torch.Tensor]:
    """Maps that are higher on defects, without ties; masks of two regions in the later half of the images; labels."""
    random = np.random.RandomState(seed)
    masks = np.zeros((count, 24, 20), dtype=np.uint8)
    masks[count // 2 :, 3:9, 4:8] = 1
    masks[count // 2 :, 15:18, 10:18] = 1
    maps = random.permutation(masks.size).reshape(masks.shape) / masks.size + 0.4 * masks
    return (
        Predictions(torch.tensor(maps).float(), torch.tensor(maps.max((1, 2))).float()),
        torch.tensor(masks),
        (torch.arange(count) >= count // 2).long(),
    )


def test_curves_are_those_of_scikit_learn() -> None:
    found, masks, labels = predictions()
    points = curves(found, masks, labels)
    x, y, _ = roc_curve(labels, found.scores)
    assert points["image_x"] == x.tolist() and points["image_y"] == y.tolist()
    x, y, _ = roc_curve(masks.flatten(), found.maps.flatten())
    assert auc(RATES, points["pixel"]) == pytest.approx(auc(x, y), abs=0.005)


def test_pro_curve_counts_regions() -> None:
    found, masks, labels = predictions()
    points = curves(found, masks, labels)["pro"]
    maps, defects = found.maps.numpy(), masks.numpy()
    normal = np.sort(maps[defects == 0])[::-1]
    for rate, value in list(zip(PRO_RATES, points, strict=True))[1::7]:
        threshold = normal[int(rate * len(normal))]
        shares = [
            (one[regions == number] > threshold).mean()
            for one, regions in zip(maps, (label(mask, connectivity=2) for mask in defects), strict=True)
            for number in range(1, regions.max() + 1)
        ]
        assert value == pytest.approx(np.mean(shares), abs=0.02)


def test_curves_that_are_not_defined() -> None:
    found, masks, labels = predictions()
    assert set(curves(found, torch.zeros_like(masks), labels)) == {"image_x", "image_y"}
    assert set(curves(found, masks, torch.ones_like(labels))) == {"pixel", "pro"}


def test_extremes() -> None:
    items = [Item(str(number), ANOMALOUS if number % 2 else NORMAL, "nut") for number in range(30)]
    scores = torch.randperm(30, generator=torch.Generator().manual_seed(0)).float()
    found = extremes(items, scores)
    ranked = {label: [i for i in scores.argsort().tolist() if i % 2 == label] for label in (0, 1)}
    assert found == {
        "lowest defect": ranked[1][:COLUMNS],
        "highest normal": ranked[0][::-1][:COLUMNS],
        "highest defect": ranked[1][::-1][:COLUMNS],
        "lowest normal": ranked[0][:COLUMNS],
    }
    few = extremes(items[:5], scores[:5])
    assert sorted(i for indices in few.values() for i in indices) == list(range(5))


def test_scale_is_one_for_all_images() -> None:
    maps = torch.rand(5, 30, 30, generator=torch.Generator().manual_seed(0))
    assert map_scale(maps) == pytest.approx(tuple(np.quantile(maps.numpy().ravel(), (0.5, 0.999))))
    low, high = map_scale(torch.full((2, 4, 4), 3.0))
    assert low == 3 and high > low


@pytest.mark.parametrize("preset", ["squash", "resize224_crop224", "resize256_crop224"])
def test_pictures_show_what_the_model_sees(preset: str) -> None:
    image = photo(3, (300, 240))
    transform = build_transform((224, 224), *STATISTICS, preset=preset)
    shown = seen(image.copy(), transform)
    if preset == "squash":
        assert shown.size == (300, 240) and np.array_equal(np.asarray(shown), np.asarray(image))
        assert seen(photo(3, (2000, 1000)), transform).size == (640, 320)
    else:
        side = int(preset[6:9])
        width, height = int(side * 300 / 240), side
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - 224) / 2), round((height - 224) / 2)
        expected = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=int)
        assert np.abs(np.asarray(shown, dtype=int) - expected).max() <= 1


def test_heat_maps_are_high_where_the_map_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = []
    for number in range(6):
        Image.new("RGB", (40, 48), (120, 120, 120)).save(tmp_path / f"{number}.png")
        items.append(Item(str(tmp_path / f"{number}.png"), number % 2, "nut", defect="hole" if number % 2 else "good"))
    maps = torch.zeros(6, 24, 20)
    maps[1, :12], maps[3, :12], maps[5, :12] = 3, 2, 1
    overlay = Mock(wraps=pictures.overlay)
    monkeypatch.setattr(pictures, "overlay", overlay)
    draw_maps(
        tmp_path / "maps.png", items, Predictions(maps, maps.amax((1, 2))), build_transform((24, 20), *STATISTICS)
    )
    shown = overlay.call_args_list
    assert {options["scale"] for _, options in shown} == {map_scale(maps)}
    captions = [options["caption"] for _, options in shown]
    assert captions[0] == "lowest defect, 1: hole 5" and "highest defect, 3: hole 1" in captions
    picture, drawn = shown[captions.index("highest defect, 3: hole 1")][0]
    assert picture.size == (40, 48) and drawn.shape == (48, 40)
    assert drawn[:20].min() == 3 and drawn[28:].max() == 0
    sheet = np.asarray(read_image(tmp_path / "maps.png"), dtype=int)
    top = colorize(np.array([[1.0]]), (0, 1))[0, 0]
    assert (np.abs(sheet - top).max(axis=2) < 80).any()


def test_curves_are_drawn_with_a_line_for_each_kind_of_features(tmp_path: Path) -> None:
    found, masks, labels = predictions()
    points = curves(found, masks, labels)
    draw_detection_curves(tmp_path / "one.png", "PatchCore on nut", {"raw": points})
    perfect = {name: [1.0] * len(values) for name, values in points.items()}
    draw_detection_curves(tmp_path / "two.png", "PatchCore on nut", {"raw": points, "pretrained": perfect})
    draw_detection_curves(tmp_path / "none.png", "PatchCore on nut", {"raw": {}})
    one, two, none = (np.asarray(read_image(tmp_path / f"{name}.png"), dtype=int) for name in ("one", "two", "none"))
    assert one.shape == two.shape == none.shape
    assert (one != two).any() and (one != none).any()
