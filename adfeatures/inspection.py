"""Scoring many image files into one output folder: rows, overlays, a sheet of the worst, a summary."""

from __future__ import annotations

import hashlib
import heapq
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat, tee
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .documents import dumps, parse, read_document
from .errors import ImageError, InputError
from .geometry import Geometry
from .images import read_image
from .overlays import contact_sheet, encoded, overlay, save_picture, tile
from .predictor import BATCH_SIZE, Detector, Prediction, ensure_threshold, score_photos, warn_of_drift, whole_number
from .results import SUMMARY, ImageRow, Results, mark, write_parquet, write_summary, writing_to
from .scoring import color_scale
from .worklist import Worklist

WORST, TILE_WIDTH = 12, 480
# Longest side in pixels of a photo in its overlay, beside which the legend stands: large ones are drawn smaller.
OVERLAY_SIDE = 2048
# Faster than the default, for files that are slightly larger.
PNG_LEVEL = 4
# As many reasons of failures as the summary tells.
MOST_ERRORS = 20


@dataclass(frozen=True)
class Terms:
    """What every image of a run is scored by.

    Attributes:
        product: Whose references to use, where several products are held.
        threshold: Score above which an image counts as anomalous, None where nothing is decided.
        scale: Values of the map that the first and the last color stand for.
        batch_size: Images per forward pass.
        workers: Images that are read, and pictures that are drawn, at a time.
        keep_maps: Whether outcomes hold their map.
    """

    product: str | None
    threshold: float | None
    scale: tuple[float, float]
    batch_size: int
    workers: int
    keep_maps: bool


class Outcome(NamedTuple):
    """What came of an image: its row, its overlay as a PNG, and whether it is one of the references."""

    row: ImageRow
    picture: bytes | None = None
    is_reference: bool = False
    map: np.ndarray | None = None


# Scores files in their order, here or elsewhere.
Engine: TypeAlias = Callable[[Iterable[str], Terms], Generator[Outcome]]


@dataclass
class Inspection:
    """What came of a run: the counts and facts of summary.json, and the maps where they were asked for."""

    folder: Path
    summary: dict[str, Any]
    maps: list[np.ndarray] = field(default_factory=list)

    @property
    def rows(self) -> list[ImageRow]:
        """The rows of the tables."""
        return list(Results(self.folder).rows())


def inspect(
    model: Detector,
    files: Worklist | Iterable[str],
    output: str | os.PathLike[str],
    *,
    product: str | None = None,
    threshold: float | None = None,
    batch_size: int = BATCH_SIZE,
    workers: int = 1,
    keep_maps: bool = False,
    resume: bool = False,
    engine: Engine | None = None,
) -> Inspection:
    """Score image files and write scores.csv, scores.jsonl, overlays/, worst.png and summary.json.

    A file that cannot be read gets a row with the error. Rows and overlays are written as they come, so that an
    interrupted run keeps them; an earlier result in the folder stays until the new one is
    complete, and only its files are replaced. If pyarrow is installed, scores.parquet is written too.

    Args:
        model: Extractor with references, or an exported file in a runtime.
        files: Image files, in the order of the rows.
        output: Folder, made if need be.
        product: Whose references to use, where several products are held.
        threshold: Decides instead of the threshold of the references.
        batch_size: Images per forward pass.
        workers: Images that are read, and pictures that are drawn, at a time, while the model scores others.
        keep_maps: Whether to keep the maps too, each of the size of its overlay.
        resume: Whether to continue an interrupted run with the same options: finished rows are kept, and the result
            is that of one run. A run that fails also leaves its rows next to an earlier result.
        engine: What scores, where it is not this process alone.

    Raises:
        ReferencesError: If no references are set.
        InputError: If an image is where the results go, a file there is not from an earlier result, the threshold is
            not a score, workers or batch_size are not whole numbers of 1 or more, or the run to continue had other
            options or images.
        AdfeaturesError: If the output cannot be written.
    """
    started = time.perf_counter()
    workers, batch_size = whole_number("workers", workers), whole_number("batch_size", batch_size)
    if threshold is not None and not 0 <= threshold < math.inf:
        raise InputError(f"The threshold is {threshold}; it must be a score, 0 or more.")
    if threshold is None:
        ensure_threshold(model, product)
    limit = model.threshold(product) if threshold is None else threshold
    terms = Terms(product, limit, color_scale(limit, model.top), batch_size, workers, keep_maps)
    work = files if isinstance(files, Worklist) else Worklist(files)
    facts, maps = _facts(model, terms), []
    with writing_to(Path(output), work, facts, resume) as results:
        if results.is_complete:
            return Inspection(Path(output), read_document(results.folder / SUMMARY, dict[str, Any]))
        before, pending = results.finished, work.since(results.finished)
        wanted = (file for file, _ in work.since(results.finished))
        with closing((engine or partial(outcomes, model))(wanted, terms)) as found, results.tables() as append:
            progress = tqdm(found, total=len(work), initial=before, unit="image", disable=None)
            for (_, name), outcome in zip(pending, progress, strict=True):
                if outcome.picture is not None:
                    results.save(outcome.picture, name)
                append(outcome.row, outcome.is_reference)
                maps += [] if outcome.map is None else [outcome.map]
        warn_of_drift(model.bank(product), (row.score for row in results.rows() if row.score is not None))
        summary = facts | _counts(results, work)
        summary["seconds_per_image"] = (time.perf_counter() - started) / max(len(work) - before, 1)
        write_parquet(results)
        write_summary(results.folder, summary)
    return Inspection(Path(output), summary, maps)


def outcomes(model: Detector, files: Iterable[str], terms: Terms) -> Generator[Outcome]:
    """Score files in this process, reading ahead of the model and drawing behind it."""
    files, sources = tee(files)
    geometry = model.bank(terms.product).record.geometry
    # Photos that are cut into tiles are held until they are scored.
    count = terms.batch_size if geometry.tile is None else terms.workers
    # For a photo of twelve megapixels either takes longer than scoring.
    readers, drawers = (ThreadPoolExecutor(terms.workers) for _ in range(2))
    try:
        read = partial(_ahead, readers, count)
        found = score_photos(model, sources, repeat(terms.product), terms.batch_size, OVERLAY_SIDE, read)
        # What is interrupted draws these few at most before it ends.
        yield from _ahead(drawers, min(count, BATCH_SIZE), partial(_outcome, terms, geometry), files, found)
    finally:
        for pool in (readers, drawers):
            pool.shutdown(cancel_futures=True)


def _outcome(
    terms: Terms, geometry: Geometry, file: str, scored: tuple[Prediction | ImageError, Image.Image | None]
) -> Outcome:
    result, picture = scored
    if isinstance(result, ImageError) or picture is None:
        return Outcome(ImageRow(file, error=str(result)))
    limit = terms.threshold
    decision = "" if limit is None else "anomalous" if result.score > limit else "normal"
    caption = f"{Path(file).name}   score {result.score:.3g}   {decision}".rstrip()
    region = None if geometry.region is None else geometry.region.resized((picture.height, picture.width))
    drawn = overlay(picture, result.map, scale=terms.scale, threshold=limit, caption=caption, region=region)
    return Outcome(
        ImageRow(file, result.score, limit, decision),
        encoded(drawn, ".png", compress_level=PNG_LEVEL, pnginfo=mark()),
        result.is_reference,
        result.map if terms.keep_maps else None,
    )


def _ahead(pool: ThreadPoolExecutor, count: int, function: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
    """As ``map``, with this many calls under way ahead of the one whose result is awaited."""
    waiting: deque[Future[Any]] = deque()
    arguments, failure = zip(*items, strict=False), None
    while failure is None:
        try:
            waiting.append(pool.submit(function, *next(arguments)))
        except BaseException as error:  # The results of what came before are given first.
            failure = error
        while len(waiting) > (count if failure is None else 0):
            yield waiting.popleft().result()
    if not isinstance(failure, StopIteration):
        raise failure


def _facts(model: Detector, terms: Terms) -> dict[str, Any]:
    """What the rows of a run depend on, as JSON has it."""
    facts = {
        "model": model.name,
        "runtime": model.runtime,
        "product": terms.product,
        "batch_size": terms.batch_size,
        "max_pixels": model.max_pixels,
        "threshold": terms.threshold,
        "color_scale": terms.scale,
        "references": {
            product: {
                "images": bank.num_images,
                "quantile": bank.quantile,
                "normal_scores": len(bank.record.normal_scores),
                **({} if bank.record.geometry.is_plain else {"geometry": str(bank.record.geometry)}),
                "files": bank.files,
                "sha256": hashlib.sha256(dumps(bank.record.facts()).encode()).hexdigest(),
            }
            for product, bank in model.references.items()
        },
    }
    return dict(parse(dumps(facts), dict[str, Any]))


def _counts(results: Results, work: Worklist) -> dict[str, Any]:
    """What the rows come to, and the sheet of the worst."""
    decisions: Counter[str] = Counter()
    errors: list[str] = []
    references, numbers = [], set(results.references)
    worst: list[tuple[float, int]] = []
    for number, row in enumerate(results.rows()):
        if row.score is None:
            errors += [row.error] if len(errors) < MOST_ERRORS else []
            continue
        decisions[row.decision] += 1
        references += [row.file] if number in numbers else []
        # Of equal scores the first stays.
        heapq.heappush(worst, (row.score, -number))
        if len(worst) > WORST:
            heapq.heappop(worst)
    save_worst(results.folder, [next(work.since(-number))[1] for _, number in sorted(worst, reverse=True)])
    scored = decisions.total()
    return {
        "images": len(work),
        "scored": scored,
        "failed": len(work) - scored,
        "errors": errors,
        "anomalous": decisions["anomalous"],
        "normal": decisions["normal"],
        "scored_references": references,
    }


def save_worst(folder: Path, pictures: Iterable[Path]) -> None:
    """Draw worst.png, a sheet of overlays that lie in the folder."""
    tiles = [tile(read_image(folder / picture), TILE_WIDTH) for picture in pictures]
    if tiles:
        save_picture(contact_sheet(tiles, columns=4, tile_width=TILE_WIDTH), folder / "worst.png")
