"""Records on disk, and the tables that are made of them: parsed back, they are the numbers of the records, in the right columns."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from adfeatures.errors import InputError
from training.evaluation import report
from training.evaluation.recipes import RECIPES, title
from training.evaluation.report import METRICS, TITLES, rows, to_csv, to_markdown, write_report
from training.evaluation.results import PRETRAINED, RAW, Record, Results, Run
from training.methods import METHODS

SETTINGS = {"model": "m", "dataset": "mvtec", "shots": 8, "weights": {"backbone": "aa"}}
ABOUT = {"title": "m on MVTec AD", "versions": {"torch": "2"}, "weights": []}


def metrics(seed: int) -> dict[str, float]:
    """Seven numbers, all different."""
    return dict(zip(METRICS, np.random.RandomState(seed).permutation(1000)[:7] / 1000, strict=True))


def record(product: str, method: str, features: str, draw: int | None, seed: int, **more: object) -> Record:
    return {
        "product": product,
        "method": method,
        "features": features,
        "draw": draw,
        "metrics": metrics(seed),
        "weights": "m.tag",
        **more,
    }


def records() -> list[Record]:
    """Two products, two methods, three draws."""
    made = []
    for number, (product, method) in enumerate(
        [(p, m) for m in ("patchcore", "feature_norm") for p in ("bottle", "cable")]
    ):
        made.append(record(product, method, RAW, None, 100 + number))
        made += [record(product, method, PRETRAINED, draw, 10 * number + draw) for draw in range(3)]
    return made


def parse(table: str) -> list[dict[str, str]]:
    """A table of Markdown as dicts by the titles of its columns."""
    head, _, *body = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.strip().splitlines()
    ]
    return [dict(zip(head, row, strict=True)) for row in body]


def values(made: list[Record], method: str, product: str, features: str) -> np.ndarray:
    """Metrics (draws, 7) of the records."""
    own = [r for r in made if (r["method"], r["product"], r["features"]) == (method, product, features)]
    return np.array([[r["metrics"][name] for name in METRICS] for r in sorted(own, key=lambda r: r["draw"] or 0)])


class TestTables:
    @pytest.mark.parametrize("method", ["patchcore", "feature_norm"])
    def test_markdown_holds_the_numbers_in_their_columns(self, method: str) -> None:
        made = records()
        found = parse(to_markdown([row for row in rows(made) if row.method == method]))
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
        found = list(csv.DictReader(io.StringIO(to_csv(rows(made)))))
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
        by_kind = {row.features: row for row in rows(made) if (row.method, row.product) == ("patchcore", "mean")}
        per_draw = np.mean([values(made, "patchcore", p, PRETRAINED) for p in ("bottle", "cable")], axis=0)
        raw = np.mean([values(made, "patchcore", p, RAW)[0] for p in ("bottle", "cable")], axis=0)
        for index, name in enumerate(METRICS):
            assert by_kind["pretrained"].values[name] == pytest.approx(per_draw[:, index].mean(), abs=1e-12)
            assert by_kind["pretrained"].spreads[name] == pytest.approx(per_draw[:, index].std(ddof=1), abs=1e-12)
            assert by_kind["raw"].values[name] == pytest.approx(raw[index], abs=1e-12)
            assert by_kind["difference"].values[name] == pytest.approx(
                per_draw[:, index].mean() - raw[index], abs=1e-12
            )

    def test_undefined_metrics_are_dashes_and_not_in_the_means(self) -> None:
        made = records()
        for entry in made:
            if (entry["product"], entry["method"]) == ("cable", "patchcore"):
                entry["metrics"]["aupro"] = None
        table = rows(made)
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
        mean = {row.features: row for row in rows(made) if row.product == "mean"}
        for kind in (PRETRAINED, RAW):
            expected = values(made, "patchcore", "bottle", kind).mean(axis=0)
            assert [mean[kind].values[name] for name in METRICS] == pytest.approx(expected, abs=1e-12)
        # Bottle alone, which is what the tables call these means.
        assert {row.products for row in mean.values()} == {1}
        alone = {row.features: row for row in rows([r for r in made if r["features"] == PRETRAINED])}
        assert set(alone) == {PRETRAINED}

    def test_draws_that_are_not_finished_everywhere(self) -> None:
        made = [r for r in records() if r["method"] == "patchcore" and not (r["product"] == "cable" and r["draw"] == 2)]
        mean = next(row for row in rows(made) if (row.product, row.features) == ("mean", PRETRAINED))
        per_draw = np.mean([values(made, "patchcore", p, PRETRAINED)[:2] for p in ("bottle", "cable")], axis=0)
        assert mean.draws == 2
        assert [mean.values[name] for name in METRICS] == pytest.approx(per_draw.mean(axis=0), abs=1e-12)

    def test_oracle_has_rows_of_its_own(self) -> None:
        best = metrics(999)
        made = [
            record("bottle", "cflow", RAW, None, 1, oracle=best),
            record("bottle", "cflow", PRETRAINED, 0, 2, oracle=metrics(998)),
        ]
        table = [row for row in rows(made) if row.product == "bottle" and row.features == RAW]
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
        (row,) = parse(to_markdown([row for row in rows(made) if row.product == "bottle" and row.features == RAW]))
        assert row["AUPRO (original)"] == "11.10" and float(row["AUPRO"]) == pytest.approx(100 * metrics(0)["aupro"])

    def test_names_cannot_break_a_table(self) -> None:
        made = [record("a|b", "patchcore", RAW, None, 1)]
        assert r"a\|b" in to_markdown(rows(made))

    def test_no_records(self) -> None:
        assert rows([]) == [] and parse(to_markdown([])) == []
        assert to_csv([]).startswith("method,product,features,products,draws,image_auroc,image_auroc_sd")


class TestReport:
    def test_files(self, tmp_path: Path) -> None:
        results = Results(tmp_path, SETTINGS)
        for entry in records():
            results.write(
                Run(entry["method"], entry["features"], entry["draw"]),
                {**entry, "curves": {"pixel": [0.1]}, "warnings": ["odd | mask"]},
            )
        results.fail("zipper", InputError("no images in zipper"))
        results.fail("bottle", RuntimeError("out of memory"), Run("padim", PRETRAINED, 1))
        printed = write_report(results, ABOUT)
        found = json.loads((tmp_path / "results.json").read_text())
        assert found["settings"]["shots"] == 8 and found["versions"] == {"torch": "2"}
        kept = [r for r in found["records"] if "error" not in r]
        assert len(kept) == 16 and not any("curves" in r for r in kept)
        assert {r["error"] for r in found["records"] if "error" in r} == {
            "no images in zipper",
            "RuntimeError: out of memory",
        }
        line = next(
            r for r in found["table"] if (r["method"], r["product"], r["features"]) == ("patchcore", "bottle", "raw")
        )
        assert line["values"] == metrics(100)
        text = (tmp_path / "results.md").read_text()
        assert "| zipper | all | no images in zipper |" in text
        assert "| bottle | PaDiM, pretrained, draw 2 | RuntimeError: out of memory |" in text
        assert (
            r"| odd \| mask | bottle (FeatureNorm), bottle (PatchCore), cable (FeatureNorm), cable (PatchCore) |"
            in text
        )
        assert (
            text.index("## Means")
            < text.index("## FeatureNorm")
            < text.index("## PatchCore")
            < text.index("## Not finished")
        )
        assert "| draws of references | 3 |" in text
        assert (tmp_path / "results.csv").read_text() == to_csv(rows(kept))
        means, failures = printed.split("\n## Not finished\n\n")
        assert [row["Method"] for row in parse(means)] == ["FeatureNorm"] * 3 + ["PatchCore"] * 3
        assert [row["Product"] for row in parse(failures)] == ["bottle", "zipper"]

    def test_metrics_of_the_checkpoint_beside_our_own(self, tmp_path: Path) -> None:
        results = Results(tmp_path, SETTINGS)
        for method, weights in (("patchcore", "m.angle"), ("feature_norm", "m.norm")):
            for features, draw in ((RAW, None), (PRETRAINED, 0)):
                entry = record("bottle", method, features, draw, len(method + features))
                results.write(Run(method, features, draw), {**entry, "weights": weights if draw == 0 else None})
        stored = [
            {"name": "m.angle", "source": "", "stored": {"img_auc": 0.9871, "pix_auc": 0.9762, "pix_pro": 0.9453}},
            {"name": "m.norm", "source": "", "stored": {}},
        ]
        printed = write_report(results, {**ABOUT, "weights": stored})
        found = parse(printed[printed.index("| Weights") :].partition("\n\n")[0])
        own = metrics(len("patchcore" + PRETRAINED))
        assert [(row["Method"], row["Stored as"], row["Stored"], row["Metric"]) for row in found] == [
            ("PatchCore", "img_auc", "98.71", "Image AUROC"),
            ("PatchCore", "pix_auc", "97.62", "Pixel AUROC"),
            ("PatchCore", "pix_pro", "94.53", "AUPRO"),
        ]
        expected = [100 * own[name] for name in ("image_auroc", "pixel_auroc", "aupro")]
        assert [float(row["Found here"]) for row in found] == pytest.approx(expected, abs=0.00501)

    def test_metrics_of_the_checkpoint_beside_any_method(self, tmp_path: Path) -> None:
        results = Results(tmp_path, SETTINGS)
        for method in ("padim", "feature_norm_retrieved"):
            results.write(Run(method, PRETRAINED, 0), record("bottle", method, PRETRAINED, 0, len(method)))
        printed = write_report(
            results, {**ABOUT, "weights": [{"name": "m.tag", "source": "", "stored": {"img_auc": 0.5}}]}
        )
        for method, name in (("padim", "PaDiM"), ("feature_norm_retrieved", "FeatureNorm (retrieved)")):
            own = 100 * metrics(len(method))["image_auroc"]
            assert f"| m.tag | img_auc | 50.00 | {name} | Image AUROC | {own:.2f} |" in printed

    def test_the_stored_aupro_is_the_approximate_one(self, tmp_path: Path) -> None:
        results = Results(tmp_path, SETTINGS)
        entry = record("bottle", "patchcore", PRETRAINED, 0, 5)
        entry["metrics"]["aupro_original"] = 0.1234
        results.write(Run("patchcore", PRETRAINED, 0), entry)
        printed = write_report(
            results, {**ABOUT, "weights": [{"name": "m.tag", "source": "", "stored": {"pix_pro": 0.5}}]}
        )
        assert "| m.tag | pix_pro | 50.00 | PatchCore | AUPRO (original) | 12.34 |" in printed


class TestResults:
    def test_a_record_is_read_back(self, tmp_path: Path) -> None:
        run = Run("padim", PRETRAINED, 3)
        results = Results(tmp_path, SETTINGS)
        assert results.read("bottle", run) is None
        results.write(
            run, {"product": "bottle", "metrics": {"aupro": float("nan"), "image_ap": 0.1}, "geometry": ("a", "b")}
        )
        again = Results(tmp_path, SETTINGS).read("bottle", run)
        assert again == {
            "method": "padim",
            "features": PRETRAINED,
            "draw": 3,
            "product": "bottle",
            "metrics": {"aupro": None, "image_ap": 0.1},
            "geometry": ["a", "b"],
        }
        for path in tmp_path.rglob("*.json"):
            json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    def test_failures_are_not_finished(self, tmp_path: Path) -> None:
        run, results = Run("padim", RAW), Results(tmp_path, SETTINGS)
        results.fail("bottle", InputError("broken"), run)
        assert results.read("bottle", run) is None and not results.failed("bottle")
        results.fail("bottle", InputError("broken"))
        assert results.failed("bottle")
        results.clear("bottle")
        results.clear("bottle")
        assert not results.failed("bottle")
        results.write(run, {"product": "bottle", "metrics": {}})
        assert [entry.get("error") for entry in results.records()] == [None]

    def test_other_settings_are_refused(self, tmp_path: Path) -> None:
        Results(tmp_path, SETTINGS)
        with pytest.raises(InputError, match="shots was 8, is 4.*Choose another --output"):
            Results(tmp_path, {**SETTINGS, "shots": 4})
        with pytest.raises(InputError, match="weights of backbone was 'aa', is 'bb'"):
            Results(tmp_path, {**SETTINGS, "weights": {"backbone": "bb"}})

    def test_weights_of_other_tags_may_come_later(self, tmp_path: Path) -> None:
        Results(tmp_path, {**SETTINGS, "weights": {"backbone": "aa", "projector realiad_norm": "cc"}})
        later = Results(tmp_path, {**SETTINGS, "weights": {"backbone": "aa", "projector realiad_angle": "dd"}})
        assert later.settings["weights"] == {
            "backbone": "aa",
            "projector realiad_norm": "cc",
            "projector realiad_angle": "dd",
        }
        with pytest.raises(InputError, match="projector realiad_norm"):
            Results(tmp_path, {**SETTINGS, "weights": {"projector realiad_norm": "ee"}})

    def test_damaged_files_are_named(self, tmp_path: Path) -> None:
        run, results = Run("padim", RAW), Results(tmp_path, SETTINGS)
        results.write(run, {"product": "bottle", "metrics": {}})
        (path,) = (tmp_path / "results" / "bottle").iterdir()
        path.write_text("{")
        with pytest.raises(InputError, match=f"{path.name} cannot be read"):
            results.read("bottle", run)

    def test_what_a_killed_process_was_writing_is_no_record(self, tmp_path: Path) -> None:
        results = Results(tmp_path, SETTINGS)
        results.write(Run("padim", RAW), {"product": "bottle", "metrics": {}})
        (path,) = (tmp_path / "results/bottle").iterdir()
        path.with_name(f".{path.stem}.0123abcd.json").write_text(path.read_text())
        path.with_name(f".{path.stem}.4567abcd.json").touch()
        assert [record["product"] for record in results.records()] == ["bottle"]


def test_every_method_has_a_recipe_and_every_metric_a_title() -> None:
    assert set(RECIPES) == set(METHODS)
    assert set(TITLES) == {*METRICS, report.ORIGINAL_AUPRO}
