"""Speed and memory against the published form of the method: ``python -m adfeatures.bench [--json] [--quick]``.

The published form is written here anew from the paper's equations, plainly: it projects the references to keys and
values again for every image of every batch, materializes the attention weights, and matches by the whole matrix of
similarities. Both forms share their weights. Judge by the ratios.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import catalog, scoring
from .backbones import create_backbone
from .documents import dumps
from .extractor import FeatureExtractor
from .factory import create_model, create_transform
from .images import read_image
from .measuring import HEADER, NOT_MEASURED, Measurement, compare, in_child, machine, peak_megabytes, timed
from .projector import ResidualProjector
from .references import ReferenceBank

Form: TypeAlias = Callable[[], Sequence[Tensor]]

BACKBONE, MODEL = "dinov2_base", "adpretrain_dinov2_base"


@dataclass(frozen=True)
class BenchSizes:
    """How much is measured; the defaults are those of the full run."""

    repeats: int = 11  # pairs of runs that a median is taken of
    seconds: float = 60  # after which a comparison does not start another pair
    width: int = 768  # channels of the projector's four levels and of the backbone
    depth: int = 12  # blocks of the backbone
    keys: int = 2048  # learnable references per level of the projector
    grid: int = 16  # height and width of the patch grids
    batches: tuple[int, ...] = (1, 8)  # of the projector; the largest also for memory
    references: int = 8  # images
    many: int = 64  # references of the embedded default, beside as many as the others have
    matching: tuple[int, int] = (1600, 12_800)  # queries and rows whose matching is timed
    bank: tuple[int, int] = (256, 2_048_000)  # queries and rows whose memory is measured
    photo: tuple[int, int] = (1600, 1200)  # width and height in pixels


FULL, QUICK = BenchSizes(), BenchSizes(repeats=3, seconds=8, bank=(256, 204_800))


# The published form


def naive_projection(projector: ResidualProjector, residuals: Sequence[Tensor]) -> list[Tensor]:
    """The projector in its published form, on the parameters of ours, which can be trained by it."""
    levels = zip(projector.children(), projector.num_heads, residuals, strict=True)
    return [_project_level(dict(level.named_parameters()), num_heads, x) for level, num_heads, x in levels]


def _project_level(parameters: dict[str, Tensor], num_heads: int, x: Tensor) -> Tensor:
    def affine(name: str, function: Callable[..., Tensor], tokens: Tensor) -> Tensor:
        return function(tokens, parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    tokens, expanded = x.flatten(2).transpose(1, 2), parameters["x_ref"].expand(len(x), -1, -1)
    references = affine("ref_proj.project", F.conv1d, expanded.transpose(1, 2)).permute(2, 0, 1)
    queries = tokens.transpose(0, 1)
    w_in, b_in, w_out, b_out = (tensor for name, tensor in parameters.items() if ".cross_attn." in name)
    # As torch's own module calls it, whose default is to return the attention weights.
    attended, _ = F.multi_head_attention_forward(
        queries, references, references, x.shape[1], num_heads, w_in, b_in, None, None, False, 0.0, w_out, b_out
    )
    tokens = tokens - attended.transpose(0, 1)
    hidden = affine("layers.0.mlp.fc1", F.linear, tokens)
    squeezed = F.relu(affine("layers.0.mlp.se.fc1", F.linear, hidden.mean(1, keepdim=True)))
    hidden = F.gelu(hidden * torch.sigmoid(affine("layers.0.mlp.se.fc2", F.linear, squeezed)))
    return (tokens + affine("layers.0.mlp.fc2", F.linear, hidden)).transpose(1, 2).reshape(x.shape)


def naive_residuals(features: Sequence[Tensor], banks: Sequence[Tensor]) -> list[Tensor]:
    """Maps (B, C, h, w) minus the most similar rows of banks (N, C), by the whole matrix of cosine similarities."""
    residuals = []
    for level, bank in zip(features, banks, strict=True):
        queries = level.permute(0, 2, 3, 1).flatten(0, 2)
        nearest = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).argmax(dim=1)
        residuals.append((queries - bank[nearest]).unflatten(0, (len(level), *level.shape[2:])).permute(0, 3, 1, 2))
    return residuals


def naive_features(extractor: FeatureExtractor, x: Tensor) -> list[Tensor]:
    """The whole path in its published form, with the backbone, the weights and the references of ours."""
    if extractor.projector is None:
        raise TypeError(f"{extractor.name} has no projector, and so no published form.")
    banks = next(iter(extractor.references.values())).rows
    return naive_projection(extractor.projector, naive_residuals(extractor.backbone(x), banks))


# What is measured


def projector_forms(sizes: BenchSizes, batch: int) -> tuple[Form, Form]:
    """Ours and the naive form of a random projector of four levels, each with its input."""
    torch.manual_seed(0)
    projector = ResidualProjector([sizes.width] * 4, num_keys=sizes.keys).requires_grad_(False).eval()
    residuals = torch.randn(4, batch, sizes.width, sizes.grid, sizes.grid).unbind()
    return partial(projector, residuals), partial(naive_projection, projector, residuals)


def build_extractor(sizes: BenchSizes) -> FeatureExtractor:
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


def extractor_forms(sizes: BenchSizes, batch: int) -> tuple[Form, Form]:
    """Ours and the naive form of the whole extractor, each with its input."""
    extractor = build_extractor(sizes)
    x = torch.randn(batch, 3, *extractor.img_size)
    return partial(extractor, x), partial(naive_features, extractor, x)


def stage_rows(extractor: FeatureExtractor, sizes: BenchSizes) -> Iterator[Measurement]:
    """Milliseconds of each stage of ours from a photograph on disk to its anomaly map, batch 1."""
    transform, size, name = create_transform(extractor), extractor.img_size, extractor.name.partition(".")[0]
    bank = next(iter(extractor.references.values()))
    stages: dict[str, Callable[[Any], Any]] = {
        "decode and transform": lambda path: transform(read_image(path))[None],
        "backbone": extractor.backbone_features,
        "matching": bank.residuals,
    }
    if extractor.projector is not None:
        stages["projector"] = extractor.projector
    stages["map"] = lambda features: extractor.scorer.maps(features, [bank.scales], size, scoring.SIGMA)
    taken: dict[str, list[float]] = {stage: [] for stage in stages}
    with tempfile.TemporaryDirectory() as folder:
        photo = _photo(Path(folder) / "photo.jpg", sizes.photo)
        for _ in range(sizes.repeats + 1):
            value: Any = photo
            for stage, function in stages.items():
                seconds, value = timed(partial(function, value))
                taken[stage].append(seconds)
    # The first round warms up.
    what = f"{name}, {bank.num_images} references"
    rows = [Measurement.of_runs(f"{what}: {stage}", runs[1:], unit="ms") for stage, runs in taken.items()]
    yield from rows
    note = f"cpu; photo of {sizes.photo[0]} x {sizes.photo[1]}, input {size[1]} x {size[0]}"
    total = sum(row.ours for row in rows if row.ours is not None)
    yield Measurement(f"{what}: all stages", "ms", total, note=note)


def memory_rows(sizes: BenchSizes) -> Iterator[Measurement]:
    """Peak memory, each in a fresh process."""
    for name, forms in (("projector", projector_forms), ("extractor", extractor_forms)):
        ours, naive = (in_child(batch_peak, forms, sizes, index) for index in range(2))
        ratio = naive / ours if ours and naive else None
        what, note = f"peak of a process: {name}, batch {max(sizes.batches)}", "target: below naive"
        yield Measurement(what, "MB", ours, naive, ratio, NOT_MEASURED if ours is None else note)
    (queries, rows), beyond = sizes.bank, in_child(matching_peak, sizes)
    note = f"target: below 2,000; bank of {2e-6 * rows * sizes.width:,.0f} MB in float16"
    note += f"; naive, not run, needs {4e-6 * rows * (sizes.width + queries):,.0f}"
    what = f"beyond the bank: {queries} x {rows:,} rows of {sizes.width}"
    yield Measurement(what, "MB", beyond, note=NOT_MEASURED if beyond is None else note)


@torch.no_grad()
def batch_peak(forms: Callable[[BenchSizes, int], Sequence[Form]], sizes: BenchSizes, index: int) -> float | None:
    """Megabytes that this process took for the largest batch, by ours (0) or the naive form (1)."""
    forms(sizes, max(sizes.batches))[index]()
    return peak_megabytes()


def matching_peak(sizes: BenchSizes) -> float | None:
    """Megabytes beyond the bank that matching takes: rows in half precision, converted on the way, take the most."""
    queries, count = sizes.bank
    rows = torch.empty(count, sizes.width, dtype=torch.float16)
    for chunk in rows.split(1024):
        chunk.normal_()
    bank, features = _bank(rows), torch.randn(1, sizes.width, 1, queries)
    before = peak_megabytes()
    bank.match([features])
    after = peak_megabytes()
    return None if before is None or after is None else after - before


def _compare(what: str, ours: Form, naive: Form, sizes: BenchSizes, note: str) -> Measurement:
    """Time two functions after comparing what they return, which also warms up."""
    results = list(zip(ours(), naive(), strict=True))
    difference = max((a - b).abs().max().item() for a, b in results)
    largest = max(b.abs().max().item() for _, b in results)
    note += f"; largest difference {difference:.1e} in outputs up to {largest:.3g}"
    return compare(what, ours, naive, repeats=sizes.repeats, limit=sizes.seconds, unit="ms", note=note)


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
def measure_all(sizes: BenchSizes) -> Iterator[Measurement]:
    """Measure everything, row by row."""
    for batch in sizes.batches:
        what = f"projector, 4 levels of {sizes.width}, batch {batch}"
        yield _compare(what, *projector_forms(sizes, batch), sizes, "target 2.8")

    note = f"target 1.4; {sizes.references} references"
    yield _compare(f"{MODEL}, batch 1", *extractor_forms(sizes, 1), sizes, note)
    yield from stage_rows(build_extractor(sizes), sizes)
    default = create_model()
    for count in (sizes.references, sizes.many):
        images = torch.randn(count, 3, *default.img_size)
        seconds, _ = timed(partial(default.set_references, images))
        yield Measurement(f"residual_lite: setting {count} references", "ms", 1000 * seconds, note="decoded images")
        yield from stage_rows(default, sizes)

    queries, rows = sizes.matching
    bank, features = _bank(torch.randn(rows, sizes.width)), [torch.randn(1, sizes.width, 1, queries)]
    what = f"matching {queries:,} x {rows:,} rows of {sizes.width}"
    naive = partial(naive_residuals, features, bank.rows)
    yield _compare(what, partial(bank.residuals, features), naive, sizes, "chunks against whole matrix")
    yield from memory_rows(sizes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements of the command line."""
    about = "Speed and memory against the published form."
    parser = argparse.ArgumentParser(prog="python -m adfeatures.bench", description=about)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help=f"fewer repeats and a bank of {QUICK.bank[1]:,} rows")
    steady = "threads of torch in this process; 1 gives steadier ratios on a busy machine"
    parser.add_argument("--threads", type=int, help=steady)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes, kind = (QUICK, "quick") if options.quick else (FULL, "full")
    if options.json:
        rows = [asdict(row) for row in measure_all(sizes)]
        print(dumps({**machine(), "run": kind, "sizes": asdict(sizes), "rows": rows}, indent=1))
        return 0
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    pairs = f"medians of {sizes.repeats} alternating pairs, fewer after {sizes.seconds:g} s"
    print(f"{kind} run: {pairs}; bank of {sizes.bank[1]:,} rows")
    print(HEADER)
    for row in measure_all(sizes):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
