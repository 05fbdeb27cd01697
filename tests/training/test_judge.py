"""The command that judges: what it writes and prints, what stops it."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from adfeatures.errors import AdfeaturesError
from training import judge
from training.judging.contenders import Contender
from training.judging.packages import JUDGED
from training.judging.protocol import Result, Size

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_it_writes_what_every_contender_is_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(judge, "fetch", lambda folder, packages: None)
    monkeypatch.setattr(judge, "QUICK", Size(references=3, good=2, bad=2, draws={1: 1, 2: 2}))
    options = ["--photographs", str(tmp_path / "photographs"), "--output", str(tmp_path / "judged"), "--quick"]
    assert judge.main([*options, "--model", "residual_lite.in1k_v1", "--products", "rendered_denim"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name} {package.version}: {package.license}" in said for name, package in JUDGED.items())
    written = (tmp_path / "judged/results.md").read_text()
    assert said.endswith(written) and "**2 references, 2 draws**" in written
    rows = list(csv.DictReader((tmp_path / "judged/results.csv").open()))
    contenders = ["residual_lite.in1k_v1", "raw residual norm", "cosine matching", "PatchCore"]
    assert [row["contender"] for row in rows] == contenders * 3
    assert all(0 <= float(row["image_auroc"]) <= 1 for row in rows)


@pytest.mark.slow
def test_thresholds_are_judged_of_the_models_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "fetch", lambda folder, packages: None)
    monkeypatch.setattr(judge, "THRESHOLDS", Size(references=4, good=3, bad=1, draws={2: 1, 4: 1}))
    options = ["--photographs", str(tmp_path / "photographs"), "--output", str(tmp_path / "judged"), "--thresholds"]
    assert judge.main([*options, "--model", "residual_lite.in1k_v2", "--products", "rendered_denim"]) == 0
    rows = list(csv.DictReader((tmp_path / "judged/results.csv").open()))
    assert [(row["contender"], row["shots"]) for row in rows] == [("residual_lite.in1k_v2", n) for n in ("2", "4")]
    assert all(0 <= float(row["flagged"]) <= 1 for row in rows)


def test_products_that_are_done_stay_when_a_later_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(name: str, *_: object) -> Sequence[Result]:
        if name == "cup":
            raise AdfeaturesError("cup cannot be judged")
        return [Result(name, "fixed", "residual_lite.in1k_v1", 8, 0, 0.9, 0.9, 0.9, 0.5, 0.0, "faint")]

    monkeypatch.setattr(judge, "fetch", lambda folder, packages: None)
    monkeypatch.setattr(judge, "pictures", lambda *_, **__: None)
    monkeypatch.setattr(judge, "judged", judged)
    options = ["--photographs", str(tmp_path / "photographs"), "--output", str(tmp_path / "judged")]
    assert judge.main([*options, "--model", "residual_lite.in1k_v1", "--products", "coins", "cup"]) == 2
    (row,) = csv.DictReader((tmp_path / "judged/results.csv").open())
    assert row["product"] == "coins" and "| coins |" in (tmp_path / "judged/results.md").read_text()


class TestAFolderWithResults:
    """What is there is not judged again, and nothing of another run is mixed with it or lost."""

    @pytest.fixture()
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The products that were judged, of one draw of 8 references."""
        asked = []

        def judged(name: str, pictures: object, contenders: Sequence[Contender], size: object) -> Iterator[Result]:
            asked.append(name)
            for title in (title for contender in contenders for title in contender.names):
                yield Result(name, "fixed", title, 8, 0, 1 / 3, 0.9, 0.9, float("nan"), 0.0, "faint blur")

        monkeypatch.setattr(judge, "fetch", lambda folder, packages: None)
        monkeypatch.setattr(judge, "pictures", lambda *_, **__: None)
        monkeypatch.setattr(judge, "judged", judged)
        return asked

    @pytest.fixture()
    def run(self, tmp_path: Path) -> Callable[..., int]:
        folders = ["--photographs", str(tmp_path / "photographs"), "--output", str(tmp_path / "judged"), "--quick"]
        return lambda *more: judge.main([*folders, "--model", "residual_lite.in1k_v1", *more])

    def test_the_rest_is_judged_and_joined(self, asked: list[str], run: Callable[..., int], tmp_path: Path) -> None:
        assert run("--products", "coins", "page") == 0 and run("--products", "page", "cup") == 0
        assert asked == ["coins", "page", "cup"]
        joined = (tmp_path / "judged/results.csv").read_text(), (tmp_path / "judged/results.md").read_text()
        (tmp_path / "judged/results.md").unlink()
        assert run("--products", "cup") == 0 and (tmp_path / "judged/results.md").read_text() == joined[1]
        (tmp_path / "judged/results.csv").unlink()
        assert run("--products", "coins", "page", "cup") == 0
        assert joined == ((tmp_path / "judged/results.csv").read_text(), (tmp_path / "judged/results.md").read_text())

    @pytest.mark.parametrize(
        "options", [["--thresholds"], ["--set", "final"], ["--rotations", "2"], ["--model", "residual_lite.in1k_v2"]]
    )
    def test_another_run_is_refused(
        self,
        asked: list[str],
        run: Callable[..., int],
        tmp_path: Path,
        options: list[str],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert run("--products", "coins") == 0
        before = (tmp_path / "judged/results.csv").read_bytes()
        folders = ["--photographs", str(tmp_path / "photographs"), "--output", str(tmp_path / "judged")]
        quick = [] if options == ["--thresholds"] else ["--quick"]
        assert judge.main([*folders, *quick, "--model", "residual_lite.in1k_v1", *options]) == 2
        assert "results.csv is of other products, models or draws" in capsys.readouterr().err
        assert asked == ["coins"] and (tmp_path / "judged/results.csv").read_bytes() == before

    @pytest.mark.parametrize("damage", [b"", b"product,group\n", b"\xff\xfe", b"a\x00b"])
    def test_a_file_of_something_else_is_refused(
        self,
        asked: list[str],
        run: Callable[..., int],
        tmp_path: Path,
        damage: bytes,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert run("--products", "coins") == 0
        file = tmp_path / "judged/results.csv"
        damaged = file.read_bytes()[:-40] + damage if damage else b""
        file.write_bytes(damaged)
        assert run("--products", "cup") == 2
        assert f"{file} cannot be read" in capsys.readouterr().err
        assert file.read_bytes() == damaged


def test_what_it_does_not_know_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--photographs", str(tmp_path / "a"), "--output", str(tmp_path / "b")]
    for arguments, message in (
        (["--products", "coin"], "Did you mean 'coins'"),
        (["--products", "gravel"], "Unknown development product 'gravel'"),
        (["--model", "residual_light"], "Did you mean 'residual_lite'"),
    ):
        assert judge.main([*folders, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error and error.count("training.judge: error:") == 1
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    (tmp_path / "b").write_text("in the way")
    assert judge.main(folders) == 2
    assert "b cannot be used as a folder" in capsys.readouterr().err
