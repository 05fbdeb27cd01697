"""From names and places to descriptions: what is meant, what is refused, and that nothing is built in vain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.hub_server import HubServer
from helpers.published import as_published

import adfeatures
from adfeatures import catalog
from adfeatures.checkpoints import load_checkpoint, save_checkpoint
from adfeatures.errors import CheckpointError, DownloadError, InputError, UnknownNameError
from adfeatures.projector import ResidualProjector
from adfeatures.resolve import (
    convert_checkpoint,
    describe_backbone,
    find_trained,
    published_files,
    resolve_backbone,
    resolve_model,
)
from adfeatures.trained import TrainedWeights

ASSET = catalog.ASSETS / "residual_lite.in1k_v1.safetensors"
LITE, OWN = "adpretrain_efficientnet_lite", "adpretrain_timm"


def write(path: Path, model: str | None, channels: tuple[int, ...] = (40, 80, 112), **header: str) -> Path:
    """A projector of a model, as training.pretrain writes it."""
    torch.manual_seed(0)
    projector = ResidualProjector(channels, num_heads=4, num_keys=8)
    tensors = {f"projector.{key}": value for key, value in projector.state_dict().items()}
    named = {} if model is None else {"model": model}
    save_checkpoint(path, tensors, metadata={"num_heads": "4", **named, **header})
    return path


@pytest.fixture
def lite(tmp_path: Path) -> Path:
    return write(tmp_path / "lite.safetensors", LITE)


class TestNames:
    def test_no_name_and_no_weights_is_the_default(self) -> None:
        for spec in (resolve_model(), resolve_model(catalog.DEFAULT_MODEL), resolve_model("residual_lite")):
            assert (spec.name, spec.trained, spec.backbone.weights) == (catalog.DEFAULT_MODEL, None, ASSET)
            assert spec.backbone.name == "efficientnet_lite" and spec.backbone.entry.img_size == (320, 320)

    def test_no_name_is_the_model_of_the_header(self, lite: Path) -> None:
        spec = resolve_model(weights=lite)
        assert (spec.name, spec.backbone.weights) == (LITE, ASSET)
        assert spec.trained is not None and spec.trained.source == str(lite)

    @pytest.mark.parametrize("name", [catalog.DEFAULT_MODEL, "residual_lite", "adpretrain_dinov2_base", OWN])
    def test_a_name_is_meant(self, name: str, lite: Path) -> None:
        with pytest.raises(CheckpointError, match=rf"lite\.safetensors is a checkpoint of {LITE}, not of {name}"):
            adfeatures.create_model(name, weights=lite, backbone_weights=None if "residual" in name else "random")

    def test_a_tag_is_meant(self, tmp_path: Path) -> None:
        channels = catalog.BACKBONES["clip_base"].channels
        path = write(tmp_path / "norm.safetensors", "adpretrain_clip_base.realiad_norm", channels)
        spec = resolve_model("adpretrain_clip_base", weights=path, backbone_weights="random")
        assert spec.name == "adpretrain_clip_base.realiad_norm"
        with pytest.raises(CheckpointError, match=r"realiad_norm, not of adpretrain_clip_base\.realiad_angle"):
            resolve_model("adpretrain_clip_base.realiad_angle", weights=path, backbone_weights="random")

    def test_weights_that_name_no_model_need_a_name(self, tmp_path: Path) -> None:
        path = write(tmp_path / "nameless.safetensors", None)
        with pytest.raises(CheckpointError, match="does not say which model"):
            resolve_model(weights=path)
        assert resolve_model(LITE, weights=path).name == LITE

    def test_weights_of_a_model_without_projector_are_those_of_its_backbone(self, tmp_path: Path) -> None:
        changed = {key: value * 1.5 for key, value in load_checkpoint(ASSET).state_dict.items()}
        save_checkpoint(tmp_path / "mine.safetensors", changed)
        model = adfeatures.create_model("residual_lite", weights=tmp_path / "mine.safetensors")
        assert torch.equal(model.backbone.state_dict()["conv_stem.weight"], changed["conv_stem.weight"].float())
        assert model.projector is None
        with pytest.raises(InputError, match="leave out weights or backbone_weights"):
            resolve_model("residual_lite", weights=ASSET, backbone_weights=ASSET)

    def test_the_embedded_file_names_its_model(self) -> None:
        model = adfeatures.create_model(weights=ASSET)
        assert model.name == "residual_lite" and model.projector is None
        for key, value in adfeatures.create_model().backbone.state_dict().items():
            assert torch.equal(model.backbone.state_dict()[key], value)
        with pytest.raises(CheckpointError, match="checkpoint of residual_lite, not of adpretrain_clip_base"):
            resolve_model("adpretrain_clip_base", weights=ASSET, backbone_weights="random")

    def test_a_word_that_is_no_file_is_a_tag(self) -> None:
        assert resolve_model(weights="in1k_v1").name == "residual_lite.in1k_v1"
        with pytest.raises(UnknownNameError, match="in1k_v1"):
            resolve_model(weights="in1k_v9")


class TestBackbones:
    def test_where_the_weights_are(self, lite: Path, tmp_path: Path) -> None:
        assert resolve_backbone("efficientnet_lite").weights == ASSET
        assert resolve_backbone("efficientnet_lite", weights="in1k_v1").weights == ASSET
        assert resolve_backbone("efficientnet_lite", weights="random").weights is None
        assert resolve_backbone("efficientnet_lite", weights=lite).weights == lite
        state = {"a": torch.ones(1)}
        assert resolve_backbone("efficientnet_lite", weights=state).weights is state

    def test_weights_beside_the_projector_come_first_but_those_given_before(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        tensors = {f"projector.{k}": v for k, v in ResidualProjector((40, 80, 112), 4, 8).state_dict().items()}
        tensors |= {f"backbone.{key}": value for key, value in load_checkpoint(ASSET).state_dict.items()}
        path = tmp_path / "whole.safetensors"
        save_checkpoint(path, tensors, metadata={"model": LITE, "num_heads": "4"})
        assert isinstance(resolve_model(weights=path, pretrained=False).backbone.weights, TrainedWeights)
        assert resolve_model(weights=path, backbone_weights=ASSET).backbone.weights == ASSET

    def test_sizes_and_levels(self) -> None:
        spec = resolve_backbone("dinov2_base", weights="random", img_size=(28, 42), levels=(1, 5))
        assert (spec.entry.img_size, spec.entry.blocks, spec.entry.channels) == ((28, 42), (1, 5), (768, 768))
        with pytest.raises(InputError, match="nearest to 29 are 28 and 42"):
            resolve_backbone("dinov2_base", weights="random", img_size=29)
        with pytest.raises(InputError, match="convolutional"):
            resolve_backbone("efficientnet_lite", levels=(1, 2))

    @pytest.mark.parametrize("arch", ["test_vit", "test_resnet"])
    def test_a_backbone_of_timm_is_built_once(self, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = timm.create_model(arch).state_dict()
        entry = resolve_backbone(arch, weights="random").entry
        facts: dict[str, Any] = {"timm_name": entry.timm_name, "blocks": entry.blocks, "channels": entry.channels}
        facts |= {"reductions": entry.reductions, "mean": (0.5,) * 3, "std": (0.5,) * 3}
        path = write(tmp_path / "own.safetensors", OWN, entry.channels, backbone=json.dumps(facts))
        save_checkpoint(tmp_path / "backbone.safetensors", whole)
        built: list[str] = []
        create = timm.create_model

        def counting(name: str, **options: Any) -> torch.nn.Module:
            model = create(name, **options)
            built.append(name)
            return model

        monkeypatch.setattr(timm, "create_model", counting)
        model = adfeatures.create_model(weights=path, backbone_weights=tmp_path / "backbone.safetensors")
        assert built == [arch]
        key = next(key for key in model.backbone.state_dict() if key.removeprefix("model.") in whole)
        assert torch.equal(model.backbone.state_dict()[key], whole[key.removeprefix("model.")])


class TestChosenBackbones:
    @pytest.mark.parametrize(
        ("asked", "name", "levels"),
        [
            ({"name": "residual_timm", "backbone": "test_vit"}, "test_vit.r160_in1k", (1, 3, 4, 6)),
            ({"backbone": "test_vit.r160_in1k"}, "test_vit.r160_in1k", (1, 3, 4, 6)),
            ({"backbone": "test_vit@2, 5"}, "test_vit.r160_in1k@2,5", (2, 5)),
            ({"name": "residual_timm.test_resnet@2,3"}, "test_resnet.r160_in1k@2,3", (2, 3)),
            ({"name": "residual_timm.test_vit.r160_in1k", "backbone": "test_vit"}, "test_vit.r160_in1k", (1, 3, 4, 6)),
            (
                {"name": "residual_timm.test_vit.r160_in1k@2,5", "backbone": "test_vit@2,5"},
                "test_vit.r160_in1k@2,5",
                (2, 5),
            ),
            ({"backbone": "efficientnet_lite"}, "efficientnet_lite", (3, 4, 5)),
        ],
    )
    def test_the_full_name_says_what_was_chosen(
        self, asked: dict[str, Any], name: str, levels: tuple[int, ...]
    ) -> None:
        spec = resolve_model(**asked, pretrained=False)
        assert (spec.name, spec.trained) == (f"residual_timm.{name}", None)
        assert spec.backbone.entry.blocks == levels and spec.backbone.weights is None
        assert resolve_model(spec.name, pretrained=False).backbone.entry == spec.backbone.entry

    def test_where_the_weights_are(self, hub: HubServer, tmp_path: Path) -> None:
        with pytest.raises(DownloadError, match=r"timm/test_vit\.r160_in1k"):
            resolve_model(backbone="test_vit")
        file = tmp_path / "mine.safetensors"
        save_checkpoint(file, timm.create_model("test_vit").state_dict())
        name = "residual_timm.test_vit"
        for spec in (resolve_model(name, weights=file), resolve_model(name, backbone_weights=file)):
            assert Path(str(spec.backbone.weights)) == file
        hub.add("timm/test_vit.r160_in1k", "model.safetensors", file.read_bytes())
        (fetched,), missing = published_files(name)
        assert resolve_model(name).backbone.weights == fetched and not missing

    @pytest.mark.parametrize(
        ("asked", "error", "message"),
        [
            ({"name": "residual_timm"}, InputError, "needs a backbone: create_model"),
            ({"backbone": "test_vjt"}, UnknownNameError, "Did you mean 'test_vit"),
            ({"backbone": "test_vit.nothing"}, UnknownNameError, "tag of test_vit"),
            ({"backbone": "test_vit@3,9"}, InputError, "from 1 to 6"),
            ({"backbone": "test_vit@"}, InputError, "must be whole numbers from 1, such as test_vit@3,6"),
            ({"backbone": "sequencer2d_s"}, InputError, "choose levels from 1 to 4"),
            ({"backbone": "pit_ti_224"}, InputError, "so it cannot be used"),
            ({"name": "residual_timm.test_vit", "backbone": "test_resnet"}, InputError, "leave out one"),
            ({"name": "residual_timm.test_vit@2", "backbone": "test_vit@3"}, InputError, "leave out one"),
            ({"name": "residual_lite", "backbone": "test_vit"}, InputError, "has a backbone of its own"),
            ({"name": OWN, "backbone": "test_vit"}, InputError, "has a backbone of its own"),
            ({"name": "residual_timm.test_vit", "weights": "in1k_v1"}, UnknownNameError, "a path, hf-hub:"),
            ({"backbone": "adpretrain_timm"}, UnknownNameError, "Unknown backbone"),
            ({"backbone": "efficientnet_lite@1,2"}, InputError, "convolutional"),
            ({"backbone": "imagebind_huge", "pretrained": True}, InputError, "imagebind_huge.pth"),
        ],
    )
    def test_what_cannot_be_is_refused(self, asked: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            resolve_model(**{"pretrained": False, **asked})


class TestFiles:
    def test_of_the_catalog(self, hub: HubServer) -> None:
        hub.add("xcyao00/ADPretrain", "clip-base/checkpoints_pro_angle.pth", as_published({"a": torch.ones(1)}))
        hub.add("timm/vit_base_patch16_clip_224.openai", "model.safetensors", b"weights")
        files, missing = published_files("adpretrain_clip_base.realiad_angle")
        assert [file.name for file in files] == ["checkpoints_pro_angle.pth", "model.safetensors"] and not missing
        trained = find_trained(arch="adpretrain_clip_base", tag="realiad_angle")
        assert trained is not None and trained.checkpoint.metrics["img_auc"] == 0.9
        assert published_files("residual_lite") == ([ASSET], "")

    def test_that_must_be_given_by_hand(self, hub: HubServer) -> None:
        hub.add("xcyao00/ADPretrain", "imagebind/checkpoints_pro_norm.pth", as_published({"a": torch.ones(1)}))
        files, missing = published_files("adpretrain_imagebind_huge")
        assert len(files) == 1 and "imagebind_huge.pth" in missing
        assert published_files(OWN) == ([], f"{catalog.must_be_given(OWN)}.")

    def test_nothing_is_found_where_nothing_is_asked_for(self) -> None:
        assert find_trained() is None and find_trained(arch="residual_lite", tag="in1k_v1") is None

    def test_converting_says_what_the_file_is_for(self, lite: Path, tmp_path: Path) -> None:
        converted = convert_checkpoint(lite, tmp_path / "out.safetensors", LITE)
        assert (converted.metadata["model"], converted.metadata["num_heads"]) == (LITE, "4")
        for name, error in (("residual_lite", InputError), ("adpretrain_clip_base", CheckpointError)):
            with pytest.raises(error):
                convert_checkpoint(lite, tmp_path / "other.safetensors", name)
        assert not (tmp_path / "other.safetensors").exists()

    def test_the_header_describes_the_backbone(self, lite: Path, tmp_path: Path) -> None:
        sized = write(tmp_path / "sized.safetensors", LITE, img_size="[64, 96]")
        for path, size in ((lite, (320, 320)), (sized, (64, 96))):
            trained = find_trained(path)
            assert describe_backbone(LITE, trained).entry.img_size == size
            assert describe_backbone(LITE, trained, 32).entry.img_size == (32, 32)
        odd = find_trained(write(tmp_path / "odd.safetensors", LITE, img_size="[1, 80]"))
        with pytest.raises(
            CheckpointError, match=r"odd\.safetensors: the img_size of its header.* 1 x 80 does not fit"
        ):
            describe_backbone(LITE, odd)
        assert describe_backbone(LITE, odd, 32).entry.img_size == (32, 32)


@pytest.mark.parametrize("size", [np.int64(96), (np.int32(96), np.int64(96)), [96, 96], 96])
def test_sizes_are_whole_numbers_of_any_kind(size: Any) -> None:
    found = resolve_model(None, img_size=size).backbone.entry.img_size
    assert found == (96, 96) and all(type(side) is int for side in found)


@pytest.mark.parametrize("size", [96.0, "96", (96,), (96, 96, 3), (96, None)])
def test_other_sizes_are_refused(size: Any) -> None:
    with pytest.raises(InputError, match="image size .* must be one whole number"):
        resolve_model(None, img_size=size)
