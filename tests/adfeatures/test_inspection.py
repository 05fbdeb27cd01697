"""Runs over many photos: rows against single scores, names of pictures, and what a run says of itself."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Generator, Iterable
from dataclasses import asdict
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.models import photo, tiny_extractor, write_photos
from PIL import Image

from adfeatures import inspection, predictor, results
from adfeatures.detectors import set_references
from adfeatures.errors import ImageError, InputError, ReferencesError
from adfeatures.extractor import FeatureExtractor
from adfeatures.inspection import Outcome, Terms, inspect, outcomes
from adfeatures.overlays import contact_sheet, encoded
from adfeatures.predictor import score_photos
from adfeatures.results import ImageRow, mark
from adfeatures.scoring import AnomalyMap
from adfeatures.worklist import find_images

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


@pytest.mark.parametrize("threshold", [-1.0, math.inf, math.nan])
def test_other_thresholds_are_refused(model: FeatureExtractor, tmp_path: Path, threshold: float) -> None:
    with pytest.raises(InputError, match="must be a score"):
        inspect(model, [str(tmp_path / "good" / "000.png")], tmp_path / "out", threshold=threshold)
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(InputError, match=r"Cannot write .*/file: it is a file\. Choose a folder"):
        inspect(model, [str(tmp_path / "good" / "000.png")], tmp_path / "file")
    with pytest.raises(ReferencesError, match="none are set"):
        inspect(tiny_extractor(), [str(tmp_path / "good" / "000.png")], tmp_path / "out")


def test_names_are_no_formulas(model: FeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [
        "=1+1.png",
        "+1.png",
        "-1.png",
        "@SUM(A1).png",
        "\t=1.png",
        "\r=1.png",
        "'=1.png",
        "''-1.png",
        "'a.png",
        "a=1.png",
    ]
    for name in names:
        Path(name).write_bytes(b"no image")
    inspect(model, names, "out")
    with open("out/scores.csv", newline="", encoding="utf-8") as file:
        cells = [row["file"] for row in csv.DictReader(file)]
    assert [cell for cell in cells if cell[0] in "=+-@\t\r"] == []
    # A spreadsheet hides the first apostrophe of a cell; the name is what it shows.
    assert [re.sub(r"^'(?='*[=+@\t\r-])", "", cell) for cell in cells] == names
    lines = Path("out/scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["file"] for line in lines] == names


class TestOutput:
    """What lies in the output folder: images to score, foreign files, a former result."""

    def test_images_are_never_written_over(self, model: FeatureExtractor, tmp_path: Path) -> None:
        photos = write_photos(tmp_path / "data" / "overlays", range(20, 22))
        before = [path.read_bytes() for path in photos]
        with pytest.raises(InputError, match=r"020\.png is where the results of this run go"):
            inspect(model, [str(path) for path in photos], tmp_path / "data")
        assert [path.read_bytes() for path in photos] == before
        assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["overlays"]

    @pytest.mark.parametrize("name", ["overlays/020.png", "worst.png", "scores.csv", "summary.json"])
    def test_foreign_files_are_never_written_over(self, model: FeatureExtractor, tmp_path: Path, name: str) -> None:
        files = [str(path) for path in write_photos(tmp_path / "new", range(20, 21))]
        foreign = tmp_path / "out" / name
        foreign.parent.mkdir(parents=True)
        foreign.write_text("mine")
        with pytest.raises(InputError, match="was not written by an earlier run"):
            inspect(model, files, tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == [foreign.name]
        assert foreign.read_text() == "mine"

    @pytest.mark.parametrize("place", ["overlays", ".adfeatures-new", "overlays/deep", "scores.csv", "worst.png"])
    @pytest.mark.parametrize("again", [False, True])
    def test_nothing_is_written_through_a_link(
        self, model: FeatureExtractor, tmp_path: Path, place: str, again: bool
    ) -> None:
        photos = write_photos(tmp_path / "new", range(20, 21)) + write_photos(tmp_path / "new/deep", range(21, 22))
        files, out = [str(path) for path in photos], tmp_path / "out"
        if again:
            inspect(model, files, out)
        link, elsewhere = out / place, tmp_path / "elsewhere"
        if link.is_dir():
            link.rename(elsewhere)
        elif link.suffix:
            elsewhere.write_text("mine")
            link.unlink(missing_ok=True)
        else:
            elsewhere.mkdir()
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(elsewhere)
        before = {path: path.is_file() and path.read_bytes() for path in (elsewhere, *elsewhere.rglob("*"))}
        if again and link.suffix:
            inspect(model, files, out)
            assert not link.is_symlink()
        else:
            with pytest.raises(InputError, match=f"{re.escape(str(link))} (is a link|exists and was not written)"):
                inspect(model, files, out)
        assert before == {path: path.is_file() and path.read_bytes() for path in (elsewhere, *elsewhere.rglob("*"))}

    def test_a_new_run_replaces_its_own_files_and_no_others(self, model: FeatureExtractor, tmp_path: Path) -> None:
        files = [str(path) for path in write_photos(tmp_path / "new", range(20, 24))]
        inspect(model, files, tmp_path / "out")
        (tmp_path / "out" / "overlays" / "mine.png").write_text("mine")
        # A PNG whose header promises more pixels than Pillow opens, and one that never ends.
        header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header))
        (tmp_path / "out" / "overlays" / "bomb.png").write_bytes(bomb)
        if hasattr(os, "mkfifo"):
            os.mkfifo(tmp_path / "out" / "overlays" / "pipe.png")
        inspect(model, files[:1], tmp_path / "out")
        (tmp_path / "out" / "overlays" / "bomb.png").unlink()
        found = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
        drawn = ["overlays/020.png", "overlays/mine.png"]
        tables = ["scores.csv", "scores.jsonl", *["scores.parquet"] * (find_spec("pyarrow") is not None)]
        assert found == [*drawn, *tables, "summary.json", "worst.png"]
        Path(files[1]).write_bytes(b"no image")
        inspect(model, files[1:2], tmp_path / "out")
        assert not (tmp_path / "out" / "worst.png").exists(), "nothing was scored"
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["failed"] == 1

    @pytest.mark.parametrize("after", [0, 2])
    def test_a_run_that_fails_leaves_the_former_result(
        self, model: FeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
    ) -> None:
        files = [str(path) for path in write_photos(tmp_path / "new", range(20, 24))]
        inspect(model, files, tmp_path / "out")
        before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
        original, calls = FeatureExtractor.anomaly_map, 0

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(FeatureExtractor, "anomaly_map", interrupted)
        with pytest.raises(KeyboardInterrupt):
            inspect(model, files[::-1], tmp_path / "out", batch_size=1)
        assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            inspect(model, files, tmp_path / "fresh", batch_size=1)
        assert len((tmp_path / "fresh" / "scores.jsonl").read_text().splitlines()) == after

    def test_a_glob_does_not_take_drawings_for_photos(self, model: FeatureExtractor, tmp_path: Path) -> None:
        photos = [str(path) for path in write_photos(tmp_path / "new", range(20, 22))]
        inspect(model, photos, tmp_path / "new")
        everything = sorted(str(path) for path in (tmp_path / "new").iterdir() if path.suffix in ("", ".png"))
        assert len(everything) == 4
        with pytest.warns(UserWarning, match="3 pictures were drawn by an earlier run"):
            assert list(find_images(everything, recursive=False)) == photos
        with pytest.raises(ImageError, match="drawn by an earlier run"):
            find_images([str(tmp_path / "new" / "overlays")], recursive=False)

    def test_a_run_follows_one_that_was_interrupted(
        self, model: FeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The rows of the first tell but one of two folders."""
        for folder in ("a", "b"):
            write_photos(tmp_path / "new" / folder, range(20, 22))
        files = find_images([str(tmp_path / "new")], recursive=True)
        original = inspection.score_photos
        monkeypatch.setattr(inspection, "score_photos", lambda *arguments: islice(original(*arguments), 2))
        with pytest.raises(ValueError, match="shorter"):
            inspect(model, files, tmp_path / "out")
        assert len(list((tmp_path / "out" / "overlays").rglob("*.png"))) == 2
        monkeypatch.undo()
        assert inspect(model, files, tmp_path / "out").summary["scored"] == 4
        assert len(list((tmp_path / "out" / "overlays").rglob("*.png"))) == 4

    def test_the_folder_may_be_that_of_the_images(self, model: FeatureExtractor, tmp_path: Path) -> None:
        write_photos(tmp_path / "new", range(20, 22))
        for _ in range(2):
            files = find_images([str(tmp_path / "new")], recursive=True)
            assert inspect(model, files, tmp_path / "new").summary["images"] == 2


def test_large_images_are_drawn_at_a_bounded_size(model: FeatureExtractor, tmp_path: Path) -> None:
    photo(20, (5000, 1000)).save(tmp_path / "wide.png")
    photo(21, (20, 4200)).save(tmp_path / "tall.png")
    files = [str(tmp_path / "wide.png"), str(tmp_path / "tall.png")]
    found = inspect(model, files, tmp_path / "out", keep_maps=True)
    assert [map.shape for map in found.maps] == [(410, 2048), (2048, 10)]
    with Image.open(tmp_path / "out" / "overlays" / "wide.png") as drawn:
        assert 2048 < drawn.width < 2500 and drawn.height < 600
    assert [row.score for row in found.rows] == [prediction.score for prediction in model.score(files)]


def test_the_worst_are_those_of_the_highest_scores(model: FeatureExtractor, tmp_path: Path) -> None:
    scores = [3.0, 1.0, 3.0, 2.0, *[0.5] * 12, 9.0]

    def engine(files: Iterable[str], _: Terms) -> Generator[Outcome]:
        for number, file in enumerate(files):
            picture = encoded(Image.new("RGB", (480, 100), (number, 0, 0)), ".png", pnginfo=mark())
            yield Outcome(ImageRow(file, scores[number]), picture)

    inspect(model, [f"{number}.png" for number in range(len(scores))], tmp_path / "out", engine=engine)
    order = sorted(range(len(scores)), key=lambda number: (-scores[number], number))[:12]
    expected = contact_sheet([Image.new("RGB", (480, 100), (n, 0, 0)) for n in order], columns=4, tile_width=480)
    with Image.open(tmp_path / "out" / "worst.png") as sheet:
        assert sheet.tobytes() == expected.tobytes()


def test_names_that_are_not_utf8_are_escaped_and_can_be_read_back(model: FeatureExtractor, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    name = os.path.join(os.fsencode(tmp_path / "new"), b"caf\xe9.png")
    with open(name, "wb") as file:
        photo(20).save(file, "PNG")
    (found,) = inspect(model, find_images([str(tmp_path / "new")], False), tmp_path / "out").rows
    (line,) = (tmp_path / "out" / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert os.fsencode(json.loads(line)["file"]) == os.fsencode(found.file) == name
    table = (tmp_path / "out" / "scores.csv").read_text(encoding="utf-8")
    assert "caf\\udce9.png" in table and found.score is not None
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 1


def test_folders_that_are_no_products_are_passed_over(tmp_path: Path) -> None:
    write_photos(tmp_path / "good" / "bolt", range(2))
    for name in ("@eaDir", ".git", "empty"):
        (tmp_path / "good" / name).mkdir()
    model = tiny_extractor()
    with pytest.warns(UserWarning, match="empty is not a product") as warned:
        set_references(model, str(tmp_path / "good"), product_folders=True, recursive=False)
    assert list(model.references) == ["bolt"] and len(warned) == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory of a process is read from /proc")
@pytest.mark.parametrize("sizes", [[(8000, 5625)] * 3, [(10_000, 8000), (1000, 40_000)]])
def test_large_images_fit_into_memory(tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    """Photos of 45 megapixels in one batch, or larger ones, with the model that comes with the package."""
    write_photos(tmp_path / "good", range(2))
    (tmp_path / "new").mkdir()
    for number, size in enumerate(sizes):
        photo(number, (160, 120)).resize(size).save(tmp_path / "new" / f"{number}.jpg")
    # Not by getrusage, which counts what the process of the tests held when it forked.
    code = (
        "import sys; from adfeatures.cli import main; print(main(sys.argv[1:])); "
        "print(next(int(line.split()[1]) / 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    good, out, new = (str(tmp_path / name) for name in ("good", "out", "new"))
    arguments = ["score", "--references", good, "--output", out, new]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    *_, done, megabytes = result.stdout.split()
    assert int(done) == 0 and len(list((tmp_path / "out" / "overlays").iterdir())) == len(sizes)
    assert len(sizes) < 3 or float(megabytes) < 1500


def contents(folder: Path) -> dict[str, Any]:
    """All files of a result, without what says how long it took."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files["summary.json"] = re.sub(rb'"seconds_per_image": [\d.e-]+', b"", files["summary.json"])
    return files


class TestResume:
    """A run that is continued ends with the bytes of one that was not cut short."""

    @pytest.fixture
    def files(self, tmp_path: Path) -> list[str]:
        files = [str(path) for path in write_photos(tmp_path / "new", range(20, 25))]
        Path(files[3]).write_bytes(b"no image")
        return [files[0], str(tmp_path / "good" / "001.png"), *files[1:], "gone.png"]

    @staticmethod
    def cut(model: FeatureExtractor, after: int, computed: list[str]) -> Any:
        """An engine that fails after so many images."""

        def engine(files: Iterable[str], terms: Terms) -> Generator[Outcome]:
            for outcome in outcomes(model, files, terms):
                if len(computed) == after:
                    raise KeyboardInterrupt
                computed.append(outcome.row.file)
                yield outcome

        return engine

    @pytest.mark.parametrize("former", [False, True])
    @pytest.mark.parametrize("after", [0, 1, 3, 4, 6])
    def test_bytes_are_those_of_one_run(
        self, model: FeatureExtractor, files: list[str], tmp_path: Path, former: bool, after: int
    ) -> None:
        inspect(model, files, tmp_path / "whole", batch_size=2)
        out, computed = tmp_path / "out", list[str]()
        if former:
            inspect(model, files[:1], out)
            before = contents(out)
        with pytest.raises(KeyboardInterrupt):
            inspect(model, files, out, batch_size=2, resume=True, engine=self.cut(model, after, computed))
        begun = out / ".adfeatures-new" if former else out
        lines = (begun / "scores.jsonl").read_text().splitlines()
        assert computed == files[:after] == [json.loads(line)["file"] for line in lines]
        if former:
            assert {name: contents(out)[name] for name in before} == before
        # A kill may come within a row, before its twin, or after its picture.
        with open(begun / "scores.jsonl", "a") as table, open(begun / ".adfeatures-begun.jsonl", "a") as own:
            table.write('{"file": "0')
            own.write(f"{after}")
        computed.clear()
        found = inspect(model, files, out, batch_size=2, resume=True, engine=self.cut(model, 99, computed))
        assert computed == files[after - after % 2 :], "finished batches are not computed again"
        assert contents(out) == contents(tmp_path / "whole")
        assert found.summary["scored_references"] == [files[1]] and len(found.rows) == 7

    def test_a_complete_result_is_left_as_it_is(
        self, model: FeatureExtractor, files: list[str], tmp_path: Path
    ) -> None:
        whole = inspect(model, files, tmp_path / "out")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
        again = inspect(model, files, tmp_path / "out", resume=True, engine=self.cut(model, 0, []))
        assert again.summary == whole.summary and again.rows == whole.rows
        assert before == {path: path.stat().st_mtime_ns for path in before}
        # Others, or more of them, are another run.
        assert inspect(model, files[:2], tmp_path / "out", resume=True).summary["images"] == 2
        assert len(list((tmp_path / "out" / "overlays").rglob("*.png"))) == 2

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"batch_size": 3}, "a run with batch_size 2, and this one has 3"),
            ({"batch_size": 2, "threshold": 5.0}, "a run with threshold .*, and this one has 5.0"),
        ],
    )
    def test_other_options_or_images_are_refused(
        self, model: FeatureExtractor, files: list[str], tmp_path: Path, options: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(KeyboardInterrupt):
            inspect(model, files, tmp_path / "out", batch_size=2, engine=self.cut(model, 4, []))
        before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
        with pytest.raises(InputError, match=reason):
            inspect(model, files, tmp_path / "out", resume=True, **options)
        with pytest.raises(InputError, match=r"a row of .*020\.png, and this run has .*gone\.png in its place"):
            inspect(model, files[::-1], tmp_path / "out", batch_size=2, resume=True)
        with pytest.raises(InputError, match=r"this run has nothing in its place"):
            inspect(model, files[:3], tmp_path / "out", batch_size=2, resume=True)
        assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
        # What has come meanwhile is scored after the others.
        assert inspect(model, [*files, "late.png"], tmp_path / "out", batch_size=2, resume=True).rows[-1].error

    def test_a_plain_run_begins_anew(self, model: FeatureExtractor, files: list[str], tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            inspect(model, files[::-1], tmp_path / "out", resume=True, engine=self.cut(model, 4, []))
        inspect(model, files, tmp_path / "out")
        inspect(model, files, tmp_path / "whole")
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 3])
def test_reading_ahead_changes_nothing(model: FeatureExtractor, tmp_path: Path, workers: int) -> None:
    files = [str(path) for path in write_photos(tmp_path / "new", range(20, 29))]
    Path(files[4]).write_bytes(b"no image")
    terms = Terms(None, 1.0, (0.0, 2.0), 2, workers, True)
    found = list(outcomes(model, files, terms))
    assert [outcome.row.file for outcome in found] == files and found[4].picture is None
    for batch in range(0, 9, 2):
        for outcome, (expected, _) in zip(
            found[batch : batch + 2], score_photos(model, files[batch : batch + 2], [None] * 2, 2, 2048), strict=True
        ):
            if isinstance(expected, ImageError):
                assert outcome.row.score is outcome.map is None
            else:
                assert outcome.row.score == expected.score and outcome.map is not None
                assert np.array_equal(expected.map, outcome.map)


def test_pictures_are_drawn_beside_the_model(
    model: FeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model scores a batch while the pictures of the one before are not drawn yet, and no more than that."""
    files = [str(path) for path in write_photos(tmp_path / "new", range(20, 26))]
    drawn, scored = threading.Semaphore(0), 0
    draw, score = inspection.overlay, model.anomaly_map

    def waits(*arguments: Any, **options: Any) -> Image.Image:
        assert drawn.acquire(timeout=60)
        return draw(*arguments, **options)

    def counts(*arguments: Any, **options: Any) -> AnomalyMap:
        nonlocal scored
        scored += 1
        if scored > 1:
            drawn.release(2)
        return score(*arguments, **options)

    monkeypatch.setattr(inspection, "overlay", waits)
    monkeypatch.setattr(model, "anomaly_map", counts)
    found = outcomes(model, files, Terms(None, 1.0, (0.0, 2.0), 2, 1, False))
    assert [next(found).row.file, next(found).row.file] == files[:2] and scored == 2
    drawn.release(2)
    assert [outcome.row.file for outcome in found] == files[2:] and scored == 3


@pytest.mark.parametrize("option", ["workers", "batch_size"])
@pytest.mark.parametrize("number", [0, -1, 1.5, "2", None, True])
def test_numbers_that_count_nothing(model: FeatureExtractor, tmp_path: Path, option: str, number: Any) -> None:
    files = [str(path) for path in write_photos(tmp_path / "new", range(1))]
    with pytest.raises(InputError, match=f"{option} is .*; it must be a whole number, 1 or more"):
        inspect(model, files, tmp_path / "out", **{option: number})
    assert not (tmp_path / "out").exists()


def test_what_is_interrupted_draws_and_reads_little_more(
    model: FeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [str(path) for path in write_photos(tmp_path / "new", range(20, 22))] * 40
    read, drawn, calls = [], [], 0
    draw, get, score = inspection.overlay, predictor.read_photo, model.anomaly_map

    def interrupted(*arguments: Any, **options: Any) -> AnomalyMap:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise KeyboardInterrupt
        return score(*arguments, **options)

    def slowly(source: Any, *arguments: Any) -> Any:
        read.append(source)
        threading.Event().wait(0.05)
        return get(source, *arguments)

    def noted(*arguments: Any, **options: Any) -> Image.Image:
        drawn.append(0)
        return draw(*arguments, **options)

    monkeypatch.setattr(predictor, "read_photo", slowly)
    monkeypatch.setattr(inspection, "overlay", noted)
    monkeypatch.setattr(model, "anomaly_map", interrupted)
    found = outcomes(model, files, Terms(None, 1.0, (0.0, 2.0), 32, 2, False))
    with pytest.raises(KeyboardInterrupt):
        list(found)
    assert len(drawn) == 32 and len(read) < len(files)


def test_parquet_holds_the_same_rows(model: FeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    files = [*(str(path) for path in write_photos(tmp_path / "new", range(20, 25))), "=gone.png"]
    monkeypatch.setattr(results, "_ROWS", 4)
    found = inspect(model, files, tmp_path / "out")
    rows = parquet.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert rows == [asdict(row) for row in found.rows] and rows[-1]["score"] is None
    assert parquet.ParquetFile(tmp_path / "out" / "scores.parquet").num_row_groups == 2


def test_without_pyarrow_there_is_no_parquet(
    model: FeatureExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "find_spec", lambda _: None)
    inspect(model, [str(path) for path in write_photos(tmp_path / "new", range(20, 21))], tmp_path / "out")
    assert not (tmp_path / "out" / "scores.parquet").exists()
