"""The paper's tables: what was found here, beside what was published, and the difference.

Rows and columns have the words of the paper: backbone, method and features, data set and metric. What the paper makes
in another way than an evaluation here, and so cannot be compared, has a name of its own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from ..data import DATASETS
from ..evaluation.results import OF_LISTED, PRETRAINED, RAW, read_json, write_text
from ..evaluation.tables import MEAN, ORACLE, ORIGINAL_AUPRO, markdown_table, title
from .plan import ABLATED, BACKBONES, BOTH, PUBLISHED

NUMBERS = Path(__file__).parent / "published.csv"
ABLATIONS = "Ablations"
TITLES = {
    BOTH: "both losses",
    "angle": "angle loss alone",
    "norm": "norm loss alone",
    "no_residual": "without residuals",
}
TABLES = ("DINOv2", "CLIP", "ImageBind", ABLATIONS)
NOTES = """\
Percent: means over the products of a data set. "94.63 (94.2, +0.43)" is what was found here, in brackets what the paper
reports and the difference; "- (94.2)" was not evaluated here, and what has no brackets is not known to this project as
a published number. "2 of 15" products are no data set, and are not compared. I-AUROC is of images; PRO is the
approximation of the original code where --protocol original was used, else exact. As the paper reports them, CFLOW and
GLASS are the best of all epochs, each metric by itself, chosen on the test images, and FeatureNorm has references
listed for every test image; "last epoch" and "8-shot" are what can be had in practice. The published weights were
selected on the test set of MVTec AD. "trained here" are projectors of this run.
"""


class Key(NamedTuple):
    """Where a number stands in the tables."""

    table: str
    row: str
    column: str


class Number(NamedTuple):
    """A number found here, in percent, by whose weights, and of how many of a data set's products."""

    key: Key
    weights: str
    value: float
    products: int
    of: int


class _Line(TypedDict):
    method: str
    product: str
    features: str
    products: int
    view: str
    trained_on: str
    values: dict[str, float | None]


class _Stored(TypedDict):
    table: list[_Line]
    settings: dict[str, Any]


def published_numbers() -> dict[Key, str]:
    """What the paper reports, as far as it is known here, as text in percent."""
    with open(NUMBERS, encoding="utf-8", newline="") as file:
        return {Key(line["table"], line["row"], line["column"]): line["value"] for line in csv.DictReader(file)}


def stored_numbers(output: Path) -> Iterator[Number]:
    """The means in the folders of evaluations."""
    for file, training, backbone, data_set in _evaluations(output):
        tree = DATASETS[data_set]
        for line in read_json(file, _Stored)["table"]:
            if line["product"] != MEAN or line["view"]:
                continue
            values = line["values"]
            pro = ORIGINAL_AUPRO if ORIGINAL_AUPRO in values else "aupro"
            for metric, name in (("image_auroc", "I-AUROC"), (pro, "PRO")):
                for table, row in _rows(training, backbone, line):
                    if (value := values.get(metric)) is not None:
                        weights = "" if line["features"] == RAW or training == PUBLISHED else "trained here"
                        key = Key(table, row, f"{tree.title} {name}")
                        yield Number(key, weights, 100 * value, line["products"], len(tree.products))


def write_tables(output: Path) -> str:
    """Write ``tables.csv`` and ``tables.md`` of the results below a folder, and return the latter."""
    published = published_numbers()
    found = {(*number.key, number.weights): number for number in stored_numbers(output)}
    keys = sorted({*found, *((*key, "") for key in published if not any(key == other[:3] for other in found))})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*Key._fields, "weights", "here", "products", "published", "difference"))
    cells: dict[str, dict[str, dict[str, str]]] = {table: {} for table in TABLES}
    for table, line, column, weights in keys:
        key, number = Key(table, line, column), found.get((table, line, column, weights))
        report = published.get(key)
        whole = number is not None and number.products == number.of
        difference = f"{number.value - float(report):+.2f}" if number and whole and report else ""
        products = f"{number.products} of {number.of}" if number else ""
        writer.writerow((*key, weights, repr(number.value) if number else "", products, report or "", difference))
        shown = f"{number.value:.2f}" if number else "-"
        shown += f" ({report}{', ' * bool(difference)}{difference})" if report else ""
        shown += f", {products}" if number and not whole else ""
        row = f"{key.row}, {weights}" if weights and key.table != ABLATIONS else key.row
        cells.setdefault(key.table, {}).setdefault(row, {})[key.column] = shown
    sections = [f"# The paper's results\n\n{NOTES}"]
    for table, rows in cells.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        body = [[row, *(values.get(column, "") for column in columns)] for row, values in rows.items()]
        sections.append(
            f"## {table}\n\n{markdown_table(['', *columns], body)}" if body else f"## {table}\n\nNothing yet.\n"
        )
    head = ["Evaluation", "References", "Protocol", "Epochs", "Trained on test images"]
    sections.append(f"## How\n\n{markdown_table(head, list(_conditions(output)))}")
    write_text(output / "tables.csv", text.getvalue())
    write_text(output / "tables.md", "\n".join(sections))
    return "\n".join(sections)


def _evaluations(output: Path) -> Iterator[tuple[Path, str, str, str]]:
    """The results of each finished evaluation, with its training, backbone and data set."""
    for file in sorted(output.glob("*/*/*/*/results.json")):
        training, backbone, data_set = file.relative_to(output).parts[:3]
        if data_set in DATASETS:
            yield file, training, backbone, data_set


def _rows(training: str, backbone: str, line: _Line) -> Iterator[tuple[str, str]]:
    """The tables and rows that a line of an evaluation stands in."""
    name, features = BACKBONES.get(backbone, backbone), line["features"]
    method = _method(line["method"], has_references=features != RAW and training != "no_residual")
    if training in (PUBLISHED, BOTH) or features == RAW:
        yield name.partition("-")[0], f"{name}, {method}, {features}"
    if training in TITLES and features == PRETRAINED and line["method"].removesuffix(OF_LISTED) in ABLATED:
        yield ABLATIONS, f"{name}, {TITLES[training]}, {method}"


def _method(method: str, has_references: bool) -> str:
    """The name of a method as the paper has it."""
    if method == "feature_norm" and has_references:
        return f"{title(method)} (8-shot)"
    if method in ("cflow", "glass"):
        return f"{title(method)} (last epoch)"
    as_in_paper = ("feature_norm" + OF_LISTED, "cflow" + ORACLE, "glass" + ORACLE)
    return title(method.removesuffix(OF_LISTED).removesuffix(ORACLE) if method in as_in_paper else method)


def _conditions(output: Path) -> Iterator[list[str]]:
    for file, *_ in _evaluations(output):
        stored = read_json(file, _Stored)
        settings, marks = stored["settings"], {line["trained_on"] for line in stored["table"] if line["trained_on"]}
        references = settings["references"] or f"the first {settings['shots']} training images"
        seen = ", ".join(sorted(marks)) or "none known"
        epochs = settings["epochs"] or "the paper's"
        yield [str(file.parent.relative_to(output)), references, settings["protocol"], str(epochs), seen]
