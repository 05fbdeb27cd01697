"""Speed and memory against the published form of the method: ``python -m adfeatures.bench``, a table in Markdown.

All forms share their weights. They run alternately in one process, each once before to warm up: judge by the ratios.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import catalog, scoring
from .backbones import create_backbone
from .documents import dumps
from .errors import InputError
from .extractor import FeatureExtractor
from .factory import create_model, create_transform
from .fitting import ROTATIONS
from .images import read_image
from .inspection import inspect
from .measuring import HEADER, NOT_MEASURED, RULE, Measurement, compare, in_child, machine, peak_megabytes, timed
from .projector import ResidualProjector
from .published import naive_projection, naive_residuals, naive_scores
from .references import ReferenceBank
from .runtime import in_runtime

Form: TypeAlias = Callable[[], Sequence[Tensor]]

BACKBONE, MODEL = "dinov2_base", "adpretrain_dinov2_base"
NAIVE, EAGER, COMPILED = "naive", "torch", "torch.compile"
RUNTIMES = ("onnx", "openvino")
# Photographs whose stages are timed, as a multiple of ``BenchSizes.repeats``.
STREAM = 5
START = "import adfeatures; adfeatures.create_model()"


@dataclass(frozen=True)
class BenchSizes:
    """How much is measured, and where; the defaults are those of the full run on a CPU."""

    repeats: int = 11  # pairs of runs that a median is taken of
    seconds: float = 60  # after which a comparison does not start another pair
    width: int = 768  # channels of the projector's four levels and of the backbone
    depth: int = 12  # blocks of the backbone
    keys: int = 2048  # learnable references per level of the projector
    grid: int = 16  # height and width of the patch grids
    batches: tuple[int, ...] = (1, 8)  # the largest also for memory
    references: int = 8  # images
    many: int = 64  # references of the embedded default, beside as many as the others have
    matching: tuple[int, int] = (1600, 12_800)  # queries and rows whose matching is timed
    bank: tuple[int, int] = (256, 2_048_000)  # queries and rows whose memory is measured
    photo: tuple[int, int] = (1600, 1200)  # width and height in pixels
    device: str = "cpu"
    dtype: str = "float32"  # that ours computes in


FULL, QUICK = BenchSizes(), BenchSizes(repeats=3, seconds=8, bank=(256, 204_800))
GPU_BATCHES = (1, 8, 32)


def projector_form(sizes: BenchSizes, batch: int, kind: str) -> Form:
    """A random projector of four levels in one of its forms, with its input."""
    torch.manual_seed(0)
    projector = ResidualProjector([sizes.width] * 4, num_keys=sizes.keys).requires_grad_(False).eval()
    residuals = torch.randn(4, batch, sizes.width, sizes.grid, sizes.grid).to(sizes.device).unbind()
    projector.to(sizes.device)
    if kind == NAIVE:
        return partial(naive_projection, projector, residuals)
    dtype = getattr(torch, sizes.dtype)
    ours, inputs = projector.to(dtype), [level.to(dtype) for level in residuals]
    return partial(_compiled(ours, sizes.device) if kind == COMPILED else ours, inputs)


def build_extractor(sizes: BenchSizes) -> FeatureExtractor:
    """A random extractor with references: with the default sizes, that of the catalog."""
    torch.manual_seed(0)
    entry = catalog.BACKBONES[BACKBONE]
    side = sizes.grid * entry.patch_size
    backbone = create_backbone(BACKBONE, img_size=side, embed_dim=sizes.width, depth=sizes.depth)
    config = {"mean": entry.normalization[0], "std": entry.normalization[1]}
    projector = ResidualProjector(backbone.channels, num_keys=sizes.keys)
    extractor = FeatureExtractor(backbone, projector, name=MODEL, img_size=(side, side), pretrained_cfg=config)
    extractor.set_references(_images(sizes.references, extractor))
    return extractor


def build_default(sizes: BenchSizes) -> FeatureExtractor:
    """The embedded default with references."""
    torch.manual_seed(0)
    extractor = create_model()
    extractor.set_references(_images(sizes.references, extractor))
    return extractor


def extractor_form(
    sizes: BenchSizes, batch: int, kind: str, build: Callable[[BenchSizes], FeatureExtractor] = build_extractor
) -> Form:
    """A whole extractor in one of its forms or in a runtime: from its input to maps and scores.

    Raises:
        InputError: For a runtime that is not installed or does not compute in the dtype.
    """
    extractor = build(sizes)
    x = _images(batch, extractor).to(sizes.device)
    if kind in RUNTIMES:
        return partial(in_runtime(extractor, kind, None, sizes.dtype).anomaly_map, x)
    extractor.to(sizes.device)
    if kind == NAIVE:
        return partial(naive_scores, extractor, x)
    extractor.to(getattr(torch, sizes.dtype))
    function = extractor.anomaly_map
    return partial(_compiled(function, sizes.device) if kind == COMPILED else function, x)


def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Compiled for one shape, on a GPU into CUDA graphs."""
    torch.compiler.reset()
    return torch.compile(
        function, fullgraph=True, dynamic=False, mode="default" if device == "cpu" else "reduce-overhead"
    )


def _images(count: int, extractor: FeatureExtractor) -> Tensor:
    # Noise within the range of transformed photos.
    return torch.randn(count, 3, *extractor.img_size).clamp(-1, 1)


def projector_rows(sizes: BenchSizes) -> Iterator[Measurement]:
    """The projector against its published form."""
    for batch in sizes.batches:
        what = f"projector, 4 levels of {sizes.width}, batch {batch}"
        ours, naive = (projector_form(sizes, batch, kind) for kind in (EAGER, NAIVE))
        yield _compare(what, ours, naive, sizes, f"target {5 if batch > 1 else 3.5}")


def extractor_rows(sizes: BenchSizes) -> Iterator[Measurement]:
    """From transformed images to maps: torch, compiled, and on a CPU the exported file, against the published form."""
    target = 2.0 if sizes.dtype == "float32" else 2.5
    on_cpu = sizes.device == "cpu"
    for batch in (1,) if on_cpu else sizes.batches:
        naive = extractor_form(sizes, batch, NAIVE)
        for kind in (EAGER, COMPILED, *(RUNTIMES if on_cpu else ())):
            note = f"target {target} by the fastest; {sizes.references} references"
            yield _attempt(f"{MODEL}, batch {batch}, {kind}", sizes, batch, kind, build_extractor, naive, note)


def default_rows(sizes: BenchSizes) -> Iterator[Measurement]:
    """The embedded default, which has no published form: compiled, and as the exported file, against torch."""
    eager = extractor_form(replace(sizes, dtype="float32"), 1, EAGER, build_default)
    for kind in (COMPILED, *RUNTIMES):
        what = f"{catalog.DEFAULT_MODEL.partition('.')[0]}, batch 1, {kind}"
        note = "against torch as it is" + ("; target 1.6" if kind == "onnx" else "")
        yield _attempt(what, sizes, 1, kind, build_default, eager, note)


def _attempt(
    what: str,
    sizes: BenchSizes,
    batch: int,
    kind: str,
    build: Callable[[BenchSizes], FeatureExtractor],
    naive: Form,
    note: str,
) -> Measurement:
    """Compare a form, where this machine can run it."""
    try:
        ours = extractor_form(sizes, batch, kind, build)
        ours()
    except (InputError, torch._dynamo.exc.TorchDynamoException) as error:  # as without a compiler
        reason = " ".join(str(error).strip().partition("\n\n")[0].split())
        return Measurement(what, "ms", None, note=f"not measured: {reason}")
    row = _compare(what, ours, naive, sizes, note)
    return replace(row, note=f"{row.note}; {1000 * batch / (row.ours or 1):.1f} images a second")


def stage_rows(extractor: FeatureExtractor, sizes: BenchSizes) -> Iterator[Measurement]:
    """Milliseconds of each stage of ours from a photograph on disk to its score, photograph after photograph."""
    extractor.to(sizes.device, getattr(torch, sizes.dtype))
    transform, size, name = create_transform(extractor), extractor.img_size, extractor.name.partition(".")[0]
    bank = next(iter(extractor.references.values()))
    stages: dict[str, Callable[[Any], Any]] = {
        "decode": read_image,
        "transform": lambda image: extractor.as_input(transform(image)[None]),
        "backbone": extractor.patches,
        "match": partial(extractor.scorer.compare, bank),
    }
    if extractor.projector is not None:
        stages["project"] = extractor.projector
    stages["score"] = lambda features: scoring.anomaly_maps(extractor.scorer, features, [bank.scales], size).amax()
    taken: dict[str, list[float]] = {stage: [] for stage in stages}
    with tempfile.TemporaryDirectory() as folder:
        photo = _photo(Path(folder) / "photo.jpg", sizes.photo)
        for _ in range(STREAM * sizes.repeats + 1):
            value: Any = photo
            for stage, function in stages.items():
                seconds, value = timed(partial(function, value), rested=False)
                taken[stage].append(seconds)
    # The first round warms up.
    runs = {stage: seconds[1:] for stage, seconds in taken.items()}
    runs["all stages"] = [sum(stages_of_run) for stages_of_run in zip(*runs.values(), strict=True)]
    pairs = zip(runs["all stages"], runs["decode"], strict=True)
    runs["decoded image to map"] = [whole - decode for whole, decode in pairs]
    what, note = f"{name}, {bank.num_images} references", f"photo of {sizes.photo[0]} x {sizes.photo[1]}"
    for stage, seconds_of_runs in runs.items():
        yield Measurement.of_runs(f"{what}: {stage}", seconds_of_runs, unit="ms", note=note)


def folder_row(extractor: FeatureExtractor, sizes: BenchSizes) -> Measurement:
    """Milliseconds for each photograph of a folder, from files to results with their pictures."""
    count = STREAM * sizes.repeats
    with tempfile.TemporaryDirectory() as folder:
        photo = _photo(Path(folder) / "0.jpg", sizes.photo)
        files = [str(photo), *(str(shutil.copy(photo, photo.with_stem(str(number)))) for number in range(1, count))]
        seconds, _ = timed(partial(inspect, extractor, files, Path(folder) / "results"))
    what = f"{extractor.name.partition('.')[0]}, {extractor.bank().num_images} references: a photo of a folder"
    note = f"{count} photos of {sizes.photo[0]} x {sizes.photo[1]}, with their pictures"
    return Measurement(what, "ms", 1000 * seconds / count, note=note)


def matching_row(sizes: BenchSizes) -> Measurement:
    """Matching against its published form."""
    queries, rows = sizes.matching
    bank, features = _bank(torch.randn(rows, sizes.width)), [torch.randn(1, sizes.width, 1, queries).to(sizes.device)]
    bank.apply(lambda tensor: tensor.to(sizes.device))
    what = f"matching {queries:,} x {rows:,} rows of {sizes.width}"
    naive = partial(naive_residuals, features, bank.rows)
    return _compare(what, partial(bank.residuals, features), naive, sizes, "chunks against whole matrix")


def start_row(sizes: BenchSizes) -> Measurement:
    """Seconds from the start of Python to the embedded default."""
    command = [sys.executable, "-c", START]
    runs = [timed(partial(subprocess.run, command, check=True))[0] for _ in range(min(sizes.repeats, 5) + 1)]
    return Measurement.of_runs(f"start of Python, {START}", runs[1:], note="target below 2.5")


def memory_rows(sizes: BenchSizes) -> Iterator[Measurement]:
    """Peak memory, each in a fresh process."""
    batch = max(sizes.batches)
    for name, form in (("projector", projector_form), ("extractor", extractor_form)):
        naive = in_child(batch_peak, form, sizes, batch, NAIVE)
        for kind in (EAGER,) if sizes.device == "cpu" else (EAGER, COMPILED):
            ours = in_child(batch_peak, form, sizes, batch, kind)
            what = f"peak of a process: {name}, batch {batch}, {kind}"
            note = NOT_MEASURED if ours is None else "target: below naive"
            yield Measurement(what, "MB", ours, naive, naive / ours if ours and naive else None, note)
    if sizes.device != "cpu":
        return
    queries, rows = sizes.bank
    beyond = in_child(matching_peak, sizes)
    note = f"target: below 2,000; bank of {2e-6 * rows * sizes.width:,.0f} MB in float16"
    note += f"; naive, not run, needs {4e-6 * rows * (sizes.width + queries):,.0f}"
    what = f"beyond the bank: {queries} x {rows:,} rows of {sizes.width}"
    yield Measurement(what, "MB", beyond, note=NOT_MEASURED if beyond is None else note)


@torch.no_grad()
def batch_peak(form: Callable[[BenchSizes, int, str], Form], sizes: BenchSizes, batch: int, kind: str) -> float | None:
    """Megabytes that this process took on its device for a batch in one of the forms."""
    run = form(sizes, batch, kind)
    for _ in range(2 if kind == COMPILED else 1):
        run()
    return peak_megabytes() if sizes.device == "cpu" else torch.cuda.max_memory_reserved() / 1e6


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
    results = [(a.float(), b) for a, b in zip(ours(), naive(), strict=True)]
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
    yield from projector_rows(sizes)
    yield from extractor_rows(sizes)
    if sizes.device == "cpu":
        yield from default_rows(sizes)
    yield from stage_rows(build_extractor(sizes), sizes)
    default = create_model()
    for count in (sizes.references, sizes.many):
        images = _images(count, default)
        for rotations, how in ((ROTATIONS, ", rotated"), (None, "")):
            seconds, _ = timed(partial(default.set_references, images, rotations=rotations))
            what = f"residual_lite: setting {count} references{how}"
            yield Measurement(what, "ms", 1000 * seconds, note="decoded images")
        yield from stage_rows(default, sizes)
        yield folder_row(default, sizes)
    yield matching_row(sizes)
    yield start_row(sizes)
    yield from memory_rows(sizes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements of the command line."""
    about = "Speed and memory against the published form."
    parser = argparse.ArgumentParser(prog="python -m adfeatures.bench", description=about)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help=f"fewer repeats and a bank of {QUICK.bank[1]:,} rows")
    steady = "threads of torch in this process; 1 gives steadier ratios on a busy machine"
    parser.add_argument("--threads", type=int, help=steady)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (%(default)s)")
    dtypes = "what ours computes in; the published form stays in float32 (%(default)s)"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtypes)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device on this machine. Leave out --device.")
    # The references are noise, unlike the photographs.
    warnings.filterwarnings("ignore", category=UserWarning)
    if options.threads:
        torch.set_num_threads(options.threads)
    sizes, kind = (QUICK, "quick") if options.quick else (FULL, "full")
    batches = sizes.batches if options.device == "cpu" else GPU_BATCHES
    sizes = replace(sizes, device=options.device, dtype=options.dtype, batches=batches)
    facts = machine(sizes.device)
    if options.json:
        rows = [asdict(row) for row in measure_all(sizes)]
        print(dumps({**facts, "run": kind, "sizes": asdict(sizes), "rows": rows}, indent=1))
        return 0
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if sizes.dtype == "bfloat16" and facts["bfloat16"] == "no":
        print("This device has no instructions for bfloat16: it is computed in others, and no faster for it.")
    pairs = f"medians of {sizes.repeats} alternating pairs after a warm-up, fewer after {sizes.seconds:g} s"
    print(f"{kind} run in {sizes.dtype}: {pairs}; bank of {sizes.bank[1]:,} rows")
    print(f"\n{HEADER}\n{RULE}")
    for row in measure_all(sizes):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
