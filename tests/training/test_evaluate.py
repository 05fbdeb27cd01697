"""The evaluation from end to end, on small trees of files: numbers against the installed package, and bad input."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from helpers.hub_server import HubServer
from helpers.published import as_published
from helpers.ranks import run_ranks
from helpers.real_iad_tree import write_real_iad
from helpers.trees import write_btad, write_manifest, write_mvtec
from PIL import Image, ImageOps
from sklearn.metrics import average_precision_score, roc_auc_score

import adfeatures
from adfeatures import catalog
from adfeatures.backbones import EfficientNet
from adfeatures.checkpoints import save_checkpoint
from adfeatures.images import build_transform, read_image
from adfeatures.projector import ResidualProjector
from adfeatures.scoring import FeatureNormScorer, feature_norm_map
from training import evaluate, metrics
from training.data import dataset, images
from training.data.images import ImageDataset
from training.evaluation import model as evaluated_model
from training.evaluation import pictures, raw_features
from training.evaluation.config import EvaluationConfig
from training.evaluation.feature_cache import content_key
from training.evaluation.fitting import settings
from training.evaluation.model import load_model, serving_tag
from training.methods import CFLOW, GLASS, METHODS, FeatureNorm, PatchCore, UniAD

SIZE = 64
Evaluate = Callable[..., int]


@pytest.fixture
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[type, dict[str, int]] = {
        CFLOW: {"blocks": 2, "sub_epochs": 2},
        GLASS: {"dim": 64, "hidden": 32},
        UniAD: {"hidden": 32, "heads": 2, "layers": 1, "feed_forward": 32},
        PatchCore: {"dim": 64},
    }
    for method, defaults in sizes.items():
        for name, value in defaults.items():
            monkeypatch.setitem(method.__dict__["__init__"].__kwdefaults__, name, value)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_mvtec(tmp_path / "mvtec", ("bottle", "cable"), good=5, test_good=3, bad=3)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A projector for the embedded backbone, as training.pretrain writes them."""
    torch.manual_seed(0)
    projector = ResidualProjector((40, 80, 112), num_heads=4, num_keys=16)
    path = tmp_path_factory.mktemp("weights") / "checkpoints_pro_norm.safetensors"
    header = {
        "format": "adfeatures",
        "model": "adpretrain_efficientnet_lite",
        "num_heads": "4",
        "img_size": f"[{SIZE}, {SIZE}]",
    }
    stored = {"img_auc": 0.9123, "pix_auc": 0.8234, "pix_pro": 0.7345}
    save_checkpoint(
        path,
        {f"projector.{key}": value for key, value in projector.state_dict().items()},
        metrics=stored,
        metadata=header,
    )
    return path


@pytest.fixture
def words(root: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The least that the command needs; by default on the embedded model with two references."""

    def given(**options: object) -> list[str]:
        needed = {
            "model": "residual_lite",
            "img_size": SIZE,
            "dataset": "mvtec",
            "root": root,
            "output": tmp_path / "run",
            "method": "feature_norm",
            "shots": 2,
            "workers": 0,
            "device": "cpu",
        }
        found = []
        for name, value in {**needed, **options}.items():
            if value is None or value is False:
                continue
            several = value if isinstance(value, (list, tuple)) else () if value is True else (value,)
            found += [f"--{name.replace('_', '-')}", *map(str, several)]
        return found

    return given


@pytest.fixture
def run_as_it_is(words: Callable[..., list[str]]) -> Evaluate:
    """The command with its pictures, and networks of their own size."""
    return lambda **options: evaluate.main(words(**options))


@pytest.fixture
def run(run_as_it_is: Evaluate, small_networks: None, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """The command with small networks, without pictures."""
    monkeypatch.setattr(pictures, "draw_detection_curves", lambda *_: None)
    monkeypatch.setattr(pictures, "draw_maps", lambda *_: None)
    return run_as_it_is


def report(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def records(folder: Path, **wanted: object) -> list[dict]:
    return [r for r in report(folder)["records"] if all(r.get(name) == value for name, value in wanted.items())]


def numbers(folder: Path) -> dict[tuple, dict[str, float]]:
    """All metrics by product, method, features and draw."""
    return {(r["product"], r["method"], r["features"], r["draw"]): r["metrics"] for r in report(folder)["records"]}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images the backbone has encoded, call by call."""
    counts: list[int] = []
    forward = EfficientNet.forward

    def counting(self: EfficientNet, images: torch.Tensor) -> list[torch.Tensor]:
        counts.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(EfficientNet, "forward", counting)
    return counts


class TestNumbers:
    def test_feature_norm_is_that_of_the_installed_package(
        self, run: Evaluate, root: Path, tmp_path: Path, weights: Path
    ) -> None:
        assert run(model=weights, img_size=None, draws=2) == 0
        model = adfeatures.create_model(weights=weights)
        transform = adfeatures.create_transform(model)
        for draw in range(2):
            for product in ("bottle", "cable"):
                model.set_references(sorted((root / product / "train/good").iterdir())[2 * draw : 2 * draw + 2])
                items = dataset("mvtec").find_items(root, "test", [product])
                maps, scores = model.anomaly_map(torch.stack([transform(read_image(item.image)) for item in items]))
                labels = [item.label for item in items]
                masks = [
                    np.zeros((SIZE, SIZE)) if item.mask is None else np.asarray(Image.open(item.mask)) for item in items
                ]
                (found,) = records(tmp_path / "run", product=product, features="pretrained", draw=draw)
                assert found["metrics"]["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
                assert found["metrics"]["image_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
                pixels = (np.array(masks) > 0).ravel()
                assert found["metrics"]["pixel_auroc"] == pytest.approx(roc_auc_score(pixels, maps.flatten()), abs=1e-4)
                assert found["metrics"]["pixel_ap"] == pytest.approx(
                    average_precision_score(pixels, maps.flatten()), abs=1e-4
                )

    def test_raw_features_have_no_references(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        assert run(method="patchcore") == 0
        backbone = adfeatures.create_model(img_size=SIZE).backbone
        transform = build_transform((SIZE, SIZE), (0.5,) * 3, (0.5,) * 3)

        def batch(split: str) -> dict:
            items = dataset("mvtec").find_items(root, split, ["bottle"])
            images = torch.stack([transform(read_image(item.image)) for item in items])
            return {"image": images, "path": [item.image for item in items], "label": [item.label for item in items]}

        test = batch("test")
        scores = PatchCore(lambda b: backbone(b["image"])).fit([batch("train")]).predict([test]).scores
        (found,) = records(tmp_path / "run", product="bottle", features="raw")
        assert found["metrics"]["image_auroc"] == pytest.approx(roc_auc_score(test["label"], scores), abs=1e-6)
        assert found["references"] == [] and found["weights"] is None and found["draw"] is None

    def test_residuals_of_any_backbone_of_timm(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        network: Any = timm.create_model("test_resnet").eval()
        save_checkpoint(tmp_path / "mine.safetensors", network.state_dict())
        name = "residual_timm.test_resnet@2"
        assert run(model=name, backbone_weights=tmp_path / "mine.safetensors", products="bottle", shots=1) == 0
        items = dataset("mvtec").find_items(root, "test", ["bottle"])
        mean, std = network.default_cfg["mean"], network.default_cfg["std"]
        transform = build_transform((SIZE, SIZE), mean, std)
        images = [sorted((root / "bottle/train/good").iterdir())[0], *(Path(item.image) for item in items)]
        with torch.no_grad():
            (maps,) = network.forward_intermediates(
                torch.stack([transform(read_image(image)) for image in images]), indices=[1], intermediates_only=True
            )
        weights = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).expand(maps.shape[1], 1, 3, 3)
        padded = torch.nn.functional.pad(maps, (1, 1, 1, 1), mode="replicate")
        means = torch.nn.functional.conv2d(padded, weights, groups=maps.shape[1])
        rows, *queries = torch.nn.functional.normalize(means, dim=1).flatten(2).permute(0, 2, 1)
        nearest = torch.stack([rows[(own @ rows.T).argmax(dim=1)] for own in queries])
        residuals = (torch.stack(queries) - nearest).permute(0, 2, 1).reshape(len(queries), *maps.shape[1:])
        of_pixels = feature_norm_map([residuals], (SIZE, SIZE))
        masks = [np.zeros((SIZE, SIZE)) if item.mask is None else np.asarray(Image.open(item.mask)) for item in items]
        (found,) = records(tmp_path / "run", features="pretrained")
        expected = roc_auc_score([item.label for item in items], of_pixels.amax(dim=(1, 2)))
        assert found["metrics"]["image_auroc"] == pytest.approx(expected, abs=1e-6)
        expected = roc_auc_score((np.array(masks) > 0).ravel(), of_pixels.flatten())
        assert found["metrics"]["pixel_auroc"] == pytest.approx(expected, abs=1e-4)
        assert "residual_timm.test_resnet.r160_in1k@2" in (tmp_path / "run/results.md").read_text()

    def test_means_and_differences(self, run: Evaluate, tmp_path: Path) -> None:
        assert run(draws=2) == 0
        found = numbers(tmp_path / "run")
        table = {(r["product"], r["features"]): r for r in report(tmp_path / "run")["table"]}
        for name in ("image_auroc", "aupro"):
            draws = [
                np.mean([found[p, "feature_norm", "pretrained", d][name] for p in ("bottle", "cable")])
                for d in range(2)
            ]
            raw = np.mean([found[p, "feature_norm", "raw", None][name] for p in ("bottle", "cable")])
            assert table["mean", "pretrained"]["values"][name] == pytest.approx(np.mean(draws))
            assert table["mean", "pretrained"]["spreads"][name] == pytest.approx(np.std(draws, ddof=1))
            assert table["mean", "difference"]["values"][name] == pytest.approx(np.mean(draws) - raw)

    def test_all_methods(self, run: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(method="all", epochs=1, products="bottle") == 0
        rows = {(r["method"], r["features"]) for r in report(tmp_path / "run")["records"]}
        assert rows == {(m, f) for m in METHODS for f in ("raw", "pretrained")}
        printed = capsys.readouterr().out
        for title in ("FeatureNorm", "PatchCore", "PaDiM", "CFLOW", "GLASS", "UniAD"):
            assert title in printed
        for method, setting in (("cflow", "meta_epochs"), ("glass", "epochs"), ("uniad", "epochs")):
            assert all(r["settings"][setting] == 1 for r in records(tmp_path / "run", method=method))
        assert [r["settings"]["adapter"] for r in records(tmp_path / "run", method="glass")] == [False, True]
        assert all("made its textures of noise" in r["warnings"][0] for r in records(tmp_path / "run", method="glass"))

    def test_retrieved_references_have_a_name_of_their_own(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        assert run(references="retrieved", method=["feature_norm", "patchcore"], draws=2) == 0
        found = numbers(tmp_path / "run")
        assert ("bottle", "feature_norm_retrieved", "pretrained", None) in found
        assert not any(method == "feature_norm" for _, method, _, _ in found)
        assert ("bottle", "patchcore", "pretrained", 1) in found
        assert "## FeatureNorm (retrieved)" in (tmp_path / "run/results.md").read_text()
        (record,) = records(tmp_path / "run", product="bottle", method="feature_norm_retrieved", features="pretrained")
        train = {str(path) for path in (root / "bottle/train/good").iterdir()}
        assert set(record["retrieved"]) == {
            item.image for item in dataset("mvtec").find_items(root, "test", ["bottle"])
        }
        assert all(set(paths) == train for paths in record["retrieved"].values())

    def test_a_manifest_is_evaluated_as_the_folder_that_it_lists(
        self, run: Evaluate, root: Path, tmp_path: Path
    ) -> None:
        table = write_manifest(
            root,
            split=lambda image: image.parts[1],
            view=lambda image: f"side {int(image.stem) % 2}",
            part=lambda image: f"{image.parent.name} {int(image.stem) // 2}",
        )
        assert run(method="patchcore", dataset="manifest", root=table, shots=1, draws=2) == 0
        assert run(method="patchcore", dataset="folder", output=tmp_path / "folder") == 0
        for record in records(tmp_path / "run", features="raw"):
            (same,) = records(tmp_path / "folder", features="raw", product=record["product"])
            assert {name: record["metrics"][name] for name in same["metrics"]} == pytest.approx(same["metrics"])
            assert set(record["views"]) == {"side 0", "side 1"} and 0 <= record["metrics"]["part_auroc"] <= 1
        (drawn,) = records(tmp_path / "run", features="pretrained", product="bottle", draw=1)
        # The second draw of each side: images 2 and 3.
        assert [Path(entry["file"]).name for entry in drawn["references"]] == ["002.png", "003.png"]

    def test_oracle_is_the_best_of_all_epochs(self, run: Evaluate, tmp_path: Path) -> None:
        assert run(method="cflow", epochs=3, oracle=True, products="bottle") == 0
        for record in records(tmp_path / "run"):
            assert set(record["oracle"]) == set(record["metrics"])
            assert all(record["oracle"][name] >= value for name, value in record["metrics"].items())
        assert any(record["oracle"] != record["metrics"] for record in records(tmp_path / "run"))
        text = (tmp_path / "run/results.md").read_text()
        assert "## CFLOW (oracle)\n\nThe best value of each metric over all epochs, chosen on the test images" in text
        before = {key: value for key, value in numbers(tmp_path / "run").items()}
        assert run(method="cflow", epochs=3, products="bottle", output=tmp_path / "plain") == 0
        # Looking at the test images changes nothing of the result itself.
        assert numbers(tmp_path / "plain") == before
        assert not any("oracle" in record for record in records(tmp_path / "plain"))


OUTSIDE = """
from torch.nn.functional import interpolate

class Brightness:
    def __init__(self, extractor, *, level=0):
        self.extractor, self.level = extractor, level

    def fit(self, loader):
        self.seen = sum(len(batch["path"]) for batch in loader)

    def predict(self, loader):
        (batch,) = loader
        maps = self.extractor(batch)[self.level].norm(dim=1, keepdim=True)
        maps = interpolate(maps, batch["image"].shape[2:])[:, 0]
        return maps, maps.amax(dim=(1, 2)) + self.seen
"""


class TestMethodFromOutside:
    @pytest.fixture(autouse=True)
    def outside(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A class in a module of which this project knows nothing."""
        (tmp_path / "package").mkdir()
        (tmp_path / "package/outside.py").write_text(OUTSIDE)
        monkeypatch.syspath_prepend(tmp_path / "package")
        monkeypatch.delitem(sys.modules, "outside", raising=False)
        return tmp_path / "package/outside.py"

    def test_it_is_evaluated_as_all_others(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        assert run(method=["outside:Brightness", "feature_norm"], products="bottle") == 0
        backbone = adfeatures.create_model(img_size=SIZE).backbone
        transform = build_transform((SIZE, SIZE), (0.5,) * 3, (0.5,) * 3)
        items = dataset("mvtec").find_items(root, "test", ["bottle"])
        maps = backbone(torch.stack([transform(read_image(item.image)) for item in items]))[0].norm(dim=1)
        (found,) = records(tmp_path / "run", method="outside:Brightness", features="raw")
        expected = roc_auc_score([item.label for item in items], maps.amax(dim=(1, 2)))
        assert found["metrics"]["image_auroc"] == pytest.approx(expected, abs=1e-6)
        assert found["settings"] == {"level": 0} and found["counts"]["train"] == 5
        text = (tmp_path / "run/results.md").read_text()
        assert text.index("## FeatureNorm") < text.index("## Brightness")
        assert {path.name for path in (tmp_path / "run/results/bottle").iterdir()} == {
            "outside.Brightness-raw.json",
            "outside.Brightness-pretrained-0.json",
            "feature_norm-raw.json",
            "feature_norm-pretrained-0.json",
        }

    def test_its_results_stay_where_it_is_gone(
        self, run: Evaluate, outside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert run(method="outside:Brightness", products="bottle") == 0
        outside.unlink()
        monkeypatch.delitem(sys.modules, "outside")
        assert run(method="feature_norm", products="bottle") == 0
        assert "## Brightness" in (tmp_path / "run/results.md").read_text()

    def test_its_faults_are_its_own(self, run: Evaluate, outside: Path, tmp_path: Path) -> None:
        faults = {
            "Keyed": "def fit(self, loader): {}['recipe']",
            "Greedy": "def __init__(self, extractor, needed): pass",
            "Triple": "def predict(self, loader): return 1, 2, 3",
        }
        outside.write_text(
            OUTSIDE + "".join(f"\nclass {name}(Brightness):\n    {fault}\n" for name, fault in faults.items())
        )
        methods = [f"outside:{name}" for name in faults]
        assert run(method=[*methods, "feature_norm"], products="bottle") == 1
        errors = {record["method"]: record.get("error", "") for record in records(tmp_path / "run", features="raw")}
        assert errors.pop("feature_norm") == ""
        assert [errors[method].partition(":")[0] for method in methods] == ["KeyError", "TypeError", "TypeError"]

    def test_settings_of_any_type_are_recorded(self, run: Evaluate, outside: Path, tmp_path: Path) -> None:
        outside.write_text(OUTSIDE.replace("level=0", "level=0, kind=Exception"))
        assert run(method="outside:Brightness", products="bottle") == 0
        (found,) = records(tmp_path / "run", features="raw")
        assert found["settings"] == {"level": 0, "kind": "<class 'Exception'>"}

    def test_what_cannot_be_found(self, run: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
        for method, text in (
            ("outside:Dark", "needs a class Dark in outside with fit(loader) and predict(loader)"),
            ("nowhere:Dark", "cannot be imported (No module named 'nowhere')"),
            ("outside", "Unknown method 'outside'"),
        ):
            assert run(method=method) == 2
            assert text in capsys.readouterr().err
        assert run(method="outside:Brightness", protocol="original", img_size=None) == 2
        assert "has no outside:Brightness: leave out --protocol" in capsys.readouterr().err


class TestReferences:
    def test_draws_and_their_files_are_recorded(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        assert run(draws=2) == 0
        files = sorted(str(path) for path in (root / "bottle/train/good").iterdir())
        for draw in range(2):
            (record,) = records(tmp_path / "run", product="bottle", draw=draw)
            expected = files[2 * draw : 2 * draw + 2]
            assert record["references"] == [{"file": file, "sha256": content_key(file)} for file in expected]

    def test_every_view_has_references_of_its_own(self, run: Evaluate, tmp_path: Path) -> None:
        write_real_iad(tmp_path / "iad", ("pcb",), ok=6, ng=2)
        assert run(dataset="real_iad", root=tmp_path / "iad", products="pcb", draws=2) == 0
        train = sorted(item.image for item in dataset("real_iad").find_items(tmp_path / "iad", "train", ["pcb"]))
        for draw in range(2):
            (record,) = records(tmp_path / "run", draw=draw)
            expected = [[path for path in train if view in path][2 * draw : 2 * draw + 2] for view in ("C1", "C2")]
            assert [entry["file"] for entry in record["references"]] == sum(expected, [])
        assert run(dataset="real_iad", root=tmp_path / "iad", products="pcb", draws=3) == 1
        (failed,) = records(tmp_path / "run", draw=2)
        assert "needs 6 normal training images of view C" in failed["error"]

    def test_draws_do_not_begin_anew(self, run: Evaluate, tmp_path: Path) -> None:
        assert run(draws=3) == 1
        (failed,) = records(tmp_path / "run", product="bottle", draw=2)
        assert (
            "Draw 3 of 2 references needs 6 normal training images, bottle has 5. Lower --shots or --draws."
            in failed["error"]
        )
        assert len(records(tmp_path / "run", product="bottle", features="pretrained")) == 3
        assert records(tmp_path / "run", product="bottle", draw=1)[0]["metrics"]

    @pytest.mark.parametrize("layout", ["mvtec/bottle/train/good", "bottle/train/good", "bottle"])
    def test_given_references(self, run: Evaluate, root: Path, tmp_path: Path, layout: str) -> None:
        chosen = [root / f"bottle/train/good/{number:03d}.png" for number in (4, 1, 3)]
        for name, path in zip(("a.png", "b.png", "c.png"), chosen, strict=True):
            (tmp_path / "8shot" / layout).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "8shot" / layout / name)
        assert run(products="bottle", references=tmp_path / "8shot", method="patchcore") == 0
        (record,) = records(tmp_path / "run", features="pretrained")
        assert [entry["sha256"] for entry in record["references"]] == [content_key(str(path)) for path in chosen[:2]]

    def test_given_references_that_are_missing_or_too_few(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        shutil.copytree(root / "bottle/train/good", tmp_path / "8shot/bottle")
        assert run(references=tmp_path / "8shot", shots=5) == 1
        (failed,) = records(tmp_path / "run", product="cable", features="pretrained")
        assert f"There are no references of cable in {tmp_path / '8shot'}" in failed["error"]
        assert run(references=tmp_path / "8shot", shots=6, output=tmp_path / "other", products="bottle") == 1
        assert (
            "holds 5 images, 6 references were asked for"
            in records(tmp_path / "other", features="pretrained")[0]["error"]
        )

    @pytest.mark.parametrize(("protocol", "zero"), [("sound", False), ("original", True)])
    def test_references_that_are_trained_on(
        self, run: Evaluate, monkeypatch: pytest.MonkeyPatch, protocol: str, zero: bool, tmp_path: Path
    ) -> None:
        """As copies in another folder, so that only their content tells them."""
        largest: dict[str, list[float]] = {}
        fit = FeatureNorm.fit

        def spy(self: FeatureNorm, loader: object) -> FeatureNorm:
            for batch in loader:  # type: ignore[attr-defined]
                for row, path in enumerate(batch["path"]):
                    largest.setdefault(path, []).append(
                        max(float(level[row].abs().max()) for level in self.extractor(batch))
                    )
            return fit(self, loader)  # type: ignore[arg-type]

        monkeypatch.setattr(FeatureNorm, "fit", spy)
        source = tmp_path / "mvtec/bottle/train/good"
        shutil.copytree(source, tmp_path / "8shot/bottle")
        assert (
            run(products="bottle", references=tmp_path / "8shot", protocol=protocol, img_size=None if zero else SIZE)
            == 0
        )
        # Of the two runs, that on raw features never sees zeros.
        assert [min(largest[str(path)]) == 0 for path in sorted(source.iterdir())] == [zero, zero, False, False, False]

    def test_a_single_reference_is_not_trained_on(self, run: Evaluate, tmp_path: Path) -> None:
        assert run(shots=1, method="patchcore", products="bottle") == 0
        (record,) = records(tmp_path / "run", features="pretrained")
        assert record["counts"]["train"] == 4
        assert "The only reference is a training image, which is left out of the training." in record["warnings"]

    def test_test_images_among_the_references_are_named(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        shutil.copy(root / "bottle/train/good/000.png", root / "bottle/test/good/007.png")
        assert run(products="bottle") == 0
        (record,) = records(tmp_path / "run", features="pretrained")
        assert "1 test images are references as well." in record["warnings"]

    def test_copies_among_the_references_are_named(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        shutil.copy(root / "bottle/train/good/000.png", root / "bottle/train/good/001.png")
        assert run(products="bottle", shots=3) == 0
        (record,) = records(tmp_path / "run", features="pretrained")
        assert len(record["references"]) == 2
        assert any("001.png is a copy of another one" in text for text in record["warnings"])


class TestProtocol:
    def test_original_geometry_is_that_of_method_data_set_and_role(
        self, run: Evaluate, root: Path, tmp_path: Path
    ) -> None:
        write_btad(tmp_path / "btad", ("01",), good=4)
        options = {"img_size": None, "protocol": "original", "method": ["feature_norm", "patchcore"]}
        assert run(**options, products="bottle") == 0
        assert run(**options, dataset="btad", root=tmp_path / "btad", output=tmp_path / "btad_run") == 0
        found = {
            (folder, r["method"]): r["geometry"] for folder in ("run", "btad_run") for r in records(tmp_path / folder)
        }
        small, large = "resize224_crop224", "resize256_crop224"
        assert found == {
            ("run", "feature_norm"): {"images": small, "references": small},
            ("run", "patchcore"): {"images": large, "references": small},
            ("btad_run", "feature_norm"): {"images": small, "references": small},
            ("btad_run", "patchcore"): {"images": small, "references": small},
        }
        assert report(tmp_path / "run")["settings"]["img_size"] == [224, 224]

    def test_the_approximate_aupro_is_beside_the_exact_one(
        self, run: Evaluate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        judge = metrics.evaluate

        def spy(maps: np.ndarray, masks: np.ndarray, *more: object) -> metrics.Metrics:
            kept.append((maps, masks))
            return judge(maps, masks, *more)  # type: ignore[arg-type]

        monkeypatch.setattr(metrics, "evaluate", spy)
        assert run(products="bottle", protocol="original", img_size=None) == 0
        found = sorted((r["metrics"]["aupro"], r["metrics"]["aupro_original"]) for r in records(tmp_path / "run"))
        assert found == sorted((metrics.aupro(*pair), metrics.aupro_original(*pair)) for pair in kept)
        assert "| AUPRO (original) |" in (tmp_path / "run/results.md").read_text()

    def test_cflow_takes_its_level_reference_from_the_test_images(self) -> None:
        model = load_model("residual_lite", ("cflow",), img_size=SIZE)
        for protocol, reference in (("sound", "train"), ("original", "test")):
            config = EvaluationConfig(model="residual_lite", dataset="mvtec", root="", output="", protocol=protocol)
            assert settings(METHODS["cflow"], "raw", config, model, "squash", [])["level_reference"] == reference


class TestGoingOn:
    def test_nothing_is_computed_twice(
        self, run: Evaluate, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert run(method=["feature_norm", "patchcore"], draws=2) == 0
        # Five training and six test images of either product.
        assert sum(encoded) == 2 * (5 + 6)
        before = report(tmp_path / "run")
        monkeypatch.setattr(FeatureNorm, "predict", lambda *_: pytest.fail("computed again"))
        monkeypatch.setattr(PatchCore, "fit", lambda *_: pytest.fail("computed again"))
        assert run(method=["feature_norm", "patchcore"], draws=2) == 0
        assert sum(encoded) == 22
        assert report(tmp_path / "run") == before

    def test_draws_methods_and_products_are_added(
        self, run: Evaluate, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[str] = []

        class Spy(ImageDataset):
            def __getitem__(self, index: int) -> dict:
                read.append(self.items[index].image)
                return super().__getitem__(index)

        monkeypatch.setattr(raw_features, "ImageDataset", Spy)
        assert run(products="bottle") == 0
        assert run(method="patchcore", draws=2) == 0
        assert sum(encoded) == 22
        # Test images are read again for their masks, training images are not.
        assert sum("/train/" in path for path in read) == 10 and len(read) == 10 + 6 + 12
        assert set(numbers(tmp_path / "run")) == {
            *(("bottle", "feature_norm", *rest) for rest in (("raw", None), ("pretrained", 0))),
            *(
                (p, "patchcore", *rest)
                for p in ("bottle", "cable")
                for rest in (("raw", None), ("pretrained", 0), ("pretrained", 1))
            ),
        }

    def test_the_cache_serves_other_outputs_and_may_be_deleted(
        self, run: Evaluate, tmp_path: Path, encoded: list[int]
    ) -> None:
        for number, output in enumerate(("one", "two")):
            assert run(output=tmp_path / output, cache=tmp_path / "cache", shots=2 + number) == 0
        assert sum(encoded) == 22
        shutil.rmtree(tmp_path / "cache")
        assert run(output=tmp_path / "one", cache=tmp_path / "cache") == 0
        assert sum(encoded) == 22
        assert run(output=tmp_path / "one", cache=tmp_path / "cache", method="patchcore") == 0
        assert sum(encoded) == 44

    def test_what_is_kept_for_one_draw_is_deleted(self, run: Evaluate, tmp_path: Path) -> None:
        assert run(method=["feature_norm", "patchcore", "uniad"], draws=2, epochs=1) == 0
        (folder,) = (tmp_path / "run/cache").iterdir()
        assert json.loads((folder / "identity.json").read_text())["preset"] == "squash"

    def test_interrupted(
        self, run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(method=["patchcore", "uniad"], epochs=1, output=tmp_path / "whole") == 0
        fit, calls = PatchCore.fit, []

        def stop(self: PatchCore, loader: object) -> PatchCore:
            calls.append(loader)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return fit(self, loader)  # type: ignore[arg-type]

        monkeypatch.setattr(PatchCore, "fit", stop)
        assert run(method=["patchcore", "uniad"], epochs=1) == 130
        assert "the same command resumes" in capsys.readouterr().err
        assert len(list((tmp_path / "run/results/bottle").iterdir())) == 2
        assert run(method=["patchcore", "uniad"], epochs=1) == 0
        assert len(calls) == 5
        assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")

    def test_other_settings_are_refused(self, run: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
        assert run() == 0
        for options, text in (
            ({"shots": 3}, "shots was 2, is 3"),
            ({"model": "adpretrain_efficientnet_lite.x"}, "Unknown tag"),
            ({"protocol": "original", "img_size": None}, "protocol was 'sound', is 'original'"),
            ({"img_size": 96}, "img_size was [64, 64], is [96, 96]"),
            ({"epochs": 3}, "epochs was None, is 3"),
        ):
            assert run(**options) == 2
            assert text in capsys.readouterr().err

    def test_other_weights_in_the_same_file_are_refused(
        self, run: Evaluate, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = shutil.copy(weights, tmp_path / "own.safetensors")
        assert run(model=path, img_size=None) == 0
        checkpoint = adfeatures.checkpoints.load_checkpoint(path)
        other = {key: value + 0.1 for key, value in checkpoint.state_dict.items()}
        save_checkpoint(path, other, metadata=checkpoint.metadata)
        assert run(model=path, img_size=None) == 2
        assert "weights of feature_norm was" in capsys.readouterr().err

    def test_other_images_are_refused(
        self, run: Evaluate, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run() == 0
        before = numbers(tmp_path / "run")
        moved = shutil.copytree(root, tmp_path / "moved")
        assert run(root=moved) == 0
        shutil.copy(moved / "cable/test/good/000.png", moved / "cable/test/good/001.png")
        assert run(root=moved) == 2
        error = capsys.readouterr().err
        assert f"The results of cable in {tmp_path / 'run'} are of other images than {moved} holds now" in error
        assert numbers(tmp_path / "run") == before
        shutil.rmtree(tmp_path / "run/results/cable")
        assert run(root=moved) == 0

    def test_uniad_is_trained_again_with_more_products(self, run: Evaluate, tmp_path: Path) -> None:
        assert run(method="uniad", epochs=1, products="bottle") == 0
        assert {tuple(r["trained_on"]) for r in records(tmp_path / "run")} == {("bottle",)}
        assert run(method="uniad", epochs=1) == 0
        assert {tuple(r["trained_on"]) for r in records(tmp_path / "run")} == {("bottle", "cable")}
        assert {r["counts"]["train"] for r in records(tmp_path / "run")} == {10}

    def test_uniad_with_more_products_after_the_cache_was_deleted(self, run: Evaluate, tmp_path: Path) -> None:
        assert run(method="uniad", epochs=1, products="bottle") == 0
        shutil.rmtree(tmp_path / "run/cache")
        assert run(method="uniad", epochs=1) == 0
        assert {tuple(r["trained_on"]) for r in records(tmp_path / "run")} == {("bottle", "cable")}

    def test_evaluations_at_the_same_time_share_the_cache(
        self, run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert run(method="patchcore", cache=tmp_path / "cache", output=tmp_path / "alone") == 0
        fit, calls, kept = PatchCore.fit, [], []

        def beside(self: PatchCore, loader: object) -> PatchCore:
            calls.append(loader)
            if len(calls) == 2:
                kept.append(set((tmp_path / "cache").iterdir()))
                assert run(cache=tmp_path / "cache", output=tmp_path / "other") == 0
                kept.append(set((tmp_path / "cache").iterdir()))
            return fit(self, loader)  # type: ignore[arg-type]

        monkeypatch.setattr(PatchCore, "fit", beside)
        assert run(method="patchcore", cache=tmp_path / "cache") == 0
        # Its raw features, which came first, and the residuals of the draw that it was at.
        assert kept[0] == kept[1] and len(kept[0]) == 2
        assert numbers(tmp_path / "run") == numbers(tmp_path / "alone")


def corrupt_image(root: Path) -> None:
    (root / "bottle/test/good/001.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")


def corrupt_training_image(root: Path) -> None:
    (root / "bottle/train/good/003.png").write_bytes(b"")


def corrupt_mask(root: Path) -> None:
    (root / "bottle/ground_truth/broken/000_mask.png").write_bytes(b"no image")


def misfit_mask(root: Path) -> None:
    Image.new("L", (32, 64), 255).save(root / "bottle/ground_truth/broken/001_mask.png")


def missing_mask(root: Path) -> None:
    (root / "bottle/ground_truth/broken/001_mask.png").unlink()


def half_extracted(root: Path) -> None:
    shutil.rmtree(root / "bottle/test")


class TestBadInput:
    @pytest.mark.parametrize(
        ("spoil", "text"),
        [
            (corrupt_image, "001.png"),
            (corrupt_training_image, "the file is empty"),
            (corrupt_mask, "000_mask.png"),
            (misfit_mask, "001_mask.png has 32 x 64 pixels, its image"),
            (missing_mask, "its mask"),
            (half_extracted, "test"),
        ],
    )
    def test_a_product_that_cannot_be_used(
        self, run: Evaluate, root: Path, tmp_path: Path, spoil: Callable[[Path], None], text: str
    ) -> None:
        spoil(root)
        assert run(method=["feature_norm", "uniad"], epochs=1) == 1
        (failed,) = records(tmp_path / "run", product="bottle")
        assert text in failed["error"] and "Error" not in failed["error"]
        assert {(r["method"], tuple(r["trained_on"])) for r in records(tmp_path / "run", product="cable")} == {
            ("feature_norm", ("cable",)),
            ("uniad", ("cable",)),
        }
        assert (
            f"| bottle | all | {failed['error'].replace(chr(10), ' ')} |" in (tmp_path / "run/results.md").read_text()
        )

    def test_a_product_that_was_repaired(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        whole = (root / "bottle/test/good/001.png").read_bytes()
        corrupt_image(root)
        assert run(method=["feature_norm", "uniad"], epochs=1) == 1
        (root / "bottle/test/good/001.png").write_bytes(whole)
        assert run(method=["feature_norm", "uniad"], epochs=1) == 0
        assert not any("error" in r for r in report(tmp_path / "run")["records"])
        assert {tuple(r["trained_on"]) for r in records(tmp_path / "run", method="uniad")} == {("bottle", "cable")}

    def test_no_anomalies(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        shutil.rmtree(root / "bottle/test/broken")
        assert run() == 1
        (record,) = records(tmp_path / "run", product="bottle", features="pretrained")
        assert set(record["metrics"].values()) == {None}
        assert "image_auroc, image_ap, image_f1: NaN, since no image is anomalous." in record["warnings"]
        text = (tmp_path / "run/results.md").read_text()
        assert "| bottle | pretrained |" + " - |" * 7 in text and "| mean of 2 | raw | -" not in text

    def test_no_masks(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        shutil.rmtree(root / "bottle/ground_truth")
        assert run(dataset="folder") == 0
        (record,) = records(tmp_path / "run", product="bottle", features="pretrained")
        assert record["metrics"]["image_auroc"] is not None and record["metrics"]["aupro"] is None
        assert "3 anomalous test images have no mask: their pixels count as normal." in record["warnings"]

    def test_masks_that_vanish(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        for name in ("bottle/test/broken/000.png", "bottle/ground_truth/broken/000_mask.png"):
            picture = Image.open(root / name).resize((640, 640))
            if "ground_truth" in name:
                picture.paste(0, (0, 0, 640, 640))
                picture.putpixel((1, 1), 255)
            picture.save(root / name)
        assert run(products="bottle") == 0
        assert all(
            "1 masks are empty at the size of the model's input" in r["warnings"][-1] for r in records(tmp_path / "run")
        )

    def test_a_single_image(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        for number in range(1, 5):
            (root / f"bottle/train/good/{number:03d}.png").unlink()
        assert run(shots=1, method="patchcore", products="bottle") == 1
        (failed,) = records(tmp_path / "run", features="pretrained")
        assert "bottle has a single normal training image, which is its reference" in failed["error"]
        assert records(tmp_path / "run", features="raw")[0]["metrics"]["image_auroc"] is not None

    @pytest.mark.parametrize("given", [False, True])
    def test_a_product_without_references_is_left_out_of_uniad(
        self, run: Evaluate, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
    ) -> None:
        if given:
            for product in ("bottle", "cable"):
                shutil.copytree(root / product / "train/good", tmp_path / "8shot" / product)
            (tmp_path / "8shot/bottle/001.png").write_bytes(b"no image")
        else:
            for number in range(1, 5):
                (root / f"bottle/train/good/{number:03d}.png").unlink()
        options = {"method": "uniad", "epochs": 1, "references": tmp_path / "8shot" if given else None}
        assert run(**options) == 1
        (failed,) = (r for r in records(tmp_path / "run") if "error" in r)
        assert (failed["product"], failed["features"]) == ("bottle", "pretrained")
        assert ("001.png" if given else "bottle has 1. Lower --shots") in failed["error"]
        (record,) = records(tmp_path / "run", product="cable", features="pretrained")
        assert record["trained_on"] == ["cable"]
        # What failed is tried again, and the others are not trained again for it.
        monkeypatch.setattr(UniAD, "fit", lambda *_: pytest.fail("computed again"))
        assert run(**options) == 1

    def test_gray_masks_count_above_zero(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        assert run(products="bottle") == 0
        for path in (root / "bottle/ground_truth/broken").iterdir():
            Image.open(path).point(lambda value: value and 3).save(path)
        assert run(products="bottle", output=tmp_path / "gray") == 0
        assert numbers(tmp_path / "gray") == numbers(tmp_path / "run")

    def test_scores_that_are_not_finite(self, run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        predict = PatchCore.predict

        def broken(self: PatchCore, loader: object) -> object:
            found = predict(self, loader)  # type: ignore[arg-type]
            if len(self._numbers) == 5 and self.extractor.__class__.__name__ == "CachedExtractor":
                found.scores[0] = float("nan")
            return found

        monkeypatch.setattr(PatchCore, "predict", broken)
        assert run(method=["patchcore", "feature_norm"], products="bottle") == 1
        assert {r["error"].split(".")[0] for r in records(tmp_path / "run", method="patchcore")} == {
            "Image scores hold NaN or infinite values"
        }
        assert all("metrics" in r for r in records(tmp_path / "run", method="feature_norm"))

    def test_out_of_memory_is_named_and_bugs_are_not_hidden(
        self, run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(error: Exception) -> Callable[..., None]:
            def raising(*_: object) -> None:
                raise error

            return raising

        monkeypatch.setattr(PatchCore, "fit", fail(torch.OutOfMemoryError("CUDA out of memory")))
        assert run(method=["patchcore", "feature_norm"], products="bottle") == 1
        assert {r["error"] for r in records(tmp_path / "run", method="patchcore")} == {
            "OutOfMemoryError: CUDA out of memory"
        }
        monkeypatch.setattr(PatchCore, "fit", fail(TypeError("a bug")))
        with pytest.raises(TypeError, match="a bug"):
            run(method="patchcore", products="bottle")

    def test_warnings_of_libraries_are_not_reported(
        self, run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fit = FeatureNorm.fit
        repository = Path(evaluate.__file__).parents[1]

        def warning(self: FeatureNorm, loader: object) -> FeatureNorm:
            for place in (".venv/lib/python3/site-packages/torch/data.py", "training/methods/some.py"):
                warnings.warn_explicit(f"from {place}", UserWarning, str(repository / place), 1)
            return fit(self, loader)  # type: ignore[arg-type]

        monkeypatch.setattr(FeatureNorm, "fit", warning)
        assert run(products="bottle") == 0
        assert all(r["warnings"] == ["from training/methods/some.py"] for r in records(tmp_path / "run"))

    def test_a_data_set_of_which_some_products_are_there(self, run: Evaluate, tmp_path: Path) -> None:
        write_real_iad(tmp_path / "iad", ("pcb", "usb"), ok=6, ng=2)
        for name, root, there in (
            ("real_iad", tmp_path / "iad", ("pcb", "usb")),
            ("mvtec", tmp_path / "mvtec", ("bottle", "cable")),
        ):
            output = tmp_path / f"{name}_run"
            assert run(dataset=name, root=root, output=output) == 0
            assert {r["product"] for r in records(output)} == set(there)
            missing = ", ".join(product for product in dataset(name).products if product not in there)
            assert f"| products not found | {missing} |" in (output / "results.md").read_text()
        assert run(products="bottle") == 0
        assert "products not found" not in report(tmp_path / "run")

    def test_nothing_comes_out(self, run: Evaluate, root: Path) -> None:
        half_extracted(root)
        assert run(products="bottle") == 2

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"products": "botle"}, "Unknown product of MVTec AD 'botle'. Did you mean 'bottle'"),
            ({"method": "patchcor"}, "Unknown method 'patchcor'. Did you mean 'patchcore'"),
            ({"model": "residual_light"}, "Unknown model 'residual_light'. Did you mean 'residual_lite'"),
            ({"model": "missing/file.safetensors"}, "There is no file 'missing/file.safetensors'"),
            ({"root": "nowhere"}, "There is no folder nowhere"),
            ({"shots": 0}, "must be 1 or more"),
            ({"epochs": 0}, "must be 1 or more"),
            ({"workers": -1}, "workers must not be below 0"),
            ({"method": []}, "method is all, or some of feature_norm, patchcore"),
            ({"draws": 2, "references": "somewhere"}, "leave out --draws"),
            ({"references": "nowhere"}, "There is no folder nowhere: correct --references"),
            ({"textures": "nowhere"}, "There is no folder nowhere: correct --textures"),
            ({"foregrounds": "nowhere"}, "There is no folder nowhere: correct --foregrounds"),
            ({"protocol": "original"}, "made for 224 x 224 pixels"),
        ],
    )
    def test_what_cannot_be_done(
        self, run: Evaluate, capsys: pytest.CaptureFixture[str], options: Mapping[str, object], text: str
    ) -> None:
        assert run(**options) == 2
        error = capsys.readouterr().err
        assert error.startswith("training.evaluate: error: ") and text in error

    def test_what_is_required(self, run: Evaluate, capsys: pytest.CaptureFixture[str]) -> None:
        for name in ("model", "dataset", "root", "output"):
            with pytest.raises(SystemExit, match="2"):
                run(**{name: None})
            assert f"required: --{name}" in capsys.readouterr().err

    def test_a_folder_too_high_or_too_low(self, run: Evaluate, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(root=root.parent) == 2
        assert f"Give {root} instead" in capsys.readouterr().err

    def test_full_disk(
        self, run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(products="bottle") == 0
        before = numbers(tmp_path / "run")

        def full(*_: object) -> None:
            raise OSError(28, os.strerror(28))

        with monkeypatch.context() as patch:
            patch.setattr("training.evaluation.feature_cache.save_file", full)
            assert run(method="patchcore") == 2
        assert "No space left on device" in capsys.readouterr().err
        assert run(method="feature_norm") == 0
        assert before.items() <= numbers(tmp_path / "run").items()


def deepen(root: Path, bits: int) -> None:
    """Make all images gray: of 8 bits, or the same in 16 of which they use fewer."""
    for path in [*root.rglob("train/good/*.png"), *root.rglob("test/*/*.png")]:
        levels = np.asarray(Image.open(path).convert("L"))
        samples = (levels.astype(int) * (2**bits - 1) + 127) // 255
        Image.fromarray(levels if bits == 8 else samples.astype(np.uint16)).save(path)


class TestBitDepth:
    def test_12_bits_in_16_are_as_good_as_8(
        self, run: Evaluate, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for bits in (8, 12):
            shutil.copytree(root, tmp_path / f"{bits}bits")
            deepen(tmp_path / f"{bits}bits", bits)
        assert run(root=tmp_path / "8bits", output=tmp_path / "run8", bit_depth=12) == 0
        assert run(root=tmp_path / "12bits", bit_depth=12) == 0
        assert numbers(tmp_path / "run") == numbers(tmp_path / "run8")
        assert report(tmp_path / "run")["settings"]["bit_depth"] == 12
        assert "| bit_depth | 12 |" in (tmp_path / "run/results.md").read_text()
        # Without the option the images are nearly black; neither the results nor the features are mixed up.
        assert run(root=tmp_path / "12bits", output=tmp_path / "dark", cache=tmp_path / "run/cache") == 0
        assert numbers(tmp_path / "dark") != numbers(tmp_path / "run")
        assert run(root=tmp_path / "12bits") == 2
        assert "bit_depth was 12, is 16" in capsys.readouterr().err

    def test_what_was_evaluated_before_there_was_a_choice(
        self, run: Evaluate, tmp_path: Path, encoded: list[int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(products="bottle") == 0
        path, before = tmp_path / "run/settings.json", sum(encoded)
        settings = json.loads(path.read_text())
        del settings["bit_depth"]
        path.write_text(json.dumps(settings))
        assert run(products="bottle", bit_depth=12) == 2
        assert "bit_depth was 16, is 12" in capsys.readouterr().err
        assert run(products="bottle", method="patchcore") == 0 and sum(encoded) == before

    @pytest.mark.parametrize("bits", [8, 17])
    def test_what_is_no_bit_depth(self, run: Evaluate, bits: int, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(bit_depth=bits) == 2
        assert f"bit_depth must be 9 to 16, got {bits}" in capsys.readouterr().err


class TestOddFiles:
    def test_masks_that_spoil_the_numbers_are_named(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        folder = root / "bottle/ground_truth/broken"
        assert run(products="bottle", output=tmp_path / "sound") == 0
        assert not any("mask" in text for r in records(tmp_path / "sound") for text in r["warnings"])
        ImageOps.invert(Image.open(folder / "000_mask.png")).save(folder / "000_mask.png")
        Image.open(folder / "001_mask.png").save(tmp_path / "mask.jpg", quality=75)
        Image.open(tmp_path / "mask.jpg").save(folder / "001_mask.png")
        shutil.copy(root / "bottle/test/good/000.png", root / "bottle/test/broken/002.bmp")
        assert run(products="bottle") == 0
        for record in records(tmp_path / "run"):
            (inverted,) = (text for text in record["warnings"] if "look inverted" in text)
            (compressed,) = (text for text in record["warnings"] if "as JPEG leaves them" in text)
            (shared,) = (text for text in record["warnings"] if "is that of several images" in text)
            assert inverted.endswith(f": {folder / '000_mask.png'}.")
            assert compressed.endswith(f": {folder / '001_mask.png'}.")
            assert f"{folder / '002_mask.png'} is that" in shared and "broken/002.bmp" in shared
        text = (tmp_path / "run/results.md").read_text()
        assert text.index("## Warnings") < text.index("look inverted")
        for output in ("run", "sound"):
            assert report(tmp_path / output)["settings"] == report(tmp_path / "sound")["settings"]

    def test_what_reading_warns_of_is_reported_once(
        self, run_as_it_is: Evaluate, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def read(path: str, **options: Any) -> Image.Image:
            warnings.warn(f"{path} has two pages.", stacklevel=1)
            return read_image(path, **options)

        monkeypatch.setattr(images, "read_image", read)
        monkeypatch.setattr("adfeatures.images.read_image", read)
        assert run_as_it_is(products="bottle") == 0
        for record in records(tmp_path / "run"):
            assert [text[: text.index(":")] for text in record["warnings"]] == [
                "6 images with a warning (an image has two pages.)",
                "5 images with a warning (an image has two pages.)",
            ]

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are Unicode")
    def test_names_that_are_not_utf8(self, run_as_it_is: Evaluate, root: Path, tmp_path: Path) -> None:
        product = os.fsdecode(b"bottle \xfc")
        (root / "bottle").rename(root / product)
        for folder in ("train/good", "test/good", "test/broken", "ground_truth/broken"):
            for path in list((root / product / folder).iterdir()):
                path.rename(path.with_name(os.fsdecode(b"\xe9" + os.fsencode(path.name))))
        Image.new("L", (64, 64)).save(root / product / os.fsdecode(b"ground_truth/broken/\xe9001_mask.png"))
        assert run_as_it_is(dataset="folder", method=["feature_norm", "uniad"], epochs=1, products=product) == 0
        found = records(tmp_path / "run", product=product, features="pretrained")
        assert len(found) == 2
        for record in found:
            # What is read back names the files.
            assert all(Path(entry["file"]).is_file() for entry in record["references"])
            (text,) = (text for text in record["warnings"] if "without a defect" in text)
            assert Path(text.partition(": ")[2].removesuffix(".")).is_file()
        for name in ("results.md", "results.csv"):
            assert r"bottle \udcfc" in (tmp_path / "run" / name).read_text(encoding="utf-8")
        assert len(list((tmp_path / "run/figures" / product).iterdir())) == 6
        before = numbers(tmp_path / "run")
        assert run_as_it_is(dataset="folder", method=["feature_norm", "uniad"], epochs=1, products=product) == 0
        assert numbers(tmp_path / "run") == before

    def test_a_console_that_cannot_print_a_path(
        self, run: Evaluate, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moved = root.rename(tmp_path / "\u5199\u771f")
        corrupt_image(moved)
        out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
        monkeypatch.setattr(sys, "stdout", out)
        assert run(root=moved) == 1
        out.flush()
        printed = out.buffer.getvalue().decode("cp1252")
        assert "mean of 1" in printed and r"\u5199\u771f" in printed and "Tables and pictures" in printed

    def test_folders_that_are_no_products(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        for name in ("@eaDir", "notes", "bottle/test/@eaDir"):
            (root / name).mkdir()
        with pytest.warns(UserWarning, match="notes holds no product of MVTec AD and is left out"):
            assert run(products=["@eaDir", "bottle", "notes"]) == 0
        assert {record["product"] for record in records(tmp_path / "run")} == {"bottle"}
        assert "| folders left out | @eaDir, notes |" in (tmp_path / "run/results.md").read_text()

    def test_a_training_set_of_copies(self, run: Evaluate, root: Path, tmp_path: Path) -> None:
        for number in range(1, 5):
            path = root / "bottle/train/good" / f"{number:03d}.png"
            shutil.copy(root / "bottle/train/good/000.png", path)
        assert run(method="patchcore", products="bottle") == 1
        (failed,) = records(tmp_path / "run", features="pretrained")
        assert "bottle has 5 normal training images, copies of one, which is its reference" in failed["error"]
        assert records(tmp_path / "run", features="raw")[0]["metrics"]["image_auroc"] is not None


class TestWeights:
    def test_tags_of_the_paper(self) -> None:
        tags = {method: serving_tag("adpretrain_dinov2_base", method) for method in METHODS}
        assert tags == {
            "feature_norm": "realiad_norm",
            "cflow": "realiad_norm",
            "glass": "realiad_norm",
            "uniad": "realiad_norm",
            "patchcore": "realiad_angle",
            "padim": "realiad_angle",
        }
        assert serving_tag("residual_lite", "padim") == "in1k_v2"
        assert serving_tag("adpretrain_timm", "padim") == ""

    @pytest.fixture
    def published(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, ResidualProjector]:
        """A model of the catalog with two published projectors on the embedded backbone."""
        projectors = {}
        for seed, kind in enumerate(("norm", "angle")):
            torch.manual_seed(seed)
            projectors[f"realiad_{kind}"] = ResidualProjector((40, 80, 112))
            hub.add(
                "owner/repo",
                f"tiny/checkpoints_pro_{kind}.pth",
                as_published(projectors[f"realiad_{kind}"].state_dict()),
            )
        like = catalog.MODELS["adpretrain_dinov2_base"]
        tags = {
            tag: dataclasses.replace(
                entry, hub_file=("owner/repo", f"tiny/checkpoints_pro_{tag.removeprefix('realiad_')}.pth")
            )
            for tag, entry in like.tags.items()
        }
        model = dataclasses.replace(like, backbone="efficientnet_lite", tags=tags)
        monkeypatch.setattr(catalog, "MODELS", MappingProxyType({**catalog.MODELS, "adpretrain_tiny": model}))
        return projectors

    def test_each_method_takes_its_tag_and_the_backbone_is_loaded_once(
        self, published: dict[str, ResidualProjector], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build = Mock(wraps=evaluated_model.build_backbone)
        monkeypatch.setattr(evaluated_model, "build_backbone", build)
        model = load_model("adpretrain_tiny", ("feature_norm", "patchcore", "uniad"), img_size=SIZE)
        build.assert_called_once()
        assert {method: model.tags[method] for method in ("feature_norm", "patchcore", "uniad")} == {
            "feature_norm": "realiad_norm",
            "patchcore": "realiad_angle",
            "uniad": "realiad_norm",
        }
        for tag, projector in published.items():
            found = model.weights[tag]
            assert found.name == f"adpretrain_tiny.{tag}"
            assert found.stored == {"img_auc": 0.9, "pix_auc": 0.8, "pix_pro": 0.7}
            assert found.projector is not None
            for key, value in projector.state_dict().items():
                assert torch.equal(found.projector.state_dict()[key], value.bfloat16().float())

    @pytest.mark.parametrize(
        ("name", "tag"), [("adpretrain_tiny.realiad_angle", None), ("adpretrain_tiny", "realiad_angle")]
    )
    def test_a_tag_forces_it(self, published: dict[str, ResidualProjector], name: str, tag: str | None) -> None:
        model = load_model(name, ("feature_norm", "patchcore"), weights=tag, img_size=SIZE)
        assert set(model.weights) == {"realiad_angle"} and set(model.tags.values()) == {"realiad_angle"}
        assert model.name == "adpretrain_tiny.realiad_angle"

    def test_metrics_of_published_files_are_printed(
        self, run: Evaluate, published: dict[str, ResidualProjector], capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert run(model="adpretrain_tiny", method=["feature_norm", "patchcore"], products="bottle") == 0
        printed = capsys.readouterr().out
        own = {r["method"]: r["metrics"] for r in records(tmp_path / "run", features="pretrained")}
        for tag, method, title in (
            ("realiad_norm", "feature_norm", "FeatureNorm"),
            ("realiad_angle", "patchcore", "PatchCore"),
        ):
            found = f"{100 * own[method]['image_auroc']:.2f}"
            assert f"| adpretrain_tiny.{tag} | img_auc | 90.00 | {title} | Image AUROC | {found} |" in printed

    def test_a_forced_tag_is_another_setting(
        self, run: Evaluate, published: dict[str, ResidualProjector], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(model="adpretrain_tiny", method="patchcore", products="bottle") == 0
        assert run(model="adpretrain_tiny", products="bottle") == 0
        assert run(model="adpretrain_tiny", method="patchcore", products="bottle", weights="realiad_norm") == 2
        assert "weights of patchcore was" in capsys.readouterr().err

    @pytest.mark.parametrize("form", ["path", "local-dir", "named"])
    def test_places(self, weights: Path, tmp_path: Path, form: str) -> None:
        shutil.copy(weights, tmp_path / "model.safetensors")
        name, place = {
            "path": (str(weights), None),
            "local-dir": (f"local-dir:{tmp_path}", None),
            "named": ("adpretrain_efficientnet_lite", str(weights)),
        }[form]
        model = load_model(name, ("feature_norm", "patchcore"), weights=place)
        assert model.name == "adpretrain_efficientnet_lite" and model.img_size == (SIZE, SIZE)
        assert set(model.weights) == {""} and model.weights[model.tags["patchcore"]].stored["img_auc"] == 0.9123
        assert isinstance(model.scorer, FeatureNormScorer)

    def test_weights_twice(self, weights: Path) -> None:
        with pytest.raises(adfeatures.errors.InputError, match="leave out --weights"):
            load_model(str(weights), ("padim",), weights=str(weights))


@pytest.mark.parametrize("place", ["results", "results/bottle", "figures", "figures/bottle", "cache"])
def test_nothing_is_written_through_a_link(
    run_as_it_is: Evaluate, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    link, elsewhere = tmp_path / "run" / place, tmp_path / "elsewhere"
    elsewhere.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    assert run_as_it_is(products="bottle") == 2
    assert f"{link} is a link" in capsys.readouterr().err and not any(elsewhere.iterdir())


def test_check(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing_mask(root)
    assert evaluate.main(["--check", str(root)]) == 1
    printed = capsys.readouterr().out
    assert f"{root} holds MVTec AD" in printed and "001_mask.png" in printed
    assert evaluate.main(["--check", str(root), "--dataset", "mvtec"]) == 1
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--check", str(root), "--shots", "2"])
    assert "--check takes --dataset alone, not --shots 2" in capsys.readouterr().err


def test_pictures(run_as_it_is: Evaluate, small_networks: None, tmp_path: Path) -> None:
    assert run_as_it_is(method="patchcore", draws=2, products="bottle") == 0
    folder = tmp_path / "run/figures/bottle"
    assert {path.name for path in folder.iterdir()} == {
        "patchcore-raw-maps.png",
        "patchcore-pretrained-0-maps.png",
        "patchcore-curves.png",
    }
    for path in folder.iterdir():
        assert np.asarray(read_image(path)).std() > 5


def test_curves_are_drawn_once_of_all_that_is_there(
    run: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a run that ended between the results and the picture."""
    drawn: list[list[str]] = []

    def draw(path: Path, heading: str, by_features: dict[str, object]) -> None:
        assert heading == "FeatureNorm on bottle" and not path.exists()
        drawn.append([*by_features])
        if len(drawn) == 2:
            raise KeyboardInterrupt
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    monkeypatch.setattr(pictures, "draw_detection_curves", draw)
    options = {"method": "feature_norm", "products": "bottle", "draws": 2}
    folder = tmp_path / "run"
    assert run(**options) == 0
    assert drawn == [["raw", "pretrained"]]
    (folder / "results/bottle/feature_norm-raw.json").unlink()
    assert run(**options) == 130
    assert not (folder / "figures/bottle/feature_norm-curves.png").exists()
    for _ in range(2):
        assert run(**options) == 0
        assert drawn == [["raw", "pretrained"]] * 3
    # The second draw of references is not shown.
    (folder / "results/bottle/feature_norm-pretrained-1.json").unlink()
    assert run(**options) == 0
    assert len(drawn) == 3


@pytest.mark.slow
def test_processes_share_the_products(
    run_as_it_is: Evaluate, words: Callable[..., list[str]], root: Path, tmp_path: Path
) -> None:
    write_mvtec(root, ("carpet",), good=5, test_good=3, bad=3, seed=5000)
    corrupt_image(root)
    options = {"method": ["feature_norm", "uniad"], "epochs": 1, "draws": 2}
    assert run_as_it_is(**options, output=tmp_path / "one") == 1
    done = run_ranks(2, "-m", "training.evaluate", *words(**options, output=tmp_path / "many"))
    assert "mean of 2" in done.stdout, done.stderr
    one, many = (
        {
            (r["product"], r.get("method"), r.get("features"), r.get("draw")): r.get("metrics", r.get("error"))
            for r in report(tmp_path / name)["records"]
        }
        for name in ("one", "many")
    )
    assert one.keys() == many.keys() and len(one) == 2 * 2 * 3 + 1
    for key, value in one.items():
        assert many[key] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-6))
