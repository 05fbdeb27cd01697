"""The demo: the embedded default on the sample images of the package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .catalog import ASSETS
from .factory import create_model
from .inspection import inspect, write_summary
from .overlays import contact_sheet, save_picture
from .scoring import auroc
from .sources import list_images

SAMPLES = ASSETS / "samples"


def run_demo(output: str | os.PathLike[str]) -> dict[str, Any]:
    """Score the samples into a folder, as ``adfeatures score`` does, and compare the scores with the known defects.

    Returns:
        The summary of the run with ``image_auroc`` and ``pixel_auroc``, fractions.

    Raises:
        AdfeaturesError: If the output cannot be written.
    """
    folder = Path(output)
    model = create_model(references=SAMPLES / "references")
    files = [str(path) for path in list_images(SAMPLES / "test", recursive=True)]
    inspection = inspect(model, files, folder, keep_maps=True)
    masks = [_mask(Path(file), map.shape) for file, map in zip(files, inspection.maps, strict=True)]
    scores = [float(row.score or 0) for row in inspection.rows]
    summary = inspection.summary | {
        "image_auroc": auroc(scores, [bool(mask.any()) for mask in masks]),
        "pixel_auroc": auroc(
            np.concatenate([map.ravel() for map in inspection.maps]), np.concatenate([mask.ravel() for mask in masks])
        ),
    }
    write_summary(folder, summary)
    _write_picture(folder, files)
    return summary


def _mask(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The defect of a sample, boolean (H, W); samples in the folder good have none."""
    if file.parent.name == "good":
        return np.zeros(shape, dtype=bool)
    with Image.open(SAMPLES / "masks" / file.parent.name / f"{file.stem}.png") as mask:
        return np.asarray(mask.convert("L")) > 0


def _write_picture(folder: Path, files: list[str]) -> None:
    """The samples above their overlays, one of each kind: what the README shows."""
    first = list({Path(file).parent: Path(file) for file in reversed(files)}.values())
    overlays = [folder / "overlays" / path.parent.name / f"{path.stem}.png" for path in first]
    tiles = [Image.open(path) for path in (*first, *overlays)]
    save_picture(contact_sheet(tiles, columns=len(first), tile_width=320), folder / "demo.png")
