"""Tables of an evaluation, made from its records by program: JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import isfinite, nan
from statistics import fmean, stdev
from typing import Any

from adfeatures.checkpoints import atomic_path

from ..methods import METHODS
from ..metrics import Metrics
from .recipes import ORACLE, base, title
from .results import PRETRAINED, RAW, Record, Results, write_json

METRICS = tuple(field.name for field in fields(Metrics))
ORIGINAL_AUPRO = "aupro_original"
TITLES = {
    "image_auroc": "Image AUROC",
    "image_ap": "Image AP",
    "image_f1": "Image F1-max",
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "pixel_f1": "Pixel F1-max",
    "aupro": "AUPRO",
    ORIGINAL_AUPRO: "AUPRO (original)",
}
DIFFERENCE, MEAN = "difference", "mean"
# The metrics that checkpoints hold.
STORED = {"img_auc": "image_auroc", "pix_auc": "pixel_auroc", "pix_pro": "aupro"}

NOTES = """\
All numbers are percent. "pretrained" are the features of the model, "raw" those of the same backbone without references, residuals and
projector, "difference" is the first minus the second. A mean and a standard deviation (±) over several draws of references are those of
the numbers of each draw. Means are over the products that have both kinds of features, without those for which a metric is not defined
("-"), and over the draws that all of them have. AUPRO is exact: all thresholds, false positive rates from 0 to 0.3, interpolated to that
limit; "AUPRO (original)" is the approximation of the original code by 200 thresholds. Mask pixels above 0 are defects, after nearest
resizing to the size of the model's input."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        method: Name of the method.
        product: Name of the product, or MEAN.
        features: PRETRAINED, RAW, or DIFFERENCE of the two.
        products: How many products it is of.
        draws: How many draws of references it is the mean of.
        values: The metrics as fractions, NaN where one is not defined.
        spreads: Their standard deviations over the draws, NaN with fewer than two.
    """

    method: str
    product: str
    features: str
    products: int
    draws: int
    values: Mapping[str, float]
    spreads: Mapping[str, float]


# Metrics by product and draw, those that are not defined left out.
_Found = dict[str, dict[int | None, dict[str, float]]]


def rows(records: Sequence[Record]) -> list[Row]:
    """The lines of the tables: per method each product and the mean over them, each pretrained, raw and their difference.

    Args:
        records: Finished ones, of `training.evaluation.results`.
    """
    columns = _columns(records)
    found: dict[str, dict[str, _Found]] = defaultdict(lambda: {PRETRAINED: defaultdict(dict), RAW: defaultdict(dict)})
    for record in records:
        for suffix, metrics in (("", record["metrics"]), (ORACLE, record.get("oracle"))):
            if metrics is not None:
                defined = {metric: value for metric, value in metrics.items() if value is not None and isfinite(value)}
                found[record["method"] + suffix][record["features"]][record["product"]][record["draw"]] = defined
    lines = []
    for method in sorted(found, key=_order):
        kinds = found[method]
        products = list(dict.fromkeys(product for of_kind in kinds.values() for product in of_kind))
        for name, own in [*((product, [product]) for product in products), (MEAN, products)]:
            there = {kind: {p: of_kind[p] for p in own if p in of_kind} for kind, of_kind in kinds.items()}
            lines += _lines(method, name, {kind: of_kind for kind, of_kind in there.items() if of_kind}, columns)
    return lines


def _lines(method: str, name: str, kinds: Mapping[str, _Found], columns: Sequence[str]) -> list[Row]:
    """Pretrained, raw and difference, as far as they are there, of the products that all kinds have."""
    products = [
        product for product in next(iter(kinds.values())) if all(product in of_kind for of_kind in kinds.values())
    ]
    # Products in which a metric is defined throughout, so that all kinds and draws are of the same ones.
    defined = {
        metric: [p for p in products if all(metric in own for of_kind in kinds.values() for own in of_kind[p].values())]
        for metric in columns
    }
    lines = []
    for kind, found in kinds.items():
        draws = (
            [draw for draw in found[products[0]] if all(draw in found[product] for product in products)]
            if products
            else []
        )
        values = {m: [fmean(found[p][draw][m] for p in defined[m]) for draw in draws if defined[m]] for m in columns}
        means = {metric: fmean(of_draws) if of_draws else nan for metric, of_draws in values.items()}
        spreads = {metric: stdev(of_draws) if len(of_draws) > 1 else nan for metric, of_draws in values.items()}
        lines.append(Row(method, name, kind, len(products), len(draws), means, spreads))
    if len(lines) == 2:
        pretrained, raw = lines
        gains = {metric: pretrained.values[metric] - raw.values[metric] for metric in columns}
        lines.append(replace(pretrained, features=DIFFERENCE, values=gains))
    return lines


def _columns(records: Sequence[Record]) -> tuple[str, ...]:
    return METRICS + (ORIGINAL_AUPRO,) * any(ORIGINAL_AUPRO in record["metrics"] for record in records)


def _order(method: str) -> tuple[int, str]:
    return list(METHODS).index(base(method)), method


def to_csv(lines: Sequence[Row]) -> str:
    """The lines as CSV, metrics as fractions in full precision; what is not defined is empty."""
    text = io.StringIO()
    columns = tuple(lines[0].values) if lines else METRICS
    names = [name for metric in columns for name in (metric, f"{metric}_sd")]
    table = csv.DictWriter(text, ["method", "product", "features", "products", "draws", *names], lineterminator="\n")
    table.writeheader()
    for line in lines:
        numbers = {**line.values, **{f"{metric}_sd": value for metric, value in line.spreads.items()}}
        facts = {
            "method": line.method,
            "product": line.product,
            "features": line.features,
            "products": line.products,
            "draws": line.draws,
        }
        table.writerow({**facts, **{name: repr(value) if isfinite(value) else "" for name, value in numbers.items()}})
    return text.getvalue()


def to_markdown(lines: Sequence[Row]) -> str:
    """The lines as one table of Markdown, in percent."""
    columns = tuple(lines[0].values) if lines else METRICS
    one_method = len({line.method for line in lines}) == 1
    head = [*([] if one_method else ["Method"]), "Product", "Features", *(TITLES[metric] for metric in columns)]
    body = [
        [
            *([] if one_method else [title(line.method)]),
            f"mean of {line.products}" if line.product == MEAN else line.product,
            line.features,
            *(_cell(line, metric) for metric in columns),
        ]
        for line in lines
    ]
    return _table(head, body)


def _cell(line: Row, metric: str) -> str:
    value, spread = 100 * line.values[metric], 100 * line.spreads[metric]
    if not isfinite(value):
        return "-"
    return format(value, "+.2f" if line.features == DIFFERENCE else ".2f") + (
        f" ± {spread:.2f}" if isfinite(spread) else ""
    )


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    escaped = [
        [cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in (head, ["---"] * len(head), *body)
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def write_report(results: Results, about: Mapping[str, Any]) -> str:
    """Write results.json, results.csv and results.md into the folder of the results.

    Args:
        results: The records.
        about: Facts on the program and the model, as plain values; "weights" lists name, source and stored metrics of
            each file.

    Returns:
        The Markdown of the means and of what is not finished, for the terminal.
    """
    records = [{key: value for key, value in record.items() if key != "curves"} for record in results.records()]
    finished = [record for record in records if "error" not in record]
    lines = rows(finished)
    write_json(
        results.folder / "results.json",
        {**about, "settings": results.settings, "table": [_row_values(line) for line in lines], "records": records},
    )
    means = [line for line in lines if line.product == MEAN]
    stored = stored_table(about["weights"], finished, means)
    _write(results, "results.csv", to_csv(lines))
    _write(results, "results.md", "\n".join(_sections(results, about, records, lines, stored)))
    return "\n".join(filter(None, [to_markdown(means), stored, _not_finished(records)]))


def _sections(
    results: Results, about: Mapping[str, Any], records: Sequence[Record], lines: Sequence[Row], stored: str
) -> Iterator[str]:
    draws = {"draws of references": max((line.draws for line in lines), default=0)}
    facts = {
        **{key: value for key, value in about.items() if key not in ("weights", "title")},
        **draws,
        **results.settings,
    }
    yield f"# {about['title']}\n"
    yield f"{NOTES}\n"
    yield _table(["Setting", "Value"], [[key, _shown(value)] for key, value in facts.items()])
    yield "## Means\n"
    yield to_markdown([line for line in lines if line.product == MEAN])
    if stored:
        yield f"## Metrics stored in the files of the weights\n\n{stored}"
    for method in dict.fromkeys(line.method for line in lines):
        yield f"## {title(method)}\n"
        if method.endswith(ORACLE):
            yield "The best value of each metric over all epochs, chosen on the test images: no result that could be had in practice.\n"
        yield to_markdown([line for line in lines if line.method == method])
    if not_finished := _not_finished(records):
        yield not_finished
    if warned := _warnings(records):
        yield "## Warnings\n"
        yield _table(["Warning", "Where"], warned)


def stored_table(weights: Sequence[Mapping[str, Any]], records: Sequence[Record], means: Sequence[Row]) -> str:
    """The metrics that the files of the weights hold beside those of the methods that took them, "" where no file holds any."""
    body = []
    for entry in weights:
        took = {record["method"] for record in records if record["weights"] == entry["name"]}
        for own in (line for line in means if line.features == PRETRAINED and line.method in took):
            for name, metric in STORED.items():
                # The stored AUPRO is the approximation.
                column = ORIGINAL_AUPRO if metric == "aupro" and ORIGINAL_AUPRO in own.values else metric
                if name in entry["stored"]:
                    stored = f"{100 * entry['stored'][name]:.2f}"
                    body.append([entry["name"], name, stored, title(own.method), TITLES[column], _cell(own, column)])
    if not body:
        return ""
    note = (
        "Stored are the means of the evaluation that selected the file: by FeatureNorm if its name ends in norm, by PatchCore if in angle. "
        "Those of the authors are over MVTec AD, in bfloat16, with their references and their AUPRO: expect equal numbers, to about a "
        "point, only for that data set with --protocol original and their references.\n"
    )
    return _table(["Weights", "Stored as", "Stored", "Method", "Metric", "Found here"], body) + "\n" + note


def _row_values(line: Row) -> dict[str, Any]:
    return {**vars(line), "values": dict(line.values), "spreads": dict(line.spreads)}


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item)
    return " x ".join(map(str, value)) if isinstance(value, (list, tuple)) else "-" if value is None else str(value)


def _not_finished(records: Sequence[Record]) -> str:
    """What failed and why, "" where nothing did."""
    body = [[record["product"], _what(record), record["error"]] for record in records if "error" in record]
    return f"## Not finished\n\n{_table(['Product', 'What', 'Error'], body)}" if body else ""


def _what(record: Record) -> str:
    if "method" not in record:
        return "all"
    draw = "" if record["draw"] is None else f", draw {record['draw'] + 1}"
    return f"{title(record['method'])}, {record['features']}{draw}"


def _warnings(records: Sequence[Record]) -> list[list[str]]:
    """Each warning once, with what it is about."""
    places: dict[str, dict[str, None]] = defaultdict(dict)
    for record in records:
        for text in record.get("warnings", ()):
            places[text][f"{record['product']} ({title(record['method'])})"] = None
    return [[text, ", ".join(where)] for text, where in places.items()]


def _write(results: Results, name: str, text: str) -> None:
    with atomic_path(results.folder / name) as temporary:
        temporary.write_text(text, encoding="utf-8")
