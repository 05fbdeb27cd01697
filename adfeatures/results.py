"""The output folder of a run: tables, pictures and a summary, which replace an earlier result or continue it."""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, field, fields
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from PIL.PngImagePlugin import PngInfo

from .checkpoints import atomic_path
from .documents import DocumentError, dumps, parse, read_document
from .errors import AdfeaturesError, ImageError, InputError
from .image_files import open_image
from .locks import only_run_in
from .sources import STAGING, holds_results
from .worklist import Worklist

TABLE, LINES, SUMMARY = "scores.csv", "scores.jsonl", "summary.json"
FILES = (SUMMARY, TABLE, LINES, "scores.parquet", "worst.png", "demo.png")
# What a run that is not complete was begun with, and after that the numbers of its rows that are references.
BEGUN = ".adfeatures-begun.jsonl"
# By this mark an overlay is known to be one.
SOFTWARE = "adfeatures score"
# Rows of a piece of the Parquet file, which are held in memory together.
_ROWS = 2000


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
class Results:
    """What is written of a run.

    Attributes:
        folder: Where to.
        finished: Rows that are written, those of a former run that is continued among them.
        references: Numbers of the rows of images that are references.
    """

    folder: Path
    finished: int = 0
    references: list[int] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return not (self.folder / BEGUN).exists()

    @contextmanager
    def tables(self) -> Iterator[Callable[[ImageRow, bool], None]]:
        """What writes the next row to both tables, and remembers whether it is one of a reference."""
        with (
            _open(self.folder / TABLE) as table,
            _open(self.folder / LINES) as lines,
            _open(self.folder / BEGUN) as begun,
        ):

            def append(row: ImageRow, is_reference: bool) -> None:
                if is_reference:
                    self.references.append(self.finished)
                    begun.write(f"{self.finished}\n")
                    begun.flush()
                _append(row, table, lines)
                table.flush()
                lines.flush()
                self.finished += 1

            yield append

    def save(self, picture: bytes, name: Path) -> None:
        """Write an overlay."""
        with atomic_path(self.folder / name, durable=False) as temporary:
            temporary.write_bytes(picture)

    def rows(self) -> Generator[ImageRow]:
        """The rows that were written, without one that a kill has truncated."""
        with open(self.folder / LINES, "rb") as lines, suppress(DocumentError):
            yield from (parse(line, ImageRow) for line in lines)


def _append(row: ImageRow, table: IO[str], lines: IO[str]) -> None:
    csv.writer(table).writerow(["" if value is None else csv_cell(value) for value in astuple(row)])
    lines.write(dumps(asdict(row), ensure_ascii=False) + "\n")


def _open(path: Path, mode: str = "a") -> IO[str]:
    r"""A text file. Names that are no UTF-8 are escaped as \udc.., which in JSON stands for the name itself."""
    return open(path, mode, newline="", encoding="utf-8", errors="backslashreplace")


def csv_cell(value: Any) -> Any:
    """What a table shows of a value: texts that a spreadsheet would take for a formula follow an apostrophe.

    So do texts that look like such ones, so that the text itself is what follows the first apostrophe.
    """
    return f"'{value}" if isinstance(value, str) and re.match("'*[=+@\\t\\r\\n-]", value) else value


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json, atomically."""
    with atomic_path(folder / SUMMARY) as temporary:
        Path(temporary).write_text(dumps(summary, indent=2) + "\n", encoding="utf-8")


def write_parquet(results: Results) -> None:
    """Write scores.parquet where pyarrow is installed, in pieces that any number of rows leaves small."""
    if find_spec("pyarrow") is None:
        return
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    kinds = [arrow.string(), arrow.float64(), arrow.float64(), arrow.string(), arrow.string()]
    schema = arrow.schema([(column.name, kind) for column, kind in zip(fields(ImageRow), kinds, strict=True)])
    rows = ({name: _utf8(value) for name, value in asdict(row).items()} for row in results.rows())
    with atomic_path(results.folder / "scores.parquet") as path, parquet.ParquetWriter(path, schema) as writer:
        while piece := list(islice(rows, _ROWS)):
            writer.write_table(arrow.Table.from_pylist(piece, schema))


def _utf8(value: Any) -> Any:
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


@contextmanager
def writing_to(output: Path, work: Worklist, facts: Mapping[str, Any], resume: bool) -> Iterator[Results]:
    """The results of a run: in the output itself, or beside a former result whose place they take when all is done.

    A killed run that was putting its result in place is completed first.

    Args:
        output: The folder, made if need be.
        work: The images.
        facts: What the rows depend on.
        resume: Whether to continue the rows of a run that was not complete, and to leave them when this one fails.

    Raises:
        InputError: If an image lies where the results go, a file there is none of a former result, or what is to be
            continued is of other facts or images.
        AdfeaturesError: If it cannot be written, or another run writes to it.
    """
    new = output / STAGING
    try:
        with only_run_in(output, "overlays", STAGING):
            try:
                if (new / SUMMARY).exists():
                    _replace(new, output)
                if not resume:
                    shutil.rmtree(new, ignore_errors=True)
                _refuse_conflicts(output, work)
                results = _continued(output, work, facts) if resume else None
                results = results or _started(output, facts)
                yield results
                (results.folder / BEGUN).unlink(missing_ok=True)
                if results.folder == new:
                    _replace(new, output)
            finally:
                if not resume and not (new / SUMMARY).exists():  # A complete one is put in place by the next run.
                    shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        if isinstance(error, AdfeaturesError):
            raise
        raise AdfeaturesError(
            f"Cannot write the results to {output}: {error}. Free it, or close what uses it, and run again."
        ) from error


def _started(output: Path, facts: Mapping[str, Any]) -> Results:
    shutil.rmtree(output / STAGING, ignore_errors=True)
    folder = output / STAGING if _holds_ours(output) else output
    (folder / "overlays").mkdir(parents=True, exist_ok=True)
    results = Results(folder)
    _write(results, facts)
    return results


def _continued(output: Path, work: Worklist, facts: Mapping[str, Any]) -> Results | None:
    """What an earlier run has left to be continued, complete or not, if it has."""
    folder = next((place for place in (output / STAGING, output) if (place / BEGUN).exists()), None)
    if folder is None:
        return _complete(output, work, facts)
    begun, *numbers = _begun(folder / BEGUN)
    for name, fact in facts.items():
        if begun.get(name) != fact:
            raise InputError(
                f"{output} holds rows of a run with {name} {begun.get(name)}, and this one has {fact}. Use the same "
                "options, or start over without --resume."
            )
    kept = _kept(Results(folder), work)
    finished = kept if kept == len(work) else kept - kept % facts["batch_size"]
    results = Results(folder, finished, [number for number in numbers if number < finished])
    _write(results, facts)
    return results


def _complete(output: Path, work: Worklist, facts: Mapping[str, Any]) -> Results | None:
    """A former result, if it is that of this very run."""
    with suppress(InputError):
        summary = read_document(output / SUMMARY, dict[str, Any])
        if {**facts, "images": len(work)}.items() <= summary.items() and _kept(Results(output), work) == len(work):
            return Results(output, len(work))
    return None


def _begun(path: Path) -> list[Any]:
    first, *others = path.read_text(encoding="utf-8").splitlines()
    with suppress(DocumentError):
        return [parse(first, dict[str, Any]), *(parse(line, int) for line in others)]
    raise InputError(f"{path} is damaged. Start over without --resume.")


def _kept(results: Results, work: Worklist) -> int:
    """The rows that are there, one for each of the first images."""
    kept, files = 0, iter(work)
    with suppress(FileNotFoundError):
        for row in results.rows():
            file = next(files, "nothing")
            if row.file != file:
                raise InputError(
                    f"{results.folder} holds a row of {row.file}, and this run has {file} in its place. Give the same "
                    "images, or start over without --resume."
                )
            kept += 1
    return kept


def _write(results: Results, facts: Mapping[str, Any]) -> None:
    """The tables with the finished rows, each atomically. A row that a kill has truncated is dropped."""
    folder, rows = results.folder, results.rows()
    with atomic_path(folder / BEGUN) as path:
        path.write_text("\n".join([dumps(facts), *map(str, results.references), ""]), encoding="utf-8")
    with atomic_path(folder / TABLE) as table_path, atomic_path(folder / LINES) as lines_path:
        with _open(table_path, "w") as table, _open(lines_path, "w") as lines:
            csv.writer(table).writerow([column.name for column in fields(ImageRow)])
            for row in islice(rows, results.finished):
                _append(row, table, lines)
        rows.close()  # Windows replaces no file that is open.


def _holds_ours(output: Path) -> bool:
    return holds_results(output) or (output / BEGUN).exists()


def mark() -> PngInfo:
    """What an overlay is known by."""
    found = PngInfo()
    found.add_text("Software", SOFTWARE)
    return found


def _is_marked(path: Path) -> bool:
    if path.suffix != ".png":
        return False
    try:
        with open_image(path) as picture:
            return picture.info.get("Software") == SOFTWARE
    except ImageError:
        return False


def _refuse_conflicts(output: Path, work: Worklist) -> None:
    ours = {os.path.realpath(output / name) for name in (*FILES, "overlays")}
    for file in work:
        path = os.path.realpath(file)
        if path in ours or any(str(parent) in ours for parent in Path(path).parents):
            raise InputError(f"{file} is where the results of this run go. Choose an --output other than {output}.")
    _refuse_foreign(output, (picture for _, picture in work.since(0)))


def _refuse_foreign(output: Path, pictures: Iterable[Path]) -> None:
    has_ours = _holds_ours(output)
    for name in chain(map(Path, FILES), pictures):
        path = output / name
        if os.path.lexists(path) and not (has_ours and (path.is_file() if name.parent == Path() else _is_marked(path))):
            raise InputError(f"{path} exists and was not written by an earlier run. Choose another --output.")


def _replace(new: Path, output: Path) -> None:
    """Replace the previous result, or what a killed run has left of it.

    The summary goes first and comes last: it tells of all. The second table goes before the first one is replaced, so
    that there are never two of different rows.
    """
    _refuse_foreign(output, _files_in(new))
    for path in (output / SUMMARY, output / BEGUN, new / BEGUN):
        path.unlink(missing_ok=True)
    if (new / TABLE).exists():  # Else this has been done.
        drawn = (path for path in _files_in(output, "overlays") if _is_marked(output / path))
        for path in chain(map(Path, FILES), drawn):
            if path == Path(LINES) or not (new / path).exists():
                (output / path).unlink(missing_ok=True)
    others = (path for path in _files_in(new) if str(path) not in (TABLE, LINES, SUMMARY))
    for path in chain((Path(TABLE), Path(LINES)), others, (Path(SUMMARY),)):
        if (new / path).exists():  # Else this has been done.
            (output / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / path, output / path)
    for folder, _, _ in os.walk(output / "overlays", topdown=False):
        with suppress(OSError):  # It is not empty.
            os.rmdir(folder)
    shutil.rmtree(new, ignore_errors=True)


def _files_in(folder: Path, part: str = "") -> Iterator[Path]:
    """Files below a part of a folder, relative to the folder."""
    for parent, _, names in os.walk(folder / part):
        yield from (Path(parent, name).relative_to(folder) for name in names)
