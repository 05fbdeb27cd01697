"""Scoring many image files into one output folder: rows, overlays, a sheet of the worst, a summary."""

from __future__ import annotations

import contextlib
import csv
import heapq
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from .checkpoints import atomic_path
from .documents import dumps
from .errors import AdfeaturesError, ImageError, InputError
from .extractor import FeatureExtractor
from .image_files import open_image
from .locks import only_run_in
from .overlays import contact_sheet, overlay, save_picture, tile
from .predictor import BATCH_SIZE, Detector, Prediction, ensure_threshold, score_photos, warn_of_drift
from .scoring import color_scale
from .sources import OF_FILE_SYSTEMS, STAGING, holds_results, is_drawn, list_images

FILES = ("summary.json", "scores.csv", "scores.jsonl", "worst.png", "demo.png")
# By this mark an overlay is known to be one.
SOFTWARE = "adfeatures score"
WORST, TILE_WIDTH = 12, 480
# Longest side in pixels of a photo in its overlay, beside which the legend stands: large ones are drawn smaller.
OVERLAY_SIDE = 2048
# As many reasons of failures as the summary tells.
MOST_ERRORS = 20


@dataclass(frozen=True)
class ImageRow:
    """One line of scores.csv and scores.jsonl; names are themselves in the second, and in the first as by ``csv_cell``.

    ``decision`` is normal, anomalous or empty; ``error`` says why there is no score.
    """

    file: str
    score: float | None = None
    threshold: float | None = None
    decision: str = ""
    error: str = ""


@dataclass
class Inspection:
    """What came of a run: its rows, the counts and facts of summary.json, and the maps where they were asked for."""

    rows: list[ImageRow]
    summary: dict[str, Any]
    maps: list[np.ndarray] = field(default_factory=list)


def find_images(arguments: Sequence[str], recursive: bool) -> list[str]:
    """Expand folders among the arguments to the image files in them; files stay as given, whether they exist or not.

    A file that is named twice counts once, and what a former run has drawn is left out with a warning.

    Raises:
        ImageError: For a folder without images, or where nothing is left.
    """
    files: list[str] = []
    for argument in arguments:
        if os.path.isdir(argument):
            files += [str(path) for path in list_images(argument, recursive=recursive)]
        else:
            files.append(argument)
    once: dict[str, str] = {}
    for file in files:
        once.setdefault(os.path.abspath(file), file)
    kept = [file for path, file in once.items() if not is_drawn(Path(path))]
    if len(kept) < len(once):
        text = f"{len(once) - len(kept)} pictures were drawn by a former run and are left out."
        if not kept:
            raise ImageError(text)
        warnings.warn(text, stacklevel=2)
    return kept


def set_references(
    model: FeatureExtractor, folder: str, *, product_folders: bool, recursive: bool, **options: Any
) -> None:
    """Set the references of one product, or with ``product_folders`` of one product for each sub-folder.

    Sub-folders without images are passed over with a warning, hidden ones and those of file systems without one.
    Further options are those of ``FeatureExtractor.set_references``.
    """
    if not product_folders:
        model.set_references(list_images(folder, recursive=recursive), **options)
        return
    folders = sorted(
        path
        for path in Path(folder).glob("*")
        if path.is_dir() and not path.name.startswith(".") and path.name not in OF_FILE_SYSTEMS
    )
    if not folders:
        raise InputError(
            f"{folder} has no sub-folders to take as products. Leave out --product-folders if its images are all of "
            "one product."
        )
    for path in folders:
        try:
            images = list_images(path, recursive=recursive)
        except ImageError as error:
            warnings.warn(f"{path} is no product: {error}", stacklevel=2)
        else:
            model.set_references(images, product=path.name, **options)


def inspect(
    model: Detector,
    files: Sequence[str],
    output: str | os.PathLike[str],
    *,
    product: str | None = None,
    threshold: float | None = None,
    batch_size: int = BATCH_SIZE,
    keep_maps: bool = False,
) -> Inspection:
    """Score image files and write scores.csv, scores.jsonl, overlays/, worst.png and summary.json.

    A file that cannot be read gets a row with the error. Rows and overlays are written as they come, so that an
    interrupted run keeps them; only where a former result lies in the folder, that one stays until the new one is
    complete, and its files are replaced, no others.

    Args:
        model: Extractor with references, or an exported file in a runtime.
        files: Image files, in the order of the rows.
        output: Folder, made if need be.
        product: Whose references to use, where several products are held.
        threshold: Decides instead of the threshold of the references.
        batch_size: Images per forward pass.
        keep_maps: Whether to keep the maps too, each of the size of its overlay.

    Raises:
        ReferencesError: If no references are set.
        InputError: If an image lies where the results go, a file there is none of a former result, or the threshold is
            no score.
        AdfeaturesError: If the output cannot be written.
    """
    started = time.perf_counter()
    if threshold is not None and not 0 <= threshold < math.inf:
        raise InputError(f"The threshold is {threshold}; it must be a score, 0 or more.")
    if threshold is None:
        ensure_threshold(model, product)
    limit = model.threshold(product) if threshold is None else threshold
    scale = color_scale(limit, model.top)
    pictures = _picture_names(files)
    found, references, worst = Inspection([], {}), [], Worst()
    with _writing_to(Path(output), files, pictures.values()) as folder:
        with _table(folder / "scores.csv") as table, _table(folder / "scores.jsonl") as lines:
            csv.writer(table).writerow([column.name for column in fields(ImageRow)])
            results = score_photos(model, files, [product] * len(files), batch_size, OVERLAY_SIDE)
            for file, (result, picture) in tqdm(
                zip(files, results, strict=True), total=len(files), unit="image", disable=None
            ):
                row = _row(file, result, limit)
                _append(row, table, lines)
                found.rows.append(row)
                if isinstance(result, Prediction) and picture is not None:
                    drawn = _overlay(row, picture, result.map, scale)
                    save_picture(drawn, folder / pictures[file], durable=False, pnginfo=_mark())
                    worst.add(result.score, drawn)
                    references += [file] if result.is_reference else []
                    found.maps += [result.map] if keep_maps else []
        warn_of_drift(model.bank(product), [row.score for row in found.rows if row.score is not None])
        found.summary = _summary(model, found.rows, limit, scale, time.perf_counter() - started)
        found.summary["scored_references"] = references
        worst.save(folder / "worst.png")
        write_summary(folder, found.summary)
    return found


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, atomically."""
    with atomic_path(folder / "summary.json") as temporary:
        Path(temporary).write_text(dumps(summary, indent=2) + "\n", encoding="utf-8")


class Worst:
    """The overlays of the highest scores, as tiles of a sheet."""

    def __init__(self) -> None:
        self._tiles: list[tuple[float, int, Image.Image]] = []
        self._count = 0

    def add(self, score: float, picture: Image.Image) -> None:
        """Keep the overlay if its score is among the highest; of equal ones the first stays."""
        self._count += 1
        if len(self._tiles) < WORST or score > self._tiles[0][0]:
            push = heapq.heappush if len(self._tiles) < WORST else heapq.heapreplace
            push(self._tiles, (score, -self._count, tile(picture, TILE_WIDTH)))

    def save(self, path: Path) -> None:
        """Draw the sheet, the highest score first."""
        if self._tiles:
            sheet = contact_sheet([tile for *_, tile in sorted(self._tiles)[::-1]], columns=4, tile_width=TILE_WIDTH)
            save_picture(sheet, path)


def _table(path: Path) -> TextIO:
    r"""A new text file. Names that are no UTF-8 are escaped as \udc.., which in JSON stands for the name itself."""
    return open(path, "w", newline="", encoding="utf-8", errors="backslashreplace")


def csv_cell(value: Any) -> Any:
    """What a table shows of a value: texts that a spreadsheet would take for a formula follow an apostrophe.

    So do texts that look like such ones, so that the text itself is what follows the first apostrophe.
    """
    return f"'{value}" if isinstance(value, str) and re.match("'*[=+@\\t\\r\\n-]", value) else value


def _row(file: str, result: Prediction | ImageError, threshold: float | None) -> ImageRow:
    if isinstance(result, ImageError):
        return ImageRow(file, error=str(result))
    decision = "" if threshold is None else "anomalous" if result.score > threshold else "normal"
    return ImageRow(file, result.score, threshold, decision)


def _append(row: ImageRow, table: TextIO, lines: TextIO) -> None:
    csv.writer(table).writerow(["" if value is None else csv_cell(value) for value in astuple(row)])
    lines.write(dumps(asdict(row), ensure_ascii=False) + "\n")
    table.flush()
    lines.flush()


def _overlay(row: ImageRow, picture: Image.Image, map: np.ndarray, scale: tuple[float, float]) -> Image.Image:
    caption = f"{Path(row.file).name}   score {row.score:.3g}   {row.decision}".rstrip()
    return overlay(picture, map, scale=scale, threshold=row.threshold, caption=caption)


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


def _summary(
    model: Detector,
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
        "errors": [row.error for row in rows if row.error][:MOST_ERRORS],
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
def _writing_to(output: Path, files: Sequence[str], pictures: Iterable[Path]) -> Iterator[Path]:
    """The folder to write to: the output itself, or beside a former result one that takes its place when all is done.

    A killed run that was putting its result in place is completed first.

    Raises:
        InputError: If an image lies where the results go, or a file there is none of a former result.
        AdfeaturesError: If it cannot be written, or another run writes to it.
    """
    new = output / STAGING
    try:
        with only_run_in(output, "overlays", STAGING):
            try:
                if (new / "summary.json").exists():
                    _replace(new, output)
                shutil.rmtree(new, ignore_errors=True)
                former = _former_result(output)
                _refuse_conflicts(output, files, pictures, former)
                folder = new if former else output
                (folder / "overlays").mkdir(parents=True, exist_ok=True)
                yield folder
                if former:
                    _replace(new, output)
            finally:
                if not (new / "summary.json").exists():  # A complete one is put in place by the next run.
                    shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        if isinstance(error, AdfeaturesError):
            raise
        raise AdfeaturesError(
            f"Cannot write the results to {output}: {error}. Free it, or close what uses it, and run again."
        ) from error


def _former_result(output: Path) -> list[Path]:
    """The files of a former run, relative to the output folder."""
    if not holds_results(output):
        return []
    drawn = [path.relative_to(output) for path in (output / "overlays").rglob("*.png") if _is_marked(path)]
    return [*(Path(name) for name in FILES if (output / name).is_file()), *drawn]


def _mark() -> PngInfo:
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    return mark


def _is_marked(path: Path) -> bool:
    try:
        with open_image(path) as picture:
            return picture.info.get("Software") == SOFTWARE
    except ImageError:
        return False


def _refuse_conflicts(output: Path, files: Sequence[str], pictures: Iterable[Path], former: Sequence[Path]) -> None:
    ours = {os.path.realpath(output / name) for name in (*FILES, "overlays")}
    for file in files:
        path = os.path.realpath(file)
        if path in ours or any(str(parent) in ours for parent in Path(path).parents):
            raise InputError(f"{file} lies where the results of this run go. Choose another --output than {output}.")
    for name in {*map(Path, FILES), *pictures} - set(former):
        if os.path.lexists(output / name):
            raise InputError(f"{output / name} is there and was not written by a former run. Choose another --output.")


def _replace(new: Path, output: Path) -> None:
    """Put a new result in the place of the former one, or what a killed run has left of it there.

    The summary goes first and comes last: it tells of all. The second table goes before the first one is replaced, so
    that there are never two of different rows.
    """
    former, fresh = _former_result(output), [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    _refuse_conflicts(output, [], fresh, former)
    (output / "summary.json").unlink(missing_ok=True)
    if (new / "scores.csv").exists():  # Else this has been done.
        for path in {*former} - {*fresh} | {Path("scores.jsonl")}:
            (output / path).unlink(missing_ok=True)
    order = {"scores.csv": 0, "scores.jsonl": 1, "summary.json": 3}
    for path in sorted(fresh, key=lambda path: order.get(str(path), 2)):
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / path, output / path)
    for folder, _, _ in os.walk(output / "overlays", topdown=False):
        with contextlib.suppress(OSError):  # It is not empty.
            os.rmdir(folder)
