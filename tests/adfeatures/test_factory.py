"""Names, weights and the three ways to a model: create_model, timm and torch.hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.hub_server import HubServer
from helpers.models import photo, tiny_extractor, write_photos
from helpers.published import as_published
from safetensors.torch import load, save

import adfeatures
from adfeatures import catalog
from adfeatures.checkpoints import save_checkpoint
from adfeatures.cli import main
from adfeatures.errors import CheckpointError, DownloadError, InputError, ReferencesError, UnknownNameError
from adfeatures.extractor import FeatureExtractor
from adfeatures.factory import load_backbone
from adfeatures.learned import LearnedScorer
from adfeatures.projector import ResidualProjector
from adfeatures.references import ReferenceBank
from adfeatures.resolve import convert_checkpoint
from adfeatures.scoring import CosineRingScorer, LocalCosineScorer

REPOSITORY = Path(__file__).parents[2]
REPO = "xcyao00/ADPretrain"
CLIP = "adpretrain_clip_base"
FULL_SIZE = catalog.BACKBONES
WIDTHS = {"clip_base": 64, "dinov2_base": 64, "dinov2_large": 128}
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot pin down")


def projector_of(model: FeatureExtractor) -> ResidualProjector:
    assert model.projector is not None
    return model.projector


@pytest.fixture(scope="module", autouse=True)
def small_catalog() -> Iterator[None]:
    """Transformers of five narrow blocks stand for those of the catalog, which take seconds to build."""
    small = {name: replace(FULL_SIZE[name], blocks=(1, 2, 4, 5), channels=(c,) * 4) for name, c in WIDTHS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "BACKBONES", {**FULL_SIZE, **small})
        yield


class Published:
    """A random model on CLIP-base, its files as they lie on the Hub, and its features of one picture."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = adfeatures.create_model(CLIP, pretrained=False)
        projector = projector_of(model)
        projector.load_state_dict({key: value.bfloat16() for key, value in projector.state_dict().items()})
        width = catalog.BACKBONES["clip_base"].channels[0]
        unused = {"norm.weight": torch.ones(width), "head.weight": torch.ones(8, width)}
        self.backbone = save({**model.backbone.state_dict(), **unused})
        self.projector = as_published(projector.state_dict())
        self.safetensors = save(
            {f"projector.{key}": value for key, value in projector.state_dict().items()}, {"model": CLIP}
        )
        self.references, self.x = torch.randn(2, 3, 224, 224), torch.randn(1, 3, 224, 224)
        self.features = self.of(model)

    def of(self, model: FeatureExtractor) -> list[torch.Tensor]:
        model.set_references(self.references)
        return model(self.x)

    def is_served_by(self, model: FeatureExtractor) -> None:
        for found, expected in zip(self.of(model), self.features, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    def upload(self, hub: HubServer) -> None:
        hub.add(REPO, "clip-base/checkpoints_pro_norm.pth", self.projector)
        hub.add("timm/vit_base_patch16_clip_224.openai", "model.safetensors", self.backbone)


@pytest.fixture(scope="module")
def published() -> Published:
    return Published()


@pytest.fixture
def full_hub(hub: HubServer, published: Published) -> HubServer:
    published.upload(hub)
    config = {"architecture": CLIP, "num_classes": 0, "pretrained_cfg": {"tag": "mine", "num_classes": 0}}
    hub.add("owner/repo", "config.json", json.dumps(config).encode(), lfs=False)
    hub.add("owner/repo", "model.safetensors", published.safetensors)
    return hub


class TestFromTheHub:
    def test_create_model_downloads_once(self, full_hub: HubServer, published: Published, tmp_path: Path) -> None:
        published.is_served_by(adfeatures.create_model(CLIP, cache_dir=tmp_path))
        with full_hub.counting() as requests:
            model = adfeatures.create_model(f"{CLIP}.realiad_norm", cache_dir=tmp_path)
        assert not requests
        published.is_served_by(model)
        assert model.name == f"{CLIP}.realiad_norm" and not model.training

    @pytest.mark.slow
    def test_in_full_size(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(catalog, "BACKBONES", FULL_SIZE)
        published = Published()
        published.upload(hub)
        model = adfeatures.create_model(CLIP)
        assert model.feature_info.channels() == [768] * 4 and model.levels == (3, 6, 9, 12)
        published.is_served_by(model)

    def test_timm_and_torch_hub_return_the_same(
        self, full_hub: HubServer, published: Published, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adfeatures.register_with_timm()
        published.is_served_by(timm.create_model(CLIP, pretrained=True, features_only=True))
        published.is_served_by(timm.create_model(f"{CLIP}.realiad_norm", pretrained=True))
        published.is_served_by(timm.create_model("hf-hub:owner/repo", pretrained=True))
        monkeypatch.chdir("/")
        published.is_served_by(torch.hub.load(str(REPOSITORY), CLIP, source="local", weights="realiad_norm"))

    def test_own_repository_and_any_file_in_one(self, full_hub: HubServer, published: Published) -> None:
        for weights in (
            "hf-hub:owner/repo",
            "hf-hub:owner/repo@main",
            f"hf-hub:{REPO}:clip-base/checkpoints_pro_norm.pth",
        ):
            published.is_served_by(adfeatures.create_model(CLIP, weights=weights))

    def test_a_missing_tag_lists_what_is_there(self, full_hub: HubServer) -> None:
        with pytest.raises(DownloadError, match=r"checkpoints_pro_angle\.pth(.|\n)*checkpoints_pro_norm\.pth"):
            adfeatures.create_model(f"{CLIP}.realiad_angle")

    def test_no_random_model_where_weights_were_asked_for(self, hub: HubServer) -> None:
        hub.add(REPO, "clip-base/checkpoints_pro_norm.pth", as_published({"l1_proj.x_ref": torch.zeros(1, 4, 8)}))
        with pytest.raises(DownloadError):
            adfeatures.create_model("adpretrain_dinov2_base")
        with pytest.raises(DownloadError):
            adfeatures.create_model(CLIP, backbone_weights="openai")

    def test_download_command_makes_it_work_offline(
        self,
        full_hub: HubServer,
        published: Published,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        from adfeatures.cli import main

        assert main(["download", CLIP, "--json"]) == 0
        files = json.loads(capsys.readouterr().out)
        assert len(files) == 2 and all(Path(path).is_file() and len(digest) == 64 for path, digest in files.items())
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with full_hub.counting() as requests:
            published.is_served_by(adfeatures.create_model(CLIP))
        assert not requests


class TestFromDisk:
    @pytest.fixture
    def disk(self, published: Published, tmp_path: Path) -> Path:
        (tmp_path / "clip-base").mkdir()
        (tmp_path / "clip-base" / "checkpoints_pro_norm.pth").write_bytes(published.projector)
        (tmp_path / "backbone.safetensors").write_bytes(published.backbone)
        return tmp_path

    def test_paths_and_folders(self, disk: Path, published: Published) -> None:
        projector, backbone = disk / "clip-base" / "checkpoints_pro_norm.pth", disk / "backbone.safetensors"
        for weights in (projector, str(projector), f"local-dir:{disk}", f"local-dir:{disk / 'clip-base'}"):
            published.is_served_by(adfeatures.create_model(CLIP, weights=weights, backbone_weights=backbone))
        (disk / "model.safetensors").write_bytes(published.backbone)
        published.is_served_by(adfeatures.create_model(CLIP, weights=projector, backbone_weights=f"local-dir:{disk}"))

    def test_converted_file_gives_the_same_model(self, disk: Path, published: Published, tmp_path: Path) -> None:
        source = disk / "clip-base" / "checkpoints_pro_norm.pth"
        checkpoint = convert_checkpoint(source, tmp_path / "c.safetensors", f"{CLIP}.realiad_norm")
        assert checkpoint.metrics == {"img_auc": 0.9, "pix_auc": 0.8, "pix_pro": 0.7}
        model = adfeatures.create_model(
            CLIP, weights=tmp_path / "c.safetensors", backbone_weights=disk / "backbone.safetensors"
        )
        published.is_served_by(model)
        with pytest.raises(
            CheckpointError, match="checkpoint of adpretrain_clip_base.realiad_norm, not of adpretrain_dinov2_base"
        ):
            adfeatures.create_model(
                "adpretrain_dinov2_base", weights=tmp_path / "c.safetensors", backbone_weights="random"
            )

    def test_whole_model_in_one_file(self, published: Published, tmp_path: Path) -> None:
        unused = ("norm.", "head.")
        whole = {
            f"backbone.{key}": value for key, value in load(published.backbone).items() if not key.startswith(unused)
        }
        (tmp_path / "model.safetensors").write_bytes(save({**whole, **load(published.safetensors)}))
        published.is_served_by(adfeatures.create_model(CLIP, pretrained=False, weights=f"local-dir:{tmp_path}"))

    def test_a_checkpoint_of_another_backbone_is_refused(self, disk: Path) -> None:
        with pytest.raises(CheckpointError, match=r"checkpoints_pro_norm\.pth does not fit.*instead of.*another model"):
            adfeatures.create_model(
                "adpretrain_dinov2_large",
                weights=disk / "clip-base" / "checkpoints_pro_norm.pth",
                backbone_weights="random",
            )
        with pytest.raises(CheckpointError, match=r"backbone\.safetensors does not fit"):
            adfeatures.create_model(
                "adpretrain_dinov2_base", pretrained=False, backbone_weights=disk / "backbone.safetensors"
            )

    def test_a_trained_projector_on_a_random_backbone_must_be_meant(self, disk: Path) -> None:
        projector = disk / "clip-base" / "checkpoints_pro_norm.pth"
        with pytest.raises(InputError, match='backbone_weights="random"'):
            adfeatures.create_model(CLIP, pretrained=False, weights=projector)
        assert adfeatures.create_model(CLIP, weights=projector, backbone_weights="random").projector is not None

    def test_paths_that_do_not_exist_name_both_spellings(self) -> None:
        with pytest.raises(DownloadError, match=r"hf-hub:(.|\n)*local-dir:|local-dir:(.|\n)*hf-hub:"):
            adfeatures.create_model(CLIP, weights="no/such.pth", backbone_weights="random")


class TestNames:
    def test_lists(self) -> None:
        assert adfeatures.list_models() == sorted(catalog.MODELS)
        assert adfeatures.list_models("*dinov2*") == ["adpretrain_dinov2_base", "adpretrain_dinov2_large"]
        assert adfeatures.DEFAULT_MODEL in adfeatures.list_models(pretrained=True)
        assert adfeatures.list_models("nothing*") == []

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("adpretrain_dino_base", "Did you mean 'adpretrain_dinov2_base'"),
            (f"{CLIP}.realiad_nrm", "Did you mean 'realiad_norm'"),
            ("zzz", "Known: adpretrain_clip_base"),
            ("owner/repo", "weights='hf-hub:owner/repo'"),
            ("", "Unknown model"),
        ],
    )
    def test_unknown_ones_get_suggestions(self, name: str, says: str) -> None:
        with pytest.raises(UnknownNameError, match=says):
            adfeatures.create_model(name)
        with pytest.raises(UnknownNameError):
            adfeatures.create_transform(name)

    def test_unknown_weights_tag(self) -> None:
        with pytest.raises(UnknownNameError, match="Did you mean 'realiad_angle'"):
            adfeatures.create_model(CLIP, weights="realiad_angel")
        with pytest.raises(InputError, match="leave out one"):
            adfeatures.create_model(f"{CLIP}.realiad_norm", weights="realiad_angle")

    def test_catalog_agrees_with_timm(self) -> None:
        for entry in catalog.BACKBONES.values():
            if entry.hub_file is not None:
                cfg = timm.get_pretrained_cfg(f"{entry.timm_name}.{entry.tag}")
                assert (cfg.hf_hub_id, (cfg.mean, cfg.std)) == (entry.hub_file[0], entry.normalization)

    def test_imagebind_is_never_fetched_and_shows_its_license(
        self, hub: HubServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(InputError, match=r"CC-BY-NC-4\.0.*imagebind_huge\.pth"):
            adfeatures.create_model("adpretrain_imagebind_huge")
        assert not hub.requests


class TestSizesAndReferences:
    @pytest.mark.parametrize(("size", "grid"), [(None, (14, 14)), (160, (10, 10)), ((96, 320), (6, 20))])
    def test_img_size(self, size: int | tuple[int, int] | None, grid: tuple[int, int]) -> None:
        model = adfeatures.create_model(CLIP, pretrained=False, img_size=size)
        transform = adfeatures.create_transform(model)
        x = transform(photo(1, (300, 100)))[None]
        assert (
            tuple(x.shape[2:])
            == (16 * grid[0], 16 * grid[1])
            == model.img_size
            == model.pretrained_cfg["input_size"][1:]
        )
        assert tuple(model.backbone_features(x)[0].shape[2:]) == grid

    def test_impossible_size_names_the_nearest(self) -> None:
        with pytest.raises(InputError, match="nearest to 225 are 224 and 238"):
            adfeatures.create_model("adpretrain_dinov2_base", pretrained=False, img_size=225)

    def test_references_argument(self, tmp_path: Path) -> None:
        paths = write_photos(tmp_path / "good", range(3))
        by_folder = adfeatures.create_model(references=tmp_path / "good")
        by_folder.save_references(tmp_path / "bank.safetensors")
        x = torch.randn(1, 3, *by_folder.img_size)
        for references in (paths, str(tmp_path / "bank.safetensors")):
            torch.testing.assert_close(adfeatures.create_model(references=references)(x), by_folder(x))


class TestTimm:
    @pytest.fixture(autouse=True)
    def registered(self) -> None:
        adfeatures.register_with_timm()
        adfeatures.register_with_timm()

    def test_traces_a_model_that_holds_an_extractor(self) -> None:
        class Net(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.extractor = tiny_extractor()
                self.extractor.set_references(torch.rand(3, 3, 56, 56))
                self.head = torch.nn.Conv2d(self.extractor.num_features, 2, 1)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(self.extractor(x)[-1])

        net, x = Net().eval(), torch.rand(2, 3, 56, 56)
        found = timm.models.create_feature_extractor(net, {"head": "head", "extractor": "maps"})(x)
        torch.testing.assert_close(found, {"head": net(x), "maps": net.extractor(x)}, rtol=0, atol=0)

    def test_lists_and_preprocessing(self) -> None:
        assert timm.list_models("adpretrain*") == adfeatures.list_models("adpretrain*")
        assert set(timm.list_models("residual_lite*", pretrained=True)) == {
            "residual_lite.in1k_v1",
            "residual_lite.in1k_v2",
        }
        model = timm.create_model("residual_lite", pretrained=True)
        picture = photo(1, (300, 200))
        theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        torch.testing.assert_close(theirs(picture), adfeatures.create_transform(model)(picture))

    def test_arguments_pass_through(self, tmp_path: Path) -> None:
        write_photos(tmp_path, range(2))
        model = timm.create_model(
            "residual_lite", pretrained=True, features_only=True, out_indices=(0, 2), references=tmp_path, num_classes=0
        )
        assert model.feature_info.out_indices == (0, 2)
        assert [level.shape[1] for level in model(torch.zeros(1, 3, *model.img_size))] == model.feature_info.channels()

    def test_layers_are_found_by_name(self) -> None:
        """As anomalib does: a first model tells the layers, a second one gives those that were asked for."""
        settings: dict[str, Any] = {"pretrained": False, "features_only": True, "exportable": True, "img_size": 64}
        names = [level["module"] for level in timm.create_model("residual_lite", **settings).feature_info.info]
        wanted = [names.index(layer) for layer in ("level1", "level3")]
        model = timm.create_model("residual_lite", **settings, out_indices=wanted)
        model.set_references(torch.rand(2, 3, 64, 64) * 2 - 1)
        maps = model(torch.zeros(1, 3, 64, 64))
        assert [level.shape[1] for level in maps] == model.feature_info.channels() == [40, 112]

    @pytest.mark.parametrize("name", ["residual_lite", "adpretrain_efficientnet_lite"])
    def test_a_repository_made_by_timm(self, name: str, tmp_path: Path) -> None:
        settings = {"img_size": 64}
        model = timm.create_model(name, pretrained=False, **settings)
        timm.models.save_for_hf(model, tmp_path, model_args=settings, safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert again.name == model.name and again.img_size == (64, 64)
        torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)

    def test_pretrained_file_as_overlay(self, tmp_path: Path) -> None:
        with pytest.raises(DownloadError, match=r"There is no file .*gone\.pth"):
            timm.create_model(CLIP, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "gone.pth")})

    @pytest.mark.parametrize("argument", [{"num_classes": 5}, {"in_chans": 1}])
    def test_classifiers_and_other_channels_are_refused(self, argument: dict[str, int]) -> None:
        with pytest.raises(InputError, match=next(iter(argument))):
            timm.create_model("residual_lite", **argument)

    def test_unknown_tags_and_arguments_are_refused(self) -> None:
        with pytest.raises(UnknownNameError, match="in1k_v1"):
            timm.create_model("residual_lite.in1k_v9", pretrained=True)
        with pytest.raises(TypeError, match="drop_rate"):
            timm.create_model("residual_lite", drop_rate=0.1)


class Own:
    """A projector trained on a tiny backbone of timm: its file, and its features of one picture."""

    def __init__(self, arch: str = "test_vit", levels: tuple[int, ...] = (2, 5)) -> None:
        torch.manual_seed(0)
        self.whole = timm.create_model(arch).state_dict()
        self.backbone, self.entry = load_backbone(arch, weights=self.whole, levels=levels, img_size=(48, 80))
        projector = ResidualProjector(self.entry.channels, num_heads=4, num_keys=8)
        for parameter in projector.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
        self.tensors = {f"projector.{key}": value for key, value in projector.state_dict().items()}
        self.tensors_of_all = {
            **self.tensors,
            **{f"backbone.{key}": value for key, value in self.backbone.state_dict().items()},
        }
        self.facts = {
            "timm_name": self.entry.timm_name,
            "blocks": self.entry.blocks,
            "channels": self.entry.channels,
            "reductions": self.entry.reductions,
            "mean": (0.1, 0.2, 0.3),
            "std": (0.4, 0.5, 0.6),
        }
        self.header = {"format": "adfeatures", "model": "adpretrain_timm", "num_heads": "4", "img_size": "[48, 80]"}
        self.header["backbone"] = json.dumps(self.facts)
        self.references, self.x = torch.randn(2, 3, 48, 80), torch.randn(1, 3, 48, 80)
        bank = ReferenceBank.from_features(self.backbone(self.references))
        with torch.no_grad():
            self.features = projector(bank.residuals(self.backbone(self.x)))

    def write(self, path: Path, whole: bool = True, **header: str | None) -> Path:
        entries = {key: text for key, text in {**self.header, **header}.items() if text is not None}
        save_checkpoint(path, self.tensors_of_all if whole else self.tensors, metadata=entries)
        return path

    def is_served_by(self, model: FeatureExtractor) -> None:
        assert model.img_size == (48, 80) and model.levels == self.entry.blocks
        model.set_references(self.references)
        for found, expected in zip(model(self.x), self.features, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def own() -> Own:
    return Own()


class TestTimmBackbones:
    def test_the_header_says_which_model_it_is(self, own: Own, tmp_path: Path) -> None:
        path = own.write(tmp_path / "model.safetensors")
        for name in (None, "adpretrain_timm"):
            for weights in (path, str(path), f"local-dir:{tmp_path}"):
                own.is_served_by(adfeatures.create_model(name, weights=weights))
        model = adfeatures.create_model(weights=path, pretrained=False)
        assert model.name == "adpretrain_timm" and not model.training
        assert (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert model.pretrained_cfg["input_size"] == (3, 48, 80)
        assert adfeatures.create_transform(model)(photo(1))[0].max() > 0.9 / 0.4 * 0.5  # not the mean and std of timm
        assert adfeatures.create_model(weights=path, img_size=32).img_size == (32, 32)

    def test_pyramids_too(self, tmp_path: Path) -> None:
        own = Own("test_resnet", levels=(2, 3, 4))
        own.is_served_by(adfeatures.create_model(weights=own.write(tmp_path / "model.safetensors")))

    def test_published_weights_of_timm_where_the_file_has_none(self, own: Own, hub: HubServer, tmp_path: Path) -> None:
        path = own.write(tmp_path / "projector.safetensors", whole=False)
        with pytest.raises(DownloadError, match=r"timm/test_vit\.r160_in1k"):
            adfeatures.create_model(weights=path)
        hub.add("timm/test_vit.r160_in1k", "model.safetensors", save(own.whole))
        own.is_served_by(adfeatures.create_model(weights=path))
        with pytest.raises(InputError, match='backbone_weights="random"'):
            adfeatures.create_model(weights=path, pretrained=False)
        (tmp_path / "backbone.safetensors").write_bytes(save(own.whole))
        with hub.counting() as requests:
            own.is_served_by(
                adfeatures.create_model(
                    weights=path, pretrained=False, backbone_weights=tmp_path / "backbone.safetensors"
                )
            )
            own.is_served_by(
                adfeatures.create_model(
                    weights=path, backbone_weights=f"local-dir:{own.write(tmp_path / 'model.safetensors')}"
                )
            )
        assert not requests

    def test_repository_through_timm(self, own: Own, hub: HubServer, tmp_path: Path) -> None:
        config = json.dumps(
            {"architecture": "adpretrain_timm", "num_classes": 0, "pretrained_cfg": {"num_classes": 0}}
        ).encode()
        hub.add("owner/repo", "config.json", config, lfs=False)
        hub.add("owner/repo", "model.safetensors", own.write(tmp_path / "model.safetensors").read_bytes())
        (tmp_path / "config.json").write_bytes(config)
        adfeatures.register_with_timm()
        for place in ("hf-hub:owner/repo", f"local-dir:{tmp_path}"):
            own.is_served_by(timm.create_model(place, pretrained=True))
            own.is_served_by(adfeatures.create_model(weights=place))

    def test_other_levels_of_a_backbone_of_the_catalog(self, tmp_path: Path) -> None:
        _, entry = load_backbone("dinov2_base", weights="random", levels=(1, 2))
        assert (entry.blocks, entry.channels, entry.reductions) == ((1, 2), (64, 64), (14, 14))
        mean, std = entry.normalization
        facts = {
            "timm_name": entry.timm_name,
            "blocks": (1, 2),
            "channels": (64, 64),
            "reductions": (14, 14),
            "mean": mean,
            "std": std,
        }
        projector = ResidualProjector(entry.channels, num_keys=8)
        tensors = {f"projector.{key}": value for key, value in projector.state_dict().items()}
        header = {
            "model": "adpretrain_dinov2_base",
            "num_heads": "16",
            "img_size": "[28, 42]",
            "backbone": json.dumps(facts),
        }
        save_checkpoint(tmp_path / "own.safetensors", tensors, metadata=header)
        model = adfeatures.create_model(weights=tmp_path / "own.safetensors", backbone_weights="random")
        assert model.levels == (1, 2) and model.img_size == (28, 42)
        with pytest.raises(CheckpointError, match="unexpected|missing"):
            save_checkpoint(tmp_path / "other.safetensors", tensors, metadata={"model": "adpretrain_dinov2_base"})
            adfeatures.create_model(weights=tmp_path / "other.safetensors", backbone_weights="random")

    @pytest.mark.parametrize(
        ("header", "says"),
        [
            ({"backbone": None}, "must describe the backbone"),
            ({"backbone": "{"}, "not JSON"),
            ({"backbone": '{"timm_name": 3, "blocks": [2, 5]}'}, "backbone of its header has no channels"),
            ({"backbone": "[1]"}, "backbone of its header must be an object"),
            ({"timm_name": 3}, r"backbone of its header\.timm_name must be text, not 3"),
            ({"blocks": [2, "5"]}, r"blocks\[1\] must be a whole number, not '5'"),
            ({"std": [1, 1, 0]}, r"std\[2\] must be a number from .*, not 0"),
            ({"blocks": (2, 9)}, "does not exist.*1 to 6"),
            ({"timm_name": "test_vitt"}, "does not exist.*Did you mean"),
            ({"timm_name": "hf-hub:owner/repo"}, "does not exist"),
            ({"timm_name": "adpretrain_timm"}, "does not exist"),
            ({"channels": (64, 32)}, "has channels"),
            ({"reductions": (16, 8)}, "has channels"),
            ({"timm_name": "test_vit2"}, "missing reg_token"),
            ({"mean": (0.1, 0.2)}, r"mean must be \[a number, a number, a number\]"),
            ({"num_heads": "many"}, "num_heads of its header is not JSON"),
            ({"num_heads": "0"}, "num_heads of its header must be a whole number from 1"),
            ({"img_size": "[48]"}, "img_size"),
            ({"img_size": "48 x 80"}, "not JSON"),
            ({"img_size": "[48.5, 80]"}, "img_size"),
            ({"model": "adpretrain_timmm"}, "does not know"),
            ({"model": None}, "does not say which model"),
            ({"model": "adpretrain_dinov2_base"}, "does not fit|has channels"),
        ],
    )
    def test_headers_that_lie(self, own: Own, tmp_path: Path, header: dict[str, Any], says: str) -> None:
        if not header.keys() & own.header.keys():
            header = {"backbone": json.dumps({**own.facts, **header})}
        path = own.write(tmp_path / "model.safetensors", **header)
        with pytest.raises(CheckpointError, match=says) as error:
            adfeatures.create_model(weights=path)
        assert "model.safetensors" in str(error.value)

    def test_a_size_in_the_header_that_cannot_be(self, own: Own, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"model\.safetensors: the img_size .*nearest to 50 are 48 and 64"):
            adfeatures.create_model(weights=own.write(tmp_path / "model.safetensors", img_size="[50, 80]"))


class TestModelsWithoutPublishedWeights:
    @pytest.mark.parametrize("name", ["adpretrain_efficientnet_lite", "adpretrain_timm"])
    def test_weights_must_be_given(self, name: str, hub: HubServer) -> None:
        adfeatures.register_with_timm()
        for create in (adfeatures.create_model, lambda arch: timm.create_model(arch, pretrained=True)):
            with pytest.raises(InputError, match=f"{name} has no published weights: give .*weights="):
                create(name)
        with pytest.raises(UnknownNameError, match="no published weights"):
            adfeatures.create_model(f"{name}.tag")
        with pytest.raises(UnknownNameError, match="no published weights"):
            adfeatures.create_model(name, weights="tag")
        assert name in adfeatures.list_models() and not adfeatures.list_models(f"{name}*", pretrained=True)
        assert "weights" in catalog.describe(name)
        assert not hub.requests

    def test_own_projector_on_the_embedded_backbone(self, tmp_path: Path, hub: HubServer) -> None:
        model = adfeatures.create_model("adpretrain_efficientnet_lite", pretrained=False)
        assert (model.img_size, model.backbone.channels) == ((320, 320), (40, 80, 112))
        tensors = {f"projector.{key}": value for key, value in projector_of(model).state_dict().items()}
        header = {"model": "adpretrain_efficientnet_lite", "num_heads": "16", "img_size": "[64, 96]"}
        save_checkpoint(tmp_path / "own.safetensors", tensors, metadata=header)
        own, embedded = adfeatures.create_model(weights=tmp_path / "own.safetensors"), adfeatures.create_model()
        assert own.name == "adpretrain_efficientnet_lite" and own.img_size == (64, 96)
        for part, expected in ((projector_of(own), projector_of(model)), (own.backbone, embedded.backbone)):
            for key, value in expected.state_dict().items():
                assert torch.equal(part.state_dict()[key], value)
        assert not hub.requests

    def test_timm_has_no_preprocessing_by_name(self) -> None:
        with pytest.raises(InputError, match="give the created model"):
            adfeatures.create_transform("adpretrain_timm")
        with pytest.raises(InputError, match="weights must|no published weights"):
            adfeatures.create_model("adpretrain_timm", pretrained=False)

    def test_commands(self, capsys: pytest.CaptureFixture[str]) -> None:
        from adfeatures.cli import main

        for name in ("adpretrain_efficientnet_lite", "adpretrain_timm"):
            for command in ("info", "list", "download"):
                assert main([command, name]) == 0
            assert "no published weights" in capsys.readouterr().err


class TestLoadBackbone:
    def test_names_of_the_catalog(self, published: Published, hub: HubServer) -> None:
        hub.add("timm/vit_base_patch16_clip_224.openai", "model.safetensors", published.backbone)
        backbone, entry = load_backbone("clip_base", img_size=(32, 48))
        assert entry == replace(catalog.BACKBONES["clip_base"], img_size=(32, 48))
        key = "blocks.4.mlp.fc2.weight"
        assert torch.equal(backbone.state_dict()[key], load(published.backbone)[key])
        assert not backbone.training and not any(parameter.requires_grad for parameter in backbone.parameters())
        assert load_backbone("efficientnet_lite")[1].img_size == (320, 320)

    def test_published_weights_of_timm(self, hub: HubServer) -> None:
        torch.manual_seed(3)
        whole = timm.create_model("test_resnet").state_dict()
        hub.add("timm/test_resnet.r160_in1k", "model.safetensors", save(whole))
        backbone, entry = load_backbone("test_resnet")
        assert torch.equal(backbone.state_dict()["model.layer3.0.conv1.weight"], whole["layer3.0.conv1.weight"])
        assert entry.img_size == (160, 160) and not any(parameter.requires_grad for parameter in backbone.parameters())
        other, _ = load_backbone("test_resnet", weights="random")
        assert not torch.equal(other.state_dict()["model.layer3.0.conv1.weight"], whole["layer3.0.conv1.weight"])

    def test_refusals(self, hub: HubServer, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"CC-BY-NC-4\.0.*imagebind_huge\.pth"):
            load_backbone("imagebind_huge")
        with pytest.raises(InputError, match="timm names no published weights of seresnet18"):
            load_backbone("seresnet18")
        with pytest.raises(UnknownNameError, match="Did you mean 'dinov2_base'"):
            load_backbone("dinov2_bas")
        with pytest.raises(InputError, match="convolutional"):
            load_backbone("efficientnet_lite", levels=(1, 2))
        assert not hub.requests
        with pytest.raises(DownloadError, match="There is no file"):
            load_backbone("test_vit", weights=tmp_path / "gone.safetensors")
        with pytest.raises(InputError, match="multiples of 14"):
            load_backbone("dinov2_base", weights="random", img_size=225)


class TestChosenBackbones:
    """Cosine residuals on a backbone that is named."""

    def test_scores_as_the_embedded_default_without_its_head(self) -> None:
        torch.manual_seed(0)
        references, x = torch.randn(3, 3, 64, 96), torch.randn(2, 3, 64, 96)
        default = adfeatures.create_model(img_size=(64, 96))
        # The head is for the levels of the default alone.
        del default.scorer
        default.scorer = LocalCosineScorer()
        chosen = adfeatures.create_model(backbone="efficientnet_lite", img_size=(64, 96))
        for model in (default, chosen):
            model.set_references(references)
        for found, expected in zip(chosen.anomaly_map(x), default.anomaly_map(x), strict=True):
            assert torch.equal(found, expected)
        assert (chosen.fit_threshold(0.9), chosen.name) == (
            default.fit_threshold(0.9),
            "residual_timm.efficientnet_lite",
        )

    @pytest.mark.parametrize("backbone", ["test_vit@2,5", "test_resnet"])
    def test_residuals_are_cosine_distances_of_the_features_of_timm(self, backbone: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        arch = backbone.partition("@")[0]
        whole: Any = timm.create_model(arch, **({"dynamic_img_size": True} if "vit" in arch else {})).eval()
        save_checkpoint(tmp_path / "mine.safetensors", whole.state_dict())
        # A single one, since several weigh the distances.
        references, x = torch.randn(1, 3, 64, 96), torch.randn(1, 3, 64, 96)
        model = adfeatures.create_model(backbone=backbone, weights=tmp_path / "mine.safetensors", img_size=(64, 96))
        model.set_references(references)
        indices = [level - 1 for level in model.levels]
        with torch.no_grad():
            normal, query = (
                whole.forward_intermediates(images, indices=indices, norm=False, intermediates_only=True)
                for images in (references, x)
            )
        for found, own, other in zip(model.residuals(x), query, normal, strict=True):
            # Weighted means of 3 x 3 patches, channel by channel.
            weights = torch.tensor([1.0, 2, 1]).outer(torch.tensor([1.0, 2, 1])) / 16
            rows, patches = (
                torch.nn.functional.conv2d(
                    torch.nn.functional.pad(level, (1, 1, 1, 1), mode="replicate").transpose(0, 1), weights[None, None]
                )
                .flatten(1)
                .T
                for level in (other, own)
            )
            lengths = patches.norm(dim=1)[:, None] * rows.norm(dim=1)
            expected = 1 - (patches @ rows.T / lengths).amax(dim=1)
            torch.testing.assert_close(found.square().sum(dim=1).flatten() / 2, expected, rtol=1e-3, atol=1e-5)
        assert model.anomaly_map(x).maps.shape == (1, 64, 96)

    def test_a_bank_is_of_its_backbone_and_its_levels(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        bank = tmp_path / "bank.safetensors"
        save_checkpoint(tmp_path / "mine.safetensors", timm.create_model("test_vit").state_dict())
        mine: dict[str, Any] = {"weights": tmp_path / "mine.safetensors", "img_size": (64, 96)}
        model, x = adfeatures.create_model(backbone="test_vit@1,6", **mine), torch.randn(1, 3, 64, 96)
        model.set_references(torch.randn(3, 3, 64, 96))
        model.save_references(bank)
        full = "residual_timm.test_vit.r160_in1k@1,6"
        for name, backbone in ((full, None), ("residual_timm", "test_vit@1,6"), (None, "test_vit@1,6")):
            other = adfeatures.create_model(name, backbone=backbone, references=bank, **mine)
            assert torch.equal(other.anomaly_map(x).maps, model.anomaly_map(x).maps)
        for levels in ("@2,6", ""):
            with pytest.raises(ReferencesError, match=f"made with {full}, not with {full.partition('@')[0]}{levels}"):
                adfeatures.create_model(backbone=f"test_vit{levels}", references=bank, **mine)
        save_checkpoint(tmp_path / "other.safetensors", timm.create_model("test_resnet").state_dict())
        with pytest.raises(ReferencesError, match=f"made with {full}, not with residual_timm.test_resnet"):
            adfeatures.create_model(
                backbone="test_resnet", references=bank, weights=tmp_path / "other.safetensors", img_size=(64, 96)
            )
        with pytest.raises(InputError, match="leave out one of them"):
            adfeatures.create_model(backbone="test_vit@2,6", references=bank, pretrained=False)
        with pytest.raises(ReferencesError, match="other weights"):
            adfeatures.create_model(full, references=bank, pretrained=False, img_size=(64, 96))

    def test_timm_and_torch_hub_reach_it(self) -> None:
        adfeatures.register_with_timm()
        models = [
            timm.create_model("residual_timm", pretrained=False, backbone="test_resnet@2,3"),
            timm.create_model("residual_timm.test_resnet@2,3", pretrained=False, features_only=True),
            torch.hub.load(
                str(REPOSITORY), "residual_timm", source="local", backbone="test_resnet@2,3", pretrained=False
            ),
        ]
        for model in models:
            assert (model.name, model.levels) == ("residual_timm.test_resnet.r160_in1k@2,3", (2, 3))
            assert model.pretrained_cfg["hf_hub_id"] == "timm/test_resnet.r160_in1k"

    def test_the_command_from_fit_to_score(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_photos(tmp_path / "good", range(3))
        write_photos(tmp_path / "new", range(10, 12))
        save_checkpoint(tmp_path / "mine.safetensors", timm.create_model("test_vit").state_dict())
        weights, bank = (
            ["--weights", str(tmp_path / "mine.safetensors")],
            ["--bank", str(tmp_path / "bank.safetensors")],
        )
        fit = ["fit", "--references", str(tmp_path / "good"), "--backbone", "test_vit@2,5", *bank, *weights, "--json"]
        assert main(fit) == 0
        full = json.loads(capsys.readouterr().out)["model"]
        assert full == "residual_timm.test_vit.r160_in1k@2,5"
        for number, named in enumerate(
            ([], ["--model", "residual_timm"], ["--model", full], ["--backbone", "test_vit@2,5"])
        ):
            output = ["--output", str(tmp_path / f"out{number}")]
            assert main(["score", *bank, *weights, *named, *output, str(tmp_path / "new")]) == 0
        assert (tmp_path / "out0/scores.csv").read_bytes() == (tmp_path / "out3/scores.csv").read_bytes()
        for wrong in (["--backbone", "test_vit@2,6"], ["--model", "residual_lite"], ["--backbone", "test_resnet"]):
            assert (
                main(["score", *bank, *weights, *wrong, "--output", str(tmp_path / "no"), str(tmp_path / "new")]) == 2
            )
            assert "residual_timm.test_vit.r160_in1k@2,5" in capsys.readouterr().err

    def test_info_says_what_was_chosen(self, capsys: pytest.CaptureFixture[str]) -> None:
        for asked in (["residual_timm", "--backbone", "test_vit@2,5"], ["residual_timm.test_vit.r160_in1k@2,5"]):
            assert main(["info", *asked, "--json"]) == 0
            facts = json.loads(capsys.readouterr().out)
            assert facts["model"] == "residual_timm.test_vit.r160_in1k@2,5" and facts["levels"] == [2, 5]
            assert facts["backbone_weights"] == "hf-hub:timm/test_vit.r160_in1k:model.safetensors"
            assert facts["backbone_license"] == "apache-2.0" and facts["img_size"] == [160, 160]
        assert main(["info", "residual_timm"]) == 0 and "--backbone says which" in capsys.readouterr().out
        assert main(["info", "residual_lite", "--backbone", "test_vit"]) == 2


def test_hubconf_has_one_entry_per_model() -> None:
    text = (REPOSITORY / "hubconf.py").read_text()
    assert len(text) < 1024
    namespace: dict[str, object] = {}
    exec(compile(text, "hubconf.py", "exec"), namespace)
    entries = {name for name, value in namespace.items() if callable(value) and not name.startswith("_")}
    assert entries == set(catalog.MODELS)


def test_pretrained_is_the_first_argument_of_an_entry() -> None:
    for pretrained, name in ((True, "residual_lite.in1k_v2"), (False, "residual_lite")):
        assert torch.hub.load(str(REPOSITORY), "residual_lite", pretrained, source="local").name == name


def test_noncommercial_weights_are_announced(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from adfeatures import factory

    monkeypatch.setattr(factory, "build_encoder", lambda *args, **kwargs: torch.nn.Identity())
    torch.save({"stands": torch.ones(1)}, tmp_path / "imagebind_huge.pth")
    with caplog.at_level(logging.WARNING):
        factory.load_backbone("imagebind_huge", weights=tmp_path / "imagebind_huge.pth")
    assert "CC-BY-NC-4.0" in caplog.text


class TestTagsOfTheDefault:
    """Each tag scores in its own way, and a bank names its own."""

    @pytest.mark.parametrize(
        ("name", "scorer", "tail"),
        [
            ("residual_lite", LearnedScorer, "lognormal"),
            ("residual_lite.in1k_v2", LearnedScorer, "lognormal"),
            ("residual_lite.in1k_v1", CosineRingScorer, "empirical"),
        ],
    )
    def test_scorers(self, name: str, scorer: type, tail: str) -> None:
        model = adfeatures.create_model(name)
        assert type(model.scorer) is scorer and model.tail == tail

    def test_a_bank_of_the_first_tag_makes_the_first_model(self, tmp_path: Path) -> None:
        write_photos(tmp_path / "good", range(3))
        first = adfeatures.create_model("residual_lite.in1k_v1", references=tmp_path / "good")
        assert first.bank().kept is None and first.bank().units is None
        first.save_references(tmp_path / "part.safetensors")
        for name in (None, "residual_lite", "residual_lite.in1k_v1"):
            model = adfeatures.create_model(name, references=tmp_path / "part.safetensors")
            assert model.name == "residual_lite.in1k_v1" and model.threshold() == first.threshold()
            assert model.score(photo(9))[0].score == first.score(photo(9))[0].score
        with pytest.raises(ReferencesError, match="made with residual_lite.in1k_v1, not with residual_lite.in1k_v2"):
            adfeatures.create_model("residual_lite.in1k_v2", references=tmp_path / "part.safetensors")

    def test_a_bank_of_another_form_of_a_tag_is_refused(self, tmp_path: Path) -> None:
        """As banks of the second tag were made before it had a head."""
        model = adfeatures.create_model("residual_lite.in1k_v2", references=[photo(seed) for seed in range(2)])
        assert model.bank().record.form == "learned"
        assert adfeatures.create_model("residual_lite.in1k_v1", references=[photo(1)]).bank().record.form is None
        for form in ("learned", "binomial", None):
            model.bank().record.form = form
            model.bank().save(tmp_path / f"{form}.safetensors")
        same = adfeatures.create_model(references=tmp_path / "learned.safetensors")
        assert same.score(photo(9))[0].score == model.score(photo(9))[0].score
        for form in ("binomial", None):
            with pytest.raises(ReferencesError, match=r"an earlier form of residual_lite.in1k_v2.*adfeatures fit"):
                adfeatures.create_model(references=tmp_path / f"{form}.safetensors")
