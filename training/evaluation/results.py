"""The results of an evaluation on disk: one JSON file for each product and combination of method, features and draw.

Each is written when it is finished, whole or not at all. So a run that was interrupted resumes, and products, methods
and draws can be added.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from adfeatures.checkpoints import atomic_path
from adfeatures.documents import DocumentError, dumps, read_document
from adfeatures.errors import AdfeaturesError, InputError

PRETRAINED, RAW = "pretrained", "raw"
SETTINGS, FOLDER, FAILURE = "settings.json", "results", "failure"
# After the name of FeatureNorm whose references are retrieved, or listed, for each image.
OF_RETRIEVED, OF_LISTED = "_retrieved", "_listed"

Record = dict[str, Any]
_Metrics: TypeAlias = dict[str, float | None]


class _Settings(TypedDict):
    weights: dict[str, Any]


class _Failure(TypedDict):
    product: str
    error: str


class _Combined(TypedDict):
    product: str
    method: str
    features: str
    draw: int | None


class _Overlap(TypedDict):
    test: tuple[int, int]


class _Optional(TypedDict, total=False):
    oracle: _Metrics
    views: dict[str, _Metrics]
    warnings: list[str]
    curves: dict[str, list[float]]
    weights: str | None
    overlap: _Overlap | None


class _Finished(_Combined, _Optional):
    metrics: _Metrics


@dataclass(frozen=True)
class Combination:
    """What is evaluated on each product.

    Attributes:
        method: Name of the method, with OF_RETRIEVED or OF_LISTED where its references are.
        features: PRETRAINED or RAW.
        draw: Number of the draw of references, from 0; None for features that take none.
    """

    method: str
    features: str
    draw: int | None = None

    @property
    def base(self) -> str:
        """Name of the method, as `training.methods.find_method` takes it."""
        return self.method.removesuffix(OF_RETRIEVED).removesuffix(OF_LISTED)

    @property
    def name(self) -> str:
        """Name for files."""
        return f"{self.method_file}-{self.features}" + ("" if self.draw is None else f"-{self.draw}")

    @property
    def method_file(self) -> str:
        """Name of the method for files; Windows takes no colon."""
        return self.method.replace(":", ".")

    @property
    def is_shown(self) -> bool:
        """Whether its curves and heat maps are drawn: of one draw are enough."""
        return self.draw in (None, 0)


class Results:
    """The folder of an evaluation. Records are plain values; NaN is kept as null.

    Args:
        folder: The folder.
        settings: All that decides the numbers, as plain values. "weights" are hashes by name, to which others may come
            later.

    Raises:
        InputError: If the folder holds results of other settings.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings: dict[str, Any] = json.loads(dumps(settings))
        path = self.folder / SETTINGS
        if path.exists():
            # Folders of before there was a choice have no bit depth and no split.
            before = {"bit_depth": 16, "split": None, **read_json(path, _Settings)}
            changed = _differences(before, self.settings)
            changed += [f"weights of {text}" for text in _differences(before["weights"], self.settings["weights"])]
            if changed:
                raise InputError(
                    f"{self.folder} holds results of other settings: {'; '.join(changed)}. Choose another --output."
                )
            self.settings["weights"] = {**before["weights"], **self.settings["weights"]}
        write_json(path, self.settings)

    def read(self, product: str, combination: Combination) -> Record | None:
        """The record of a combination on a product, None where it is not finished."""
        path = self._path(product, combination.name)
        record = _read_record(path) if path.exists() else {"error": ""}
        return None if "error" in record else record

    def write(self, combination: Combination, record: Record) -> None:
        """Keep the record of a combination on a product."""
        write_json(self._path(record["product"], combination.name), {**asdict(combination), **record})

    def fail(self, product: str, error: Exception, combination: Combination | None = None) -> None:
        """Keep what went wrong with a combination on a product, or with the product itself, until the next command."""
        text = str(error) if isinstance(error, AdfeaturesError) else f"{type(error).__name__}: {error}"
        record = {"product": product, "error": text}
        if combination is None:
            write_json(self._path(product, FAILURE), record)
        else:
            self.write(combination, record)

    def failed(self, product: str) -> bool:
        """Whether the product itself could not be used when it was last tried."""
        return self._path(product, FAILURE).exists()

    def clear(self, product: str) -> None:
        """Forget that a product could not be used."""
        self._path(product, FAILURE).unlink(missing_ok=True)

    def records(self) -> list[Record]:
        """Everything that is there, failures included, product after product."""
        # What a killed process was writing is hidden, and no record.
        return [_read_record(path) for path in sorted((self.folder / FOLDER).glob("*/[!.]*.json"))]

    def _path(self, product: str, name: str) -> Path:
        return self.folder / FOLDER / product / f"{name}.json"


def _read_record(path: Path) -> Record:
    record = read_json(path)
    kind = _Finished if "error" not in record else _Combined if "method" in record else _Failure
    return read_json(path, kind)


def read_json(path: Path, kind: Any = dict[str, Any]) -> dict[str, Any]:
    """Read a file that ``write_json`` wrote; for the kind see ``adfeatures.documents.check``.

    Raises:
        InputError: For a damaged file.
    """
    try:
        return dict(read_document(path, kind))
    except DocumentError as error:
        raise InputError(f"{path} cannot be read ({error}). Remove it; what it held is computed again.") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write plain values, atomically; NaN becomes null, and what else a method from outside has among them, text."""
    write_text(path, dumps(value, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    r"""Write a text in UTF-8, atomically; bytes of file names that are no UTF-8 become ``\udc..``."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has another value now; weights are left to a comparison of their own."""
    shared = [name for name in now if name in before and name != "weights"]
    return [f"{name} was {before[name]!r}, is {now[name]!r}" for name in shared if before[name] != now[name]]
