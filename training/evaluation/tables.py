"""The tables of an evaluation: lines made of its records by program, and their forms as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite, nan
from statistics import fmean, stdev

from adfeatures.results import csv_cell

from ..methods import METHODS, title_of
from ..metrics import Metrics
from .results import OF_LISTED, OF_RETRIEVED, PRETRAINED, RAW, Record
from .views import PART_AUROC

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
    PART_AUROC: "Part AUROC",
}
DIFFERENCE, MEAN = "difference", "mean"
# After the name of a method: its best result over all epochs.
ORACLE = "_oracle"


@dataclass(frozen=True)
class TableLine:
    """One line of a table.

    Attributes:
        method: Name of the method.
        product: Name of the product, or MEAN.
        features: PRETRAINED, RAW, or DIFFERENCE of the two.
        products: How many products it is of.
        draws: How many draws of references it is the mean of.
        values: The metrics as fractions, NaN where one is not defined.
        spreads: Their standard deviations over the draws, NaN with fewer than two.
        view: The view whose images alone it is of, "" for all.
        trained_on: How many of the test images the weights were trained on, as "25 of 30"; "" for none.
    """

    method: str
    product: str
    features: str
    products: int
    draws: int
    values: Mapping[str, float]
    spreads: Mapping[str, float]
    view: str = ""
    trained_on: str = ""


# Metrics by product and draw.
_Found = Mapping[str, Mapping[int | None, Mapping[str, float]]]


def title(method: str) -> str:
    """The name of a method for people."""
    last_epoch = method.removesuffix(ORACLE)
    base = last_epoch.removesuffix(OF_RETRIEVED)
    listed = base.removesuffix(OF_LISTED)
    kind = " (retrieved)" * (base != last_epoch) + " (listed references)" * (listed != base)
    return title_of(listed) + kind + " (oracle)" * (last_epoch != method)


def table_lines(records: Sequence[Record]) -> list[TableLine]:
    """The lines of the tables: of each method each product and their mean, each pretrained, raw and their difference.

    After those of all images come those of each view.

    Args:
        records: Finished ones, of `training.evaluation.results`.
    """
    lines = _lines_of(records)
    for view in sorted({view for record in records for view in record.get("views", ())}):
        seen = [record for record in records if view in record.get("views", ())]
        own = _lines_of([{**record, "metrics": record["views"][view], "oracle": None} for record in seen])
        lines += [replace(line, view=view) for line in own]
    return lines


def _lines_of(records: Sequence[Record]) -> list[TableLine]:
    more = (ORIGINAL_AUPRO, PART_AUROC)
    columns = METRICS + tuple(name for name in more if any(name in record["metrics"] for record in records))
    found: dict[str, dict[str, dict]] = defaultdict(lambda: {PRETRAINED: defaultdict(dict), RAW: defaultdict(dict)})
    overlaps: dict[str, dict[str, Sequence[int]]] = defaultdict(dict)
    for record in records:
        if record["features"] == PRETRAINED and record.get("overlap"):
            overlaps[record["method"]][record["product"]] = record["overlap"]["test"]
        for suffix, values in (("", record["metrics"]), (ORACLE, record.get("oracle"))):
            if values is not None:
                numbers = {metric: nan if values.get(metric) is None else values[metric] for metric in columns}
                found[record["method"] + suffix][record["features"]][record["product"]][record["draw"]] = numbers
    lines = []
    for method in sorted(found, key=_order):
        kinds, overlap = found[method], overlaps[method.removesuffix(ORACLE)]
        products = list(dict.fromkeys([*kinds[PRETRAINED], *kinds[RAW]]))
        for product in products:
            own = {kind: {product: of_kind[product]} for kind, of_kind in kinds.items() if product in of_kind}
            lines += _lines(method, product, own, columns, overlap)
        lines += _lines(method, MEAN, {kind: of_kind for kind, of_kind in kinds.items() if of_kind}, columns, overlap)
    return lines


def _lines(
    method: str, name: str, kinds: Mapping[str, _Found], columns: Sequence[str], overlaps: Mapping[str, Sequence[int]]
) -> list[TableLine]:
    """Pretrained, raw and difference, as far as they are there, of the products that all kinds have."""
    products = set.intersection(*map(set, kinds.values()))
    # Products in which a metric is defined throughout, so that all kinds and draws are of the same ones.
    defined = {m: [product for product in products if _is_defined(m, product, kinds)] for m in columns}
    lines = []
    for kind, found in kinds.items():
        draws = set.intersection(*(set(found[product]) for product in products)) if products else set()
        means, spreads = dict.fromkeys(columns, nan), dict.fromkeys(columns, nan)
        for metric, of_metric in defined.items():
            values = [fmean(found[product][draw][metric] for product in of_metric) for draw in draws if of_metric]
            means[metric] = fmean(values) if values else nan
            spreads[metric] = stdev(values) if len(values) > 1 else nan
        judged = [overlaps.get(product, (0, 0)) for product in products]
        seen, of = (sum(counts) for counts in zip((0, 0), *judged, strict=True))
        trained_on = f"{seen} of {of}" if seen and kind == PRETRAINED else ""
        lines.append(TableLine(method, name, kind, len(products), len(draws), means, spreads, trained_on=trained_on))
    if len(lines) == 2:
        pretrained, raw = lines
        gains = {metric: pretrained.values[metric] - raw.values[metric] for metric in columns}
        lines.append(replace(pretrained, features=DIFFERENCE, values=gains))
    return lines


def _is_defined(metric: str, product: str, kinds: Mapping[str, _Found]) -> bool:
    return all(isfinite(values[metric]) for found in kinds.values() for values in found[product].values())


def _order(method: str) -> tuple[int, str]:
    places = [place for place, name in enumerate(METHODS) if method.startswith(name)]
    return (places or [len(METHODS)])[0], method


def to_csv(lines: Sequence[TableLine]) -> str:
    """The lines as CSV, metrics as fractions in full precision; what is not defined is empty."""
    text = io.StringIO()
    columns = tuple(lines[0].values) if lines else METRICS
    facts = [field.name for field in fields(TableLine)]
    # In the place of the numbers as a whole stands each by itself.
    place = facts.index("values")
    facts[place : place + 2] = [name for metric in columns for name in (metric, f"{metric}_sd")]
    table = csv.DictWriter(text, facts, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    for line in lines:
        values = {**line.values, **{f"{metric}_sd": value for metric, value in line.spreads.items()}}
        shown = {name: repr(value) if isfinite(value) else "" for name, value in values.items()}
        table.writerow({name: csv_cell(value) for name, value in asdict(line).items()} | shown)
    return text.getvalue()


def to_markdown(lines: Sequence[TableLine]) -> str:
    """The lines as one table of Markdown, in percent."""
    columns = tuple(lines[0].values) if lines else METRICS
    several = len({line.method for line in lines}) != 1
    body = []
    for line in lines:
        product = f"mean of {line.products}" if line.product == MEAN else line.product
        product += f", view {line.view}" if line.view else ""
        features = line.features + (f", trained on {line.trained_on} test images" if line.trained_on else "")
        body.append([title(line.method)] * several + [product, features, *(percent(line, m) for m in columns)])
    return markdown_table(["Method"] * several + ["Product", "Features", *(TITLES[m] for m in columns)], body)


def percent(line: TableLine, metric: str) -> str:
    """A metric of a line with its spread, in percent."""
    value, spread = 100 * line.values[metric], 100 * line.spreads[metric]
    if not isfinite(value):
        return "-"
    shown = format(value, "+.2f" if line.features == DIFFERENCE else ".2f")
    return f"{shown} ± {spread:.2f}" if isfinite(spread) else shown


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    text = ""
    for row in (head, ["---"] * len(head), *body):
        text += f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |".replace("\n", " ") + "\n"
    return text
