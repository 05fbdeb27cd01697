"""Nothing is judged in silence on images that it was trained on, whatever they are called and wherever they lie."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from helpers.evaluation_records import parse
from helpers.hub_server import HubServer
from helpers.published import as_published
from helpers.real_iad_tree import write_official_lists, write_real_iad
from helpers.trees import write_mvtec

from adfeatures import catalog
from adfeatures.checkpoints import load_checkpoint, save_checkpoint
from adfeatures.projector import ResidualProjector
from training import evaluate
from training.data import dataset
from training.data.fingerprint import TRAINED_ON, Fingerprint
from training.evaluation import pictures
from training.pretrain import pretrain
from training.pretraining.config import PretrainConfig

Run = Callable[..., int]
UNKNOWN = "cannot be excluded"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """FeatureNorm with two references, without pictures."""
    monkeypatch.setattr(pictures, "draw_detection_curves", lambda *_: None)
    monkeypatch.setattr(pictures, "draw_maps", lambda *_: None)

    def call(model: object, name: str, root: Path, *flags: str, output: str = "run") -> int:
        needed = ["--model", str(model), "--dataset", name, "--root", str(root), "--output", str(tmp_path / output)]
        fixed = ["--method", "feature_norm", "--shots", "2", "--workers", "0", "--device", "cpu", "--img-size", "32"]
        return evaluate.main([*needed, *fixed, *flags])

    return call


def weights(path: Path, images: list[Path] | None = None, **facts: str) -> Path:
    """A projector for the embedded backbone that was trained on some images."""
    torch.manual_seed(0)
    projector = ResidualProjector((40, 80, 112), num_heads=4, num_keys=4)
    header = {"format": "adfeatures", "model": "adpretrain_efficientnet_lite", "num_heads": "4", **facts}
    if images is not None:
        header[TRAINED_ON] = Fingerprint.of(map(str, images)).to_text()
    tensors = {f"projector.{key}": value for key, value in projector.state_dict().items()}
    save_checkpoint(path, tensors, metrics={"img_auc": 0.9123}, metadata=header)
    return path


def everything(folder: Path) -> tuple[dict, str, list[dict[str, str]], list[dict]]:
    """results.json, results.md, the rows of results.csv, and the pretrained records."""
    found = json.loads((folder / "results.json").read_text())
    with open(folder / "results.csv") as file:
        rows = list(csv.DictReader(file))
    records = [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*/*pretrained*.json"))]
    return found, (folder / "results.md").read_text(), rows, records


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    return write_mvtec(tmp_path / "parts", ("nut", "bolt"), good=3, test_good=2, bad=2, size=(32, 32))


def marked(rows: list[dict[str, str]]) -> dict[tuple[str, str], str]:
    return {(row["product"], row["features"]): row["trained_on"] for row in rows if row["trained_on"]}


def test_test_images_that_were_trained_on_are_refused_or_marked(
    run: Run, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Renamed copies, one of each product that is judged, and training images of the data set, which are not.
    seen = [parts / "nut/test/good/000.png", parts / "bolt/test/broken/001.png", *(parts / "nut/train/good").iterdir()]
    copies = [Path(shutil.copy(path, tmp_path / f"{number}.jpg")) for number, path in enumerate(seen)]
    model = weights(tmp_path / "model.safetensors", copies)
    assert run(model, "folder", parts) == 2
    error = capsys.readouterr().err
    assert "was trained on 2 of the 8 test images (bolt 1 of 4, nut 1 of 4)" in error and "--allow-overlap" in error
    assert not (tmp_path / "run").exists()

    assert run(model, "folder", parts, "--allow-overlap") == 0
    printed = capsys.readouterr().out
    assert "pretrained, trained on 2 of 8 test images" in printed and "judged here" in printed
    found, text, rows, records = everything(tmp_path / "run")
    expected = {("bolt", "1 of 4"), ("nut", "1 of 4"), ("mean", "2 of 8")}
    assert {(product, mark) for (product, _), mark in marked(rows).items()} == expected
    assert {features for _, features in marked(rows)} == {"pretrained", "difference"}
    assert [line["trained_on"] for line in found["table"]] == [row["trained_on"] for row in rows]
    assert {r["product"]: r["overlap"] for r in records} == {
        "bolt": {"test": [1, 4], "train": [0, 3]},
        "nut": {"test": [1, 4], "train": [3, 3]},
    }
    tables = [block for block in text.split("\n\n") if block.startswith("| Product") or block.startswith("| Method")]
    assert len(tables) >= 1 and all("trained on" in table for table in tables)
    assert text.index("judged here") < text.index("|")


def test_training_images_alone_are_no_overlap(run: Run, parts: Path, tmp_path: Path) -> None:
    model = weights(tmp_path / "model.safetensors", [*(parts / "nut/train/good").iterdir()])
    assert run(model, "folder", parts, "--products", "nut") == 0
    found, text, rows, (record,) = everything(tmp_path / "run")
    assert record["overlap"] == {"test": [0, 4], "train": [3, 3]}
    assert not marked(rows) and "judged here" not in text and UNKNOWN not in text


def test_a_file_without_a_fingerprint_is_warned_of(run: Run, parts: Path, tmp_path: Path) -> None:
    model = weights(tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=f"model.safetensors with the test images {UNKNOWN}"):
        assert run(model, "folder", parts, "--products", "nut") == 0
    found, text, rows, (record,) = everything(tmp_path / "run")
    assert record["overlap"] is None and UNKNOWN in text and UNKNOWN in json.dumps(found) and not marked(rows)


def test_results_of_before_there_were_marks_are_marked(run: Run, parts: Path, tmp_path: Path) -> None:
    model = weights(tmp_path / "model.safetensors", [parts / "nut/test/good/000.png"])
    assert run(model, "folder", parts, "--products", "nut", "--allow-overlap") == 0
    (path,) = (tmp_path / "run/results/nut").glob("*pretrained*.json")
    before = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in before.items() if key != "overlap"}))
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    del settings["split"]
    (tmp_path / "run/settings.json").write_text(json.dumps(settings))
    assert run(model, "folder", parts, "--products", "nut") == 2
    assert run(model, "folder", parts, "--products", "nut", "--allow-overlap") == 0
    assert json.loads(path.read_text()) == before and marked(everything(tmp_path / "run")[2])


@pytest.mark.parametrize("text", ["", "{}", "[" * 100_000, '{"kind": "sha256/40", "images": 9, "differences": ""}'])
def test_a_damaged_fingerprint_is_no_missing_one(
    run: Run, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    model = weights(tmp_path / "model.safetensors", None, **{TRAINED_ON: text})
    assert run(model, "folder", parts) == 2
    assert "the trained_on of its header cannot be read" in capsys.readouterr().err


def test_what_cannot_be_read_fails_by_itself(run: Run, parts: Path, tmp_path: Path) -> None:
    model = weights(tmp_path / "model.safetensors", [])
    (parts / "nut/test/good/000.png").write_bytes(b"no image")
    shutil.rmtree(parts / "bolt/test")
    write_mvtec(parts, ("gear",), good=3, test_good=2, bad=2, size=(32, 32), seed=1000)
    assert run(model, "folder", parts) == 1
    assert {r["product"] for r in everything(tmp_path / "run")[3]} == {"gear"}


@pytest.mark.filterwarnings("ignore:Fewer normal images")
@pytest.mark.slow
def test_another_split_of_the_same_data_is_found(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A projector of --seed 7 has seen test images of the split of the evaluation, one of its seed has not."""
    tree = write_real_iad(tmp_path / "iad", ("pcb",), ok=8, ng=4)
    given: dict[str, Any] = {
        "root": str(tree),
        "products": ("pcb",),
        "backbone": "efficientnet_lite",
        "img_size": (32,),
        "num_heads": 4,
        "num_keys": 4,
        "batch_size": 8,
        "max_steps": 1,
        "workers": 0,
        "validation": "none",
        "precision": "float32",
    }
    test = [item.image for item in dataset("real_iad").find_items(tree, "test", ["pcb"])]
    for seed in (42, 7):
        config = PretrainConfig(output=str(tmp_path / f"seed{seed}"), seed=seed, **given)
        model = pretrain(config, torch.device("cpu")) / "checkpoint_last.safetensors"
        seen = Fingerprint.from_text(load_checkpoint(model).metadata[TRAINED_ON]).known(test)
        assert bool(seen) == (seed == 7)
        assert run(model, "real_iad", tree, output=f"judged{seed}") == (2 if seen else 0)
    assert f"was trained on {len(seen)} of the {len(test)} test images" in capsys.readouterr().err
    # The official lists judge others: all defective parts.
    lists = write_official_lists(tree, tmp_path / "realiad_jsons", ("pcb",))
    assert run(tmp_path / "seed42/checkpoint_last.safetensors", "real_iad", tree, "--split", str(lists)) == 2
    assert run("residual_lite", "real_iad", tree, "--split", str(lists)) == 0
    found, text, rows, (record,) = everything(tmp_path / "run")
    assert record["counts"]["normal"] + record["counts"]["anomalous"] == 2 * 2 + 2 * 4 * 2
    assert set(record["views"]) == {"C1", "C2"} and 0 <= record["metrics"]["part_auroc"] <= 1
    assert "## Views" in text and "Part AUROC" in text and {row["view"] for row in rows} == {"", "C1", "C2"}
    means = next(block for block in text.split("\n\n") if "mean of 1, view C1" in block)
    assert len(parse(means)) == 2 * 3


def test_published_weights_have_seen_all_of_real_iad(
    run: Run, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("owner/repo", "norm.pth", as_published(ResidualProjector((40, 80, 112)).state_dict()))
    like = catalog.MODELS["adpretrain_dinov2_base"]
    tag = dataclasses.replace(like.tags["realiad_norm"], hub_file=("owner/repo", "norm.pth"))
    model = dataclasses.replace(like, backbone="efficientnet_lite", tags={"realiad_norm": tag})
    monkeypatch.setattr(catalog, "MODELS", MappingProxyType({**catalog.MODELS, "adpretrain_tiny": model}))
    real = write_real_iad(tmp_path / "iad", ("pcb",), ok=8, ng=2)
    assert run("adpretrain_tiny", "real_iad", real) == 2
    assert "was trained on 4 of the 4 test images" in capsys.readouterr().err
    assert run("adpretrain_tiny", "real_iad", real, "--allow-overlap") == 0
    _, text, rows, (record,) = everything(tmp_path / "run")
    assert record["overlap"]["test"] == [4, 4] and set(marked(rows).values()) == {"4 of 4"}
    # What the authors selected it on is another data set, and other data may come in the layout of Real-IAD.
    assert "Stored as" not in text
    other = write_real_iad(tmp_path / "other", ("cogwheel",), ok=8, ng=2)
    assert run("adpretrain_tiny", "real_iad", other, output="other") == 0
    assert not marked(everything(tmp_path / "other")[2])


@pytest.mark.parametrize(
    ("selected", "title", "shown"),
    [
        ("image AUROC of FeatureNorm on held-out samples of the training data, after step 9", "Real-IAD", True),
        ("image AUROC of FeatureNorm on held-out samples of the training data, after step 9", None, False),
        ("image AUROC of PatchCore on held-out samples of the training data, after step 9", "Real-IAD", False),
        ("image AUROC of FeatureNorm on the test set of MVTec AD, after step 9", "Real-IAD", False),
        ("nothing: the last one, after step 9", "Real-IAD", False),
    ],
)
def test_stored_metrics_stand_beside_what_selected_them_alone(
    run: Run, tmp_path: Path, selected: str, title: str | None, shown: bool
) -> None:
    tree = write_real_iad(tmp_path / "iad", ("pcb",), ok=4, ng=1)
    facts = {"selected_by": selected, **({} if title is None else {"training_data": title})}
    assert run(weights(tmp_path / "model.safetensors", [], **facts), "real_iad", tree) == 0
    found, text, *_ = everything(tmp_path / "run")
    assert ("| img_auc | 91.23 | FeatureNorm | Image AUROC |" in text) == shown
    assert found["weights"][0]["selected_by"].startswith(selected[:20])
