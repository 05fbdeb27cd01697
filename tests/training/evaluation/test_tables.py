"""Tables made of records: parsed back, they are the numbers of the records, in the right columns."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from helpers.evaluation_records import metrics, parse, record, records, values

from training.evaluation.results import PRETRAINED, RAW
from training.evaluation.tables import METRICS, ORIGINAL_AUPRO, TITLES, table_lines, title, to_csv, to_markdown
from training.evaluation.views import PART_AUROC


class TestTables:
    @pytest.mark.parametrize("method", ["patchcore", "feature_norm"])
    def test_markdown_holds_the_numbers_in_their_columns(self, method: str) -> None:
        made = records()
        found = parse(to_markdown([row for row in table_lines(made) if row.method == method]))
        pretrained = {p: values(made, method, p, PRETRAINED) for p in ("bottle", "cable")}
        raw = {p: values(made, method, p, RAW)[0] for p in ("bottle", "cable")}
        pretrained["mean of 2"], raw["mean of 2"] = (np.mean(list(kind.values()), axis=0) for kind in (pretrained, raw))
        assert [(row["Product"], row["Features"]) for row in found] == [
            (product, kind)
            for product in ("bottle", "cable", "mean of 2")
            for kind in ("pretrained", "raw", "difference")
        ]
        for row in found:
            draws, own = pretrained[row["Product"]], raw[row["Product"]]
            sd = draws.std(axis=0, ddof=1)
            for index, name in enumerate(METRICS):
                cell = row[TITLES[name]]
                mean = 100 * draws[:, index].mean()
                if row["Features"] == "raw":
                    assert float(cell) == pytest.approx(100 * own[index], abs=0.00501)
                else:
                    expected = mean if row["Features"] == "pretrained" else mean - 100 * own[index]
                    assert [float(part) for part in cell.split(" ± ")] == pytest.approx(
                        [expected, 100 * sd[index]], abs=0.00501
                    )
                    assert (cell[0] in "+-") == (row["Features"] == "difference")

    def test_csv_holds_the_numbers_in_full_precision(self) -> None:
        made = records()
        found = list(csv.DictReader(io.StringIO(to_csv(table_lines(made)))))
        assert len(found) == 2 * 3 * 3
        for row in found:
            if row["product"] == "mean" or row["features"] == "difference":
                continue
            expected = values(made, row["method"], row["product"], row["features"])
            assert [float(row[name]) for name in METRICS] == pytest.approx(expected.mean(axis=0), abs=1e-12)
            assert int(row["draws"]) == len(expected)
            spreads = [row[f"{name}_sd"] for name in METRICS]
            if len(expected) == 1:
                assert spreads == [""] * 7
            else:
                assert [float(spread) for spread in spreads] == pytest.approx(expected.std(axis=0, ddof=1), abs=1e-12)

    def test_means_and_difference_of_all_products(self) -> None:
        made = records()
        by_kind = {row.features: row for row in table_lines(made) if (row.method, row.product) == ("patchcore", "mean")}
        per_draw = np.mean([values(made, "patchcore", p, PRETRAINED) for p in ("bottle", "cable")], axis=0)
        raw = np.mean([values(made, "patchcore", p, RAW)[0] for p in ("bottle", "cable")], axis=0)
        for index, name in enumerate(METRICS):
            assert by_kind["pretrained"].values[name] == pytest.approx(per_draw[:, index].mean(), abs=1e-12)
            assert by_kind["pretrained"].spreads[name] == pytest.approx(per_draw[:, index].std(ddof=1), abs=1e-12)
            assert by_kind["raw"].values[name] == pytest.approx(raw[index], abs=1e-12)
            assert by_kind["difference"].values[name] == pytest.approx(
                per_draw[:, index].mean() - raw[index], abs=1e-12
            )

    def test_names_are_no_formulas_and_numbers_are_numbers(self) -> None:
        names = {"bottle": "=HYPERLINK(A1)", "cable": "-cable"}
        made = [{**entry, "product": names[entry["product"]]} for entry in records()]
        found = list(csv.DictReader(io.StringIO(to_csv(table_lines(made)))))
        assert {row["product"] for row in found} == {"'=HYPERLINK(A1)", "'-cable", "mean"}
        gains = [float(row[name]) for row in found if row["features"] == "difference" for name in METRICS]
        assert min(gains) < 0, "a number may begin with a minus"

    def test_undefined_metrics_are_dashes_and_not_in_the_means(self) -> None:
        made = records()
        for entry in made:
            if (entry["product"], entry["method"]) == ("cable", "patchcore"):
                entry["metrics"]["aupro"] = None
        table = table_lines(made)
        found = {
            row["Product"]: row
            for row in parse(to_markdown([r for r in table if r.method == "patchcore" and r.features == "raw"]))
        }
        assert found["cable"]["AUPRO"] == "-"
        assert float(found["mean of 2"]["AUPRO"]) == pytest.approx(
            100 * values(made, "patchcore", "bottle", RAW)[0, 6].astype(float), abs=0.00501
        )
        assert float(found["cable"]["Pixel AP"]) == pytest.approx(100 * made[4]["metrics"]["pixel_ap"], abs=0.00501)
        cells = [
            row
            for row in csv.DictReader(io.StringIO(to_csv(table)))
            if (row["product"], row["method"]) == ("cable", "patchcore")
        ]
        assert [row["aupro"] for row in cells] == ["", "", ""]

    def test_means_are_of_products_that_have_both_kinds_of_features(self) -> None:
        made = [
            r
            for r in records()
            if r["method"] == "patchcore" and not (r["product"] == "cable" and r["features"] == RAW)
        ]
        mean = {row.features: row for row in table_lines(made) if row.product == "mean"}
        for kind in (PRETRAINED, RAW):
            expected = values(made, "patchcore", "bottle", kind).mean(axis=0)
            assert [mean[kind].values[name] for name in METRICS] == pytest.approx(expected, abs=1e-12)
        # Bottle alone, which is what the tables call these means.
        assert {row.products for row in mean.values()} == {1}
        alone = {row.features: row for row in table_lines([r for r in made if r["features"] == PRETRAINED])}
        assert set(alone) == {PRETRAINED}

    def test_draws_that_are_not_finished_everywhere(self) -> None:
        made = [r for r in records() if r["method"] == "patchcore" and not (r["product"] == "cable" and r["draw"] == 2)]
        mean = next(row for row in table_lines(made) if (row.product, row.features) == ("mean", PRETRAINED))
        per_draw = np.mean([values(made, "patchcore", p, PRETRAINED)[:2] for p in ("bottle", "cable")], axis=0)
        assert mean.draws == 2
        assert [mean.values[name] for name in METRICS] == pytest.approx(per_draw.mean(axis=0), abs=1e-12)

    def test_oracle_has_rows_of_its_own(self) -> None:
        best = metrics(999)
        made = [
            record("bottle", "cflow", RAW, None, 1, oracle=best),
            record("bottle", "cflow", PRETRAINED, 0, 2, oracle=metrics(998)),
        ]
        table = [row for row in table_lines(made) if row.product == "bottle" and row.features == RAW]
        assert [(row.method, row.values["aupro"]) for row in table] == [
            ("cflow", metrics(1)["aupro"]),
            ("cflow_oracle", best["aupro"]),
        ]
        assert (
            title("cflow_oracle") == "CFLOW (oracle)" and title("feature_norm_retrieved") == "FeatureNorm (retrieved)"
        )

    def test_the_approximate_aupro_has_a_column_of_its_own(self) -> None:
        made = [
            record("bottle", "patchcore", kind, None if kind == RAW else 0, seed)
            for seed, kind in enumerate((RAW, PRETRAINED))
        ]
        for number, entry in enumerate(made):
            entry["metrics"]["aupro_original"] = 0.111 + number / 2
        (row,) = parse(
            to_markdown([row for row in table_lines(made) if row.product == "bottle" and row.features == RAW])
        )
        assert row["AUPRO (original)"] == "11.10" and float(row["AUPRO"]) == pytest.approx(100 * metrics(0)["aupro"])

    def test_views_have_lines_of_their_own(self) -> None:
        made = [
            record(product, "patchcore", kind, None if kind == RAW else 0, seed)
            for seed, (product, kind) in enumerate((p, k) for p in ("bottle", "cable") for k in (RAW, PRETRAINED))
        ]
        for number, entry in enumerate(made):
            entry["metrics"]["part_auroc"] = 0.5 + number / 100
            entry["views"] = {"C1": metrics(50 + number), "C2": {**metrics(60 + number), "aupro": None}}
        table = table_lines(made)
        assert [line.view for line in table] == [""] * 9 + ["C1"] * 9 + ["C2"] * 9
        found = {(line.view, line.product, line.features): line for line in table}
        assert found["C1", "cable", RAW].values == metrics(52)
        expected = np.mean([metrics(51)["aupro"], metrics(53)["aupro"]])
        assert found["C1", "mean", PRETRAINED].values["aupro"] == pytest.approx(expected, abs=1e-12)
        shown = parse(to_markdown([line for line in table if line.view == "C2" and line.product == "mean"]))
        assert shown[0]["Product"] == "mean of 2, view C2" and shown[0]["AUPRO"] == "-"
        rows = list(csv.DictReader(io.StringIO(to_csv(table))))
        assert [row["view"] for row in rows] == [line.view for line in table]
        assert rows[0]["part_auroc"] == "0.51" and rows[9]["part_auroc"] == ""

    def test_what_was_trained_on_is_marked(self) -> None:
        made = records()
        for entry in made:
            if entry["method"] == "patchcore":
                seen = {"bottle": [25, 30], "cable": [0, 12]}[entry["product"]]
                entry["overlap"] = {"test": seen, "train": [9, 9]} if entry["features"] == PRETRAINED else None
        table = table_lines(made)
        marked = {(line.product, line.features): line.trained_on for line in table if line.method == "patchcore"}
        assert {key: mark for key, mark in marked.items() if mark} == {
            ("bottle", "pretrained"): "25 of 30",
            ("bottle", "difference"): "25 of 30",
            ("mean", "pretrained"): "25 of 42",
            ("mean", "difference"): "25 of 42",
        }
        assert not any(line.trained_on for line in table if line.method != "patchcore")
        (row, *_) = parse(to_markdown([line for line in table if line.trained_on]))
        assert row["Features"] == "pretrained, trained on 25 of 30 test images"
        rows = csv.DictReader(io.StringIO(to_csv(table)))
        assert [row["trained_on"] for row in rows] == [line.trained_on for line in table]

    def test_names_cannot_break_a_table(self) -> None:
        made = [record("a|b", "patchcore", RAW, None, 1)]
        assert r"a\|b" in to_markdown(table_lines(made))

    def test_no_records(self) -> None:
        assert table_lines([]) == [] and parse(to_markdown([])) == []
        assert to_csv([]).startswith("method,product,features,products,draws,image_auroc,image_auroc_sd")


def test_every_metric_has_a_title() -> None:
    assert set(TITLES) == {*METRICS, ORIGINAL_AUPRO, PART_AUROC}
