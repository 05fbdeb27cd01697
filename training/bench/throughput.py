"""Whole steps of the pretraining on a device, and the reading of their images, from the cache and from files."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from adfeatures.backbones import create_backbone
from adfeatures.catalog import BACKBONES
from adfeatures.images import build_transform
from adfeatures.measuring import Measurement, peak_megabytes
from adfeatures.projector import ResidualProjector

from ..data.fingerprint import digests
from ..data.image_cache import ImageCache
from ..data.images import ImageLoader
from ..data.items import ANOMALOUS, NORMAL, Item
from ..data.transforms import two_views
from ..distributed import cores
from ..pretraining.config import PretrainConfig
from ..pretraining.dataset import Draw, PretrainingDataset, StepSampler, collate, view_statistics
from ..pretraining.step import encode_images, prepared, train_step

ENCODERS, PRECISIONS = ("dinov2_base", "dinov2_large"), ("float32", "autocast", "bfloat16")


@dataclass(frozen=True)
class Sizes:
    """What the steps are made of; None is what the encoder has."""

    batch: int = 32
    side: int = 224
    source: int = 512
    images: int = 128
    steps: int = 20
    keys: int = 2048
    width: int | None = None
    depth: int | None = None


FULL, QUICK = Sizes(), Sizes(batch=4, side=56, images=16, steps=1, keys=16, width=48, depth=24)


def readings(quick: bool = False) -> Iterator[Measurement]:
    """Reading a sample, for sources of two sizes."""
    sizes = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        for source in (sizes.source, 4 * sizes.source):
            own = Path(folder, str(source))
            items = write_images(own, sizes.images // (source // sizes.source) ** 2, source)
            yield reading(items, sizes.side, own)


def steps(device: torch.device, quick: bool = False) -> Iterator[Measurement]:
    """A step of each encoder in each precision."""
    sizes = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        items = write_images(Path(folder, "steps"), sizes.images, sizes.source)
        for name in ENCODERS:
            for precision in PRECISIONS:
                yield stepping(items, name, precision, sizes, device, Path(folder))


def write_images(folder: Path, count: int, side: int) -> list[Item]:
    """JPEG files of one product, of which every fourth has a defect and a mask."""
    folder.mkdir()
    random, items = np.random.default_rng(0), list[Item]()
    for number in range(max(8, count)):
        coarse = random.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
        path, mask = folder / f"{number}.jpg", folder / f"{number}.png"
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=95)
        is_anomalous = number % 4 == 0
        if is_anomalous:
            drawn = Image.new("L", (side, side))
            drawn.paste(255, (side // 4, side // 4, side // 2, side // 2))
            drawn.save(mask)
        label = ANOMALOUS if is_anomalous else NORMAL
        items.append(Item(str(path), label, "product", str(mask) if is_anomalous else None))
    return items


def make_datasets(items: list[Item], side: int, folder: Path) -> tuple[PretrainingDataset, PretrainingDataset]:
    """The same data from a filled cache, and from files."""
    entry = replace(BACKBONES[ENCODERS[0]], img_size=(side, side))
    transform = build_transform(entry.img_size, *entry.normalization)
    files = [path for item in items for path in (item.image, item.mask) if path is not None]
    cache = ImageCache(folder / "cache", transform, digests(files, cores()))
    cache.fill(items, cores())
    pool = [item for item in items if item.label == NORMAL]
    make = partial(PretrainingDataset, items, pool, two_views, transform, shots=(1,))
    return make(cache), make(None)


def reading(items: list[Item], side: int, folder: Path) -> Measurement:
    """Seconds of a core for a sample: two views, a mask, and the references as they are drawn."""
    cached, plain = make_datasets(items, side, folder)
    views = partial(two_views, Image.fromarray(cached[Draw(0, 1, 0)]["references"][0]))
    forms = (cached.__getitem__, plain.__getitem__, lambda draw: views(draw.seed))
    draws = [draw for batch in StepSampler(len(items), 4, seed=0) for draw in batch]
    seconds = []
    for draw in draws:
        for form in forms:
            form(draw)  # Files are in the memory of the system, as those of a cache are.
            start = time.process_time()
            form(draw)
            seconds.append(time.process_time() - start)
    ours, naive, augmenting = (sum(seconds[form :: len(forms)]) / len(draws) for form in range(len(forms)))
    size = sum(file.stat().st_size for file in (folder / "cache").iterdir()) / len(items)
    note = (
        f"samples a second and core {1 / ours:.0f}, from files {1 / naive:.0f}, the two views alone "
        f"{1 / augmenting:.0f}; {size / 1000:.0f} kB an image in the cache"
    )
    what = f"a sample of {Image.open(items[0].image).width} px for {side} px, CPU time"
    return Measurement(what, "ms", 1000 * ours, 1000 * naive, naive / ours, note)


def stepping(
    items: list[Item], name: str, precision: str, sizes: Sizes, device: torch.device, folder: Path
) -> Measurement:
    """Seconds of a step from the cache and from files, waiting included."""
    entry = BACKBONES[name]
    backbone = create_backbone(name, img_size=sizes.side, embed_dim=sizes.width, depth=sizes.depth)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    backbone.to(device, dtype)
    config = PretrainConfig(precision=precision)
    projector = ResidualProjector(backbone.channels, num_keys=sizes.keys)
    projector.to(device, dtype)
    optimizer = torch.optim.Adam(projector.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    encoders = [
        partial(encode_images, statistics=statistics, backbone=backbone, device=device, precision=precision)
        for statistics in (view_statistics(config.view_statistics, entry), entry.normalization)
    ]
    centers = [torch.zeros(channels, device=device) for channels in backbone.channels]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    means, notes = [], []
    for where, dataset in zip(("cache", "files"), make_datasets(items, sizes.side, folder), strict=True):
        sampler = StepSampler(len(items), sizes.batch, seed=0)
        prepare = partial(prepared, store=None, pinned=device.type == "cuda")
        loader = ImageLoader(dataset, sampler, workers=cores(), collate=collate, prepare=prepare, keep=True)
        waiting, computing, images = 0.0, 0.0, 0
        asked = time.perf_counter()
        # The first step warms up.
        for number, batch in enumerate(islice(chain.from_iterable(repeat(loader)), sizes.steps + 1)):
            started = time.perf_counter()
            train_step(projector, optimizer, batch, (encoders[0], encoders[1]), centers, config)
            if number:
                waiting, computing = waiting + started - asked, computing + time.perf_counter() - started
                images += 2 * len(batch["views"]) + len(batch["references"])
            asked = time.perf_counter()
        total = waiting + computing
        means.append(total / sizes.steps)
        notes.append(f"{where}: waiting {waiting / total:.0%}, {images / total:,.0f} images/s")
    peak = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else peak_megabytes()
    notes.append("peak memory " + ("-" if peak is None else f"{peak:,.0f} MB"))
    what = f"step of {name}, batch {sizes.batch}, {precision}"
    return Measurement(what, "s", means[0], means[1], means[1] / means[0], "; ".join(notes))
