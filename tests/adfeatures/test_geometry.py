"""How photos are cut: views, what counts of them, and maps that are joined without seams."""

from __future__ import annotations

import base64
import csv
import dataclasses
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Generator, Iterable
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import CFG, photo, tiny_extractor
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from torch import Tensor

import adfeatures
from adfeatures import fitting
from adfeatures.backbones import Encoder
from adfeatures.cli import main
from adfeatures.documents import check
from adfeatures.errors import ImageError, InputError, ReferencesError
from adfeatures.extractor import FeatureExtractor
from adfeatures.geometry import PLAIN, Geometry, Region, Span, View, views_of
from adfeatures.images import ImageSource
from adfeatures.inspection import Outcome, Terms, inspect, outcomes
from adfeatures.predictor import transform_for
from adfeatures.scoring import AnomalyMap, fuse, ring_scales, smooth

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot pin down", "ignore:.*almost the same picture")


class Patches(Encoder):
    """Means and spreads of patches of 8 x 8 pixels: no patch sees anything of another."""

    levels, channels, reductions, patch_size = (1,), (6,), (8,), 8

    def __init__(self) -> None:
        super().__init__()
        self.like = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> list[Tensor]:
        patches = x.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4)
        return [torch.cat([patches.mean(-1), patches.std(-1)], dim=1)]


def patches(img_size: tuple[int, int] = (64, 64)) -> FeatureExtractor:
    return FeatureExtractor(Patches(), None, name="patches", img_size=img_size, pretrained_cfg=CFG)


def cut(size: tuple[int, int], geometry: Geometry, img_size: tuple[int, int] = (40, 40)) -> Any:
    return geometry.resolved([size], img_size).cut(size, img_size)


def inside(shape: tuple[int, int], *box: int) -> np.ndarray:
    """A mask that counts in a box of rows and columns."""
    mask = np.zeros(shape, dtype=np.uint8)
    mask[box[0] : box[1], box[2] : box[3]] = 255
    return mask


class TestCuts:
    @given(st.integers(16, 400), st.integers(16, 400), st.integers(16, 90), st.integers(0, 8), st.booleans())
    def test_tiles_cover_the_photo_and_share_what_was_asked_for(
        self, height: int, width: int, tile: int, eighths: int, keep: bool
    ) -> None:
        overlap = tile * eighths // 16
        geometry = Geometry(tile, overlap, keep_aspect=keep)
        if tile > min(height, width) and not keep:
            with pytest.raises(ImageError, match=f"tile of {tile} x {tile} pixels is larger than its {width} x"):
                cut((height, width), geometry)
            return
        found = cut((height, width), geometry)
        for spans, length in ((found.rows, height), (found.columns, width)):
            assert spans[0].start == 0 and spans[-1].stop == length
            for one, next_one in zip(spans, spans[1:], strict=False):
                assert one.start < next_one.start and one.stop - next_one.start >= overlap
                assert next_one.stop - next_one.start == tile == one.stop - one.start
            assert len(spans) == max(1, -(-(length - overlap) // (tile - overlap))), "no more than are needed"
        assert found.places == [(row, column) for row in found.rows for column in found.columns]

    def test_auto_is_the_shorter_side_of_the_references_at_most_four_inputs(self) -> None:
        auto = Geometry(tile="auto")
        assert auto.resolved([(1000, 40000), (40000, 1100)], (320, 320)) == Geometry(1000, 125)
        assert auto.resolved([(6000, 8000)], (320, 320)) == Geometry(1280, 160)
        assert len(cut((40000, 1000), auto, (320, 320)).places) == 46
        assert len(cut((6000, 8000), auto, (320, 320)).places) == 42
        assert Geometry(64).resolved([], (320, 320)) == Geometry(64, 8), "no size is needed"
        assert auto.resolved([(3, 4000)], (320, 320)) == Geometry(16, 2), "which a lower photo is padded to"

    def test_what_is_padded_lies_in_the_middle_at_its_aspect(self) -> None:
        (place,) = cut((50, 200), Geometry(keep_aspect=True)).places
        assert place == (Span(0, 50, 15, 25), Span(0, 200, 0, 40))
        (place,) = cut((50, 200), Geometry(keep_aspect=True), (40, 20)).places
        assert place == (Span(0, 50, 17, 22), Span(0, 200, 0, 20))
        small = cut((20, 100), Geometry(64, 0, keep_aspect=True))
        assert small.rows == [Span(0, 20, 14, 26)] and len(small.columns) == 2
        (place,) = cut((1000, 40000), Geometry(keep_aspect=True)).places
        assert place[0] == Span(0, 1000, 19, 20)

    @pytest.mark.parametrize(
        "facts, said",
        [
            ({"tile": 15}, "16 to 1,000,000 pixels, or auto, not 15"),
            ({"tile": 10**30}, f"or auto, not {10**30}"),
            ({"tile": "small"}, "not small"),
            ({"tile": 100, "overlap": 51}, "share 0 to 50 pixels, not 51"),
            ({"tile": 100, "overlap": 100}, "share 0 to 50 pixels, not 100"),
            ({"tile": 100, "overlap": -1}, "not -1"),
            ({"overlap": 8}, "needs tiles"),
        ],
    )
    def test_what_cannot_be_cut_by(self, facts: dict[str, Any], said: str) -> None:
        with pytest.raises(InputError, match=said):
            Geometry(**facts)

    def test_photos_of_another_size_than_the_region(self) -> None:
        geometry = Geometry(region=Region.read(inside((60, 80), 0, 9, 0, 9)))
        with pytest.raises(ImageError, match="it has 60 x 80 pixels, and its region of interest 80 x 60"):
            cut((80, 60), geometry)

    def test_photos_of_too_many_tiles(self) -> None:
        with pytest.raises(ImageError, match=r"takes 4,096 tiles of 16 pixels\. Fit with larger tiles"):
            cut((1024, 1024), Geometry(16, 0))

    def test_tiles_in_which_nothing_counts_are_left_out(self) -> None:
        found = cut((160, 160), Geometry(40, 0, region=Region.read(inside((160, 160), 50, 51, 30, 90))))
        assert [(row.start, column.start) for row, column in found.places] == [(40, 0), (40, 40), (40, 80)]


class TestRegions:
    @given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
    def test_kept_bit_for_bit(self, height: int, width: int, seed: int) -> None:
        mask = np.random.default_rng(seed).random((height, width)) < 0.5
        mask[seed % height, seed % width] = True
        region = Region.read(mask.astype(np.uint8))
        assert np.array_equal(region.mask, mask) and region.size == (height, width)
        again = check(dataclasses.asdict(Geometry(region=region)), Geometry)
        assert again.region == region and np.array_equal(again.region.mask, mask)

    @pytest.mark.parametrize("size", [(7, 5), (60, 80), (64, 200)])
    def test_at_another_size_every_pixel_counts_that_holds_one(self, size: tuple[int, int]) -> None:
        mask = np.zeros((60, 80), dtype=np.uint8)
        mask[33, 71] = 1
        found = Region.read(mask).resized(size)
        rows, columns = np.nonzero(found)
        assert rows.size and found.shape == size
        assert {int(y * 60 / size[0]) for y in rows} <= {*range(33 - 60 // size[0], 34)}
        assert {int(x * 80 / size[1]) for x in columns} <= {*range(71 - 80 // size[1], 72)}

    def test_what_is_bright_counts_whatever_saved_it(self, tmp_path: Path) -> None:
        mask = inside((60, 80), 10, 40, 20, 70)
        Image.fromarray(mask).save(tmp_path / "mask.jpg", quality=60)
        Image.fromarray(mask).convert("1").save(tmp_path / "mask.png")
        Image.fromarray(mask // 255 * 3).convert("RGB").save(tmp_path / "labels.bmp")
        palette = Image.fromarray(mask // 255).convert("P")
        palette.putpalette([0, 0, 0, 255, 0, 0, *[0] * 762])
        palette.save(tmp_path / "red.png")
        Image.fromarray(mask.astype(np.uint16) * 257).save(tmp_path / "deep.png")
        turned = Image.Exif()
        turned[ExifTags.Base.Orientation] = 6
        Image.fromarray(np.rot90(mask)).save(tmp_path / "turned.png", exif=turned)
        for color in ("white", "red"):  # Drawn on nothing.
            drawn = Image.new("RGBA", (80, 60))
            drawn.paste(color, (0, 0), Image.fromarray(mask))
            drawn.save(tmp_path / f"{color}-alone.png")
        for path in tmp_path.iterdir():
            assert np.array_equal(Region.read(path).mask, mask > 0), path.name

    def test_what_is_no_region(self, tmp_path: Path) -> None:
        Image.new("L", (9, 9)).save(tmp_path / "black.png")
        with pytest.raises(InputError, match=r"black\.png cannot be used: it has no white pixels"):
            Region.read(tmp_path / "black.png")
        with pytest.raises(ImageError, match=r"missing\.png"):
            Region.read(tmp_path / "missing.png")
        noise = np.random.default_rng(0).integers(0, 2, (4000, 4000), dtype=np.uint8)
        with pytest.raises(InputError, match="in memory cannot be used: it has too many small parts"):
            Region.read(noise)

    @pytest.mark.parametrize(
        "size, bits",
        [
            ((4, 4), ""),
            ((4, 4), "no base64!"),
            ((4, 4), "AAAA"),
            ((4, 4), Region.read(np.ones((4, 4), np.uint8)).bits[:-4]),
            ((4, 5), Region.read(np.ones((4, 4), np.uint8)).bits),
            ((4, 2), Region.read(np.ones((4, 4), np.uint8)).bits),
            ((2**20, 2**20), Region.read(np.ones((4, 4), np.uint8)).bits),
            ((4, 4), "A" * (3 << 20)),
        ],
    )
    def test_damaged_ones(self, size: tuple[int, int], bits: str) -> None:
        with pytest.raises(InputError, match="damaged|larger than any photo"):
            check({"region": {"size": size, "bits": bits}}, Geometry)

    def test_a_bomb_is_not_unpacked(self) -> None:
        bomb = base64.b64encode(zlib.compress(bytes(1 << 24), 9)).decode()
        with pytest.raises(InputError, match="damaged"):
            Region((8, 8), bomb)


class TestJoining:
    GEOMETRIES = (
        PLAIN,
        Geometry(keep_aspect=True),
        Geometry(64, 8),
        Geometry(64, 0),
        Geometry(100, 50),
        Geometry(150, 10, keep_aspect=True),
    )
    SIZES = ((120, 400), (120, 400)), ((120, 400), (33, 110)), ((250, 130), (250, 130)), ((250, 130), (500, 260))

    @pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
    @pytest.mark.parametrize("size, wanted", SIZES)
    def test_constants_and_slopes_stay(
        self, size: tuple[int, int], wanted: tuple[int, int], geometry: Geometry
    ) -> None:
        found = cut(size, geometry, (48, 40))
        places = [
            torch.meshgrid(*(self.shown(span, side) for span, side in zip(place, (48, 40), strict=True)), indexing="ij")
            for place in found.places
        ]
        constant = found.join([torch.full((48, 40), 0.7)] * len(places), wanted)
        assert constant.dtype == np.float32 and constant.shape == wanted
        np.testing.assert_allclose(constant, 0.7, rtol=1e-5)
        slope = found.join([(y / size[0] + 2 * x / size[1]).float() for y, x in places], wanted)
        y, x = ((np.arange(count) + 0.5) / count for count in wanted)
        # Beyond the center of the last pixel of a view its value stays: half a pixel of it.
        half = max((span.stop - span.start) / (span.high - span.low) for place in found.places for span in place) / 2
        np.testing.assert_allclose(slope, y[:, None] + 2 * x, atol=half * (1 / size[0] + 2 / size[1]) + 1e-5)

    @staticmethod
    def shown(span: Span, side: int) -> Tensor:
        """The place in the photo of each pixel of a view, along a side."""
        return span.start + (torch.arange(side) + 0.5 - span.low) * (span.stop - span.start) / (span.high - span.low)

    @pytest.mark.parametrize("geometry", [Geometry(64, 16), Geometry(80, 40)], ids=str)
    def test_no_jump_where_tiles_differ(self, geometry: Geometry) -> None:
        found = cut((200, 300), geometry)
        values = torch.rand(len(found.places), generator=torch.Generator().manual_seed(0))
        joined = found.join([torch.full((40, 40), float(value)) for value in values], (200, 300))
        assert joined.std() > 0.05
        for axis in (0, 1):
            assert np.abs(np.diff(joined, axis=axis)).max() <= 1 / (geometry.overlap or 0)

    def test_a_peak_stays_where_it_is(self) -> None:
        found = cut((200, 300), Geometry(64, 16))
        target = (101, 155)
        maps = []
        for row, column in found.places:
            y, x = torch.meshgrid(self.shown(row, 40), self.shown(column, 40), indexing="ij")
            maps.append(torch.exp(-((y - target[0]) ** 2 + (x - target[1]) ** 2) / 50).float())
        joined = found.join(maps, (200, 300))
        assert np.abs(np.subtract(np.unravel_index(joined.argmax(), joined.shape), target)).max() <= 1
        assert joined.max() == pytest.approx(1, abs=0.05)


class TestCounting:
    def test_averages_are_over_cells_that_count(self) -> None:
        """Against sums over single pixels, where the grid is that of the map."""
        scores = torch.rand(2, 12, 16, generator=torch.Generator().manual_seed(0))
        counts = torch.rand(2, 12, 16, generator=torch.Generator().manual_seed(1)) < 0.4
        garbage = torch.where(counts, scores, 1e6)
        found = fuse([garbage], (12, 16), 1.5, counts)
        expected = smooth(scores * counts, 1.5) / smooth(counts.float(), 1.5)
        torch.testing.assert_close(found[counts], expected[counts])
        assert (found[~counts] == 0).all()
        levels, every = [scores, scores[:, ::2]], torch.ones_like(counts)
        torch.testing.assert_close(fuse(levels, (12, 16), 2.0, every), fuse(levels, (12, 16), 2.0))

    def test_ring_scales_are_of_cells_that_count(self) -> None:
        distances = torch.rand(3, 10, 10, generator=torch.Generator().manual_seed(0)) + 0.1
        counts = torch.zeros(3, 20, 20, dtype=torch.bool)
        counts[:, :10] = True
        spoiled = distances.clone()
        spoiled[:, 5:] = 1e6
        ring = torch.tensor([[min(y, x, 9 - y, 9 - x, 3) for x in range(10)] for y in range(5)])
        means = torch.stack([distances[:, :5][:, ring == r].mean() for r in range(4)])
        expected = means[-1] * (means / means[-1]).square().clamp_min(1)
        torch.testing.assert_close(ring_scales([spoiled], counts)[0], expected)
        none_outside = torch.zeros(3, 20, 20, dtype=torch.bool)
        none_outside[:, 8:12, 8:12] = True
        assert ring_scales([distances], none_outside).isfinite().all()


def crops(image: Image.Image, geometry: Geometry, img_size: tuple[int, int]) -> list[Image.Image]:
    found = geometry.cut((image.height, image.width), img_size)
    return [image.crop((c.start, r.start, c.stop, r.stop)) for r, c in found.places]


class TestTiles:
    SIZE, GEOMETRY = (200, 130), Geometry(60, 10)

    def test_scores_are_those_of_the_crops(self) -> None:
        """Against a model of whole photos whose references are the crops."""
        references = [photo(seed, self.SIZE) for seed in range(3)]
        cut_up, plain = tiny_extractor(), tiny_extractor()
        cut_up.set_references(references, geometry=self.GEOMETRY)
        of_photos = [crops(image, self.GEOMETRY, (56, 56)) for image in references]
        plain.set_references([crop for own in of_photos for crop in own])
        for tested in (photo(9, self.SIZE), photo(8, (61, 300)), photo(7, (60, 60))):
            (prediction,) = cut_up.score(tested)
            alone = plain.score(crops(tested, self.GEOMETRY, (56, 56)))
            assert prediction.score == pytest.approx(max(own.score for own in alone), rel=1e-5)
            assert prediction.map.shape == (tested.height, tested.width)
        # Of a photo that is one tile the map is that of the crop.
        np.testing.assert_allclose(prediction.map, alone[0].map, rtol=1e-4, atol=1e-6)

    def test_a_reference_is_left_out_with_all_its_tiles(self) -> None:
        references = [photo(seed, self.SIZE) for seed in range(4)]
        model = tiny_extractor()
        model.set_references(references, geometry=self.GEOMETRY)
        bank = model.bank()
        views = len(crops(references[0], self.GEOMETRY, (56, 56)))
        assert bank.num_images == 4 and bank.image_of_row[0].bincount().tolist() == [views * 16] * 4
        for index, score in enumerate(bank.record.normal_scores):
            alone = tiny_extractor()
            others = references[:index] + references[index + 1 :]
            alone.set_references([crop for image in others for crop in crops(image, self.GEOMETRY, (56, 56))])
            expected = max(own.score for own in alone.score(crops(references[index], self.GEOMETRY, (56, 56))))
            assert score == pytest.approx(expected, rel=1e-5)
        model.fit_threshold(1.0)
        assert model.threshold() == max(bank.record.normal_scores)

    def test_normals_and_batches_of_any_size(self) -> None:
        model = tiny_extractor()
        model.set_references([photo(seed, self.SIZE) for seed in range(3)], geometry=self.GEOMETRY)
        tested = [photo(20 + seed, (60 + 31 * seed, 130)) for seed in range(5)]
        scores = [prediction.score for prediction in model.score(tested)]
        for batch_size in (1, 3, 100):
            again = model.score(tested, batch_size=batch_size)
            assert [prediction.score for prediction in again] == pytest.approx(scores, rel=1e-5)
        model.fit_threshold(1.0, normals=tested)
        assert model.bank().record.normal_scores == pytest.approx(scores, rel=1e-5)

    def test_an_odd_reference_is_named_and_damage_in_any_tile_is_no_decision(self, tmp_path: Path) -> None:
        base = np.asarray(photo(0, self.SIZE), dtype=np.int64)
        for number in range(6):
            noise = np.random.default_rng(number).integers(-3, 4, base.shape)
            own = base.copy()
            if number == 4:
                own[60:100, 130:180] = np.asarray(photo(7, (50, 40)))
            Image.fromarray((own + noise).clip(0, 255).astype(np.uint8)).save(tmp_path / f"{number}.png")
        model = tiny_extractor()
        model.set_references(tmp_path, geometry=self.GEOMETRY)
        with pytest.warns(UserWarning, match=r"4\.png looks anomalous"):
            model.fit_threshold()
        scores = torch.tensor([0.5, torch.nan, 0.25])
        model.anomaly_map = lambda x, product, counts: AnomalyMap(torch.zeros(len(x), 56, 56), scores[: len(x)])  # type: ignore[method-assign,assignment,misc]
        with pytest.raises(InputError, match="score of .* is nan"):
            model.score(photo(0, self.SIZE), batch_size=3)

    def test_banks_keep_their_geometry(self, tmp_path: Path) -> None:
        model = tiny_extractor()
        region = Region.read(inside((130, 200), 20, 100, 30, 170))
        geometries = {"tiles": self.GEOMETRY, "part": Geometry(region=region), "whole": PLAIN}
        for product, geometry in geometries.items():
            model.set_references([photo(seed, self.SIZE) for seed in range(3)], product, geometry=geometry)
        model.save_references(tmp_path / "banks.safetensors")
        other = tiny_extractor()
        other.load_references(tmp_path / "banks.safetensors")
        assert {name: bank.record.geometry for name, bank in other.references.items()} == geometries
        tested = [photo(9, self.SIZE)] * 3
        mixed = other.score(tested, list(geometries))
        for prediction, product in zip(mixed, geometries, strict=True):
            assert prediction.score == pytest.approx(model.score(tested[0], product)[0].score, rel=1e-5)

    def test_none_can_be_added_and_no_transform_fits(self) -> None:
        model = tiny_extractor()
        model.set_references([photo(seed, self.SIZE) for seed in range(3)], geometry=self.GEOMETRY)
        with pytest.raises(ReferencesError, match="set all references at once"):
            model.add_references(photo(5, self.SIZE))
        with pytest.raises(ReferencesError, match="a coreset, or of cut images"):
            model.reference_features()
        with pytest.raises(InputError, match="tiles of 60 pixels, 10 shared, which no transform reproduces"):
            adfeatures.create_transform(model)
        with pytest.raises(InputError, match="Transformed tensors cannot be cut"):
            model.set_references(torch.randn(2, 3, 56, 56), geometry=self.GEOMETRY)

    def test_references_smaller_than_a_tile_are_named(self, tmp_path: Path) -> None:
        photo(0, (50, 200)).save(tmp_path / "small.png")
        with pytest.raises(ImageError, match=r"small\.png: a tile of 60 x 60 pixels is larger than its 50 x 200"):
            tiny_extractor().set_references(tmp_path, geometry=self.GEOMETRY)

    def test_auto_takes_the_sizes_of_files_arrays_and_images(self, tmp_path: Path) -> None:
        photo(0, (200, 150)).save(tmp_path / "a.png")
        sources: list[ImageSource] = [tmp_path / "a.png", np.asarray(photo(1, (90, 120))), photo(2, (140, 300))]
        model = tiny_extractor()
        model.set_references(sources, geometry=Geometry("auto"))
        assert model.bank().record.geometry == Geometry(90, 11)

    @pytest.mark.parametrize("options, rows", [({"rotations": 4}, 512), ({"coreset": 0.2}, 26)])
    def test_turned_and_thinned(self, options: dict[str, Any], rows: int) -> None:
        model = tiny_extractor()
        model.set_references([photo(seed, (120, 120)) for seed in range(2)], geometry=Geometry(60, 0), **options)
        bank = model.bank()
        assert len(bank.rows[0]) == rows and len(bank.record.normal_scores) == 2
        assert bank.image_of_row[0].unique().tolist() == [0, 1]
        turned, other = model.score([photo(0, (120, 120)).rotate(90), photo(5, (120, 120))])
        assert (turned.score < 0.5 * other.score) is ("rotations" in options)


class TestPadding:
    GEOMETRY = Geometry(keep_aspect=True)

    def test_nothing_of_it_is_a_row_or_a_score(self) -> None:
        model = patches()
        references = [photo(seed, (160, 80)) for seed in range(3)]
        model.set_references(references, geometry=self.GEOMETRY)
        # Of 8 x 8 patches the middle four rows are of the photo.
        assert len(model.bank().rows[0]) == 3 * 4 * 8
        whole = patches((32, 64))
        whole.set_references(references)
        assert torch.equal(model.bank().rows[0], whole.bank().rows[0])
        ((x, counts, size),) = views_of(photo(9, (160, 80)), transform_for(model, 16), self.GEOMETRY)[1]
        assert counts is not None and counts.sum() == 32 * 64 and counts[16:48].all() and size == (160, 160)
        found = model.anomaly_map(x[None], counts=counts[None])
        assert (found.maps[0][~counts] == 0).all() and found.scores[0] == found.maps.max() > 0
        for value in (-5.0, 3.0):
            other = model.anomaly_map(torch.where(counts, x, value)[None], counts=counts[None])
            assert torch.equal(other.scores, found.scores) and torch.equal(other.maps, found.maps)

    def test_the_map_is_that_of_the_photo(self) -> None:
        model = patches()
        model.set_references([photo(seed, (160, 80)) for seed in range(3)], geometry=self.GEOMETRY)
        odd = np.array(photo(1, (160, 80)))
        odd[30:50, 120:140] = (255, 0, 255)
        (prediction,) = model.score(Image.fromarray(odd))
        y, x = np.unravel_index(prediction.map.argmax(), prediction.map.shape)
        assert prediction.map.shape == (80, 160) and 24 < y < 56 and 114 < x < 146

    @pytest.mark.parametrize("size", [(400, 1), (1, 400), (1, 1), (4000, 3)])
    @pytest.mark.parametrize("tile", [None, 64, 4000])
    def test_photos_of_single_rows(self, size: tuple[int, int], tile: int | None) -> None:
        model = patches()
        references = [photo(seed, (160, 80)) for seed in range(3)]
        model.set_references(references, geometry=dataclasses.replace(self.GEOMETRY, tile=tile))
        (prediction,) = model.score(photo(9, size))
        assert prediction.map.shape == size[::-1] and np.isfinite(prediction.map).all() and prediction.score > 0


@pytest.mark.usefixtures("small_input")
class TestRegionOfInterest:
    @pytest.mark.parametrize("geometry", [PLAIN, Geometry(100, 0), Geometry(keep_aspect=True)], ids=str)
    def test_nothing_outside_counts(self, geometry: Geometry) -> None:
        """With the embedded default: neither in the bank nor in the threshold nor in a score."""
        mask = inside((120, 200), 30, 90, 40, 150)
        geometry = dataclasses.replace(geometry, region=Region.read(mask))
        rng = np.random.default_rng(0)

        def scene(seed: int, spoiled: bool = False) -> np.ndarray:
            image = np.array(photo(3, (200, 120)), dtype=np.int64)
            image += np.random.default_rng(seed).integers(-6, 7, image.shape)
            if spoiled:
                image[mask == 0] = rng.integers(0, 256, (int((mask == 0).sum()), 3))
            return image.clip(0, 255).astype(np.uint8)

        clean, spoiled = adfeatures.create_model(), adfeatures.create_model()
        clean.set_references([scene(seed) for seed in range(3)], geometry=geometry)
        spoiled.set_references([scene(seed, True) for seed in range(3)], geometry=geometry)
        assert all(map(torch.equal, clean.bank().rows, spoiled.bank().rows))
        assert clean.fit_threshold() == spoiled.fit_threshold()
        one, other = clean.score(scene(9))[0], spoiled.score(scene(9, True))[0]
        assert one.score == other.score and np.array_equal(one.map, other.map)
        assert (one.map[mask == 0] == 0).all() and not one.is_anomalous
        outside, within = scene(9), scene(9)
        outside[5:20, 60:80] = within[50:65, 60:80] = (250, 10, 10)
        assert clean.score(outside)[0].score == one.score
        (found,) = clean.score(within)
        assert found.is_anomalous and found.score > 1.5 * one.score
        y, x = np.unravel_index(found.map.argmax(), found.map.shape)
        assert 40 < y < 75 and 50 < x < 90

    def test_parts_may_cross_its_border(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the embedded default: where a part crosses it, each photo shows something else, and all are good."""
        geometry = Geometry(region=Region.read(inside((320, 320), 0, 320, 160, 320)))
        rows, columns = np.mgrid[:320, :320]

        def gear(seed: int, spot: bool = False) -> Image.Image:
            y, x = np.random.default_rng(seed).uniform(-4, 4, 2)
            y, x = rows - 160 - y, columns - 160 - x
            radius, angle = np.hypot(y, x), np.arctan2(y, x)
            metal = (radius > 30) & (radius < 100 + 14 * (np.sin(16 * angle) > 0))
            image = np.where(metal, 150 + 12 * np.sin(radius / 3), 60)
            image[np.hypot(y - 60, x - 40) < 8 * spot] = 90
            image += np.random.default_rng(seed).normal(0, 3, image.shape)
            return Image.fromarray(image.clip(0, 255).astype(np.uint8)).convert("RGB")

        limits = []
        for margin in (0, fitting.MARGIN):
            monkeypatch.setattr(fitting, "MARGIN", margin)
            model = adfeatures.create_model()
            model.set_references([gear(seed) for seed in range(8)], geometry=geometry, rotations=1)
            limits.append(model.fit_threshold())
        assert limits[1] < 0.5 * limits[0]
        assert not any(own.is_anomalous for own in model.score([gear(seed) for seed in range(20, 26)]))
        assert all(own.is_anomalous for own in model.score([gear(seed, spot=True) for seed in range(20, 24)]))


def test_views_hold_no_photo_they_do_not_need() -> None:
    model = tiny_extractor()
    for geometry, lazy in ((PLAIN, False), (Geometry(keep_aspect=True), False), (Geometry(60, 8), True)):
        _, views = views_of(photo(0, (200, 130)), transform_for(model, 16), geometry)
        assert isinstance(views, list) is not lazy
        assert all(isinstance(view, View) and view.x.shape == (3, 56, 56) for view in views)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def scores(folder: Path) -> dict[str, float]:
    with open(folder / "scores.csv", newline="", encoding="utf-8") as table:
        return {Path(row["file"]).stem: float(row["score"] or "nan") for row in csv.DictReader(table)}


@pytest.mark.gpu
@pytest.mark.usefixtures("small_input")
@pytest.mark.parametrize("options", [{}, {"rotations": 3}, {"coreset": 0.5}], ids=str)
def test_cut_on_a_gpu_as_on_the_processor(options: dict[str, Any]) -> None:
    region = Region.read(inside((130, 200), 20, 100, 30, 170))
    found = []
    for device in ("cpu", "cuda"):
        model = adfeatures.create_model().to(device)
        model.set_references(
            [photo(seed, (200, 130)) for seed in range(3)],
            geometry=Geometry(100, keep_aspect=True, region=region),
            **options,
        )
        found.append([model.fit_threshold(), model.score(photo(9, (200, 130)))[0].score])
    assert found[1] == pytest.approx(found[0], rel=1e-2)


@pytest.mark.usefixtures("small_input")
class TestCommands:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Good parts of one pattern in noise, two products of them, and photos to score."""
        monkeypatch.chdir(tmp_path)
        for product, size in (("wide", (400, 160)), ("tall", (150, 300))):
            base = np.asarray(photo(1, size), dtype=np.int64)
            for number in range(5):
                folder = tmp_path / ("good" if number < 3 else "new") / product
                folder.mkdir(parents=True, exist_ok=True)
                noise = np.random.default_rng(number).integers(-4, 5, base.shape)
                Image.fromarray((base + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        return tmp_path

    def test_fit_cuts_and_score_follows_the_bank(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with Image.open("new/wide/4.png") as good:
            spots = {"within": (230, 70), "outside": (30, 20)}
            for name, place in spots.items():
                bad = good.copy()
                bad.paste((255, 0, 0), (*place, place[0] + 9, place[1] + 7))
                bad.save(f"new/wide/{name}.png")
        Image.fromarray(inside((160, 400), 20, 150, 60, 390)).save("roi.png")
        options = ("--tile", "auto", "--roi", "roi.png")
        assert run("fit", "--references", "good/wide", "--bank", "b.safetensors", "--json", *options) == 0
        facts = json.loads(capsys.readouterr().out)["products"]["default"]
        assert facts["geometry"] == "tiles of 160 pixels, 20 shared, 67% of 400 x 160 pixels count"
        assert run("score", "--bank", "b.safetensors", "--output", "out", "new/wide") == 0
        found = scores(folder / "out")
        assert found["outside"] == found["4"] < facts["threshold"] < found["within"]
        summary = json.loads((folder / "out" / "summary.json").read_text())
        assert summary["references"]["default"]["geometry"] == facts["geometry"]
        # What lies outside is dimmed in the overlay.
        drawn = np.asarray(Image.open(folder / "out/overlays/4.png"), dtype=int)[:160, :400]
        original = np.asarray(Image.open("new/wide/4.png"), dtype=int)
        outside = inside((160, 400), 20, 150, 60, 390) == 0
        np.testing.assert_allclose(drawn[outside], 0.4 * original[outside] + 0.6 * 128, atol=1)
        # At once, from references: the same.
        assert run("score", "--references", "good/wide", "--output", "again", *options, "new/wide") == 0
        assert scores(folder / "again") == pytest.approx(found, rel=1e-5)

    def test_every_product_has_its_own(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "roi").mkdir()
        Image.fromarray(inside((160, 400), 0, 160, 0, 200)).save("roi/wide.png")
        fit = ("fit", "--references", "good", "--product-folders", "--bank", "b.safetensors", "--keep-aspect", "--roi")
        assert run(*fit, "roi") == 2
        assert "tall.png" in capsys.readouterr().err
        Image.fromarray(inside((300, 150), 100, 200, 0, 150)).save("roi/tall.png")
        assert run(*fit, "roi", "--json") == 0
        told = {name: facts["geometry"] for name, facts in json.loads(capsys.readouterr().out)["products"].items()}
        assert told == {
            "tall": "whole photos, padded, 33% of 150 x 300 pixels count",
            "wide": "whole photos, padded, 50% of 400 x 160 pixels count",
        }
        assert run("score", "--bank", "b.safetensors", "--product", "tall", "--output", "out", "new/tall") == 0
        assert run("score", "--bank", "b.safetensors", "--product", "tall", "--output", "out", "new/wide") == 2
        assert "it has 400 x 160 pixels, and its region of interest 150 x 300" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "options, said",
        [
            (["--tile", "161"], r"0\.png: a tile of 161 x 161 pixels is larger than its 400 x 160"),
            (["--roi", "good/tall/0.png"], "its region of interest 150 x 300"),
            (["--roi", "missing.png"], r"missing\.png"),
            (["--roi", "black.png"], r"black\.png cannot be used: it has no white pixels"),
        ],
    )
    def test_what_does_not_fit_the_references(
        self, options: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Image.new("L", (400, 160)).save("black.png")
        assert run("fit", "--references", "good/wide", "--bank", "b.safetensors", *options) == 2
        assert re.search(said, capsys.readouterr().err) and not (folder / "b.safetensors").exists()

    @pytest.mark.parametrize("text", ["15", "100:51", "100:-1", "100:", ":8", "auto:8", "x", "1e3", "64:8:8"])
    def test_no_tiles(self, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            run("fit", "--references", "good", "--bank", "b.safetensors", "--tile", text)
        assert f"{text} is not SIZE, SIZE:OVERLAP or auto" in capsys.readouterr().err

    def test_a_bank_was_cut_already(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("fit", "--references", "good/wide", "--bank", "b.safetensors", "--tile", "150:8") == 0
        for options in (["--tile", "150:8"], ["--keep-aspect"], ["--roi", "roi.png"]):
            capsys.readouterr()
            assert run("score", "--bank", "b.safetensors", "--output", "out", "new/wide", *options) == 2
            assert (
                "was made of tiles of 150 pixels, 8 shared, so others are cut the same way" in capsys.readouterr().err
            )

    def test_a_photo_that_is_too_small_gets_a_row_and_the_rest_go_on(self, folder: Path) -> None:
        Image.new("RGB", (400, 149)).save("new/wide/low.png")
        assert run("fit", "--references", "good/wide", "--bank", "b.safetensors", "--tile", "150") == 0
        assert run("score", "--bank", "b.safetensors", "--output", "out", "new/wide") == 1
        found = scores(folder / "out")
        assert np.isnan(found.pop("low")) and len(found) == 2 and min(found.values()) > 0

    def test_a_run_that_was_cut_short_ends_with_the_same_bytes(self, folder: Path) -> None:
        """Photos of one, two and six tiles: batches begin anew where a run is resumed."""
        for number, size in enumerate([(80, 80), (150, 80), (400, 160), (80, 80), (150, 80), (80, 80), (150, 90)]):
            photo(number, size).save(f"new/{number}.png")
        files = sorted(map(str, Path("new").glob("*.png")))
        model = tiny_extractor()
        model.set_references(folder / "good" / "wide", geometry=Geometry(80, 8))
        whole = inspect(model, files, "whole", batch_size=3)
        with pytest.raises(ValueError, match="stop"):
            inspect(model, files, "cut", batch_size=3, resume=True, engine=partial(stopping, model, 5))
        inspect(model, files, "cut", batch_size=3, resume=True)
        for name in ("scores.csv", "scores.jsonl", "overlays/6.png"):
            assert (Path("cut") / name).read_bytes() == (Path("whole") / name).read_bytes()
        assert whole.summary["scored"] == 7

    @pytest.mark.parametrize(
        "options, batch_size",
        [
            pytest.param(["--keep-aspect", "--roi", "roi.png"], None, marks=pytest.mark.slow),
            pytest.param(["--tile", "80:8"], None, marks=pytest.mark.release),
            pytest.param(["--tile", "80:8"], 2, marks=pytest.mark.release),
        ],
        ids=str,
    )
    def test_exported_files_are_cut_for_too(
        self, options: list[str], batch_size: int | None, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        Image.fromarray(inside((160, 400), 20, 150, 60, 390)).save("roi.png")
        assert run("fit", "--references", "good/wide", "--bank", "b.safetensors", *options) == 0
        batch = [] if batch_size is None else ["--batch-size", batch_size]
        assert run("export", "--bank", "b.safetensors", "--output", "part.onnx", "--uint8", *batch) == 0
        assert run("score", "--bank", "b.safetensors", "--output", "torch", "new/wide") == 0
        runtimes = ["onnx", "openvino"] if find_spec("openvino") else ["onnx"]
        for name in runtimes:
            assert run("score", "--bank", "part.onnx", "--runtime", name, "--output", name, "new/wide") == 0
            assert scores(folder / name) == pytest.approx(scores(folder / "torch"), rel=1e-4)
        assert run("score", "--bank", "part.onnx", "--output", "onnx", "new/wide", "--tile", "80") == 2
        assert "was made of" in capsys.readouterr().err
        # A station that squashes whole photos gets no score.
        session = runtime.InferenceSession("part.onnx", providers=["CPUExecutionProvider"])
        with pytest.raises(ValueError, match="counts"):
            session.run(["map", "score"], {"image": np.zeros((batch_size or 1, 160, 160, 3), np.uint8)})


def stopping(model: FeatureExtractor, count: int, files: Iterable[str], terms: Terms) -> Generator[Outcome]:
    """An engine that breaks after so many files."""
    yield from islice(outcomes(model, files, terms), count)
    raise ValueError("stop")


LARGE = """
import sys, warnings
from pathlib import Path
from adfeatures.cli import main
warnings.simplefilter("ignore")
assert main(["score", "--bank", sys.argv[1], "--output", sys.argv[2], *sys.argv[3:]]) == 0
print(next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def large(width: int, height: int, seed: int, defect: tuple[int, int] | None = None) -> Image.Image:
    """A bright surface with a pattern of lines, and perhaps a scratch of 40 x 6 pixels."""
    rng = np.random.default_rng(seed)
    rows = (20 * np.sin(np.arange(height) / 23 + rng.uniform(0, 6))).astype(np.int16)
    columns = (30 * np.sin(np.arange(width) / 31 + rng.uniform(0, 6))).astype(np.int16)
    noise = np.tile(rng.integers(-9, 10, (256, 256), dtype=np.int16), (height // 256 + 1, width // 256 + 1))
    gray = Image.fromarray((150 + rows[:, None] + columns + noise[:height, :width]).astype(np.uint8))
    if defect is not None:
        gray.paste(30, (*defect, defect[0] + 40, defect[1] + 6))
    return gray


@pytest.mark.slow
@pytest.mark.usefixtures("small_input")
@pytest.mark.parametrize(
    "size, place, tile",
    [
        pytest.param((8000, 6000), (5301, 2777), 1280, marks=pytest.mark.release),
        ((1000, 40000), (440, 31234), 1000),
    ],
    ids=str,
)
def test_large_photos_in_bounded_memory(
    size: tuple[int, int], place: tuple[int, int], tile: int, tmp_path: Path
) -> None:
    # Of a line scan every third column is left, and a scratch that is long enough.
    squashed: dict[str, list[object]] = {"plain": []} if max(size) == 8000 else {}
    found = large_scores(size, place, {"tiles": ["--tile", tile], **squashed}, tmp_path, references=1, good=2)
    assert found["tiles"][-1] > 2 * max(found["tiles"][:-1])
    if squashed:
        assert found["plain"][-1] < 1.5 * max(found["plain"][:-1])


@pytest.mark.release
@pytest.mark.parametrize("size, place", [((8000, 6000), (5301, 2777)), ((1000, 40000), (440, 31234))], ids=str)
def test_large_photos_at_full_input(size: tuple[int, int], place: tuple[int, int], tmp_path: Path) -> None:
    scores = large_scores(size, place, {"tiles": ["--tile", "auto"]}, tmp_path, references=2, good=3)["tiles"]
    assert scores[-1] > 2 * max(scores[:-1])


def large_scores(
    size: tuple[int, int],
    place: tuple[int, int],
    ways: dict[str, list[object]],
    folder: Path,
    *,
    references: int,
    good: int,
) -> dict[str, list[float]]:
    """Scores, in less than 3 GB, of good photos in one run with a last one.

    That shows a scratch of 40 x 6 pixels, which squashing loses.
    """
    (folder / "good").mkdir()
    (folder / "new").mkdir()
    for seed in range(references):
        large(*size, seed).save(folder / "good" / f"{seed}.bmp")
    for seed in range(good):
        large(*size, 10 + seed).save(folder / "new" / f"{seed}.bmp")
    large(*size, 13, place).save(folder / "new" / "spoiled.bmp")
    found = {}
    for name, options in ways.items():
        bank, output = folder / f"{name}.safetensors", folder / name
        assert run("fit", "--references", folder / "good", "--bank", bank, *options) == 0
        command = [sys.executable, "-c", LARGE, str(bank), str(output), str(folder / "new")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert float(done.stdout.split()[-1]) < 3000
        found[name] = list(scores(output).values())
    return found
