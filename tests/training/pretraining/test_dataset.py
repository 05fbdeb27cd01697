"""The data of the pretraining: draws that depend on seed and position only, references, files that cannot be read."""

from __future__ import annotations

import math
import pickle
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from helpers.models import photo
from helpers.real_iad_tree import SIZE, write_real_iad
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from adfeatures.catalog import BACKBONES
from adfeatures.errors import ImageError, InputError
from adfeatures.images import PRESETS, build_transform
from training.data import real_iad
from training.data.fingerprint import digests
from training.data.image_cache import ImageCache
from training.data.images import ImageLoader
from training.data.items import ANOMALOUS, NORMAL, Item
from training.data.transforms import two_views
from training.pretraining import dataset as module
from training.pretraining.config import PretrainConfig
from training.pretraining.dataset import (
    MAX_FAILURES,
    Draw,
    PretrainingDataset,
    StepSampler,
    choose_pool,
    collate,
    view_statistics,
)

Statistics: TypeAlias = "tuple[float, ...]"
IMG_SIZE, MEAN, STD = (28, 32), (0.48, 0.45, 0.40), (0.22, 0.25, 0.27)
PRODUCTS = ("bottle_cap", "pcb")
REFERENCE = build_transform(IMG_SIZE, MEAN, STD)


def resized(item: Item) -> np.ndarray:
    return np.asarray(Image.open(item.image).convert("RGB").resize(IMG_SIZE[::-1], Image.Resampling.BICUBIC))


def make(items: list[Item], pool: list[Item] | None = None, **settings: Any) -> PretrainingDataset:
    """A data set of small images; groups are small on purpose, so that the warning of it is of no interest."""
    return PretrainingDataset(
        items, real_iad.reference_pool(items) if pool is None else pool, two_views, REFERENCE, shots=[1], **settings
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_real_iad(tmp_path_factory.mktemp("data"), PRODUCTS, ok=4, ng=2, views=2)


@pytest.fixture(scope="module")
def items(root: Path) -> list[Item]:
    return real_iad.read(root, PRODUCTS)


# The sampler


def sampler_of(rank: int, world: int, *arguments: Any) -> StepSampler:
    """The sampler of one of several processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "rank", lambda: rank)
        patch.setattr(module, "world_size", lambda: world)
        return StepSampler(*arguments)


def all_batches(sampler: StepSampler, epoch: int, step: int = 0) -> list[list[Draw]]:
    sampler.epoch, sampler.step = epoch, step
    return list(sampler)


@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 2**40),
    st.integers(0, 3),
    st.data(),
)
def test_ranks_divide_one_global_batch_from_any_position(
    count: int, share: int, world: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    batch_size = share * world
    if count < batch_size:
        with pytest.raises(InputError, match="do not fill a batch"):
            StepSampler(count, batch_size, seed)
        return
    whole = StepSampler(count, batch_size, seed)
    batches = all_batches(whole, epoch)
    assert len(batches) == whole.steps_per_epoch == count // batch_size
    indices = [draw.index for batch in batches for draw in batch]
    assert len(set(indices)) == len(indices) and set(indices) <= set(range(count))
    assert all(len({draw.shots for draw in batch}) == 1 for batch in batches)
    step = data.draw(st.integers(0, whole.steps_per_epoch))
    ranks = [sampler_of(rank, world, count, batch_size, seed) for rank in range(world)]
    shares = [all_batches(sampler, epoch, step) for sampler in ranks]
    assert [len(sampler) for sampler in ranks] == [len(batches) - step] * world
    for batch, own in zip(batches[step:], zip(*shares, strict=True), strict=True):
        assert [draw for turn in zip(*own, strict=True) for draw in turn] == batch


def test_epochs_and_seeds_differ_and_repeat() -> None:
    sampler, twin, other = StepSampler(64, 8, 1), StepSampler(64, 8, 1), StepSampler(64, 8, 2)
    epochs = [all_batches(sampler, epoch) for epoch in range(3)]
    assert epochs == [all_batches(twin, epoch) for epoch in (0, 1, 2)]
    assert list(twin) == list(twin) == epochs[2]  # iterating does not move the position
    seeds = [draw.seed for epoch in [*epochs, all_batches(other, 0)] for batch in epoch for draw in batch]
    assert len(set(seeds)) == len(seeds)
    orders = [[draw.index for batch in epoch for draw in batch] for epoch in epochs]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_numbers_of_references_are_drawn_evenly() -> None:
    shots = Counter(batch[0].shots for epoch in range(10) for batch in all_batches(StepSampler(300, 1, 0), epoch))
    assert set(shots) == {1, 4, 8}
    assert all(abs(count - 1000) < 5 * math.sqrt(3000 * 2 / 9) for count in shots.values())


@pytest.mark.parametrize(
    ("world", "arguments", "message"),
    [
        (3, (10, 4, 0), "Choose a multiple of 3"),
        (1, (10, 6, 0, (1,), 4), "6 images cannot be divided among 1 processes in 4 equal micro-batches"),
        (2, (10, 6, 0, (1,), 2), "Choose a multiple of 4"),
        (1, (3, 4, 0), "smaller batch"),
    ],
)
def test_batches_that_cannot_be_are_refused(world: int, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sampler_of(0, world, *arguments)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.mark.parametrize(
    ("backbone", "original", "own"),
    [
        ("dinov2_base", CLIP, IMAGENET),
        ("dinov2_large", CLIP, IMAGENET),
        ("clip_base", CLIP, CLIP),
        ("imagebind_huge", CLIP, CLIP),
    ],
)
def test_views_have_the_statistics_of_clip_unless_those_of_the_backbone_are_asked_for(
    backbone: str, original: tuple[Statistics, Statistics], own: tuple[Statistics, Statistics]
) -> None:
    entry = BACKBONES[backbone]
    assert view_statistics(PretrainConfig().view_statistics, entry) == original
    assert view_statistics("backbone", entry) == own


def group(product: str, view: str, count: int) -> list[Item]:
    return [Item(f"/data/{product}/{view}/{number}.png", NORMAL, product, view=view) for number in range(count)]


def test_a_pool_has_so_many_different_images_of_each_product_and_view() -> None:
    nuts, others = group("nut", "C1", 9), [*group("nut", "C2", 3), *group("bolt", "C1", 9)]
    pool = choose_pool([*nuts, *others], 4, seed=0)
    assert [
        sum((item.product, item.view) == key for item in pool) for key in (("nut", "C1"), ("nut", "C2"), ("bolt", "C1"))
    ] == [4, 3, 4]
    assert pool == [item for item in (*nuts, *others) if item in pool]
    # What is drawn of a group depends on nothing but the seed.
    alone = choose_pool(nuts, 4, seed=0)
    assert alone == [item for item in pool if item in nuts]
    draws = {tuple(item.image for item in choose_pool(nuts, 4, seed)) for seed in range(20)}
    assert len(draws) > 10 and {image for draw in draws for image in draw} == {item.image for item in nuts}


# The data set


def test_an_element_holds_the_files_that_it_names(items: list[Item]) -> None:
    data = make(items)
    assert len(data) == len(items)
    for index, item in enumerate(items):
        element = data[Draw(index, 3, seed=index)]
        assert element["path"] == item.image and element["label"] == item.label
        assert np.array_equal(element["views"], two_views(Image.fromarray(resized(item)), index))
        assert element["mask"].shape == (1, *IMG_SIZE) and element["mask"].dtype == np.uint8
        expected = np.zeros(IMG_SIZE, bool)
        if item.mask is not None:
            expected = np.asarray(Image.open(item.mask).resize(IMG_SIZE[::-1], Image.Resampling.NEAREST)) > 0
        assert np.array_equal(element["mask"][0], expected)


def test_views_masks_and_references_have_the_geometry_of_the_recipe(tmp_path: Path) -> None:
    """From files and from one folder of caches alike; the oracle is plain Pillow."""
    picture, drawn = photo(0, (300, 260)), Image.new("L", (300, 260))
    drawn.paste(255, (30, 20, 90, 150))
    picture.save(tmp_path / "a.png")
    drawn.save(tmp_path / "mask.png")
    normal = Item(str(tmp_path / "a.png"), NORMAL, "nut")
    items = [normal, replace(normal, label=ANOMALOUS, mask=str(tmp_path / "mask.png"))]
    files = digests([normal.image, str(tmp_path / "mask.png")])

    def expected(image: Image.Image, preset: str, resample: Image.Resampling) -> Image.Image:
        if preset == "squash":
            return image.resize((224, 224), resample)
        side = int(preset[6:9])
        left, top = round((side * 300 // 260 - 224) / 2), (side - 224) // 2
        return image.resize((side * 300 // 260, side), resample).crop((left, top, left + 224, top + 224))

    caches = []
    for preset in PRESETS:
        transform = build_transform((224, 224), MEAN, STD, preset=preset)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* images are cached anew")
            caches.append(cache := ImageCache(tmp_path / "cache", transform, files))
            cache.fill(items)
        square = expected(picture, preset, Image.Resampling.BICUBIC)
        for place in (None, cache):
            data = PretrainingDataset(items, items[:1], two_views, transform, place, shots=(1,))
            element = data[Draw(1, 1, seed=3)]
            assert np.array_equal(element["views"], two_views(square, 3))
            assert np.array_equal(element["references"][0], np.asarray(square))
            mask = np.asarray(expected(drawn, preset, Image.Resampling.NEAREST)) > 0
            assert mask.any() and np.array_equal(element["mask"][0], mask)
    assert len({cache.file for cache in caches}) == len(PRESETS)


def test_references_are_normal_images_of_the_same_product_and_view(items: list[Item]) -> None:
    data = make(items)
    files = [item for item in items if "/OK/" in item.image]
    pictures = {item.image: resized(item) for item in files}
    seen: dict[tuple[str, str], Counter[str]] = {}
    for index, item in enumerate(items):
        for seed in range(5):
            references = data[Draw(index, 8, seed=100 * index + seed)]["references"]
            assert references.shape == (8, *IMG_SIZE, 3) and references.dtype == np.uint8
            for reference in references:
                matches = [file for file in files if np.array_equal(pictures[file.image], reference)]
                assert [(file.product, file.view) for file in matches] == [(item.product, item.view)]
                seen.setdefault((item.product, item.view), Counter())[matches[0].image] += 1
    for counts in seen.values():  # 4 images, 8 items, 5 times 8 draws: even up to 5 standard deviations
        assert len(counts) == 4
        assert all(abs(count - 80) < 5 * math.sqrt(320 * 3 / 16) for count in counts.values())


def test_indices_stand_for_the_same_references(items: list[Item]) -> None:
    loading, lazy = make(items), make(items, load_references=False)
    pool = real_iad.reference_pool(items)
    for index in range(0, len(items), 5):
        draw = Draw(index, 4, seed=index)
        indices = lazy[draw]["reference_indices"]
        assert indices.dtype == np.int64 and "references" not in lazy[draw]
        assert np.array_equal(loading[draw]["references"], [resized(pool[i]) for i in indices])
        assert np.array_equal(loading[draw]["reference_indices"], indices)


def test_batches_do_not_depend_on_the_number_of_workers(items: list[Item]) -> None:
    sampler = StepSampler(len(items), 4, seed=3)
    sampler.epoch, sampler.step = 1, 2
    loaders = [ImageLoader(make(items), sampler, workers=workers, collate=collate) for workers in (0, 1, 2)]
    runs = [list(loader) for loader in loaders]
    assert len(runs[0]) == len(items) // 4 - 2 == len(loaders[0])
    pool = real_iad.reference_pool(items)
    for batch, draws, *others in zip(runs[0], sampler, *runs[1:], strict=True):
        assert batch["views"].shape == (4, 2, *IMG_SIZE, 3) and batch["mask"].shape == (4, 1, *IMG_SIZE)
        assert batch["label"].dtype == torch.int64 and len(batch["path"]) == 4
        # Each reference is there once, and stands where the elements have it.
        known = batch["pool_indices"].tolist()
        assert len(batch["references"]) == len(known) == len(set(known))
        drawn = [index for draw in draws for index in make(items)[draw]["reference_indices"]]
        assert known == list(dict.fromkeys(drawn))
        assert [known[place] for place in batch["reference_indices"].flatten()] == drawn
        assert all(np.array_equal(one, resized(pool[at])) for one, at in zip(batch["references"], known, strict=True))
        for other in others:
            assert other["path"] == batch["path"]
            assert all(torch.equal(other[key], value) for key, value in batch.items() if key != "path")


def test_the_cache_changes_no_bit(items: list[Item], tmp_path: Path) -> None:
    """Of images that lie in it, of images that do not, and of images that cannot be read."""
    data = write_real_iad(tmp_path / "data", PRODUCTS, ok=4, ng=2, views=2)
    items = real_iad.read(data, PRODUCTS)
    for item in items:
        if item.sample in ("pcb/NG/ZW/S0001", "pcb/OK/S0302"):
            Path(item.image).write_bytes(b"no image")
    files = [path for item in items for path in (item.image, item.mask) if path is not None]
    cache = ImageCache(tmp_path / "cache", REFERENCE, digests(files))
    cache.fill(items[::2])
    partly = make(items, cache=pickle.loads(pickle.dumps(cache)))
    cache.fill(items)
    wholly, plain = make(items, cache=cache), make(items)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index in range(len(items)):
            draw = Draw(index, 4, seed=index)
            expected = plain[draw]
            for cached in (partly, wholly):
                found = cached[draw]
                assert found.keys() == expected.keys()
                for key, value in expected.items():
                    assert np.array_equal(found[key], value) and np.asarray(found[key]).dtype == np.asarray(value).dtype
    for item in items:  # And none of the files is opened any more.
        Path(item.image).write_bytes(b"no image")
    assert np.array_equal(wholly[Draw(0, 4, 0)]["views"], partly[Draw(0, 4, 0)]["views"])


def test_a_group_without_references_is_refused(items: list[Item]) -> None:
    pool = [item for item in real_iad.reference_pool(items) if (item.product, item.view) != ("pcb", "C2")]
    with pytest.raises(InputError, match="references for pcb C2. Add"):
        make(items, pool)


def test_few_references_are_warned_of_once(items: list[Item]) -> None:
    pool = real_iad.reference_pool(items)
    with pytest.warns(UserWarning, match="than 8 references") as caught:
        data = PretrainingDataset(items, pool, two_views, REFERENCE)
        assert data[Draw(0, 8, 0)]["references"].shape[0] == 8
    assert len(caught) == 1
    assert all(f"{product} {view} (4)" in str(caught[0].message) for product in PRODUCTS for view in ("C1", "C2"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PretrainingDataset(items, pool, two_views, REFERENCE, shots=(1, 4))


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Path, list[Item]]:
    """A tree with one unreadable query, and one reference of each group that is gone."""
    root = write_real_iad(tmp_path, ["pcb"], ok=4, ng=2, views=2)
    items = real_iad.read(root, ["pcb"])
    for item in items:
        if item.sample == "pcb/NG/ZW/S0001":
            Path(item.image).write_bytes(b"no image")
        if item.sample == "pcb/OK/S0302":
            Path(item.image).unlink()
    return root, items


def test_unreadable_files_are_replaced_and_warned_of_once_each(damaged: tuple[Path, list[Item]]) -> None:
    _, items = damaged
    bad = {item.image for item in items if item.sample in ("pcb/NG/ZW/S0001", "pcb/OK/S0302")}
    runs = []
    for _ in range(2):
        data = make(items)
        with pytest.warns(UserWarning, match="Another image takes its place") as caught:
            runs.append([data[Draw(index, 8, seed)] for index in range(len(items)) for seed in range(3)])
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == len(set(messages)) == len(bad)
        assert all(any(name in message for message in messages) for name in bad)
    readable = {item.image: item for item in items if item.image not in bad}
    for element, twin in zip(*runs, strict=True):
        assert element["path"] in readable and element["label"] == readable[element["path"]].label
        assert element["path"] == twin["path"]
        assert all(np.array_equal(element[key], twin[key]) for key in ("views", "mask", "references"))
    # the place of an image that is gone is not always taken by the same one
    index = next(i for i, item in enumerate(items) if item.image in bad)
    assert len({data[Draw(index, 1, seed)]["path"] for seed in range(10)}) > 1


def test_an_unreadable_reference_changes_none_of_the_others(damaged: tuple[Path, list[Item]], tmp_path: Path) -> None:
    _, items = damaged
    intact = real_iad.read(write_real_iad(tmp_path / "intact", ["pcb"], ok=4, ng=2, views=2), ["pcb"])
    gone = {i for i, item in enumerate(real_iad.reference_pool(items)) if item.sample == "pcb/OK/S0302"}
    for seed in range(10):
        draw = Draw(0, 8, seed)
        indices = make(intact, load_references=False)[draw]["reference_indices"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, expected = make(items)[draw]["references"], make(intact)[draw]["references"]
        for index, one, other in zip(indices.tolist(), found, expected, strict=True):
            assert np.array_equal(one, other) != (index in gone)


@pytest.mark.parametrize("what", ["queries", "references"])
@pytest.mark.filterwarnings("ignore:Cannot read")
def test_too_many_failures_end_it(tmp_path: Path, items: list[Item], what: str) -> None:
    gone = [Item(str(tmp_path / f"{i}.jpg"), NORMAL, items[0].product, view=items[0].view) for i in range(30)]
    data = make(gone, items) if what == "queries" else make(items[:1], gone)
    with pytest.raises(ImageError, match=rf"{MAX_FAILURES} images in a row.*{tmp_path}.*Check the data set"):
        data[Draw(0, 2, 0)]


@pytest.mark.parametrize("fault", ["size", "damaged", "gone"])
def test_masks_that_do_not_fit_are_errors(tmp_path: Path, fault: str) -> None:
    items = real_iad.read(write_real_iad(tmp_path, ["pcb"], ok=1, ng=1, views=2), ["pcb"])
    index, mask = next((i, Path(item.mask)) for i, item in enumerate(items) if item.mask)
    if fault == "size":
        Image.new("L", (SIZE[0] // 2, SIZE[1] // 2)).save(mask)
    elif fault == "damaged":
        mask.write_bytes(b"no image")
    else:
        mask.unlink()
    with pytest.raises(ImageError, match=mask.name):
        make(items)[Draw(index, 1, 0)]
