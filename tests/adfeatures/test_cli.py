"""The adfeatures command, as its users call it."""

from __future__ import annotations

import csv
import hashlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.models import photo, write_photos
from helpers.published import as_published
from PIL import Image
from safetensors import safe_open
from scipy import stats

import adfeatures
from adfeatures import catalog, commands, inspection
from adfeatures.cli import main
from adfeatures.errors import ReferencesError
from adfeatures.images import read_image
from adfeatures.projector import ResidualProjector

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def photos(tmp_path: Path, small_input: None) -> Path:
    """References good/, and images to score in new/."""
    write_photos(tmp_path / "good", range(4))
    write_photos(tmp_path / "new", range(10, 13))
    return tmp_path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def score(photos: Path, *arguments: object) -> int:
    return run("score", "--references", photos / "good", "--output", photos / "out", *arguments)


def rows(photos: Path) -> list[dict[str, str]]:
    with open(photos / "out" / "scores.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["info", "residual_lite"], ["score", "--help"]])
def test_help_and_facts_need_no_torch_and_answer_at_once(arguments: list[str]) -> None:
    code = f"import sys; sys.argv = ['adfeatures', *{arguments}]\nfrom adfeatures.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'timm', 'PIL', 'numpy', 'huggingface_hub'} & set(sys.modules), 'imported too much'"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    # One second is promised; a loaded machine gets ten before this says that something heavy is imported.
    assert time.perf_counter() - started < 10


def test_importing_the_package_has_no_side_effects() -> None:
    code = "import os, sys, threading; before = dict(os.environ), threading.active_count(); import adfeatures\n"
    code += "assert (dict(os.environ), threading.active_count()) == before and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    assert capsys.readouterr().out.split() == adfeatures.list_models()
    assert run("list", "clip") == 0
    assert (told := capsys.readouterr()).out == "" and "no model matches 'clip'; try '*clip*'" in told.err
    assert run("list", "*clip*", "--pretrained", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [
        "adpretrain_clip_base.realiad_angle",
        "adpretrain_clip_base.realiad_norm",
        "adpretrain_clip_large.realiad_angle",
        "adpretrain_clip_large.realiad_norm",
    ]


def test_info_shows_licenses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "adpretrain_imagebind_huge", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backbone_license"] == "CC-BY-NC-4.0" and facts["training_data_license"] == "CC-BY-NC-SA-4.0"
    assert facts["levels"] == [8, 16, 24, 32] and facts["channels"] == [1280] * 4
    assert run("info", "adpretrain_imagebind_huge") == 0
    assert "CC-BY-NC-4.0" in capsys.readouterr().out


def test_a_typo_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "adpretrain_dino_base") == 2
    assert "Did you mean 'adpretrain_dinov2_base'" in capsys.readouterr().err


def test_score_writes_everything(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(photos, photos / "new", photos / "good" / "000.png") == 0
    assert "4 of 4 images scored" in capsys.readouterr().out
    table = rows(photos)
    assert list(table[0]) == ["file", "score", "threshold", "decision", "error"]
    assert [row["file"] for row in table] == [str(photos / "new" / f"{i:03d}.png") for i in range(10, 13)] + [
        str(photos / "good/000.png")
    ]
    lines = [json.loads(line) for line in (photos / "out" / "scores.jsonl").read_text().splitlines()]
    for row, line in zip(table, lines, strict=True):
        assert list(line) == list(row)
        assert float(row["score"]) == line["score"] and float(row["threshold"]) == line["threshold"]
        assert row["decision"] == line["decision"] == ("anomalous" if line["score"] > line["threshold"] else "normal")
    for name in ("overlays/new/010.png", "overlays/good/000.png", "worst.png"):
        with Image.open(photos / "out" / name) as picture:
            assert picture.width > 80 and picture.height >= 60
    summary = json.loads((photos / "out" / "summary.json").read_text())
    assert (summary["images"], summary["scored"], summary["failed"]) == (4, 4, 0)
    assert summary["scored_references"] == [str(photos / "good/000.png")]
    assert summary["references"]["default"]["images"] == 4


def test_scores_are_those_of_the_library(photos: Path) -> None:
    score(photos, photos / "new")
    model = adfeatures.create_model(references=photos / "good")
    expected = [prediction.score for prediction in model.score(photos / "new")]
    assert [float(row["score"]) for row in rows(photos)] == pytest.approx(expected, rel=1e-5)


def test_bad_images_get_a_row_and_the_rest_go_on(photos: Path) -> None:
    (photos / "new" / "0105.png").write_bytes(b"")
    (photos / "new" / "011b.jpg").write_bytes(b"no image")
    content = (photos / "new" / "012.png").read_bytes()
    (photos / "new" / "0125.png").write_bytes(content[: len(content) // 2])
    assert score(photos, photos / "new", photos / "gone.png", "--batch-size", 4) == 1
    table = {Path(row["file"]).name: row for row in rows(photos)}
    assert len(table) == 7
    for name in ("0105.png", "011b.jpg", "0125.png", "gone.png"):
        assert name in table[name]["error"] and not table[name]["score"] and not table[name]["decision"]
    for name in ("010.png", "011.png", "012.png"):
        assert table[name]["score"] and not table[name]["error"]
    assert json.loads((photos / "out" / "summary.json").read_text())["failed"] == 4


def test_what_pillow_says_of_metadata_is_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(0).save(tmp_path / "photo.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\0")
    with pytest.warns(UserWarning, match="EXIF"):
        read_image(tmp_path / "photo.jpg")

    def read(_: object) -> int:
        assert read_image(tmp_path / "photo.jpg").size == photo(0).size
        read_image(np.full((4, 4), 100, np.uint16))
        return 0

    monkeypatch.setattr(commands, "list_models", read)
    assert run("list") == 0
    assert "EXIF" not in (printed := capsys.readouterr().err) and "hold values of 8 bits" in printed


def test_images_above_the_limit_get_a_row(photos: Path) -> None:
    photo(13, (90, 60)).save(photos / "new" / "large.png")
    assert score(photos, "--max-pixels", 80 * 60, photos / "new") == 1
    assert [row["error"].endswith("cut it into parts.") for row in rows(photos)] == [False] * 3 + [True]


def test_exit_code_2_where_nothing_could_be_done(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(photos, photos / "gone.png") == 2
    assert rows(photos)[0]["error"]
    assert run("score", "--references", photos / "nowhere", "--output", photos / "out", photos / "new") == 2
    assert "nowhere" in capsys.readouterr().err
    (photos / "empty").mkdir()
    assert score(photos, photos / "empty") == 2
    assert run("score", "--bank", photos / "no.bank", "--output", photos / "out", photos / "new") == 2
    assert "adfeatures fit" in capsys.readouterr().err
    (photos / "file").write_text("in the way")
    assert run("score", "--references", photos / "good", "--output", photos / "file", photos / "new") == 2
    assert "Cannot write" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        run("score", photos / "new")
    assert exit.value.code == 2
    assert score(photos, photos / "new", "--device", "cuda:99") == 2
    assert "cuda:99" in capsys.readouterr().err


def test_fit_then_score_with_the_bank_alone(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = photos / "part.safetensors"
    assert run("fit", "--references", photos / "good", "--bank", bank, "--quantile", "0.9", "--json") == 0
    facts = json.loads(capsys.readouterr().out)["products"]["default"]
    assert facts["references"] == 4 and facts["quantile"] == 0.9 and facts["normal_scores"] == 4
    assert run("score", "--bank", bank, "--output", photos / "out", photos / "new") == 0
    assert float(rows(photos)[0]["threshold"]) == facts["threshold"]
    by_bank = [row["score"] for row in rows(photos)]
    assert score(photos, photos / "new") == 0
    assert [float(row["score"]) for row in rows(photos)] == pytest.approx([float(s) for s in by_bank], rel=1e-5)


def test_fit_with_held_out_normals_and_coreset(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--references", photos / "good", "--bank", photos / "b.safetensors", "--json"]
    assert run("fit", *arguments, "--normals", photos / "new", "--quantile", 0.9, "--coreset", 0.5) == 0
    facts = json.loads(capsys.readouterr().out)["products"]["default"]
    model = adfeatures.create_model()
    model.set_references(photos / "good", coreset=0.5)
    logs = np.log([prediction.score for prediction in model.score(photos / "new")])
    # Student's t with a prior spread of 0.12 that is worth 8 scores
    spread = np.sqrt((8 * 0.12**2 + ((logs - logs.mean()) ** 2).sum()) / 10 * (1 + 1 / 3))
    assert facts["threshold"] == pytest.approx(np.exp(logs.mean() + stats.t.ppf(0.9, 10) * spread), rel=1e-4)
    assert facts["normal_scores"] == 3


def test_threshold_and_quantile_options(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(photos, photos / "new", "--threshold", "0") == 0
    assert {row["decision"] for row in rows(photos)} == {"anomalous"} and float(rows(photos)[0]["threshold"]) == 0
    model = adfeatures.create_model(references=photos / "good")
    assert score(photos, photos / "new", "--quantile", "0.5") == 0
    assert float(rows(photos)[0]["threshold"]) == pytest.approx(model.fit_threshold(0.5), rel=1e-5)
    for quantile in (95, 0, "nan", "many"):
        with pytest.raises(SystemExit):
            score(photos, photos / "new", "--quantile", quantile)
        assert f"{quantile} is not a fraction: give a number between 0 and 1" in capsys.readouterr().err


def test_one_reference_gives_scores_without_decisions(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted((photos / "good").iterdir())[1:]:
        path.unlink()
    assert score(photos, photos / "new") == 0
    assert {(row["threshold"], row["decision"]) for row in rows(photos)} == {("", "")}
    assert "no threshold" in capsys.readouterr().out
    assert run("fit", "--references", photos / "good", "--bank", photos / "b.safetensors") == 0
    assert "no decision: one reference gives no threshold" in capsys.readouterr().out


def test_sub_folders_are_products_only_when_asked(photos: Path) -> None:
    write_photos(photos / "good" / "nut", range(20, 23))
    write_photos(photos / "good" / "bolt", range(30, 33))
    bank = photos / "b.safetensors"
    assert run("fit", "--references", photos / "good", "--bank", bank) == 0
    assert adfeatures.ReferenceBank.load(bank).num_images == 4
    assert run("fit", "--references", photos / "good", "--bank", bank, "--recursive") == 0
    assert adfeatures.ReferenceBank.load(bank).num_images == 10
    assert run("fit", "--references", photos / "good", "--bank", bank, "--product-folders") == 0
    assert run("score", "--bank", bank, "--output", photos / "out", photos / "new") == 2
    assert run("score", "--bank", bank, "--product", "nut", "--output", photos / "out", photos / "new") == 0
    model = adfeatures.create_model(references=photos / "good" / "nut")
    assert [float(row["score"]) for row in rows(photos)] == pytest.approx(
        [p.score for p in model.score(photos / "new")], rel=1e-5
    )
    assert run("fit", "--references", photos / "new", "--bank", bank, "--product-folders") == 2


def test_images_in_sub_folders_only_when_asked(photos: Path) -> None:
    write_photos(photos / "new" / "late", range(14, 16))
    assert score(photos, photos / "new") == 0 and len(rows(photos)) == 3
    assert score(photos, photos / "new", "--recursive") == 0 and len(rows(photos)) == 5
    assert (photos / "out" / "overlays" / "late" / "014.png").is_file()


def test_bit_depth_is_kept_with_the_bank(photos: Path) -> None:
    for folder in ("good16", "new16"):
        (photos / folder).mkdir()
    for seed in range(6):
        gray = np.asarray(photo(seed).convert("L")).astype(np.uint16) * 16
        Image.fromarray(gray).save(photos / ("good16" if seed < 4 else "new16") / f"{seed}.png")
    bank = photos / "b.safetensors"
    assert run("fit", "--references", photos / "good16", "--bank", bank, "--bit-depth", 12) == 0
    assert run("score", "--bank", bank, "--output", photos / "out", photos / "new16") == 0
    model = adfeatures.create_model()
    model.bit_depth = 12
    model.set_references(photos / "good16")
    assert [float(row["score"]) for row in rows(photos)] == pytest.approx(
        [p.score for p in model.score(photos / "new16")], rel=1e-5
    )


def test_an_interrupted_run_keeps_its_rows(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = inspection.score_photos

    def interrupted(*args: Any) -> Iterator[Any]:
        for number, result in enumerate(original(*args)):
            if number == 2:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(inspection, "score_photos", interrupted)
    assert score(photos, photos / "new", "--batch-size", 1) == 130
    assert [row["file"][-7:] for row in rows(photos)] == ["010.png", "011.png"]
    assert "interrupted" in capsys.readouterr().err


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A published file of full size: the same tensors, bit for bit, under a name that the library loads by itself."""
    shallow = replace(catalog.BACKBONES["dinov2_base"], blocks=(1, 2, 3, 4))
    monkeypatch.setattr(catalog, "BACKBONES", {**catalog.BACKBONES, "dinov2_base": shallow})
    projector = ResidualProjector((768,) * 4).state_dict()
    source, destination = tmp_path / "checkpoints_pro_norm.pth", tmp_path / "c.safetensors"
    source.write_bytes(as_published(projector))
    name = "adpretrain_dinov2_base.realiad_norm"
    assert run("convert", source, destination, "--model", name, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["file"] == str(destination) and facts["model"] == name and facts["tensors"] == len(projector)
    assert (facts["img_auc"], facts["pix_auc"], facts["pix_pro"]) == (0.9, 0.8, 0.7)
    assert facts["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    with safe_open(destination, framework="pt") as file:
        for key, tensor in projector.items():
            assert torch.equal(file.get_tensor(key), tensor.bfloat16()), key
    model = adfeatures.create_model(weights=destination, backbone_weights="random")
    assert model.name == name and model.projector is not None
    for key, tensor in model.projector.state_dict().items():
        assert torch.equal(tensor, projector[key].bfloat16().float()), key
    # Once more changes nothing.
    before = destination.read_bytes()
    assert run("convert", source, destination, "--model", name) == 0
    assert destination.read_bytes() == before


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("adpretrain_dinov2_base", "does not fit"),
        ("residual_lite", "no projector"),
        ("adpretrain_dino", "Did you mean"),
    ],
)
def test_convert_refuses_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, reason: str
) -> None:
    source = Path(__file__).parents[1] / "golden" / "upstream_checkpoint.pth"
    assert run("convert", source, tmp_path / "c.safetensors", "--model", model) == 2
    assert reason in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_demo(tmp_path: Path, small_input: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--output", tmp_path / "demo", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["failed"] == 0 and summary["image_auroc"] > 0.9 and summary["pixel_auroc"] > 0.9
    assert summary == json.loads((tmp_path / "demo" / "summary.json").read_text())
    for name in ("demo.png", "worst.png", "scores.csv"):
        assert (tmp_path / "demo" / name).stat().st_size > 0


def test_info_without_a_model_tells_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adfeatures"] == adfeatures.__version__ and found["torch"] == torch.__version__.partition("+")[0]
    assert found["python"] == platform.python_version() and found["timm"] == timm.__version__
    assert main(["info"]) == 0
    assert "huggingface-hub" in capsys.readouterr().out


def test_reasons_of_failures_are_told(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "new" / "broken.png").write_bytes(b"no image")
    assert score(photos, photos / "new") == 1
    assert "not scored: Cannot read" in (told := capsys.readouterr()).err and "broken.png" in told.err
    (reason,) = json.loads((photos / "out" / "summary.json").read_text())["errors"]
    assert reason in told.err


def test_a_bank_of_another_model_is_refused_before_anything_is_fetched(
    photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = photos / "part.bank"
    assert run("fit", "--references", photos / "good", "--bank", bank) == 0
    monkeypatch.setattr("adfeatures.hub.resolve", lambda *_: pytest.fail("fetched for nothing"))
    wanted = ["--bank", bank, "--output", photos / "out", photos / "new"]
    assert run("score", *wanted, "--model", "adpretrain_dinov2_base") == 2
    assert (
        "was made with residual_lite.in1k_v2, not with adpretrain_dinov2_base. Use residual_lite.in1k_v2, or"
        in capsys.readouterr().err
    )
    with pytest.raises(ReferencesError, match=r"part\.bank was made with residual_lite\.in1k_v2, not with adpretrain"):
        adfeatures.create_model("adpretrain_dinov2_base", references=bank)
    assert adfeatures.create_model(references=bank).bank().num_images == 4
    assert adfeatures.create_model(references=str(bank)).threshold() is not None


def test_the_bit_depth_is_that_of_the_bank(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = photos / "part.safetensors"
    assert run("fit", "--references", photos / "good", "--bank", bank) == 0
    assert run("score", "--bank", bank, "--bit-depth", 12, "--output", photos / "out", photos / "new") == 2
    assert "adfeatures fit --bit-depth 12" in capsys.readouterr().err
    assert run("fit", "--references", photos / "good", "--bank", photos / "good" / "000.png") == 2
    assert "000.png exists and is not a reference bank" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("fit", "--references", photos / "good", "--bank", bank, "--bit-depth", 99)


@pytest.mark.parametrize("threshold", ["nan", "inf", "-1", "-inf", "high"])
def test_thresholds_are_scores(photos: Path, threshold: str) -> None:
    with pytest.raises(SystemExit) as exit:
        score(photos, photos / "new", f"--threshold={threshold}")
    assert exit.value.code == 2 and not (photos / "out").exists()


def test_long_facts_are_cut_on_a_terminal_alone(capsys: pytest.CaptureFixture[str]) -> None:
    facts: dict[str, Any] = {"model": "m", "trained_on": "x" * 100_000}
    commands.show(facts, False)
    assert capsys.readouterr().out.splitlines()[1] == f"trained_on  {'x' * 60}... (100000 characters)"
    commands.show(facts, True)
    assert json.loads(capsys.readouterr().out) == facts


def test_facts_within_facts_are_indented(capsys: pytest.CaptureFixture[str]) -> None:
    commands.show({"model": "m", "products": {"bolt": {"size": (3, 4), "threshold": 0.5}}}, False)
    assert capsys.readouterr().out.splitlines() == [
        "model     m",
        "products",
        "  bolt",
        "    size       3, 4",
        "    threshold  0.5",
    ]


def test_a_mistyped_folder_costs_no_former_result(photos: Path) -> None:
    assert score(photos, photos / "new") == 0
    before = {path: path.read_bytes() for path in (photos / "out").rglob("*") if path.is_file()}
    assert score(photos, photos / "neww") == 2
    assert {path: path.read_bytes() for path in (photos / "out").rglob("*") if path.is_file()} == before
