"""Results as tables: means over products, with bootstrap intervals over products."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import get_type_hints

import numpy as np

from adfeatures.errors import InputError

from .protocol import Result

METRICS = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
    "found": "found",
    "flagged": "flagged",
}
SAMPLES = 2000


def as_csv(results: Sequence[Result]) -> str:
    """All results, a row for each, in full precision."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Result)])
    writer.writeheader()
    writer.writerows(map(dataclasses.asdict, results))
    return file.getvalue()


def of_csv(text: str) -> list[Result]:
    """The results that ``as_csv`` wrote.

    Raises:
        InputError: For another table.
    """
    types = get_type_hints(Result)
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if rows.fieldnames != list(types):
            raise ValueError("it has other columns")
        return [Result(**{name: of_type(row[name]) for name, of_type in types.items()}) for row in rows]
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise InputError(f"This is no table of results: {error}.") from error


def as_markdown(results: Sequence[Result], baseline: str) -> str:
    """The tables, in percent.

    Args:
        results: All results.
        baseline: The contender that the others are compared with, product by product.
    """
    counts = sorted({result.shots for result in results})
    main = 8 if 8 in counts else counts[-1]
    lines = [f"Mean over {len({r.product for r in results})} products [95 % interval over products]; below the image "]
    lines[0] += f"AUROC of each contender its difference to {baseline}, product by product."
    for shots in counts:
        chosen = [result for result in results if result.shots == shots]
        draws = 1 + max(result.draw for result in chosen)
        lines += ["", f"**{shots} references, {draws} draws**", "", *_overall(chosen, baseline)]
    chosen = [result for result in results if result.shots == main]
    for title, key in (("group", lambda r: r.group), ("product", lambda r: r.product)):
        lines += ["", f"**By {title}, {main} references**: image AUROC, found, flagged", "", *_by(chosen, title, key)]
    return "\n".join(lines) + "\n"


def _overall(results: Sequence[Result], baseline: str) -> list[str]:
    lines = _head(["", *METRICS.values(), "difference"])
    own = {name: _by_product(results, name) for name in dict.fromkeys(result.contender for result in results)}
    for name, values in own.items():
        cells = [_interval(values[:, column]) for column in range(len(METRICS))]
        difference = "" if name == baseline else _interval(values[:, 0] - own[baseline][:, 0], sign="+")
        lines.append(_row([name, *cells, difference]))
    return lines


def _by(results: Sequence[Result], title: str, key: Callable[[Result], str]) -> list[str]:
    names = list(dict.fromkeys(result.contender for result in results))
    lines = _head([title, *names])
    for group in sorted({key(result) for result in results}):
        members = [result for result in results if key(result) == group]
        cells = []
        for name in names:
            values = _by_product(members, name).mean(axis=0)
            cells.append(" / ".join(_percent(value) for value in values[[0, 3, 4]]))
        lines.append(_row([group, *cells]))
    return lines


def _by_product(results: Sequence[Result], contender: str) -> np.ndarray:
    """Means over the draws, (products, METRICS)."""
    found = defaultdict(list)
    for result in results:
        if result.contender == contender:
            found[result.product].append([getattr(result, metric) for metric in METRICS])
    return np.array([np.mean(of_product, axis=0) for of_product in found.values()])


def _interval(values: np.ndarray, sign: str = "") -> str:
    if np.isnan(values).all():
        return "-"
    drawn = np.random.default_rng(0).integers(len(values), size=(SAMPLES, len(values)))
    low, high = np.nanpercentile(np.nanmean(values[drawn], axis=1), [2.5, 97.5])
    return f"{100 * np.nanmean(values):{sign}.1f} [{_percent(low)}, {_percent(high)}]"


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), _row(["---"] * len(cells))]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
