"""Records on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adfeatures.errors import InputError
from training.evaluation.results import PRETRAINED, RAW, Combination, Results

SETTINGS = {"model": "m", "dataset": "mvtec", "shots": 8, "weights": {"backbone": "aa"}}


class TestResults:
    def test_a_record_is_read_back(self, tmp_path: Path) -> None:
        combination = Combination("padim", PRETRAINED, 3)
        results = Results(tmp_path, SETTINGS)
        assert results.read("bottle", combination) is None
        results.write(
            combination,
            {"product": "bottle", "metrics": {"aupro": float("nan"), "image_ap": 0.1}, "geometry": ("a", "b")},
        )
        again = Results(tmp_path, SETTINGS).read("bottle", combination)
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
        combination, results = Combination("padim", RAW), Results(tmp_path, SETTINGS)
        results.fail("bottle", InputError("broken"), combination)
        assert results.read("bottle", combination) is None and not results.failed("bottle")
        results.fail("bottle", InputError("broken"))
        assert results.failed("bottle")
        results.clear("bottle")
        results.clear("bottle")
        assert not results.failed("bottle")
        results.write(combination, {"product": "bottle", "metrics": {}})
        assert [entry.get("error") for entry in results.records()] == [None]

    def test_other_settings_are_refused(self, tmp_path: Path) -> None:
        Results(tmp_path, SETTINGS)
        with pytest.raises(InputError, match="shots was 8, is 4.*Choose another --output"):
            Results(tmp_path, {**SETTINGS, "shots": 4})
        with pytest.raises(InputError, match="weights of backbone was 'aa', is 'bb'"):
            Results(tmp_path, {**SETTINGS, "weights": {"backbone": "bb"}})

    def test_a_folder_that_an_earlier_version_wrote(self, tmp_path: Path) -> None:
        (tmp_path / "results/bottle").mkdir(parents=True)
        (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
        names = {
            "feature_norm-raw": ("feature_norm", "raw", None),
            "feature_norm_retrieved-pretrained": ("feature_norm_retrieved", "pretrained", None),
            "patchcore-pretrained-1": ("patchcore", "pretrained", 1),
        }
        for name, (method, features, draw) in names.items():
            entry: dict[str, object] = {
                "method": method,
                "features": features,
                "draw": draw,
                "product": "bottle",
                "metrics": {},
            }
            (tmp_path / f"results/bottle/{name}.json").write_text(json.dumps(entry))
        (tmp_path / "results/bottle/failure.json").write_text('{"product": "bottle", "error": "no images"}')
        results = Results(tmp_path, SETTINGS)
        for key in names.values():
            found = results.read("bottle", Combination(*key))
            assert found is not None and (found["method"], found["features"], found["draw"]) == key
        assert results.failed("bottle") and len(results.records()) == 4

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
        combination, results = Combination("padim", RAW), Results(tmp_path, SETTINGS)
        results.write(combination, {"product": "bottle", "metrics": {}})
        (path,) = (tmp_path / "results" / "bottle").iterdir()
        record = {"product": "bottle", "method": "padim", "features": "raw", "draw": None, "metrics": {"aupro": 0.5}}
        path.write_text(json.dumps(record))
        assert results.read("bottle", combination) == record
        changes: tuple[dict[str, Any], ...] = ({"metrics": 5}, {"metrics": {"aupro": "1"}}, {"draw": "0"},
                   {"product": 3}, {"oracle": []}, {"warnings": [1]}, {"error": 3, "draw": "x"}, {"weights": 1},
                   {"views": {"C1": 2}}, {"curves": {"pixel": [None]}}, {"overlap": {"test": 3}})  # fmt: skip
        damaged = [{**record, **change} for change in changes]
        for text in ("{", "[]", "[" * 100_000, "{}", '{"error": "x"}', "NaN", *map(json.dumps, damaged)):
            path.write_text(text)
            with pytest.raises(InputError, match=f"{path.name} cannot be read"):
                results.read("bottle", combination)
            with pytest.raises(InputError, match=f"{path.name} cannot be read"):
                results.records()
        for text in ("{}", "[]", '{"weights": 3}'):
            (tmp_path / "settings.json").write_text(text)
            with pytest.raises(InputError, match=r"settings\.json cannot be read"):
                Results(tmp_path, SETTINGS)

    def test_what_a_killed_process_was_writing_is_no_record(self, tmp_path: Path) -> None:
        results = Results(tmp_path, SETTINGS)
        results.write(Combination("padim", RAW), {"product": "bottle", "metrics": {}})
        (path,) = (tmp_path / "results/bottle").iterdir()
        path.with_name(f".{path.stem}.0123abcd.json").write_text(path.read_text())
        path.with_name(f".{path.stem}.4567abcd.json").touch()
        assert [record["product"] for record in results.records()] == ["bottle"]
