"""Scoring many image files into one output folder: rows, overlays, a sheet of the worst, a summary."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from heapq import nlargest
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from tqdm.auto import tqdm

from .checkpoints import atomic_path
from .errors import AdfeaturesError, ImageError, InputError
from .extractor import FeatureExtractor
from .images import list_images, read_image
from .overlays import contact_sheet, overlay
from .predictor import BATCH_SIZE, Prediction, ensure_threshold

WORST = 12


@dataclass(frozen=True)
class ImageRow:
    """One line of scores.csv and scores.jsonl.

    ``decision`` is normal, anomalous or empty; ``error`` says why there is no score.
    """

    file: str
    score: float | None = None
    threshold: float | None = None
    decision: str = ""
    error: str = ""


@dataclass
class Inspection:
    """What came of a run: its rows, and the counts and facts of summary.json."""

    rows: list[ImageRow]
    summary: dict[str, Any]


def find_images(arguments: Sequence[str], recursive: bool) -> list[str]:
    """Expand folders among the arguments to the image files in them; files stay as given, whether they exist or not."""
    files: list[str] = []
    for argument in arguments:
        files += (
            [str(path) for path in list_images(argument, recursive=recursive)]
            if Path(argument).is_dir()
            else [argument]
        )
    return files


def set_references(
    model: FeatureExtractor, folder: str, *, product_folders: bool, recursive: bool, coreset: float | None = None
) -> None:
    """Set the references of one product, or with ``product_folders`` of one product for each sub-folder."""
    if not product_folders:
        model.set_references(list_images(folder, recursive=recursive), coreset=coreset)
        return
    folders = (
        sorted(path for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith("."))
        if Path(folder).is_dir()
        else []
    )
    if not folders:
        raise InputError(
            f"{folder} has no sub-folders to take as products. Leave out --product-folders if its images are all of "
            "one product."
        )
    for path in folders:
        model.set_references(list_images(path, recursive=recursive), product=path.name, coreset=coreset)


def inspect(
    model: FeatureExtractor,
    files: Sequence[str],
    output: str | os.PathLike[str],
    *,
    product: str | None = None,
    threshold: float | None = None,
    batch_size: int = BATCH_SIZE,
) -> Inspection:
    """Score image files and write scores.csv, scores.jsonl, overlays/, worst.png and summary.json.

    A file that cannot be read gets a row with the error. Rows and overlays are written as they come, so that an
    interrupted run keeps them.

    Args:
        model: Extractor with references.
        files: Image files, in the order of the rows.
        output: Folder, made if need be.
        product: Whose references to use, where several products are held.
        threshold: Decides instead of the threshold of the references.
        batch_size: Images per forward pass.

    Raises:
        ReferencesError: If no references are set.
        AdfeaturesError: If the output cannot be written.
    """
    folder, started = Path(output), time.perf_counter()
    if threshold is None:
        ensure_threshold(model, product)
    limit = model.threshold(product) if threshold is None else threshold
    scale = (0.0, 2 * limit if limit else model.scorer.top)
    bit_depth = model.bank(product).record.bit_depth
    pictures = _picture_names(files)
    rows: list[ImageRow] = []
    references: list[str] = []
    with _writing_to(folder):
        (folder / "overlays").mkdir(parents=True, exist_ok=True)
        with (
            open(folder / "scores.csv", "w", newline="", encoding="utf-8") as table,
            open(folder / "scores.jsonl", "w", encoding="utf-8") as lines,
        ):
            csv.writer(table).writerow([field.name for field in fields(ImageRow)])
            for file, result in tqdm(
                _predict(model, files, product, batch_size), total=len(files), unit="image", disable=None
            ):
                row = _row(file, result, limit)
                _append(row, table, lines)
                rows.append(row)
                if isinstance(result, Prediction):
                    picture = _overlay(row, result, bit_depth, scale)
                    (folder / pictures[file]).parent.mkdir(parents=True, exist_ok=True)
                    picture.save(folder / pictures[file])
                    references += [file] if result.is_reference else []
        summary = _summary(model, rows, limit, scale, time.perf_counter() - started)
        summary["scored_references"] = references
        _write_worst(folder, rows, pictures)
        with atomic_path(folder / "summary.json") as temporary:
            Path(temporary).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return Inspection(rows, summary)


def _predict(
    model: FeatureExtractor, files: Sequence[str], product: str | None, batch_size: int
) -> Iterator[tuple[str, Prediction | ImageError]]:
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        try:
            yield from zip(batch, model.score(batch, product, batch_size=batch_size), strict=True)
        except ImageError as error:
            if len(batch) == 1:
                yield batch[0], error
            else:
                yield from _predict(model, batch, product, 1)


def _row(file: str, result: Prediction | ImageError, threshold: float | None) -> ImageRow:
    if isinstance(result, ImageError):
        return ImageRow(file, error=str(result))
    decision = "" if threshold is None else "anomalous" if result.score > threshold else "normal"
    return ImageRow(file, result.score, threshold, decision)


def _append(row: ImageRow, table: TextIO, lines: TextIO) -> None:
    csv.writer(table).writerow(["" if value is None else value for value in astuple(row)])
    lines.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
    table.flush()
    lines.flush()


def _overlay(row: ImageRow, prediction: Prediction, bit_depth: int, scale: tuple[float, float]) -> Image.Image:
    caption = f"{Path(row.file).name}   score {row.score:.3g}   {row.decision}".rstrip()
    image = read_image(row.file, bit_depth=bit_depth)
    return overlay(image, prediction.map, scale=scale, threshold=row.threshold, caption=caption)


def _picture_names(files: Sequence[str]) -> dict[str, Path]:
    """An overlay file for every image: its path below the folder that all images share."""
    absolute = {file: Path(os.path.abspath(file)) for file in files}
    parents = {path.parent for path in absolute.values()}
    # Windows drives share no folder; then the names alone must do.
    common = os.path.commonpath(parents) if len({path.drive for path in parents}) == 1 else None
    names: dict[str, Path] = {}
    taken: set[Path] = set()
    for file, path in absolute.items():
        name = Path("overlays") / (path.relative_to(common) if common else path.name)
        picture = name.with_suffix(".png")
        number = 2
        while picture in taken:
            picture, number = name.with_name(f"{name.name}-{number}.png"), number + 1
        taken.add(picture)
        names[file] = picture
    return names


def _write_worst(folder: Path, rows: Sequence[ImageRow], pictures: dict[str, Path]) -> None:
    worst = nlargest(WORST, (row for row in rows if row.score is not None), key=lambda row: row.score or 0.0)
    if worst:
        sheet = contact_sheet([read_image(folder / pictures[row.file]) for row in worst], columns=4, tile_width=480)
        with atomic_path(folder / "worst.png") as temporary:
            sheet.save(temporary)


def _summary(
    model: FeatureExtractor,
    rows: Sequence[ImageRow],
    threshold: float | None,
    scale: tuple[float, float],
    seconds: float,
) -> dict[str, Any]:
    scored = [row for row in rows if row.score is not None]
    return {
        "model": model.name,
        "images": len(rows),
        "scored": len(scored),
        "failed": len(rows) - len(scored),
        "anomalous": sum(row.decision == "anomalous" for row in rows),
        "normal": sum(row.decision == "normal" for row in rows),
        "threshold": threshold,
        "color_scale": scale,
        "references": {
            product: {
                "images": bank.num_images,
                "quantile": bank.quantile,
                "normal_scores": len(bank.record.normal_scores),
                "files": bank.files,
            }
            for product, bank in model.references.items()
        },
        "seconds_per_image": seconds / max(len(rows), 1),
    }


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, AdfeaturesError):
            raise
        raise AdfeaturesError(
            f"Cannot write the results to {folder}: {error}. What was written before is kept."
        ) from error
