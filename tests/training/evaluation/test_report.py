"""The files of a report: what was found, what failed and why, and what is odd."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.evaluation_records import metrics, parse, record, records

from adfeatures.errors import InputError
from training.evaluation.report import write_report
from training.evaluation.results import PRETRAINED, RAW, Combination, Results
from training.evaluation.tables import table_lines, to_csv

SETTINGS = {"model": "m", "dataset": "mvtec", "shots": 8, "weights": {"backbone": "aa"}}
ABOUT = {"title": "m on MVTec AD", "versions": {"torch": "2"}, "weights": []}


class TestReport:
    def test_files(self, tmp_path: Path) -> None:
        results = Results(tmp_path, SETTINGS)
        for entry in records():
            results.write(
                Combination(entry["method"], entry["features"], entry["draw"]),
                {**entry, "curves": {"pixel": [0.1]}, "warnings": ["odd | mask"]},
            )
        results.fail("zipper", InputError("no images in zipper"))
        results.fail("bottle", RuntimeError("out of memory"), Combination("padim", PRETRAINED, 1))
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
        assert (tmp_path / "results.csv").read_text() == to_csv(table_lines(kept))
        means, failures = printed.split("\n## Not finished\n\n")
        assert [row["Method"] for row in parse(means)] == ["FeatureNorm"] * 3 + ["PatchCore"] * 3
        assert [row["Product"] for row in parse(failures)] == ["bottle", "zipper"]

    def test_metrics_of_the_checkpoint_beside_our_own(self, tmp_path: Path) -> None:
        results = Results(tmp_path, SETTINGS)
        for method, weights in (("patchcore", "m.angle"), ("feature_norm", "m.norm")):
            for features, draw in ((RAW, None), (PRETRAINED, 0)):
                entry = record("bottle", method, features, draw, len(method + features))
                results.write(Combination(method, features, draw), {**entry, "weights": weights if draw == 0 else None})
        stored = [
            {
                "name": "m.angle",
                "stored": {"img_auc": 0.9871, "pix_auc": 0.9762, "pix_pro": 0.9453},
                "selected_by": "AUPRO of PatchCore on the test set of MVTec AD",
            },
            {"name": "m.norm", "stored": {}, "selected_by": "AUPRO of FeatureNorm on the test set of MVTec AD"},
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

    def test_metrics_of_the_checkpoint_beside_the_method_that_selected_it_alone(self, tmp_path: Path) -> None:
        results = Results(tmp_path, SETTINGS)
        for method in ("padim", "patchcore", "feature_norm_retrieved", "feature_norm"):
            results.write(Combination(method, PRETRAINED, 0), record("bottle", method, PRETRAINED, 0, len(method)))
        selected = "AUPRO of FeatureNorm on the test set of MVTec AD"
        norm = {"name": "m.tag", "stored": {"img_auc": 0.5}, "selected_by": selected}
        printed = write_report(results, {**ABOUT, "weights": [norm]})
        found = parse(printed[printed.index("| Weights") :].partition("\n\n")[0])
        own = 100 * metrics(len("feature_norm"))["image_auroc"]
        assert [(row["Method"], row["Stored"], row["Found here"]) for row in found] == [
            ("FeatureNorm", "50.00", f"{own:.2f}")
        ]
        for selected in ("", "nothing: the last one"):
            assert "| Weights" not in write_report(results, {**ABOUT, "weights": [{**norm, "selected_by": selected}]})

    def test_the_stored_aupro_is_the_approximate_one(self, tmp_path: Path) -> None:
        results = Results(tmp_path, SETTINGS)
        entry = record("bottle", "patchcore", PRETRAINED, 0, 5)
        entry["metrics"]["aupro_original"] = 0.1234
        results.write(Combination("patchcore", PRETRAINED, 0), entry)
        selected = "AUPRO of PatchCore on the test set of MVTec AD"
        weights = [{"name": "m.tag", "stored": {"pix_pro": 0.5}, "selected_by": selected}]
        printed = write_report(results, {**ABOUT, "weights": weights})
        assert "| m.tag | pix_pro | 50.00 | PatchCore | AUPRO (original) | 12.34 |" in printed
