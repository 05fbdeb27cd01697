"""Tables: means over draws and then over products, intervals over products."""

from __future__ import annotations

import csv
import io
import re

import numpy as np
import pytest

from adfeatures.errors import InputError
from training.judging.protocol import Result
from training.judging.tables import as_csv, as_markdown, of_csv


def results() -> list[Result]:
    rng = np.random.default_rng(0)
    made = []
    for product in range(12):
        for draw in range(3):
            for name, level in (("first", 0.9), ("second", 0.8)):
                auroc = level + 0.005 * product + 0.01 * rng.normal()
                made.append(Result(f"p{product}", f"g{product % 2}", name, 8, draw, auroc, 0.5, 0.4, 0.3, 0.1, "blur"))
    made += [
        Result(f"p{product}", "g", "first", 1, 0, 0.7, 0.5, 0.4, float("nan"), float("nan"), "") for product in (0, 1)
    ]
    return made


def cells(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_means_and_intervals_are_over_products() -> None:
    text = as_markdown(results(), "first")
    means = {
        name: np.array(
            [
                np.mean([r.image_auroc for r in results() if (r.product, r.contender, r.shots) == (f"p{p}", name, 8)])
                for p in range(12)
            ]
        )
        for name in ("first", "second")
    }
    eight = text[text.index("**8 references, 3 draws**") :]
    for name, values in means.items():
        mean, low, high = map(float, re.findall(r"[\d.]+", cells(eight, name)[1]))
        assert mean == pytest.approx(100 * values.mean(), abs=0.06)
        # As a normal distribution of means has them.
        half = 1.96 * 100 * values.std() / np.sqrt(12)
        assert [mean - low, high - mean] == pytest.approx([half, half], rel=0.25)
    difference = [float(number) for number in re.findall(r"[-+]?[\d.]+", cells(eight, "second")[6])]
    assert difference[0] == pytest.approx(100 * (means["second"] - means["first"]).mean(), abs=0.06)
    assert difference[1] <= difference[0] <= difference[2] < -8
    assert cells(eight, "first")[6] == ""


def test_groups_products_and_undefined_decisions_are_shown() -> None:
    text = as_markdown(results(), "first")
    one = text[text.index("**1 references, 1 draws**") : text.index("**8 references")]
    assert cells(one, "first")[4:6] == ["-", "-"]
    assert re.fullmatch(r"[\d.]+ / 30\.0 / 10\.0", cells(text, "g1")[2])
    assert len(re.findall(r"^\| p\d+ \|", text, re.MULTILINE)) == 12


def test_the_file_holds_every_result_in_full() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(results()))))
    assert len(rows) == 74
    assert [float(row["image_auroc"]) for row in rows] == [result.image_auroc for result in results()]


def test_results_are_read_as_they_were_written() -> None:
    # NaN is unequal to itself, its text is not.
    assert [*map(repr, of_csv(as_csv(results())))] == [*map(repr, results())]


@pytest.mark.parametrize("damage", [(",8,", ",eight,"), ("image_auroc", "auroc"), (",0.5,0.4,", ",")])
def test_another_table_is_refused(damage: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="no table of results"):
        of_csv(as_csv(results()).replace(*damage))
