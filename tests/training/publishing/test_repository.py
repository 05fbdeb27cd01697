"""The files of a repository: what goes into them, and what may not be published."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.hub_server import HubServer
from helpers.published import as_published
from helpers.publishing import GOLDEN, REPO, TRAINING, OwnCheckpoint, files_in, save_projector, timm_header
from safetensors import safe_open
from safetensors.torch import load_file, save

import adfeatures
from adfeatures import catalog, resolve
from adfeatures.checkpoints import load_checkpoint, save_checkpoint
from adfeatures.factory import load_backbone
from adfeatures.projector import ResidualProjector
from adfeatures.timm_backbones import TimmBackbone, find_timm
from training.publish import main
from training.publishing.config import PublishConfig
from training.publishing.repository import model_in, write_repository

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot pin down")


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    return capsys.readouterr().err


def test_a_pyramid_of_timm_as_a_whole(writable: HubServer, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = timm.create_model("resnet18").state_dict()
    (tmp_path / "resnet18.safetensors").write_bytes(save(whole))
    backbone, entry = load_backbone("resnet18", weights=whole)
    projector = ResidualProjector(entry.channels, num_keys=8)
    save_projector(tmp_path / "own.safetensors", projector, timm_header(entry, (64, 64)))
    arguments = [str(tmp_path / "own.safetensors"), "--repo", REPO, "--whole-model"]
    assert main([*arguments, "--backbone-weights", str(tmp_path / "resnet18.safetensors")]) == 0
    model = timm.create_model(f"hf-hub:{REPO}", pretrained=True)
    for part, expected in ((model.backbone, backbone), (model.projector, projector)):
        for key, value in expected.state_dict().items():
            assert torch.equal(part.state_dict()[key], value)
    assert model.levels == (2, 3, 4) and model.img_size == (64, 64)


def test_folder_without_a_network(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = adfeatures.create_model("adpretrain_efficientnet_lite", pretrained=False, img_size=64)
    assert model.projector is not None
    header = {"model": "adpretrain_efficientnet_lite", "num_heads": "16", "img_size": "[64, 64]"}
    save_projector(tmp_path / "own.safetensors", model.projector, header)
    arguments = [str(tmp_path / "own.safetensors"), "--folder", str(tmp_path / "published")]
    assert main(arguments) == main(arguments) == 0
    adfeatures.register_with_timm()
    place = f"local-dir:{tmp_path / 'published'}"
    for served in (adfeatures.create_model(weights=place), timm.create_model(place, pretrained=True)):
        assert served.img_size == (64, 64)
        for key, value in model.projector.state_dict().items():
            assert served.projector is not None and torch.equal(served.projector.state_dict()[key], value)
    assert not hub.requests


def test_only_the_projector_goes_out_with_its_header(own: OwnCheckpoint, writable: HubServer, tmp_path: Path) -> None:
    assert own.publish("--repo", REPO, "--folder", tmp_path) == 0
    assert {
        name: (tmp_path / name).read_bytes() for name in ("config.json", "README.md", "model.safetensors")
    }.items() <= files_in(writable).items()
    checkpoint = load_checkpoint(tmp_path / "model.safetensors")
    assert checkpoint.state_dict.keys() == {f"projector.{key}" for key in own.projector.state_dict()}
    assert checkpoint.metrics == {"img_auc": 0.9123, "pix_pro": 0.8}
    training = {**TRAINING, "root": "Real-IAD", "output": "run"}
    assert {**checkpoint.metadata, "training": json.loads(checkpoint.metadata["training"])} == {
        **own.header,
        "training": training,
    }


def test_files(own: OwnCheckpoint, hub: HubServer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").touch()
    save_checkpoint(tmp_path / "alien.safetensors", {"x": torch.ones(2)})
    save_checkpoint(tmp_path / "lying.safetensors", {"x": torch.ones(2)}, metadata=own.header)
    spoiled = load_file(own.path)
    del spoiled["projector.l2_proj.x_ref"]
    save_checkpoint(tmp_path / "spoiled.safetensors", spoiled, metadata=own.header)
    lite = adfeatures.create_model().backbone.state_dict()
    save_checkpoint(tmp_path / "lite.safetensors", lite, metadata={"model": "residual_lite"})
    for name, says in (
        ("gone.safetensors", "There is no file"),
        ("empty.safetensors", "is empty"),
        ("alien.safetensors", "does not say which model it is for. Say it: --name"),
        ("lying.safetensors", "lying.safetensors does not fit ResidualProjector"),
        ("spoiled.safetensors", "missing l2_proj.x_ref"),
        ("lite.safetensors", "residual_lite has no projector"),
    ):
        assert says in refused(capsys, main([str(tmp_path / name), "--folder", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists() and not hub.requests


def test_folders_that_hold_something_else(
    own: OwnCheckpoint, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("my project")
    assert "is not empty and holds no model" in refused(capsys, own.publish("--folder", tmp_path))
    assert "is a file" in refused(capsys, own.publish("--folder", tmp_path / "README.md"))
    assert (tmp_path / "README.md").read_text() == "my project"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (b'{"architecture": "resnet50"}', "holds resnet50, which adpretrain_timm"),
        (
            b'{"architecture": "adpretrain_timm", "pretrained_cfg": {"tag": "old"}}',
            "holds adpretrain_timm.old, which",
        ),
        (b"\xff{}", "holds something else"),
    ],
)
def test_another_model_in_the_folder(
    own: OwnCheckpoint, capsys: pytest.CaptureFixture[str], tmp_path: Path, config: bytes, says: str
) -> None:
    (tmp_path / "config.json").write_bytes(config)
    assert says in refused(capsys, own.publish("--folder", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_backbone_that_it_was_trained_on(
    own: OwnCheckpoint, writable: HubServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    unpublished = "Publish them with it: --backbone-weights"
    for used, says in (
        ("/there/other.pth", unpublished),
        ("/there/pytorch_model.bin", unpublished),
        ("random", "random backbone"),
    ):
        training = json.dumps({**TRAINING, "backbone_weights": used})
        path = str(own.write(tmp_path / "other.safetensors", training=training))
        assert says in refused(capsys, main([path, "--dry-run"]))
    path = str(
        own.write(tmp_path / "other.safetensors", training=json.dumps({**TRAINING, "backbone_weights": "/there/b.pth"}))
    )
    assert main([path, "--folder", str(tmp_path / "out"), "--backbone-weights", str(own.save_backbone())]) == 0
    own.is_served_by(adfeatures.create_model(weights=f"local-dir:{tmp_path / 'out'}", pretrained=False))
    assert "/there" not in "".join(load_checkpoint(tmp_path / "out" / "model.safetensors").metadata.values())
    # Said to be the published ones under another name, they stay where they are.
    assert main([path, "--folder", str(tmp_path / "published"), "--backbone-weights", "r160_in1k"]) == 0
    assert not any(
        key.startswith("backbone.") for key in load_checkpoint(tmp_path / "published" / "model.safetensors").state_dict
    )
    assert not writable.requests


def test_backbones_that_timm_has_not_published(
    own: OwnCheckpoint, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, entry = load_backbone("lcnet_035", weights="random", levels=(1, 2))
    header = timm_header(dataclasses.replace(entry, timm_name="lcnet_035"), (64, 64))
    path = save_projector(tmp_path / "own.safetensors", ResidualProjector(entry.channels, num_keys=8), header)
    says = refused(capsys, main([str(path), "--dry-run"]))
    assert "timm has no published weights of lcnet_035, so they must come along" in says


def test_whole_models_keep_the_terms_of_the_backbone(
    own: OwnCheckpoint,
    writable: HubServer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def non_commercial(*of: Any) -> tuple[catalog.Backbone, TimmBackbone]:
        entry, encoder = find_timm(*of)
        return dataclasses.replace(entry, license="cc-by-nc-4.0"), encoder

    monkeypatch.setattr(resolve, "find_timm", non_commercial)
    options = ["--folder", tmp_path, "--license", "apache-2.0"]
    assert own.publish(*options) == 0
    assert "cannot be apache-2.0" in refused(capsys, own.publish(*options, "--whole-model"))
    assert own.publish("--folder", tmp_path, "--license", "cc-by-nc-4.0", "--whole-model") == 0


def test_republished_bit_for_bit(tiny: str, writable: HubServer, tmp_path: Path) -> None:
    original = load_checkpoint(GOLDEN)
    assert main([str(GOLDEN), "--name", tiny, "--repo", REPO]) == 0
    (tmp_path / "model.safetensors").write_bytes(files_in(writable)["model.safetensors"])
    published = load_checkpoint(tmp_path / "model.safetensors")
    assert published.state_dict.keys() == {f"projector.{key}" for key in original.state_dict}
    for key, value in original.state_dict.items():
        found = published.state_dict[f"projector.{key}"]
        assert found.dtype == value.dtype == torch.bfloat16
        assert torch.equal(found.view(torch.int16), value.view(torch.int16))
    assert published.metrics == original.metrics
    assert (published.metadata["model"], published.metadata["source"]) == (tiny, GOLDEN.name)
    assert (
        published.metadata["selected_by"]
        == "AUPRO of FeatureNorm on the test set of MVTec AD, by the authors of ADPretrain"
    )
    with writable.counting() as requests:
        assert main([str(tmp_path / "model.safetensors"), "--repo", REPO]) == 0  # the published file is the same model
    assert {request.method for request in requests} <= {"GET", "HEAD"}


def test_your_own_training_is_not_theirs(
    tiny: str, own: OwnCheckpoint, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    golden = {f"projector.{key}": value for key, value in load_checkpoint(GOLDEN).state_dict.items()}
    save_checkpoint(tmp_path / "own.safetensors", golden, metadata={"training": json.dumps(TRAINING)})
    assert main([str(tmp_path / "own.safetensors"), "--name", tiny, "--dry-run"]) == 2
    assert "leave out the tag" in capsys.readouterr().err


@pytest.mark.slow
def test_full_size(writable: HubServer, tmp_path: Path) -> None:
    projector = ResidualProjector((768,) * 4)
    (tmp_path / "checkpoints_pro_norm.pth").write_bytes(as_published(projector.state_dict()))
    name = "adpretrain_dinov2_base.realiad_norm"
    assert main([str(tmp_path / "checkpoints_pro_norm.pth"), "--name", name, "--repo", REPO]) == 0
    model = adfeatures.create_model(weights=f"hf-hub:{REPO}", backbone_weights="random")
    assert model.name == name and model.projector is not None
    for key, value in projector.state_dict().items():
        assert torch.equal(model.projector.state_dict()[key], value.bfloat16().float())


def test_config_is_timms(own: OwnCheckpoint, tmp_path: Path) -> None:
    assert own.publish("--folder", tmp_path, "--license", "cc-by-nc-sa-4.0") == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("adpretrain_timm", 0, 64)
    cfg = timm.models.PretrainedCfg(**config["pretrained_cfg"])  # knows every key
    assert (cfg.input_size, cfg.crop_pct, cfg.crop_mode, cfg.license) == (
        [3, 48, 80],
        1.0,
        "squash",
        "cc-by-nc-sa-4.0",
    )
    assert cfg.mean == list(json.loads(own.header["backbone"])["mean"])


def test_header_is_in_order(own: OwnCheckpoint, tmp_path: Path) -> None:
    assert own.publish("--folder", tmp_path) == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "adfeatures"
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert own.publish("--folder", tmp_path) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ({"architecture": "a"}, "a"),
        ({"architecture": "a", "pretrained_cfg": {"tag": "t"}}, "a.t"),
        ({"architecture": "a", "pretrained_cfg": {"tag": None}}, "a"),
        ({"architecture": "a", "pretrained_cfg": None}, "something else"),
        ({}, "something else"),
        ([], "something else"),
    ],
)
def test_the_model_of_a_config(config: object, model: str) -> None:
    assert model_in(json.dumps(config).encode()) == model


def test_the_training_of_a_header_must_be_a_config(
    own: OwnCheckpoint, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = own.write(tmp_path / "own.safetensors", training="[1]")
    assert "must be the config of a run, not [1]" in refused(capsys, main([str(path), "--dry-run"]))


@pytest.mark.parametrize(("kind", "method"), [("norm", "FeatureNorm"), ("angle", "PatchCore")])
def test_what_selected_the_files_of_the_authors(tiny: str, tmp_path: Path, kind: str, method: str) -> None:
    config = PublishConfig(name=f"adpretrain_tiny.realiad_{kind}")
    _, weights, _ = write_repository(str(GOLDEN), config, tmp_path)
    metadata = load_checkpoint(weights).metadata
    assert metadata["selected_by"].startswith(f"AUPRO of {method} on the test set of MVTec AD")
    assert metadata["source_sha256"] == hashlib.sha256(GOLDEN.read_bytes()).hexdigest()
