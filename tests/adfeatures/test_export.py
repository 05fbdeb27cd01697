"""Exported graphs and files give what the model gives: torch.export, torch.compile, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import CFG, photo, tiny_extractor, write_photos
from PIL import Image
from torch import Tensor

from adfeatures import export
from adfeatures.backbones import Encoder, create_backbone
from adfeatures.cli import main
from adfeatures.errors import CheckpointError, InputError, ReferencesError, UnknownNameError
from adfeatures.export import export_onnx
from adfeatures.extractor import FeatureExtractor
from adfeatures.factory import create_model, create_transform
from adfeatures.projector import ResidualProjector
from adfeatures.runtime import ExportedModel
from adfeatures.timm_backbones import TimmBackbone

FAMILIES = {"dinov2_base": 56, "clip_base": 64, "imagebind_huge": 56, "vit_tiny_patch16_224": 64}
# An export takes long: what every commit needs is one of them, beside the embedded default.
each_family = pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.slow if "dino" in arch else pytest.mark.release) for arch in FAMILIES]
)
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot pin down", "ignore:The images hold values")
for extra in ("onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(extra, reason="needs the extra openvino")
PARITY = 1e-4


def reduced(arch: str, batch: int = 3) -> tuple[FeatureExtractor, Tensor]:
    """A model of two blocks with random weights and three references, and images for it."""
    torch.manual_seed(0)
    backbone: Encoder
    if arch.startswith("vit"):
        backbone = TimmBackbone(arch, (1, 2))
        backbone.load(None)
    else:
        backbone = create_backbone(arch, embed_dim=32, depth=2, num_heads=2, levels=(1, 2))
    for name, parameter in backbone.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.ones_(parameter)
    size, projector = (FAMILIES[arch], FAMILIES[arch] * 2), ResidualProjector(backbone.channels, num_keys=16)
    model = FeatureExtractor(backbone, projector, name="tiny", img_size=size, pretrained_cfg=CFG)
    model.set_references(torch.rand(3, 3, *size))
    return model, torch.rand(batch, 3, *size)


def everything(model: FeatureExtractor, x: Tensor) -> list[Tensor]:
    return [*model.anomaly_map(x), *model(x)]


def assert_alike(found: Iterable[Any], expected: Iterable[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.float32
        assert np.abs(ours - theirs).max() <= PARITY * np.abs(theirs).max()


@each_family
def test_torch_export_with_any_batch(arch: str) -> None:
    model, x = reduced(arch)
    station = export._Station(model, None, uint8=False, features=True)
    for strict in (True, False):
        program = torch.export.export(
            station, (x[:2],), dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1)}}, strict=strict
        )
        for batch in (x, x[:1]):
            torch.testing.assert_close([*program.module()(batch)], everything(model, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("arch", FAMILIES)
def test_torch_compile_has_no_graph_break(arch: str) -> None:
    model, x = reduced(arch)
    torch._dynamo.reset()
    for function in (model, model.anomaly_map):
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close([*found], [*function(x)], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_model_follows_its_weights_and_its_references() -> None:
    model, x = reduced("clip_base")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = [level.clone() for level in compiled(x)]
    assert model.projector is not None
    with torch.no_grad():
        for name, parameter in model.projector.named_parameters():
            if name.endswith("x_ref"):
                parameter.mul_(3)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
    assert not torch.equal(before[0], compiled(x)[0])
    model.set_references(torch.rand(2, 3, *model.img_size))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


@each_family
def test_files_of_every_family_in_both_runtimes(arch: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    model, x = reduced(arch)
    path = tmp_path / "model.onnx"
    facts = export_onnx(model, path, features=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["map", "score", "features_1", "features_2"]
    for batch in (x, x[:1]):
        assert_alike(session.run(None, {"image": batch.numpy()}), everything(model, batch))
    for runtime in ("onnx", "openvino"):
        assert_alike(ExportedModel(path, runtime).anomaly_map(x), model.anomaly_map(x))
    text = session.get_modelmeta().custom_metadata_map
    bank = model.bank()
    assert text["model"] == "tiny" and json.loads(text["threshold"]) == bank.threshold == facts["threshold"]
    assert json.loads(text["color_scale"]) == [0, 2 * facts["threshold"]]
    assert json.loads(text["img_size"]) == [*model.img_size] and json.loads(text["sha256s"]) == bank.sha256s
    assert json.loads(text["fingerprint"]) == facts["fingerprint"] and facts["fingerprint"]
    content = path.read_bytes()
    assert str(Path.cwd()).encode() not in content and b"site-packages" not in content
    # What no image changes is computed, and the backbone is there once, whatever is put out.
    assert not any(".x_ref" in tensor.name for tensor in onnx.load(path).graph.initializer)
    resized = [node for node in onnx.load(path).graph.node if node.op_type == "Resize"]
    assert resized and not any(attribute.s == b"cubic" for node in resized for attribute in node.attribute)
    assert sum(node.op_type == "Conv" for node in onnx.load(path).graph.node) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.slow
def test_cosine_residuals_of_any_backbone_of_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(backbone="test_vit@2,5", pretrained=False, img_size=(64, 96))
    model.set_references(torch.randn(3, 3, 64, 96))
    model.fit_threshold()
    facts, x = export_onnx(model, tmp_path / "part.onnx"), torch.randn(2, 3, 64, 96)
    assert facts["model"] == model.name and facts["tail"] == "lognormal"
    for runtime in ("onnx", "openvino"):
        exported = ExportedModel(tmp_path / "part.onnx", runtime)
        assert_alike(exported.anomaly_map(x), model.anomaly_map(x))
        assert exported.threshold() == model.threshold()


@pytest.mark.slow
def test_a_fixed_batch_takes_any_number_of_photos(tmp_path: Path) -> None:
    model, x = reduced("clip_base", 5)
    export_onnx(model, tmp_path / "model.onnx", batch_size=2)
    for runtime in ("onnx", "openvino"):
        exported = ExportedModel(tmp_path / "model.onnx", runtime)
        assert exported._session.batch == 2
        for batch in (x, x[:1]):
            assert_alike(exported.anomaly_map(batch), model.anomaly_map(batch))


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "scores.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_embedded_default_gives_the_same_rows_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(Path("good"), range(4))
    write_photos(Path("new"), range(10, 13))
    photo(0).save("new/copy.png")
    Path("new/broken.png").write_bytes(b"no image")
    assert main(["fit", "--references", "good", "--bank", "part.safetensors"]) == 0
    assert main(["export", "--bank", "part.safetensors", "--output", "part.onnx", "--uint8"]) == 0
    assert main(["score", "--bank", "part.safetensors", "--output", "torch", "new"]) == 1
    expected, summary = rows(Path("torch")), json.loads(Path("torch/summary.json").read_text())
    assert len(expected) == 5 and summary["scored_references"] == ["new/copy.png"]
    for output, options in {
        "onnx": ["--bank", "part.onnx"],
        "openvino": ["--bank", "part.onnx", "--runtime", "openvino"],
        "at_once": ["--references", "good", "--runtime", "onnx"],
    }.items():
        assert main(["score", *options, "--output", output, "new"]) == 1
        found = rows(Path(output))
        for ours, theirs in zip(found, expected, strict=True):
            assert {**ours, "score": "", "threshold": ""} == {**theirs, "score": "", "threshold": ""}
            if theirs["score"]:
                assert float(ours["score"]) == pytest.approx(float(theirs["score"]), rel=PARITY, abs=PARITY)
                assert float(ours["threshold"]) == pytest.approx(float(theirs["threshold"]), rel=1e-9)
        ignored = {"seconds_per_image", "threshold", "color_scale", "runtime", "references"}
        told = json.loads((Path(output) / "summary.json").read_text())
        assert {k: v for k, v in told.items() if k not in ignored} == {
            k: v for k, v in summary.items() if k not in ignored
        }
    model = create_model(references="part.safetensors")
    x = torch.stack([create_transform(model)(photo(seed)) for seed in (10, 11)])
    for runtime in ("onnx", "openvino"):
        assert_alike(ExportedModel("part.onnx", runtime).anomaly_map(x), model.anomaly_map(x))

    # The reader of the guide, where there is no torch.
    reader = "\n".join(re.findall(r"^    (.*)$", str(export.__doc__), flags=re.MULTILINE))
    assert "InferenceSession" in reader
    blocker = (
        "import sys\nfor name in ('torch', 'timm', 'adfeatures', 'onnx', 'torchvision'): sys.modules[name] = None\n"
    )
    Image.open("new/011.png").save("photo.png")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", blocker + reader], capture_output=True, text=True, env=clean)
    assert not done.returncode, done.stderr
    score, decision = done.stdout.split()
    row = next(row for row in expected if row["file"].endswith("011.png"))
    assert float(score) == pytest.approx(float(row["score"]), rel=PARITY) and decision == row["decision"]

    # A threshold and a quantile of one's own, and what a file cannot do.
    assert main(["score", "--bank", "part.onnx", "--quantile", "0.5", "--output", "onnx", "new"]) == 1
    assert rows(Path("onnx"))[0]["threshold"] < expected[0]["threshold"]
    for options, words in (
        (["--runtime", "torch"], "made from"),
        (["--product", "x"], "product"),
        (["--weights", "x"], "inside"),
        (["--bit-depth", "12"], "16 bits"),
        (["--dtype", "bfloat16"], "openvino"),
        (["--model", "adpretrain_clip_base"], "residual_lite"),
        (["--runtime", "openvino", "--device", "cuda"], "CPU"),
    ):
        capsys.readouterr()
        assert main(["score", "--bank", "part.onnx", "--output", "onnx", "new", *options]) == 2, options
        assert words in capsys.readouterr().err, options


class TestRefused:
    def test_another_suffix(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"part\.xml must end in \.onnx"):
            export_onnx(tiny_extractor(), tmp_path / "part.xml")

    def test_no_references(self, tmp_path: Path) -> None:
        with pytest.raises(ReferencesError, match="none are set"):
            export_onnx(tiny_extractor(), tmp_path / "part.onnx")

    def test_several_products(self, tmp_path: Path) -> None:
        model = tiny_extractor()
        for product in ("bolt", "nut"):
            model.set_references([photo(1), photo(2)], product)
        with pytest.raises(UnknownNameError, match="choose one with product=, or --product, of bolt, nut"):
            export_onnx(model, tmp_path / "part.onnx")
        assert not list(tmp_path.iterdir())

    def test_too_large_for_one_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_extractor()
        model.set_references([photo(1), photo(2)])
        monkeypatch.setattr(export, "MAX_BYTES", 1000)
        with pytest.raises(InputError, match="coreset"):
            export_onnx(model, tmp_path / "part.onnx")

    def test_what_is_not_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for module, extra in (("onnxscript", "onnx"), ("onnxruntime", "onnx"), ("openvino", "openvino")):
            monkeypatch.setitem(sys.modules, module, None)
            with pytest.raises(InputError, match=rf'{module} is not installed.*pip install "adfeatures\[{extra}\]"'):
                if module == "onnxscript":
                    export_onnx(tiny_extractor(), tmp_path / "part.onnx")
                else:
                    ExportedModel(tmp_path / "part.onnx", extra)

    @pytest.mark.parametrize("runtime", ["onnx", "openvino"])
    def test_files_that_are_none(self, tmp_path: Path, runtime: str) -> None:
        import onnx

        path = tmp_path / "part.onnx"
        with pytest.raises(CheckpointError, match="adfeatures export"):
            ExportedModel(path, runtime)
        for content in (b"", b"no model", os.urandom(2000)):
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match="adfeatures export"):
                ExportedModel(path, runtime)
        value = onnx.helper.make_tensor_value_info
        x, y = (value(name, onnx.TensorProto.FLOAT, ["batch", 3]) for name in "xy")
        graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "other", [x], [y])
        other = onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 18)])
        for facts in ({}, {"format": "adfeatures-export", "version": "1", "model": "m", "threshold": "{"}):
            onnx.helper.set_model_props(other, facts)
            onnx.save(other, path)
            with pytest.raises(CheckpointError, match="adfeatures export"):
                ExportedModel(path, runtime)

    def test_a_single_reference_without_threshold(
        self, tmp_path: Path, small_input: None, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_photos(tmp_path / "good", range(1))
        bank = str(tmp_path / "part.safetensors")
        assert main(["fit", "--references", str(tmp_path / "good"), "--bank", bank]) == 0
        assert main(["export", "--bank", bank, "--output", str(tmp_path / "part.onnx")]) == 2
        assert "--threshold" in capsys.readouterr().err
        assert main(["export", "--bank", bank, "--output", str(tmp_path / "part.pt")]) == 2
        assert "part.pt must end in .onnx" in capsys.readouterr().err
