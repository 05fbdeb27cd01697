"""Synthetic defects: noise against its formula, masks, textures, and the places where defects may lie."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.planted import batches
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from adfeatures.errors import ImageError, InputError, UnknownNameError
from training.methods import glass_synthesis
from training.methods.glass_synthesis import CHANGES, DefectSynthesis, perlin_mask, perlin_noise, procedural_texture

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)


def synthesis(textures: Path | None = None, foregrounds: Path | None = None, preset: str = "squash") -> DefectSynthesis:
    return DefectSynthesis(textures, foregrounds, MEAN, STD, preset)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("size", "cells"), [((8, 8), (2, 4)), ((7, 9), (1, 32)), ((5, 6), (4, 4))])
def test_perlin_noise_is_the_naive_formula(size: tuple[int, int], cells: tuple[int, int]) -> None:
    angles = rng().uniform(0, 2 * np.pi, (cells[0] + 1, cells[1] + 1))
    found = perlin_noise(size, cells, rng())

    def fade(t: float) -> float:
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    for i in range(size[0]):
        for j in range(size[1]):
            y, x = i * cells[0] / size[0], j * cells[1] / size[1]
            value = 0.0
            for a in (math.floor(y), math.floor(y) + 1):
                for b in (math.floor(x), math.floor(x) + 1):
                    slope = math.cos(angles[a, b]) * (y - a) + math.sin(angles[a, b]) * (x - b)
                    value += slope * fade(1 - abs(y - a)) * fade(1 - abs(x - b))
            assert found[i, j] == pytest.approx(math.sqrt(2) * value, abs=1e-9)


def test_masks_are_neither_always_empty_nor_full() -> None:
    generator = rng()
    shares = [perlin_mask((64, 48), generator).mean() for _ in range(60)]
    assert perlin_mask((64, 48), generator).shape == (64, 48)
    assert 0.01 < np.mean(shares) < 0.2 and max(shares) > 0.1 and max(shares) < 1


def test_masks_are_turned_by_up_to_a_quarter_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = np.zeros((65, 65))
    blob[30:35, 50:55] = 1
    monkeypatch.setattr(glass_synthesis, "perlin_noise", lambda size, cells, generator: blob)
    generator, angles = rng(), []
    for _ in range(200):
        rows, columns = np.nonzero(perlin_mask((65, 65), generator))
        angles.append(math.degrees(math.atan2(rows.mean() - 32, columns.mean() - 32)))
    assert stats.kstest(angles, stats.uniform(-90, 180).cdf).pvalue > 1e-3


def test_noise_has_one_to_32_cells_per_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def noise(size: tuple[int, int], cells: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
        drawn.append(cells)
        return np.zeros(size)

    monkeypatch.setattr(glass_synthesis, "perlin_noise", noise)
    generator = rng()
    for _ in range(300):
        perlin_mask((4, 4), generator)
    for counts in zip(*drawn, strict=True):
        found, frequencies = np.unique(counts, return_counts=True)
        assert found.tolist() == [1, 2, 4, 8, 16, 32]
        assert stats.chisquare(frequencies).pvalue > 1e-3


def test_two_masks_are_joined_intersected_or_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = np.zeros((2, 4, 4), dtype=bool)
    first[:2], second[:, :2] = True, True
    monkeypatch.setattr(
        glass_synthesis, "perlin_mask", lambda size, generator, masks=[first, second]: masks.reverse() or masks[1]
    )
    generator, counts = rng(), {4: 0, 8: 0, 12: 0}
    for _ in range(600):
        counts[int(glass_synthesis._mask(np.ones((4, 4), bool), generator).sum())] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_an_image_changes_inside_its_mask_only(tmp_path: Path) -> None:
    Image.new("RGB", (30, 50)).save(tmp_path / "black.png")
    images = torch.randn(400, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = {"image": images, "product": ["p"] * 400, "path": ["x.png"] * 400}
    augmented, masks = synthesis(tmp_path)(batch, rng())
    assert augmented.shape == images.shape and augmented.dtype == torch.float32
    assert masks.shape == (400, 1, 16, 16) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert masks.flatten(1).any(dim=1).all()
    # Nothing turns black to another color, so that the texture is known and the weight of the image can be told.
    texture = (-torch.tensor(MEAN) / torch.tensor(STD))[:, None]
    weights = []
    for image, result, mask in zip(images, augmented, masks[:, 0] > 0, strict=True):
        assert torch.equal(result[:, ~mask], image[:, ~mask])
        kept = (result[:, mask] - texture) / (image[:, mask] - texture)
        assert kept.std(correction=0) < 1e-3
        weights.append(float(kept.median()))
    assert 0.2 - 1e-4 < min(weights) < 0.27 and 0.73 < max(weights) < 0.8 + 1e-4
    assert stats.kstest(weights, stats.norm(0.5, 0.1).cdf).pvalue > 1e-3


def test_textures_are_found_in_sub_folders_and_cut_to_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glass_synthesis, "CHANGES", (lambda image, generator: image,) * 9)
    for name, color in (("a/one.jpg", (255, 0, 0)), ("b/c/two.JPG", (0, 0, 255))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        # Green at both ends, which covering the image and cutting its center leaves out.
        image = Image.new("RGB", (90, 30), (0, 255, 0))
        image.paste(color, (25, 0, 65, 30))
        image.save(tmp_path / name, quality=100, subsampling=0)
    made = DefectSynthesis(tmp_path, None, (0, 0, 0), (1, 1, 1), "squash")
    textures = torch.stack([made._texture((24, 24), rng(seed)) for seed in range(20)])
    assert textures.shape == (20, 3, 24, 24) and textures[:, 1].max() < 0.05
    assert {round(float(value)) for value in textures[:, 0].mean(dim=(1, 2))} == {0, 1}


def test_three_different_changes_of_nine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(CHANGES) == 9
    drawn = []

    def mark(index: int, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        drawn.append(index)
        return image

    marks = tuple(partial(mark, index) for index in range(9))
    monkeypatch.setattr(glass_synthesis, "CHANGES", marks)
    made, generator = synthesis(), rng()
    for _ in range(300):
        made._texture((8, 8), generator)
    triples = np.array(drawn).reshape(300, 3)
    assert all(len(set(triple)) == 3 for triple in triples.tolist())
    assert stats.chisquare(np.bincount(triples.ravel(), minlength=9)).pvalue > 1e-3


@pytest.mark.parametrize("index", range(9))
def test_every_change_keeps_size_and_mode_and_does_something(index: int) -> None:
    image = procedural_texture((20, 30), rng(3))
    results = [CHANGES[index](image, rng(seed)) for seed in range(4)]
    assert all(result.size == (30, 20) and result.mode == "RGB" for result in results)
    assert any(not np.array_equal(np.asarray(result), np.asarray(image)) for result in results)


def test_changes_are_the_stated_ones() -> None:
    """Each with the largest value of its range, against Pillow and numpy."""
    ranges: list[tuple[float, float]] = []

    class Largest:
        def uniform(self, low: float, high: float) -> float:
            ranges.append((low, high))
            return high

    image = procedural_texture((20, 30), rng(3))
    pixels, gray = np.asarray(image), image.convert("L")
    saturated = ImageEnhance.Color(image).enhance(1.2)
    hue, saturation, value = (np.asarray(band) for band in saturated.convert("HSV").split())
    shifted = [Image.fromarray(band) for band in (hue + np.uint8(0.2 * 255), saturation, value)]
    expected = [
        ImageEnhance.Contrast(image).enhance(1.2),
        ImageEnhance.Brightness(image).enhance(1.2),
        Image.merge("HSV", shifted).convert("RGB"),
        pixels[:, ::-1],
        pixels[::-1],
        np.stack([np.asarray(gray)] * 3, axis=2),
        ImageOps.autocontrast(image),
        ImageOps.equalize(image),
        image.rotate(45),
    ]
    for change, wanted in zip(CHANGES, expected, strict=True):
        assert np.array_equal(np.asarray(change(image, Largest())), np.asarray(wanted))  # type: ignore[arg-type]
    assert ranges == [(0.8, 1.2)] * 3 + [(-0.2, 0.2), (-45, 45)]


def test_procedural_textures_differ_and_vary() -> None:
    textures = [np.asarray(procedural_texture((32, 40), rng(seed))) for seed in range(20)]
    assert all(texture.shape == (32, 40, 3) for texture in textures)
    assert np.mean([texture.std() for texture in textures]) > 20
    assert len({texture.tobytes() for texture in textures}) == 20


def write_foreground(folder: Path, product: str, name: str, mask: np.ndarray) -> None:
    (folder / product).mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(folder / product / name)


@pytest.mark.parametrize("image_dir", ["train/good", "elsewhere"])
def test_defects_stay_in_the_foreground(tmp_path: Path, image_dir: str) -> None:
    wide = np.zeros((40, 80), np.uint8)
    wide[:, :20] = 255
    write_foreground(tmp_path, "left", "000.png", wide)
    write_foreground(tmp_path, "right", "000.png", wide[:, ::-1])
    batch = {
        "image": torch.zeros(2, 3, 32, 32),
        "product": ["left", "right"],
        "path": [f"/d/{p}/{image_dir}/000.png" for p in ("left", "right")],
    }
    for seed in range(10):
        _, masks = synthesis(foregrounds=tmp_path)(batch, rng(seed))
        assert masks.flatten(1).any(dim=1).all()
        assert not masks[0, 0, :, 8:].any() and not masks[1, 0, :, :24].any()


def test_foregrounds_follow_the_geometry_of_the_images(tmp_path: Path) -> None:
    wide = np.zeros((100, 200), np.uint8)
    wide[:, 45:150] = 1
    write_foreground(tmp_path, "p", "a.png", wide)
    batch = {"image": torch.zeros(1, 3, 224, 224), "product": ["p"], "path": ["a.png"]}
    # The center square of 100 x 100 begins at column 50, so that the object fills it.
    assert synthesis(foregrounds=tmp_path, preset="resize224_crop224")._foreground((224, 224), "p", "a.png").all()
    squashed = synthesis(foregrounds=tmp_path)._foreground((224, 224), "p", "a.png")
    assert squashed.mean() == pytest.approx(105 / 200, abs=0.01)
    with pytest.raises(UnknownNameError, match="Did you mean"):
        synthesis(foregrounds=tmp_path, preset="squish")(batch, rng())
    with pytest.raises(ImageError, match=r"becomes \(224, 224\)"):
        synthesis(foregrounds=tmp_path, preset="resize224_crop224")(
            {**batch, "image": torch.zeros(1, 3, 32, 32)}, rng()
        )


def test_foregrounds_count_above_zero_and_where_they_are_opaque(tmp_path: Path) -> None:
    left = np.zeros((32, 32), np.uint16)
    left[:, :8] = 1
    write_foreground(tmp_path, "p", "deep.png", left)
    drawing = np.full((32, 32, 4), 255, np.uint8)
    drawing[:, 8:, 3] = 0
    write_foreground(tmp_path, "p", "drawing.png", drawing)
    for name in ("deep.png", "drawing.png"):
        assert np.array_equal(synthesis(foregrounds=tmp_path)._foreground((32, 32), "p", name), left > 0)


def test_a_foreground_of_one_pixel_is_no_endless_search(tmp_path: Path) -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[31, 31] = 255
    write_foreground(tmp_path, "p", "a.png", mask)
    _, masks = synthesis(foregrounds=tmp_path)(
        {"image": torch.zeros(1, 3, 32, 32), "product": ["p"], "path": ["a.png"]}, rng()
    )
    assert masks.nonzero().tolist() == [[0, 0, 31, 31]]


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 17), (33, 20)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    augmented, masks = synthesis()(batches(3, seed=0, size=size)[0], rng())
    assert augmented.shape == (3, 3, *size) and augmented.isfinite().all()
    assert masks.flatten(1).any(dim=1).all()


def test_the_same_generator_gives_the_same_defects(tmp_path: Path) -> None:
    (batch,) = batches(4, seed=0)
    first, second, other = (synthesis()(batch, rng(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_refuses(tmp_path: Path) -> None:
    (batch,) = batches(1, seed=0)
    with pytest.raises(ImageError, match="No images in"):
        synthesis(tmp_path)
    with pytest.raises(ImageError, match="does not exist"):
        synthesis(tmp_path / "none")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        synthesis(tmp_path)(batch, rng())
    with pytest.raises(ImageError, match=r"Cannot open .*000\.png: No such file"):
        synthesis(foregrounds=tmp_path)(batch, rng())
    write_foreground(tmp_path, "noise", "000.png", np.zeros((32, 32), np.uint8))
    with pytest.raises(InputError, match=r"000\.png is zero everywhere"):
        synthesis(foregrounds=tmp_path)(batch, rng())
