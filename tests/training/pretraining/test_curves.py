"""Reading the log of a run and drawing it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import matplotlib.lines
import numpy as np
import pytest
from helpers.full_disk import full_disk
from PIL import Image

from adfeatures.errors import AdfeaturesError
from training.pretraining.curves import SMOOTHING, draw_curves, read_log


def lines(steps: int, validations: int) -> list[dict[str, Any]]:
    random = np.random.RandomState(0)
    made: list[dict[str, Any]] = [
        {"kind": "step", "step": n, "angle": random.rand(), "norm": random.rand()} for n in range(1, steps + 1)
    ]
    for number in range(1, validations + 1):
        scores = {method: {key: random.rand() for key in ("img", "pix", "pro")} for method in ("norm", "angle")}
        made.append({"kind": "validation", "step": 10 * number, **scores})
    return made


def write(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in made))
    return path


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that were saved."""
    saved: list[matplotlib.figure.Figure] = []
    original = matplotlib.figure.Figure.savefig

    def savefig(self: matplotlib.figure.Figure, *arguments: Any, **keywords: Any) -> None:
        saved.append(self)
        original(self, *arguments, **keywords)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


def points(line: matplotlib.lines.Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def test_a_log_is_read_up_to_a_line_that_was_cut_off(tmp_path: Path) -> None:
    assert read_log(tmp_path / "missing.jsonl") == []
    made = lines(3, 1)
    path = write(tmp_path / "log.jsonl", made)
    assert read_log(path) == made
    path.write_text(path.read_text() + '{"kind": "st')
    assert read_log(path) == made
    for line in ("[1]", "3", "{}", '{"kind": 3, "step": 1}', '{"kind": "step", "step": "1"}', "[" * 100_000):
        write(path, made).write_text(path.read_text() + line + "\n" + '{"kind": "step", "step": 4}')
        assert read_log(path) == made


def test_what_is_no_number_is_not_drawn(tmp_path: Path, figures: list[matplotlib.figure.Figure]) -> None:
    """Logs of before hold NaN, which is null today."""
    made = lines(4, 2)
    made[1] |= {"angle": None, "norm": float("nan")}
    made[4]["norm"] = 5
    made[5].pop("angle")
    made += [
        {"kind": "step", "step": 9, "angle": 10**400},
        {"kind": "validation", "step": 9, "norm": {"img": 10**400, "pix": []}, "angle": 3},
    ]
    write(tmp_path / "log.jsonl", made)
    draw_curves(tmp_path)
    assert np.isnan(points(figures[0].axes[0].lines[0])[1]).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("steps", [7, 3 * SMOOTHING])
def test_losses_are_drawn_as_they_are_and_as_a_running_mean(
    tmp_path: Path, figures: list[matplotlib.figure.Figure], steps: int
) -> None:
    made = lines(steps, 3)
    skipped = {"kind": "step", "step": steps + 1, "skipped": 1.0}
    write(tmp_path / "log.jsonl", [*made[:steps], skipped, *made[steps:]])
    draw_curves(tmp_path)
    losses, metrics = figures[0].axes
    window = min(steps, SMOOTHING)
    for name, thin, thick in zip(("angle", "norm"), losses.lines[::2], losses.lines[1::2], strict=True):
        values = [line[name] for line in made[:steps]]
        assert points(thin) == (list(range(1, steps + 1)), values)
        numbers, means = points(thick)
        assert numbers == list(range(window, steps + 1))
        assert np.allclose(means, [np.mean(values[end - window : end]) for end in range(window, steps + 1)])
    drawn = {line.get_label(): points(line) for line in metrics.lines}
    assert drawn["PatchCore, AUPRO"] == ([10, 20, 30], [line["angle"]["pro"] for line in made[steps:]])
    assert drawn["FeatureNorm, image AUROC"] == ([10, 20, 30], [line["norm"]["img"] for line in made[steps:]])
    assert Image.open(tmp_path / "curves.png").size == (1320, 480)


@pytest.mark.parametrize(
    ("made", "width"),
    [([], 660), (lines(1, 0), 660), (lines(0, 1), 1320)],
    ids=["nothing", "one step", "one validation"],
)
def test_logs_that_have_just_begun(tmp_path: Path, made: list[dict[str, Any]], width: int) -> None:
    """Where nothing has been validated there is no empty panel for it."""
    write(tmp_path / "log.jsonl", made)
    draw_curves(tmp_path)
    assert Image.open(tmp_path / "curves.png").size == (width, 480)


def test_a_full_disk_keeps_the_last_picture(tmp_path: Path) -> None:
    write(tmp_path / "log.jsonl", lines(5, 1))
    (tmp_path / "curves.png").write_bytes(b"the last one")
    with full_disk(1000), pytest.raises(AdfeaturesError, match="curves.png.*File too large"):
        draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == b"the last one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "log.jsonl"]
