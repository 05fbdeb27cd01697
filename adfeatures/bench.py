"""Speed and memory against the published form of the method: ``python -m adfeatures.bench [--json] [--quick]``.

The published form is written here anew from the paper's equations, plainly: it projects the references to keys and
values again for every image of every batch, materializes the attention weights, and matches by the whole matrix of
similarities. Both forms share their weights and run alternately in one process, so that whatever else the machine does
slows both: judge by the ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from . import catalog, scoring
from .backbones import create_backbone
from .extractor import FeatureExtractor
from .factory import create_model, create_transform
from .images import read_image
from .projector import ResidualProjector
from .references import ReferenceBank

BACKBONE, MODEL = "dinov2_base", "adpretrain_dinov2_base"


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the defaults are those of the full run."""

    repeats: int = 11  # pairs of runs that a median is taken of
    seconds: float = 60  # after which a comparison does not start another pair
    width: int = 768  # channels of the projector's four levels and of the backbone
    depth: int = 12  # blocks of the backbone
    keys: int = 2048  # learnable references per level of the projector
    grid: int = 16  # height and width of the patch grids
    batches: tuple[int, ...] = (1, 8)  # of the projector; the largest also for memory
    references: int = 8  # images
    matching: tuple[int, int] = (1600, 12_800)  # queries and rows whose matching is timed
    bank: tuple[int, int] = (256, 2_048_000)  # queries and rows whose memory is measured
    photo: tuple[int, int] = (1600, 1200)  # width and height in pixels


FULL, QUICK = Sizes(), Sizes(repeats=3, seconds=8, bank=(256, 204_800))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    The ratio is naive over ours, so above 1 where ours is better; None is what was not measured.
    """

    what: str
    unit: str
    ours: float | None
    naive: float | None = None
    ratio: float | None = None
    note: str = ""

    def __str__(self) -> str:
        ours, naive = ("-" if value is None else f"{value:,.1f}" for value in (self.ours, self.naive))
        return _line(
            f"{self.what}, {self.unit}", ours, naive, "-" if self.ratio is None else f"{self.ratio:.2f}", self.note
        )


def _line(what: str, ours: str, naive: str, ratio: str, note: str) -> str:
    return f"{what:<58}{ours:>9}{naive:>10}{ratio:>7}  {note}".rstrip()


# The published form


class NaiveProjector:
    """The projector in its published form, on the weights of ours."""

    def __init__(self, ours: ResidualProjector) -> None:
        self.levels = [
            _NaiveLevel(*level) for level in zip(ours.children(), ours.channels, ours.num_heads, strict=True)
        ]

    def __call__(self, residuals: Sequence[Tensor]) -> list[Tensor]:
        return [level(residual) for level, residual in zip(self.levels, residuals, strict=True)]


class _NaiveLevel:
    def __init__(self, ours: nn.Module, channels: int, num_heads: int) -> None:
        self.state, prefix = ours.state_dict(), "layers.0.cross_attn."
        own = {key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)}
        # torch's own module, which by default computes and returns the attention weights; the published keys are its
        # keys.
        self.attention = (
            nn.MultiheadAttention(channels, num_heads, batch_first=True, device="meta").requires_grad_(False).eval()
        )
        self.attention.load_state_dict(own, assign=True)

    def __call__(self, x: Tensor) -> Tensor:
        tokens, expanded = x.flatten(2).transpose(1, 2), self.state["x_ref"].expand(len(x), -1, -1)
        references = F.conv1d(expanded.transpose(1, 2), *self._parameters("ref_proj.project")).transpose(1, 2)
        tokens = tokens - self.attention(tokens, references, references)[0]
        hidden = F.linear(tokens, *self._parameters("layers.0.mlp.fc1"))
        squeezed = F.relu(F.linear(hidden.mean(1, keepdim=True), *self._parameters("layers.0.mlp.se.fc1")))
        hidden = F.gelu(hidden * torch.sigmoid(F.linear(squeezed, *self._parameters("layers.0.mlp.se.fc2"))))
        return (tokens + F.linear(hidden, *self._parameters("layers.0.mlp.fc2"))).transpose(1, 2).reshape(x.shape)

    def _parameters(self, name: str) -> tuple[Tensor, Tensor]:
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]


def naive_residuals(features: Sequence[Tensor], banks: Sequence[Tensor]) -> list[Tensor]:
    """Maps (B, C, h, w) minus the most similar rows of banks (N, C), by the whole matrix of cosine similarities."""
    residuals = []
    for level, bank in zip(features, banks, strict=True):
        queries = level.permute(0, 2, 3, 1).flatten(0, 2)
        nearest = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).argmax(dim=1)
        residuals.append((queries - bank[nearest]).unflatten(0, (len(level), *level.shape[2:])).permute(0, 3, 1, 2))
    return residuals


class NaiveExtractor:
    """The whole path in its published form, with the backbone, the weights and the references of ours."""

    def __init__(self, ours: FeatureExtractor) -> None:
        if ours.projector is None:
            raise TypeError(f"{ours.name} has no projector, and so no published form.")
        self.backbone, self.projector = ours.backbone, NaiveProjector(ours.projector)
        self.banks = next(iter(ours.references.values())).rows

    def __call__(self, x: Tensor) -> list[Tensor]:
        return self.projector(naive_residuals(self.backbone(x), self.banks))


# What is measured


def build_projector(sizes: Sizes) -> ResidualProjector:
    """A random projector of four levels."""
    torch.manual_seed(0)
    return ResidualProjector([sizes.width] * 4, num_keys=sizes.keys).requires_grad_(False).eval()


def build_extractor(sizes: Sizes) -> FeatureExtractor:
    """A random extractor with references: with the default sizes, that of the catalog."""
    torch.manual_seed(0)
    entry = catalog.BACKBONES[BACKBONE]
    side = sizes.grid * entry.patch_size
    backbone = create_backbone(BACKBONE, img_size=side, embed_dim=sizes.width, depth=sizes.depth)
    config = {"mean": entry.normalization[0], "std": entry.normalization[1]}
    projector = ResidualProjector(backbone.channels, num_keys=sizes.keys)
    extractor = FeatureExtractor(backbone, projector, name=MODEL, img_size=(side, side), pretrained_cfg=config)
    extractor.set_references(torch.randn(sizes.references, 3, side, side))
    return extractor


def projector_rows(sizes: Sizes) -> Iterator[Row]:
    """The projector at every batch size."""
    ours = build_projector(sizes)
    naive = NaiveProjector(ours)
    for batch in sizes.batches:
        residuals = torch.randn(4, batch, sizes.width, sizes.grid, sizes.grid).unbind()
        yield _compare(
            f"projector, 4 levels of {sizes.width}, batch {batch}", ours, naive, residuals, sizes, "target 2.8"
        )


def extractor_rows(sizes: Sizes) -> Iterator[Row]:
    """The whole extractor at batch 1, and its stages."""
    ours = build_extractor(sizes)
    x = torch.randn(1, 3, *ours.img_size)
    yield _compare(
        f"{MODEL}, batch 1", ours, NaiveExtractor(ours), x, sizes, f"target 1.4; {sizes.references} references"
    )
    yield from stage_rows(ours, sizes)


def default_rows(sizes: Sizes) -> Iterator[Row]:
    """The stages of the embedded default model, where its file is there."""
    asset = catalog.BACKBONES[catalog.MODELS[catalog.DEFAULT_MODEL.partition(".")[0]].backbone].asset
    if asset is not None and (catalog.ASSETS / asset).is_file():
        extractor = create_model()
        extractor.set_references(torch.randn(sizes.references, 3, *extractor.img_size))
        yield from stage_rows(extractor, sizes)


def stage_rows(extractor: FeatureExtractor, sizes: Sizes) -> Iterator[Row]:
    """Milliseconds of each stage of ours from a photograph on disk to its anomaly map, batch 1."""
    transform, size, name = create_transform(extractor), extractor.img_size, extractor.name.partition(".")[0]
    bank = next(iter(extractor.references.values()))

    def to_map(features: Sequence[Tensor]) -> Tensor:
        return extractor.scorer.maps(features, [bank.scales], size, scoring.SIGMA)

    stages: dict[str, Callable[[Any], Any]] = {
        "decode and transform": lambda path: transform(read_image(path))[None],
        "backbone": extractor.backbone_features,
        "matching": bank.residuals,
        **({"projector": extractor.projector} if extractor.projector is not None else {}),
        "map": to_map,
    }
    seconds: dict[str, list[float]] = {stage: [] for stage in stages}
    with tempfile.TemporaryDirectory() as folder:
        photo = _photo(Path(folder) / "photo.jpg", sizes.photo)
        for _ in range(sizes.repeats + 1):
            value: Any = photo
            for stage, function in stages.items():
                taken, value = _timed(function, value)
                seconds[stage].append(taken)
    # The first round warms up.
    milliseconds = {stage: 1000 * median(each[1:]) for stage, each in seconds.items()}
    yield from (Row(f"{name}: {stage}", "ms", each) for stage, each in milliseconds.items())
    note = (
        f"cpu; photo of {sizes.photo[0]} x {sizes.photo[1]}, input {size[1]} x {size[0]}, {bank.num_images} references"
    )
    yield Row(f"{name}: all stages", "ms", sum(milliseconds.values()), note=note)


def matching_rows(sizes: Sizes) -> Iterator[Row]:
    """Matching in chunks against the whole matrix."""
    queries, rows = sizes.matching
    bank, features = _bank(torch.randn(rows, sizes.width)), [torch.randn(1, sizes.width, 1, queries)]
    what = f"matching {queries:,} x {rows:,} rows of {sizes.width}"
    yield _compare(
        what,
        bank.residuals,
        lambda maps: naive_residuals(maps, bank.rows),
        features,
        sizes,
        "chunks against whole matrix",
    )


def memory_rows(sizes: Sizes) -> Iterator[Row]:
    """Peak memory, each in a fresh process."""
    for what, whole in (("projector", False), ("extractor", True)):
        ours, naive = (_in_child(batch_peak, sizes, whole, form) for form in (False, True))
        ratio = naive / ours if ours and naive else None
        yield Row(
            f"peak of a process: {what}, batch {max(sizes.batches)}",
            "MB",
            ours,
            naive,
            ratio,
            note=_note(ours, "target: below naive"),
        )
    (queries, rows), beyond = sizes.bank, _in_child(matching_peak, sizes)
    note = f"target: below 2,000; bank of {2e-6 * rows * sizes.width:,.0f} MB in float16"
    note += f"; naive, not run, needs {4e-6 * rows * (sizes.width + queries):,.0f}"
    yield Row(f"beyond the bank: {queries} x {rows:,} rows of {sizes.width}", "MB", beyond, note=_note(beyond, note))


def batch_peak(sizes: Sizes, whole: bool, naive: bool) -> float | None:
    """Megabytes that this process took for one batch of the projector, or of the whole extractor."""
    batch, side = max(sizes.batches), sizes.grid * catalog.BACKBONES[BACKBONE].patch_size
    with torch.no_grad():
        if whole:
            extractor = build_extractor(sizes)
            (NaiveExtractor(extractor) if naive else extractor)(torch.randn(batch, 3, side, side))
        else:
            projector, residuals = (
                build_projector(sizes),
                torch.randn(4, batch, sizes.width, sizes.grid, sizes.grid).unbind(),
            )
            (NaiveProjector(projector) if naive else projector)(residuals)
    return _peak_megabytes()


def matching_peak(sizes: Sizes) -> float | None:
    """Megabytes beyond the bank that matching takes.

    Rows in half precision, converted on the way, take more than others.
    """
    queries, count = sizes.bank
    rows = torch.empty(count, sizes.width, dtype=torch.float16)
    for part in rows.split(1024):
        part.normal_()
    bank, features = _bank(rows), torch.randn(1, sizes.width, 1, queries)
    before = _peak_megabytes()
    bank.match([features])
    after = _peak_megabytes()
    return None if before is None or after is None else after - before


# How it is measured


def _compare(
    what: str,
    ours: Callable[[Any], list[Tensor]],
    naive: Callable[[Any], list[Tensor]],
    value: Any,
    sizes: Sizes,
    note: str,
) -> Row:
    """Time two functions of the same value alternately, after comparing their results, which also warms up."""
    results = list(zip(ours(value), naive(value), strict=True))
    difference, largest = (
        max((a - b).abs().max().item() for a, b in results),
        max(b.abs().max().item() for _, b in results),
    )
    pairs: list[tuple[float, float]] = []
    end = time.perf_counter() + sizes.seconds
    while not pairs or (len(pairs) < sizes.repeats and time.perf_counter() < end):
        pairs.append((_timed(ours, value)[0], _timed(naive, value)[0]))
    ours_ms, naive_ms = (1000 * median(seconds) for seconds in zip(*pairs, strict=True))
    note += f"; pairs {len(pairs)}; largest difference {difference:.1e} in outputs up to {largest:.3g}"
    return Row(what, "ms", ours_ms, naive_ms, median(n / o for o, n in pairs), note)


def _timed(function: Callable[[Any], Any], value: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(value)
    return time.perf_counter() - start, result


def _in_child(function: Callable[..., float | None], *arguments: object) -> float | None:
    """What a function returns in a fresh process, None where that process died, as of too little memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return None


def _peak_megabytes() -> float | None:
    """The most memory that this process ever held, None on Windows."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux that of a spawned process begins with its parent's.
        (kibibytes,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kibibytes) * 1024 / 1e6
    if sys.platform == "win32":
        return None
    import resource

    # macOS counts bytes, others kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def _note(measured: float | None, note: str) -> str:
    return (
        note
        if measured is not None
        else "not measured: " + ("no such count on Windows" if sys.platform == "win32" else "process died")
    )


def _bank(rows: Tensor) -> ReferenceBank:
    """A bank of one level and one image."""
    return ReferenceBank([rows], [torch.zeros(len(rows), dtype=torch.int32)], [(1, len(rows))], num_images=1)


def _photo(path: Path, size: tuple[int, int]) -> Path:
    """Soft shapes with some noise, which take a decoder about the time of a photograph."""
    random = np.random.default_rng(0)
    soft = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(soft, dtype=np.int16) + random.integers(-6, 7, (size[1], size[0], 1), dtype=np.int16)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return path


@torch.no_grad()
def run(sizes: Sizes) -> Iterator[Row]:
    """Measure everything, row by row."""
    for section in (projector_rows, extractor_rows, default_rows, matching_rows, memory_rows):
        yield from section(sizes)


def main(arguments: Sequence[str] | None = None, *, full: Sizes = FULL, quick: Sizes = QUICK) -> int:
    """Run the measurements of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m adfeatures.bench", description="Speed and memory against the published form."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help=f"fewer repeats and a bank of {quick.bank[1]:,} rows")
    parser.add_argument(
        "--threads", type=int, help="threads of torch in this process; 1 gives steadier ratios on a busy machine"
    )
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes, kind = (quick, "quick") if options.quick else (full, "full")
    machine = {
        "torch": torch.__version__,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
    }
    if hasattr(os, "getloadavg"):
        machine["load"] = round(os.getloadavg()[0], 1)
    if options.json:
        print(
            json.dumps(
                {**machine, "run": kind, "sizes": asdict(sizes), "rows": [asdict(row) for row in run(sizes)]}, indent=1
            )
        )
        return 0
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(
        f"{kind} run: medians of {sizes.repeats} alternating pairs, fewer after {sizes.seconds:g} s; bank of {sizes.bank[1]:,} rows"
    )
    print(_line("what", "ours", "naive", "ratio", "(ratio: naive / ours; MB: 10^6 bytes)"))
    for row in run(sizes):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
