"""The results of an evaluation on disk: one JSON file for each product, method, kind of features and draw of references.

Each is written when it is finished, whole or not at all. So a run that was interrupted resumes, and products, methods
and draws can be added.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adfeatures.checkpoints import atomic_path
from adfeatures.errors import AdfeaturesError, InputError

PRETRAINED, RAW = "pretrained", "raw"
SETTINGS, FOLDER, FAILURE = "settings.json", "results", "failure"

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What is evaluated on each product.

    Attributes:
        method: Name of the method.
        features: PRETRAINED or RAW.
        draw: Number of the draw of references, None for features that take none.
    """

    method: str
    features: str
    draw: int | None = None

    @property
    def name(self) -> str:
        """Name for files."""
        return "-".join([self.method, self.features, *([] if self.draw is None else [str(self.draw)])])


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
        self.settings: dict[str, Any] = _plain(settings)
        path = self.folder / SETTINGS
        if path.exists():
            before = _flat(read_json(path))
            changed = [
                f"{name} was {before[name]!r}, is {value!r}"
                for name, value in _flat(self.settings).items()
                if name in before and before[name] != value
            ]
            if changed:
                raise InputError(
                    f"{self.folder} holds results of other settings: {'; '.join(changed)}. Choose another --output."
                )
            self.settings["weights"] = {**read_json(path)["weights"], **self.settings["weights"]}
        write_json(path, self.settings)

    def read(self, product: str, run: Run) -> Record | None:
        """The record of a run, None where it is not finished."""
        path = self._path(product, run.name)
        record = read_json(path) if path.exists() else {"error": ""}
        return None if "error" in record else record

    def write(self, run: Run, record: Record) -> None:
        """Keep the record of a run on a product."""
        write_json(
            self._path(record["product"], run.name),
            {"method": run.method, "features": run.features, "draw": run.draw, **record},
        )

    def fail(self, product: str, error: Exception, run: Run | None = None) -> None:
        """Keep what went wrong with a run on a product, or with the product itself.

        It is tried again by the next command.
        """
        text = str(error) if isinstance(error, AdfeaturesError) else f"{type(error).__name__}: {error}"
        of_run = {} if run is None else {"method": run.method, "features": run.features, "draw": run.draw}
        write_json(self._path(product, run.name if run else FAILURE), {**of_run, "product": product, "error": text})

    def failed(self, product: str) -> bool:
        """Whether the product itself could not be used when it was last tried."""
        return self._path(product, FAILURE).exists()

    def clear(self, product: str) -> None:
        """Forget that a product could not be used."""
        self._path(product, FAILURE).unlink(missing_ok=True)

    def records(self) -> list[Record]:
        """Everything that is there, failures included, product after product."""
        # What a killed process was writing is hidden, and no record.
        return [read_json(path) for path in sorted((self.folder / FOLDER).glob("*/[!.]*.json"))]

    def _path(self, product: str, name: str) -> Path:
        return self.folder / FOLDER / product / f"{name}.json"


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that ``write_json`` wrote.

    Raises:
        InputError: For a damaged file.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}). Remove it; what it held is computed again.") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write plain values, atomically; NaN becomes null."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(_plain(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """Values as JSON gives them back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the weights as entries of their own."""
    return {
        **{k: v for k, v in settings.items() if k != "weights"},
        **{f"weights of {k}": v for k, v in settings["weights"].items()},
    }
