"""The tutorial in miniature: what it leaves, that its numbers are those of the files, that the same command resumes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import adfeatures
from training import tutorial
from training.pretraining.curves import read_log


@pytest.mark.parametrize("options", [["--steps", "0"], ["--seeds", "0", "-1"]])
def test_senseless_numbers_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert tutorial.main(["--output", str(tmp_path), *options]) == 2
    assert "must" in capsys.readouterr().err and not any(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["data", "published", "seed1"])
def test_nothing_is_written_through_a_link(tmp_path: Path, place: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / place).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(adfeatures.errors.InputError, match=f"{place} is a link"):
        tutorial.tutorial(tmp_path / "out", 1, [1])
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Fewer normal images")
def test_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = {
        "SEEN": ("linen",),
        "UNSEEN": ("denim",),
        "PRODUCTS": ("linen", "denim"),
        "GOOD": 4,
        "BAD": 8,
        "SIDE": 64,
        "NUM_KEYS": 8,
    }
    for name, value in small.items():
        monkeypatch.setattr(tutorial, name, value)
    arguments = ["--output", str(tmp_path), "--seeds", "0", "1", "--steps"]
    assert tutorial.main([*arguments, "2"]) == 0
    printed = capsys.readouterr().out
    said = [line.split()[0] for line in printed.splitlines() if line.endswith(" ...")]
    assert said == [
        *("Rendering", "Computing", "Evaluating"),
        *["Pretraining", "Evaluating"] * 2,
        "Publishing",
    ]
    assert re.fullmatch(r"It took \d+ minutes on \d+ threads\.", printed.splitlines()[-1])
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {name: len(scores) for name, scores in found.items()} == {"residual": 1, "untrained": 2, "trained": 2}
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]]
        for line in printed.splitlines()
        if "|" in line
    }
    assert rows["residuals of unit length, no projector"] == [
        f"{100 * found['residual'][0][key]:.1f}" for key in ("img", "pix", "pro")
    ]
    low, high = sorted(100 * scores["img"] for scores in found["trained"])
    assert rows["trained projector, 2 steps"][0] == f"{(low + high) / 2:.1f} ± {(high - low) / 2**0.5:.1f}"
    model = adfeatures.create_model(weights=f"local-dir:{tmp_path / 'published'}")
    assert model.name == "adpretrain_efficientnet_lite" and model.img_size == (64, 64)
    card = (tmp_path / "published" / "README.md").read_text()
    assert "images of training.synthesize: MIT" in card and "Real-IAD:" not in card
    # More steps resume from these.
    assert tutorial.main([*arguments, "3"]) == 0
    assert [line["step"] for line in read_log(tmp_path / "seed0" / "log.jsonl")] == [1, 2, 3]
