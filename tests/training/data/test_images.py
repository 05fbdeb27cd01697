"""Entries and batches: what they hold, whatever the format of a mask, the seed and the workers, and broken files."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import photo, write_photos
from helpers.trees import defective, write_mvtec
from PIL import Image, ImageOps
from scipy import ndimage
from torch.utils.data import Dataset

from adfeatures.errors import ImageError
from adfeatures.images import build_transform
from training.data import images as module
from training.data import mvtec
from training.data.images import (
    ImageDataset,
    ImageLoader,
    ahead,
    in_parallel,
    loader,
    read_mask,
    shared_masks,
    summarize,
)
from training.data.items import ANOMALOUS, NORMAL, Item

PLAIN: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
TRANSFORM = build_transform((32, 32), **PLAIN)


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "I;16", "instances", "blue", "gray edge", "RGBA", "LA", "transparent color"]
)
def test_masks_are_binary_after_resizing_whatever_their_values(tmp_path: Path, mode: str) -> None:
    defect = np.zeros((40, 60), dtype=np.uint8)
    defect[8:20, 12:36] = 1
    stored = {
        "1": lambda: Image.fromarray(defect * 255).convert("1"),
        "L": lambda: Image.fromarray(defect),
        "P": lambda: _palette(defect),
        "I;16": lambda: Image.fromarray(defect.astype(np.uint16) * 65535),
        "instances": lambda: Image.fromarray(defect.astype(np.uint16)),
        "RGBA": lambda: Image.fromarray(np.stack([defect * 9, 0 * defect, 0 * defect, defect * 255], axis=2)),
        "LA": lambda: Image.fromarray(np.stack([defect * 255, defect * 90], axis=2), mode="LA"),
        "transparent color": lambda: _palette(defect),
        "blue": lambda: Image.fromarray(np.stack([0 * defect, 0 * defect, defect], axis=2)),
        "gray edge": lambda: Image.fromarray(
            defect * 127 + ndimage.binary_erosion(defect, iterations=2).astype(np.uint8) * 128
        ),
    }[mode]()
    photo(0, (60, 40)).save(tmp_path / "image.png")
    options: dict[str, Any] = {"transparency": 0} if mode == "transparent color" else {}
    stored.save(tmp_path / "mask.png", **options)
    item = Item(str(tmp_path / "image.png"), ANOMALOUS, "product", str(tmp_path / "mask.png"), "scratch")
    for height, width in ((40, 60), (20, 30), (80, 120)):
        mask = ImageDataset([item], build_transform((height, width), **PLAIN))[0]["mask"]
        expected = Image.fromarray(defect * 255).resize((width, height), Image.Resampling.NEAREST)
        assert mask.dtype == torch.uint8 and np.array_equal(mask[0], np.asarray(expected) // 255)


def test_the_largest_page_of_a_mask_is_the_mask(tmp_path: Path) -> None:
    defect = np.zeros((40, 60), dtype=np.uint16)
    defect[8:20, 12:36] = 3
    thumbnail = Image.fromarray(np.zeros((4, 6), np.uint16))
    thumbnail.save(tmp_path / "mask.tif", save_all=True, append_images=[Image.fromarray(defect)])
    assert np.array_equal(np.asarray(read_mask(str(tmp_path / "mask.tif")))[..., 0] > 0, defect > 0)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ImageError, match=r"Cannot read .*broken\.png"):
        read_mask(str(tmp_path / "broken.png"))


def _palette(defect: np.ndarray) -> Image.Image:
    image = Image.fromarray(defect, mode="P")
    image.putpalette([0, 0, 0, 10, 200, 30])
    return image


def test_an_entry_holds_image_mask_label_product_and_path(tmp_path: Path) -> None:
    root = write_mvtec(tmp_path, size=(64, 48))
    items = mvtec.TREE.find_items(root, "test")
    data = pickle.loads(pickle.dumps(ImageDataset(items, TRANSFORM)))
    assert len(data) == 4
    for item, entry in zip(items, data, strict=True):
        assert set(entry) == {"image", "mask", "label", "product", "path", "noticed"} and entry["noticed"] == ""
        assert entry["image"].shape == (3, 32, 32) and entry["image"].dtype == torch.float32
        assert entry["mask"].shape == (1, 32, 32) and entry["mask"].dtype == torch.uint8
        assert entry["mask"].any() == (item.label == ANOMALOUS)
        assert (entry["label"], entry["product"], entry["path"]) == (item.label, "bottle", item.image)


def test_batches_have_the_form_that_methods_expect(tmp_path: Path) -> None:
    items = mvtec.TREE.find_items(write_mvtec(tmp_path, test_good=3), "test")
    batches = list(loader(ImageDataset(items, TRANSFORM), 2))
    assert [len(batch["path"]) for batch in batches] == [2, 2, 1]
    assert batches[0]["image"].shape == (2, 3, 32, 32) and batches[0]["mask"].shape == (2, 1, 32, 32)
    assert batches[0]["label"].dtype == torch.int64 and batches[0]["label"].tolist() == [ANOMALOUS, ANOMALOUS]
    assert [path for batch in batches for path in batch["path"]] == [item.image for item in items]
    assert batches[2]["product"] == ["bottle"]
    assert [len(batch["path"]) for batch in loader(ImageDataset(items, TRANSFORM), 2, drop_last=True)] == [2, 2]


def test_shuffled_batches_depend_on_the_seed_only(tmp_path: Path) -> None:
    items = mvtec.TREE.find_items(write_mvtec(tmp_path, good=9, size=(16, 16)), "train")
    data = ImageDataset(items, TRANSFORM)

    def passes(seed: int, workers: int) -> list[list[tuple[list[str], float]]]:
        batches = loader(data, 4, shuffle=True, seed=seed, workers=workers)
        next(iter(batches))  # A pass that is broken off, while workers have read all of it.
        return [[(batch["path"], batch["image"].sum().item()) for batch in batches] for _ in range(2)]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = passes(seed=5, workers=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert passes(seed=5, workers=1) == first == passes(seed=5, workers=2)
    assert passes(seed=6, workers=0) != first and first[0] != first[1]
    for one in first:
        assert sorted(path for paths, _ in one for path in paths) == [item.image for item in items]


def test_an_unreadable_file_leaves_no_workers_behind(tmp_path: Path) -> None:
    """Not even until the garbage is collected: a worker forked meanwhile would inherit them."""
    write_photos(tmp_path, range(4))
    (tmp_path / "001.png").write_bytes(b"no image")
    items = [Item(str(path), NORMAL, "bottle") for path in sorted(tmp_path.iterdir())]
    gc.collect()  # Workers of the tests before.
    gc.disable()
    try:
        with pytest.raises(ImageError, match="001.png") as caught:
            list(loader(ImageDataset(items, TRANSFORM), 1, workers=2))
        del caught
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files_are_named_by_the_loader_too(tmp_path: Path, workers: int) -> None:
    root = write_mvtec(tmp_path, size=(16, 16))
    items = mvtec.TREE.find_items(root, "test")
    broken = root / "bottle/ground_truth/broken/001_mask.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(ImageError) as caught:
        list(loader(ImageDataset(items, TRANSFORM), 1, workers=workers))
    assert str(caught.value).startswith(f"Cannot read {broken}: ") and "\n" not in str(caught.value)

    (root / "bottle/test/broken/000.png").write_text("no image")
    with pytest.raises(ImageError, match=r"broken/000\.png"):
        ImageDataset(items, TRANSFORM)[0]


def test_a_mask_of_another_size_is_refused_upright(tmp_path: Path) -> None:
    """A camera that was held sideways: its file is 40 x 24, the image and its mask are 24 x 40."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(0, (40, 24)).save(tmp_path / "image.jpg", exif=exif)
    mask = defective(1, (24, 40))[1]
    mask.save(tmp_path / "upright.png")
    mask.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png")
    upright, lying = (
        Item(str(tmp_path / "image.jpg"), ANOMALOUS, "p", str(tmp_path / name), "d")
        for name in ("upright.png", "lying.png")
    )
    assert ImageDataset([upright], TRANSFORM)[0]["mask"].any()
    with pytest.raises(ImageError, match=r"lying\.png has 40 x 24 pixels, its image .*image\.jpg has 24 x 40"):
        ImageDataset([lying], TRANSFORM)[0]


def test_what_is_odd_is_noticed_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_mvtec(tmp_path, bad=5)
    items = [item for item in mvtec.TREE.find_items(root, "test") if item.label == ANOMALOUS]
    masks = [Path(str(item.mask)) for item in items]
    for path in masks[:4]:
        ImageOps.invert(Image.open(path)).save(path)
    Image.open(masks[4]).save(tmp_path / "mask.jpg", quality=50)
    Image.open(tmp_path / "mask.jpg").save(masks[4])
    for workers in (0, 1):
        entries = [
            entry for batch in loader(ImageDataset(items, TRANSFORM), 2, workers=workers) for entry in batch["noticed"]
        ]
        inverted, compressed = summarize(items, map(str.splitlines, entries))
        assert inverted == (
            "4 masks that look inverted, a defect all around the edge of the image: "
            f"{masks[0]}, {masks[1]}, {masks[2]} and 1 more."
        )
        assert compressed.startswith("1 masks with faint grays") and compressed.endswith(f": {masks[4]}.")
    assert shared_masks(items) == []
    both = [items[0], replace(items[1], mask=items[0].mask)]
    (text,) = shared_masks(both)
    assert text.startswith(f"The mask {masks[0]} is that of several images: {items[0].image}, {items[1].image}. Rename")


def test_the_bit_depth_of_images_is_not_that_of_masks(tmp_path: Path) -> None:
    levels = np.random.RandomState(0).randint(0, 256, (16, 16))
    Image.fromarray(((levels * 4095 + 127) // 255).astype(np.uint16)).save(tmp_path / "image.png")
    Image.fromarray((levels > 200).astype(np.uint16) * 65535).save(tmp_path / "mask.png")
    item = Item(str(tmp_path / "image.png"), ANOMALOUS, "nut", str(tmp_path / "mask.png"))
    entry = ImageDataset([item], build_transform((16, 16), **PLAIN, bit_depth=12))[0]
    assert np.array_equal((entry["image"][0] * 255).round().numpy(), levels)
    assert np.array_equal(entry["mask"][0], levels > 200)


class Squares(Dataset[dict[str, Any]]):
    """Entries of a megabyte each."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.full((1 << 18,), float(index)), "name": str(index)}


def test_batches_need_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which containers have 64 MB: all that torch would put there is refused."""
    monkeypatch.setattr(torch.UntypedStorage, "_new_using_fd_cpu", lambda *_: pytest.fail("shared memory"))
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", lambda *_: pytest.fail("shared memory"))
    batches = list(ImageLoader(Squares(), [[3, 1], [2], [0, 4, 5]], workers=2))
    assert [batch["name"] for batch in batches] == [["3", "1"], ["2"], ["0", "4", "5"]]
    assert [batch["image"][:, -1].tolist() for batch in batches] == [[3, 1], [2], [0, 4, 5]]


class Counted(Squares):
    """Writes down in files which entries are made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, index: int) -> dict[str, Any]:
        (self.folder / str(index)).touch()
        return {"index": index}


def test_few_entries_are_in_flight(tmp_path: Path) -> None:
    batches = [list(range(at, at + 4)) for at in range(0, 400, 4)]
    entries = iter(ImageLoader(Counted(tmp_path), batches, workers=2))
    assert next(entries)["index"].tolist() == [0, 1, 2, 3]
    time.sleep(0.5)
    # One batch in use, one that is ready, and those of the workers.
    assert 4 <= len(list(tmp_path.iterdir())) <= 2 * 4 + 2 * module.AHEAD


def test_reading_goes_on_while_a_batch_is_in_use() -> None:
    """The second value is made before the first is given back."""
    made = threading.Event()

    def values() -> Iterator[int]:
        yield 1
        made.set()
        yield 2

    taken = ahead(values())
    assert next(taken) == 1 and made.wait(60)
    assert list(taken) == [2]

    def failing() -> Iterator[int]:
        yield 1
        raise ImageError("broken")

    taken = ahead(failing())
    assert next(taken) == 1
    with pytest.raises(ImageError, match="broken"):
        next(taken)


def _negative(value: int) -> int:
    return -value


class _Large(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": np.zeros(1 << 20, np.uint8)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed as POSIX has it")
@pytest.mark.parametrize("what", ["loader", "calls"])
def test_workers_end_with_a_process_that_was_killed(what: str) -> None:
    """They write to pipes that are full, and nobody reads."""
    end, own = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        large = _Large()
        values = ImageLoader(large, [[number] for number in range(64)], workers=3)
        for _ in values if what == "loader" else in_parallel(large.__getitem__, range(640), 3):
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(own)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    # Its end is that of the last process that holds the other one.
    ended, _, _ = select.select([end], [], [], 60)
    os.close(end)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    assert ended


@pytest.mark.parametrize("workers", [0, 2])
def test_calls_in_parallel_keep_their_order(workers: int) -> None:
    assert list(in_parallel(_negative, range(50), workers)) == [-value for value in range(50)]
    assert list(in_parallel(_negative, [], workers)) == []
