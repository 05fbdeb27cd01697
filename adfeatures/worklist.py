"""Which images a run is about: files, folders, lists of names; any number of them, held on disk."""

from __future__ import annotations

import csv
import os
import sqlite3
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO

from .checkpoints import regular_file
from .errors import ImageError, InputError
from .image_files import IMAGE_SUFFIXES
from .sources import is_drawn, walk_images

# In the place of a file: its names come on standard input.
STDIN = "-"
# The column of a table that names its images, as in the manifests of ``training``.
COLUMN = "image"
_MAX_LINE = 1 << 16


class Worklist:
    """The images of a run in their order, each once, with the names of their pictures.

    They lie in a temporary file that SQLite makes when they are many and removes when it is closed, so that memory does
    not grow with them.

    Args:
        files: Image files. Pictures drawn by an earlier run are left out with a warning.

    Raises:
        ImageError: If nothing is left.
    """

    def __init__(self, files: Iterable[str]) -> None:
        self._base = sqlite3.connect("")
        self._base.execute("create table images (number integer primary key, file blob, path blob unique)")
        self._base.execute("create table pictures (number integer primary key, name blob unique)")
        drawn = 0
        common: str | None = ""
        for file in files:
            path = os.path.abspath(file)
            if is_drawn(Path(path)):
                drawn += 1
            elif self._insert("images (file, path)", os.fsencode(file), os.fsencode(path)):
                common = _common(common, os.path.dirname(path))
        left_out = f"{drawn} pictures were drawn by an earlier run and are left out."
        if not len(self):
            raise ImageError(
                left_out if drawn else "No images were named. Give files, folders, --manifest, or - for standard input."
            )
        if drawn:
            warnings.warn(left_out, stacklevel=2)
        for number, path in self._base.execute("select number, path from images order by number"):
            self._name_picture(number, Path(os.fsdecode(path)), common)

    def __len__(self) -> int:
        (length,) = self._base.execute("select count(*) from images").fetchone()
        return int(length)

    def __iter__(self) -> Iterator[str]:
        return (file for file, _ in self.since(0))

    def since(self, number: int) -> Iterator[tuple[str, Path]]:
        """The images from a number on, counted from 0, each with the file that its picture goes to."""
        found = self._base.execute(
            "select file, name from images join pictures using (number) where number > ?", [number]
        )
        return ((os.fsdecode(file), Path(os.fsdecode(name))) for file, name in found)

    def _insert(self, columns: str, *values: object) -> bool:
        """Whether a row is new."""
        return self._base.execute(f"insert or ignore into {columns} values (?, ?)", values).rowcount > 0

    def _name_picture(self, number: int, path: Path, common: str | None) -> None:
        """By the path below the folder that all images share."""
        name = Path("overlays") / (path.relative_to(common) if common else path.name)
        picture, others = name.with_suffix(".png"), count(2)
        while not self._insert("pictures (number, name)", number, os.fsencode(picture)):
            picture = name.with_name(f"{name.name}-{next(others)}.png")


def _common(common: str | None, folder: str) -> str | None:
    """The folder that holds both, "" standing for any and None for none: Windows drives share no folder."""
    with suppress(ValueError):
        return common if common is None else os.path.commonpath([common or folder, folder])
    return None


def find_images(arguments: Iterable[str], recursive: bool, manifest: str | os.PathLike[str] | None = None) -> Worklist:
    """The images that the arguments and the lines of a manifest name, with those in the folders among them.

    Image files stay as given, whether they exist or not.

    Args:
        arguments: Files and folders. For "-" their names are read from standard input, one a line.
        recursive: Whether to look in sub-folders too.
        manifest: A text file with a name in each line, or a table ending in .csv with a column ``image``. Names are
            relative to its folder.

    Raises:
        ImageError: For a folder without images, or where nothing is left.
        InputError: For an argument that does not exist and is not named like an image, or a list that cannot be read.
    """
    return Worklist(_files(_names(arguments, manifest), recursive))


def _files(names: Iterable[str], recursive: bool) -> Iterator[str]:
    for name in names:
        if os.path.isdir(name):
            yield from map(str, walk_images(name, recursive=recursive))
        else:
            yield name


def _names(arguments: Iterable[str], manifest: str | os.PathLike[str] | None) -> Iterator[str]:
    for argument in arguments:
        if argument == STDIN:
            yield from _stripped(_lines(sys.stdin.buffer, "Standard input"))
        elif os.path.exists(argument) or argument.lower().endswith(IMAGE_SUFFIXES):
            yield argument
        else:  # Perhaps a mistyped folder: as a row with an error it would replace an earlier result.
            raise InputError(f"{argument} does not exist. Give image files, or folders of them.")
    if manifest is not None:
        with open(regular_file(manifest, InputError), "rb") as file:
            lines = _lines(file, os.fspath(manifest))
            is_table = Path(manifest).suffix.lower() == ".csv"
            names = _column(lines, os.fspath(manifest)) if is_table else lines
            yield from (os.path.join(os.path.dirname(manifest), name) for name in _stripped(names))


def _lines(stream: IO[bytes], source: str) -> Iterator[str]:
    """Lines as names of files, which may be no UTF-8."""
    while line := stream.readline(_MAX_LINE):
        if len(line) == _MAX_LINE or b"\0" in line:
            raise InputError(f"{source} is not a list of file names, one per line.")
        yield os.fsdecode(line.removeprefix(b"\xef\xbb\xbf"))


def _stripped(lines: Iterable[str]) -> Iterator[str]:
    return filter(None, (line.rstrip("\r\n") for line in lines))


def _column(lines: Iterator[str], source: str) -> Iterator[str]:
    try:
        table = csv.DictReader(lines)
        if COLUMN not in (table.fieldnames or ()):
            raise InputError(f"{source} has no column {COLUMN!r} with the names of the images.")
        yield from (row[COLUMN] or "" for row in table)
    except csv.Error as error:
        raise InputError(f"{source} cannot be read: {error}. It must be a CSV file.") from error
