"""The report of an evaluation: everything as JSON, the tables as CSV, and both for people as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..metrics import CRITERIA
from .results import PRETRAINED, Record, Results, write_json, write_text
from .tables import (
    MEAN,
    ORACLE,
    ORIGINAL_AUPRO,
    TITLES,
    TableLine,
    markdown_table,
    percent,
    table_lines,
    title,
    to_csv,
    to_markdown,
)

NOTES = """\
All numbers are percent. "pretrained" are the features of the model, "raw" those of the same backbone without
references, residuals and projector, "difference" is the first minus the second. A mean and a standard deviation (±)
over several draws of references are those of the numbers of each draw. Means are over the products that have both
kinds of features, without those for which a metric is not defined ("-"), and over the draws that all of them have.
AUPRO is exact: all thresholds, false positive rates from 0 to 0.3, interpolated to that limit; "AUPRO (original)" is
the approximation of the original code by 200 thresholds. Mask pixels above 0 are defects, after nearest resizing to
the size of the model's input.
"""
NOTES_ON_STORED = """\
Stored are the means of the evaluation that selected the file, beside the method and the data set that did. They are the
best of several, and flatter the file. Those of the authors are in bfloat16, with their references and their AUPRO:
expect equal numbers, to about a point, only with --protocol original and their references.
"""
NOTES_ON_OVERLAP = """\
**The weights were trained on test images that are judged here.** "trained on 25 of 30 test images" marks these results,
which flatter the weights: they are not what these would do on images that they have not seen.
"""
NOTES_ON_VIEWS = """\
Of the images of each view alone. "Part AUROC" above is of parts, each with the highest score of its views.
"""
NOTES_ON_ORACLE = """\
The best value of each metric over all epochs, chosen on the test images: no result that could be had in practice.
"""


def write_report(results: Results, about: Mapping[str, Any]) -> str:
    """Write results.json, results.csv and results.md into the folder of the results.

    Args:
        results: The records.
        about: Facts on the program and the model, as plain values; "weights" lists name, source and stored metrics of
            each file, and by what it was selected.

    Returns:
        The Markdown of the means and of what is not finished, for the terminal.
    """
    folder = results.folder
    records = [{key: value for key, value in record.items() if key != "curves"} for record in results.records()]
    finished = [record for record in records if "error" not in record]
    lines = table_lines(finished)
    table = [asdict(line) for line in lines]
    write_json(folder / "results.json", {**about, "settings": results.settings, "table": table, "records": records})
    means = [line for line in lines if line.product == MEAN and not line.view]
    stored = stored_table(about["weights"], finished, means)
    write_text(folder / "results.csv", to_csv(lines))
    write_text(folder / "results.md", "\n".join(_sections(results, about, records, lines, stored)))
    return "\n".join(filter(None, [_overlap(lines), to_markdown(means), stored, _not_finished(records)]))


def _sections(
    results: Results, about: Mapping[str, Any], records: Sequence[Record], lines: Sequence[TableLine], stored: str
) -> Iterator[str]:
    facts = {key: value for key, value in about.items() if key not in ("weights", "title")}
    facts["draws of references"] = max((line.draws for line in lines), default=0)
    yield f"# {about['title']}\n"
    if overlap := _overlap(lines):
        yield overlap
    yield NOTES
    yield markdown_table(["Setting", "Value"], [[key, _shown(v)] for key, v in {**facts, **results.settings}.items()])
    yield "## Means\n"
    yield to_markdown([line for line in lines if line.product == MEAN and not line.view])
    if views := [line for line in lines if line.product == MEAN and line.view]:
        yield f"## Views\n\n{NOTES_ON_VIEWS}"
        yield to_markdown(views)
    if stored:
        yield f"## Metrics stored in the files of the weights\n\n{stored}"
    for method in dict.fromkeys(line.method for line in lines):
        yield f"## {title(method)}\n"
        if method.endswith(ORACLE):
            yield NOTES_ON_ORACLE
        yield to_markdown([line for line in lines if line.method == method and not line.view])
    if not_finished := _not_finished(records):
        yield not_finished
    if warned := _warnings(records):
        yield "## Warnings\n"
        yield markdown_table(["Warning", "Where"], warned)


def stored_table(weights: Sequence[Mapping[str, Any]], records: Sequence[Record], means: Sequence[TableLine]) -> str:
    """The metrics that the files of the weights hold beside those of the method that selected them, "" for none."""
    body = []
    for entry in weights:
        took = {record["method"] for record in records if record.get("weights") == entry["name"]}
        took = {method for method in took if f" of {title(method)} on " in entry["selected_by"]}
        for line in (line for line in means if line.features == PRETRAINED and line.method in took):
            for criterion in (criterion for criterion in CRITERIA if criterion.stored in entry["stored"]):
                # The stored AUPRO is the approximation.
                approximate = criterion.field == "aupro" and ORIGINAL_AUPRO in line.values
                column = ORIGINAL_AUPRO if approximate else criterion.field
                stored = f"{100 * entry['stored'][criterion.stored]:.2f}"
                found = [title(line.method), TITLES[column], percent(line, column)]
                body.append([entry["name"], criterion.stored, stored, *found])
    head = ["Weights", "Stored as", "Stored", "Method", "Metric", "Found here"]
    return f"{markdown_table(head, body)}\n{NOTES_ON_STORED}" if body else ""


def _overlap(lines: Sequence[TableLine]) -> str:
    return NOTES_ON_OVERLAP if any(line.trained_on for line in lines) else ""


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items() if item)
    return " x ".join(map(str, value)) if isinstance(value, (list, tuple)) else "-" if value is None else str(value)


def _not_finished(records: Sequence[Record]) -> str:
    """What failed and why, "" where nothing did."""
    body = [[record["product"], _what(record), record["error"]] for record in records if "error" in record]
    return f"## Not finished\n\n{markdown_table(['Product', 'What', 'Error'], body)}" if body else ""


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
