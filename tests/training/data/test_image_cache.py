"""The cache of images: the bits of the files, whatever happened to it before."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.full_disk import full_disk
from helpers.real_iad_tree import write_real_iad
from PIL import Image

from adfeatures.errors import AdfeaturesError, ImageError
from adfeatures.images import ImageTransform, build_transform
from adfeatures.locks import only_run_for
from training.console import run
from training.data import image_cache as module
from training.data import images, real_iad
from training.data.fingerprint import digests
from training.data.image_cache import ImageCache
from training.data.items import Item

SIZE = (20, 27)
TRANSFORM = build_transform(SIZE, (0.4,) * 3, (0.2,) * 3)
ROW = 20 * 27 * 3 + 68


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WRITTEN_AT_ONCE", 4)
    monkeypatch.setattr(images, "_CALLS", 1)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    root = write_real_iad(tmp_path_factory.mktemp("data"), ("pcb",), ok=4, ng=1, views=2)
    return real_iad.read(root, ["pcb"])


def known(items: Sequence[Item]) -> dict[str, str]:
    return digests(path for item in items for path in (item.image, item.mask) if path is not None)


def filled(folder: Path, items: Sequence[Item], transform: ImageTransform = TRANSFORM, workers: int = 0) -> ImageCache:
    cache = ImageCache(folder, transform, known(items))
    cache.fill(items, workers)
    return cache


def check(cache: ImageCache, items: Sequence[Item], size: tuple[int, int] = SIZE) -> None:
    """Against Pillow itself."""
    for item in items:
        found = cache.get(item)
        assert found is not None, item
        expected = Image.open(item.image).convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)
        mask = np.zeros(size, bool)
        if item.mask is not None:
            mask = np.asarray(Image.open(item.mask).resize(size[::-1], Image.Resampling.NEAREST)) > 0
        assert found[0].dtype == found[1].dtype == np.uint8
        assert np.array_equal(found[0], np.asarray(expected)) and np.array_equal(found[1][0], mask)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are decoded for the cache from now on."""
    read: list[str] = []
    before = module.read_item

    def noted(item: Item, bit_depth: int) -> Any:
        read.append(item.image)
        return before(item, bit_depth)

    monkeypatch.setattr(module, "read_item", noted)
    return read


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_the_resized_images_and_masks(tmp_path: Path, items: list[Item], workers: int) -> None:
    cache = filled(tmp_path, items, workers=workers)
    check(cache, items)
    assert cache.file.stat().st_size == len(items) * ROW
    # What a worker gets is the cache, and no copy of all images.
    sent = pickle.dumps(cache)
    assert len(sent) < cache.file.stat().st_size
    check(pickle.loads(sent), items)


def test_what_is_cached_is_read_no_more_wherever_it_lies(
    tmp_path: Path, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "cache", items[::2])
    read = count_reads(monkeypatch)
    with pytest.warns(UserWarning, match=f"{len(items) // 2} images are cached anew"):
        cache = filled(tmp_path / "cache", items[1:])
    assert sorted(read) == sorted(item.image for item in items[1::2])
    read.clear()
    moved = [replace(item, image=str(shutil.copy(item.image, tmp_path))) for item in items]
    cache = filled(tmp_path / "cache", moved)
    assert read == []
    check(cache, moved)
    assert cache.file.stat().st_size == len(items) * ROW


def test_other_images_masks_and_geometry_are_cached_anew_and_the_old_ones_named(
    tmp_path: Path, items: list[Item]
) -> None:
    first = filled(tmp_path / "cache", items)
    own = [
        replace(
            item, image=str(shutil.copy(item.image, tmp_path)), mask=item.mask and str(shutil.copy(item.mask, tmp_path))
        )
        for item in items
    ]
    marked = next(item for item in own if item.mask is not None)
    Image.new("L", Image.open(str(marked.mask)).size, 255).save(str(marked.mask))
    Image.open(own[0].image).rotate(180).save(own[0].image)
    with pytest.warns(UserWarning, match=f"2 images are cached anew.*2 other images in {first.file.name}"):
        second = filled(tmp_path / "cache", own)
    check(second, own)
    check(first, items)
    for transform in (replace(TRANSFORM, img_size=(16, 16)), replace(TRANSFORM, bit_depth=12)):
        with pytest.warns(UserWarning, match=f"{len(own)} images are cached anew.*{first.file.name}.*remove"):
            other = filled(tmp_path / "cache", own, transform)
        check(other, own, transform.img_size)
    assert len(list((tmp_path / "cache").glob("*.rows"))) == 3


def test_a_cache_that_was_removed_is_not_remembered(tmp_path: Path, items: list[Item]) -> None:
    half = len(items) // 2
    for own in (items[:half], items[half:]):
        check(filled(tmp_path / "cache", own), own)
        shutil.rmtree(tmp_path / "cache")


def test_another_pillow_caches_anew(tmp_path: Path, items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    first = filled(tmp_path, items)
    monkeypatch.setattr("PIL.__version__", "1.1.7")
    assert ImageCache(tmp_path, TRANSFORM, {}).file != first.file


def test_a_crop_is_cached_as_it_is(tmp_path: Path, items: list[Item]) -> None:
    """Resizing to 256 and cropping 224 of it must not be done twice."""
    transform = replace(TRANSFORM, preset="resize256_crop224")
    cache = filled(tmp_path, items[:2], transform)
    for item in items[:2]:
        found = cache.get(item)
        assert found is not None
        assert np.array_equal(found[0], np.asarray(transform.resized(transform.read(item.image))))


@pytest.mark.parametrize("fault", ["image", "mask", "size", "gone"])
def test_what_cannot_be_read_is_left_to_its_user(tmp_path: Path, fault: str) -> None:
    items = real_iad.read(write_real_iad(tmp_path / "data", ("pcb",), ok=2, ng=2, views=2), ["pcb"])
    bad = next(item for item in items if item.mask is not None)
    if fault == "size":
        Image.new("L", (3, 3)).save(str(bad.mask))
    elif fault == "gone":
        Path(bad.image).unlink()
    else:
        Path(bad.image if fault == "image" else str(bad.mask)).write_bytes(b"no image")
    cache = filled(tmp_path / "cache", items)
    assert cache.get(bad) is None
    check(cache, [item for item in items if item is not bad])


def test_an_item_of_another_mask_is_another_one(tmp_path: Path, items: list[Item]) -> None:
    cache = filled(tmp_path, items)
    marked = next(item for item in items if item.mask is not None)
    assert cache.get(replace(marked, mask=None)) is None
    assert cache.get(replace(marked, mask=str(tmp_path / "none.png"))) is None


@pytest.mark.parametrize("part", ["rows", "keys"])
@pytest.mark.parametrize("left", [0, 1, 5 * ROW + 3])
def test_a_file_that_was_cut_short_is_completed(tmp_path: Path, items: list[Item], part: str, left: int) -> None:
    file = filled(tmp_path, items).file.with_suffix(f".{part}")
    whole = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    os.truncate(file, left if part == "rows" else left * 32 // ROW)
    cache = ImageCache(tmp_path, TRANSFORM, known(items))
    assert [cache.get(item) is not None for item in items] == [at < left // ROW for at in range(len(items))]
    cache.fill(items)
    check(cache, items)
    assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == whole


def test_keys_that_a_lost_power_left_as_zeros_cost_their_rows_alone(tmp_path: Path, items: list[Item]) -> None:
    file = filled(tmp_path, items).file
    with open(file.with_suffix(".keys"), "r+b") as keys:
        keys.seek(2 * 32)
        keys.write(bytes(3 * 32))
    with pytest.warns(UserWarning, match="3 images are cached anew"):
        cache = filled(tmp_path, items)
    check(cache, items)
    assert cache.file.stat().st_size == (len(items) + 3) * ROW


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("left", [None, 5])
def test_a_cache_that_is_lost_while_in_use_is_an_error(
    tmp_path: Path, items: list[Item], workers: int, left: int | None
) -> None:
    cache = filled(tmp_path, items)
    if left is None:
        cache.file.unlink()
    else:
        os.truncate(cache.file, left)
    with pytest.raises(ImageError, match=f"^The cache {cache.file} was removed or changed while in use.*Start"):
        list(images.in_parallel(cache.get, items, workers))


def test_a_full_disk_keeps_what_is_cached(tmp_path: Path, items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        full_disk(9 * ROW),
        pytest.raises(AdfeaturesError, match="Cannot write the cache .*rows: .*File too large.*--cache"),
    ):
        filled(tmp_path, items)
    read = count_reads(monkeypatch)
    cache = filled(tmp_path, items)
    assert read == [item.image for item in items[8:]]
    check(cache, items)


def test_a_disk_without_the_room_is_refused_at_once(
    tmp_path: Path, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = count_reads(monkeypatch)
    full = shutil.disk_usage(tmp_path)._replace(free=len(items) * ROW - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(AdfeaturesError, match=f"{len(items)} images take 0.0 GB, 0.0 GB are free.*free some space"):
        filled(tmp_path, items)
    assert read == []


@pytest.mark.parametrize("what", ["file", "pipe"])
def test_what_is_no_cache_is_refused(tmp_path: Path, items: list[Item], what: str) -> None:
    if what == "file":
        (tmp_path / "cache").write_text("mine")
    else:
        file = filled(tmp_path / "cache", items[:1]).file
        file.unlink()
        os.mkfifo(file)
    with pytest.raises(AdfeaturesError, match=f"{tmp_path}/cache"):
        filled(tmp_path / "cache", items)


@pytest.mark.parametrize("suffix", [".rows", ".keys"])
def test_nothing_is_written_through_a_link(tmp_path: Path, items: list[Item], suffix: str) -> None:
    (tmp_path / "mine").write_text("mine")
    cache = ImageCache(tmp_path / "cache", TRANSFORM, known(items))
    cache.file.parent.mkdir()
    cache.file.with_suffix(suffix).symlink_to(tmp_path / "mine")
    with pytest.raises(AdfeaturesError, match=f"{suffix} is a link"):
        cache.fill(items)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_process_that_dies_while_caching_loses_nothing_finished(
    tmp_path: Path, items: list[Item], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    cache, before = ImageCache(tmp_path, TRANSFORM, known(items)), module.read_item

    def dying(item: Item, bit_depth: int) -> Any:
        if item is items[9]:
            # Workers are ahead of what is written.
            started = time.monotonic()
            while cache.file.with_suffix(".keys").stat().st_size < 8 * 32 and time.monotonic() - started < 60:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return before(item, bit_depth)

    child = os.fork()
    if not child:
        os.dup2(os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w")
        monkeypatch.setattr(module, "read_item", dying)
        code = run("cache", lambda: cache.fill(items, workers))
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    error = (tmp_path / "stderr").read_text()
    assert code == (2 if workers else -signal.SIGKILL), error
    if workers:
        assert error.startswith("training.cache: error: A process that reads images was ended from outside")
    read = count_reads(monkeypatch)
    check(filled(tmp_path, items), items)
    assert read == [item.image for item in items[8:]]


def test_ranks_wait_for_the_one_that_fills_it(
    tmp_path: Path, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[int] = []

    def agreed(own: Callable[[], object]) -> None:
        assert own() is None and not cache.file.exists()
        waited.append(1)
        with monkeypatch.context() as patch:
            patch.setattr(module, "agreed", before)
            patch.setattr(module, "rank", lambda: 0)
            filled(tmp_path, items)

    before = module.agreed
    monkeypatch.setattr(module, "rank", lambda: 1)
    monkeypatch.setattr(module, "agreed", agreed)
    cache = ImageCache(tmp_path, TRANSFORM, known(items))
    cache.fill(items)
    check(cache, items)
    assert waited == [1]


def test_two_runs_do_not_fill_one_file(tmp_path: Path, items: list[Item]) -> None:
    cache = ImageCache(tmp_path, TRANSFORM, known(items))
    with only_run_for(cache.file), pytest.raises(AdfeaturesError, match="Another run"):
        cache.fill(items)
    cache.fill(items)
    with only_run_for(cache.file):
        filled(tmp_path, items)  # Whole as it is, it is only read.
