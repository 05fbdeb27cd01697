"""Losses and metrics of a run as a picture."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import nan
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from adfeatures.checkpoints import atomic_path, regular_file
from adfeatures.documents import DocumentError, check
from adfeatures.errors import InputError

from ..metrics import CRITERIA, SELECTED_BY

LOG, CURVES = "log.jsonl", "curves.png"
SMOOTHING = 50
_COLORS = {"angle": "tab:orange", "norm": "tab:blue"}
_STYLES = {"img": "-", "pix": "--", "pro": ":"}


class _Line(TypedDict):
    kind: str
    step: int


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log. A last line that was cut off is left out."""
    lines: list[dict[str, Any]] = []
    with suppress(ValueError, RecursionError):
        for line in regular_file(path, InputError).read_bytes().splitlines() if os.path.lexists(path) else ():
            # Not ``parse``, since logs of before hold NaN.
            lines.append(check(json.loads(line), _Line))
    return lines


def draw_curves(folder: Path) -> None:
    """Draw the losses of the steps and, beside them, the metrics of the validations where there are any.

    Args:
        folder: That of the run: ``log.jsonl`` is read, ``curves.png`` written.

    Raises:
        AdfeaturesError: If the picture cannot be written.
    """
    from matplotlib.figure import Figure

    lines = read_log(folder / LOG)
    steps = [line for line in lines if line["kind"] == "step" and "angle" in line]
    validations = [line for line in lines if line["kind"] == "validation"]
    panels = 2 if validations else 1
    # A layout that looks for its margins is slow.
    figure = Figure(figsize=(5.5 * panels, 4))
    figure.subplots_adjust(left=0.12 / panels, right=1 - 0.03 / panels, bottom=0.12, top=0.91, wspace=0.16)
    losses, *others = figure.subplots(1, panels, squeeze=False)[0]
    _draw_losses(losses, steps)
    for metrics in others:
        _draw_metrics(metrics, validations)
    for axes in figure.axes:
        axes.set(xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    # Encoded in memory: of a disk that fills up Pillow would not tell.
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=120)
    with atomic_path(folder / CURVES) as temporary:
        temporary.write_bytes(encoded.getbuffer())


def _draw_losses(axes: Any, steps: Sequence[Mapping[str, Any]]) -> None:
    """Thin as they are and thick as a running mean."""
    x = np.array([line["step"] for line in steps])
    for name, color in _COLORS.items():
        y = np.array([_number(line, name) for line in steps])
        axes.plot(x, y, linewidth=0.4, alpha=0.5, color=color)
        window = max(1, min(SMOOTHING, len(y)))
        smooth = np.convolve(y, np.ones(window) / window, "valid") if len(y) else y
        axes.plot(x[window - 1 :], smooth, color=color, label=f"{name} loss")
    # The angle loss may be negative, and the norm loss falls through orders of magnitude.
    axes.set(yscale="symlog", title="losses, summed over the levels")


def _draw_metrics(axes: Any, validations: Sequence[Mapping[str, Any]]) -> None:
    steps = [line["step"] for line in validations]
    for method, title in SELECTED_BY.items():
        for criterion in CRITERIA:
            values = [_number(line.get(method), criterion.key) for line in validations]
            label = f"{title}, {criterion.title}"
            axes.plot(steps, values, _STYLES[criterion.key], color=_COLORS[method], marker=".", label=label)
    axes.set(title="validation, mean over products")


def _number(values: Any, key: str) -> float:
    """The number of a key; NaN for anything else, such as the null that stands for NaN."""
    with suppress(DocumentError):
        return float(check(values.get(key) if isinstance(values, dict) else None, float))
    return nan
