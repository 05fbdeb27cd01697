"""Runs over many photos: rows against single scores, names of pictures, and what a run says of itself."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from helpers.models import photo, tiny_extractor, write_photos
from PIL import Image

from adfeatures.errors import AdfeaturesError, ImageError, InputError, ReferencesError
from adfeatures.extractor import FeatureExtractor
from adfeatures.inspection import find_images, inspect, set_references

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot pin down")


@pytest.fixture
def model(tmp_path: Path) -> FeatureExtractor:
    model = tiny_extractor()
    model.set_references(write_photos(tmp_path / "good", range(3)))
    return model


def test_rows_are_those_of_the_predictions_in_the_order_of_the_files(model: FeatureExtractor, tmp_path: Path) -> None:
    files = [str(path) for path in write_photos(tmp_path / "new", range(20, 25))]
    expected = model.score(files)
    for batch_size in (1, 2, 8):
        found = inspect(model, files, tmp_path / "out", batch_size=batch_size)
        assert [row.file for row in found.rows] == files
        assert [row.score for row in found.rows] == pytest.approx([p.score for p in expected], rel=1e-4)
        decisions = ["anomalous" if p.is_anomalous else "normal" for p in expected]
        assert [row.decision for row in found.rows] == decisions
    with open(tmp_path / "out" / "scores.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["file"] for row in table] == [line["file"] for line in lines] == files
    assert [float(row["score"]) for row in table] == [line["score"] for line in lines]
    assert found.summary["scored"] == 5 and found.summary["anomalous"] == decisions.count("anomalous")


def test_a_threshold_decides_in_place_of_the_bank_s(model: FeatureExtractor, tmp_path: Path) -> None:
    files = [str(path) for path in write_photos(tmp_path / "new", range(20, 22))]
    for threshold, decision in ((0.0, "anomalous"), (1e9, "normal")):
        found = inspect(model, files, tmp_path / "out", threshold=threshold)
        assert {row.decision for row in found.rows} == {decision}
        assert found.summary["threshold"] == threshold


def test_unreadable_files_have_a_row_with_the_reason(model: FeatureExtractor, tmp_path: Path) -> None:
    files = [str(path) for path in write_photos(tmp_path / "new", range(20, 23))]
    Path(files[1]).write_bytes(b"no image")
    found = inspect(model, [*files, "gone.png"], tmp_path / "out", batch_size=4)
    assert [row.score is None for row in found.rows] == [False, True, False, True]
    assert "001" not in found.rows[0].error and "021.png" in found.rows[1].error and "gone.png" in found.rows[3].error
    assert (found.summary["scored"], found.summary["failed"]) == (2, 2)


def test_pictures_keep_folders_and_equal_names_apart(model: FeatureExtractor, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_photos(tmp_path / "new" / folder, range(20, 21))
    photo(21).save(tmp_path / "new" / "a" / "020.jpg")
    files = find_images([str(tmp_path / "new")], recursive=True)
    inspect(model, files, tmp_path / "out")
    pictures = sorted(str(p.relative_to(tmp_path / "out/overlays")) for p in (tmp_path / "out/overlays").rglob("*.png"))
    assert len(pictures) == 3 and {"a/020.png", "b/020.png"} < set(pictures)
    with Image.open(tmp_path / "out" / "worst.png") as sheet:
        assert sheet.width > 480


def test_scored_references_are_named(model: FeatureExtractor, tmp_path: Path) -> None:
    files = [str(tmp_path / "good" / "001.png"), str(write_photos(tmp_path / "new", range(20, 21))[0])]
    assert inspect(model, files, tmp_path / "out").summary["scored_references"] == files[:1]


def test_a_folder_is_one_product_or_each_sub_folder_is(tmp_path: Path) -> None:
    for name in ("bolt", "nut"):
        write_photos(tmp_path / "good" / name, range(2))
    model = tiny_extractor()
    set_references(model, str(tmp_path / "good"), product_folders=True, recursive=False)
    assert list(model.references) == ["bolt", "nut"]
    model.clear_references()
    set_references(model, str(tmp_path / "good" / "nut"), product_folders=False, recursive=False)
    assert list(model.references) == ["default"]
    with pytest.raises(InputError, match="no sub-folders"):
        set_references(model, str(tmp_path / "good" / "nut"), product_folders=True, recursive=False)


def test_what_cannot_work_is_said_at_once(model: FeatureExtractor, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="No images"):
        (tmp_path / "empty").mkdir()
        find_images([str(tmp_path / "empty")], recursive=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(AdfeaturesError, match="Cannot write the results"):
        inspect(model, [str(tmp_path / "good" / "000.png")], tmp_path / "file")
    with pytest.raises(ReferencesError, match="none are set"):
        inspect(tiny_extractor(), [str(tmp_path / "good" / "000.png")], tmp_path / "out")
