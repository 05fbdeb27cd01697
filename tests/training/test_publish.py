"""Publishing over HTTP to the loopback Hub: what was pushed loads back, breaks off and resumes, and is refused where it must be."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers.hub_server import HubServer
from helpers.models import write_photos
from helpers.published import as_published
from safetensors import safe_open
from safetensors.torch import load_file, save

import adfeatures
from adfeatures import catalog, loading
from adfeatures.checkpoints import load_checkpoint, save_checkpoint
from adfeatures.factory import load_backbone
from adfeatures.projector import ResidualProjector
from adfeatures.timm_backbones import find_timm
from training.publish import main
from training.publishing.model_card import PAPER

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "upstream_checkpoint.pth"
REPO, TOKEN = "owner/name", "hf_of_the_owner"
TRAINING = {"data": "real_iad", "root": "/there/Real-IAD", "output": "/there/run", "backbone_weights": None, "lr": 1e-4}
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot pin down")


class Trained:
    """A projector trained on a tiny backbone of timm, as training.pretrain leaves it."""

    def __init__(self, path: Path) -> None:
        torch.manual_seed(0)
        self.path = path
        self.whole = timm.create_model("test_vit").state_dict()
        self.backbone, entry = load_backbone("test_vit", weights=self.whole, levels=(2, 5), img_size=(48, 80))
        self.projector = ResidualProjector(entry.channels, num_heads=4, num_keys=8)
        for parameter in self.projector.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
        mean, std = entry.normalization
        facts = {
            "timm_name": entry.timm_name,
            "blocks": entry.blocks,
            "channels": entry.channels,
            "reductions": entry.reductions,
        }
        self.header = {"format": "adfeatures", "model": "adpretrain_timm", "num_heads": "4", "img_size": "[48, 80]"}
        self.header |= {"backbone": json.dumps({**facts, "mean": mean, "std": std}), "training": json.dumps(TRAINING)}
        self.header |= {
            "selected_by": "AUPRO of FeatureNorm on held-out samples of the training data, after step 3",
            "training_data": "Real-IAD",
        }
        self.write(path)
        self.references, self.x = torch.randn(2, 3, 48, 80), torch.randn(1, 3, 48, 80)
        model = adfeatures.create_model(weights=path, backbone_weights=self.save_backbone())
        model.set_references(self.references)
        self.features = model(self.x)

    def write(self, path: Path, **header: str) -> Path:
        tensors = {f"projector.{key}": value for key, value in self.projector.state_dict().items()}
        save_checkpoint(path, tensors, metrics={"img_auc": 0.9123, "pix_pro": 0.8}, metadata={**self.header, **header})
        return path

    def save_backbone(self) -> Path:
        path = self.path.with_name("backbone.safetensors")
        path.write_bytes(save(self.whole))
        return path

    def is_served_by(self, model: torch.nn.Module) -> None:
        model.set_references(self.references)
        for found, expected in zip(model(self.x), self.features, strict=True):
            assert torch.equal(found, expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained") / "checkpoints_pro_norm.safetensors")


@pytest.fixture
def writable(hub: HubServer, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A Hub that has the backbone and that we may write to."""
    hub.add("timm/test_vit.r160_in1k", "model.safetensors", save(trained.whole))
    hub.allow(TOKEN, "owner")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def publish(trained: Trained, *options: object) -> int:
    return main([str(trained.path), *map(str, options)])


def written(hub: HubServer, repo: str = REPO) -> dict[str, bytes]:
    return {path: file.content for path, file in hub.commits[hub.branches[repo]["main"]].items()}


class TestRoundTrip:
    def test_what_was_pushed_loads_back(
        self, trained: Trained, writable: HubServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert publish(trained, "--repo", REPO) == 0
        assert f"{writable.url}/{REPO}, private" in capsys.readouterr().out
        assert written(writable).keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
        trained.is_served_by(adfeatures.create_model(weights=f"hf-hub:{REPO}"))
        adfeatures.register_with_timm()
        trained.is_served_by(timm.create_model(f"hf-hub:{REPO}", pretrained=True))
        trained.is_served_by(timm.create_model(f"hf-hub:{REPO}", pretrained=True, features_only=True))

    def test_only_the_projector_goes_out_with_its_header(
        self, trained: Trained, writable: HubServer, tmp_path: Path
    ) -> None:
        assert publish(trained, "--repo", REPO, "--folder", tmp_path) == 0
        assert {
            name: (tmp_path / name).read_bytes() for name in ("config.json", "README.md", "model.safetensors")
        }.items() <= written(writable).items()
        checkpoint = load_checkpoint(tmp_path / "model.safetensors")
        assert checkpoint.state_dict.keys() == {f"projector.{key}" for key in trained.projector.state_dict()}
        assert checkpoint.metrics == {"img_auc": 0.9123, "pix_pro": 0.8}
        training = {**TRAINING, "root": "Real-IAD", "output": "run"}
        assert {**checkpoint.metadata, "training": json.loads(checkpoint.metadata["training"])} == {
            **trained.header,
            "training": training,
        }

    @pytest.mark.parametrize("way", ["--whole-model", "--backbone-weights"])
    def test_whole_model_needs_nothing_else(self, trained: Trained, writable: HubServer, way: str) -> None:
        assert (
            publish(trained, "--repo", REPO, way, *([trained.save_backbone()] if way == "--backbone-weights" else []))
            == 0
        )
        asked_before = len(writable.requests)
        trained.is_served_by(adfeatures.create_model(weights=f"hf-hub:{REPO}", pretrained=False))
        trained.is_served_by(timm.create_model(f"hf-hub:{REPO}", pretrained=True))
        assert not any("timm" in request.path for request in writable.requests[asked_before:])

    def test_a_pyramid_of_timm_as_a_whole(self, writable: HubServer, tmp_path: Path) -> None:
        torch.manual_seed(1)
        whole = timm.create_model("resnet18").state_dict()
        (tmp_path / "resnet18.safetensors").write_bytes(save(whole))
        backbone, entry = load_backbone("resnet18", weights=whole)
        projector = ResidualProjector(entry.channels, num_keys=8)
        mean, std = entry.normalization
        facts = {
            "timm_name": entry.timm_name,
            "blocks": entry.blocks,
            "channels": entry.channels,
            "reductions": entry.reductions,
        }
        header = {
            "model": "adpretrain_timm",
            "num_heads": "16",
            "backbone": json.dumps({**facts, "mean": mean, "std": std}),
        }
        header["img_size"] = "[64, 64]"
        tensors = {f"projector.{key}": value for key, value in projector.state_dict().items()}
        save_checkpoint(tmp_path / "own.safetensors", tensors, metadata=header)
        arguments = [str(tmp_path / "own.safetensors"), "--repo", REPO, "--whole-model"]
        assert main([*arguments, "--backbone-weights", str(tmp_path / "resnet18.safetensors")]) == 0
        model = timm.create_model(f"hf-hub:{REPO}", pretrained=True)
        for part, expected in ((model.backbone, backbone), (model.projector, projector)):
            for key, value in expected.state_dict().items():
                assert torch.equal(part.state_dict()[key], value)
        assert model.levels == (2, 3, 4) and model.img_size == (64, 64)

    def test_folder_without_a_network(self, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        model = adfeatures.create_model("adpretrain_efficientnet_lite", pretrained=False, img_size=64)
        tensors = {f"projector.{key}": value for key, value in model.projector.state_dict().items()}
        header = {"model": "adpretrain_efficientnet_lite", "num_heads": "16", "img_size": "[64, 64]"}
        save_checkpoint(tmp_path / "own.safetensors", tensors, metadata=header)
        arguments = [str(tmp_path / "own.safetensors"), "--folder", str(tmp_path / "published")]
        assert main(arguments) == main(arguments) == 0
        adfeatures.register_with_timm()
        place = f"local-dir:{tmp_path / 'published'}"
        for served in (adfeatures.create_model(weights=place), timm.create_model(place, pretrained=True)):
            assert served.img_size == (64, 64)
            for key, value in model.projector.state_dict().items():
                assert torch.equal(served.projector.state_dict()[key], value)
        assert not hub.requests


class TestVisibility:
    @pytest.mark.parametrize(("option", "private"), [((), True), (("--private",), True), (("--public",), False)])
    def test_private_unless_public_is_said(
        self,
        trained: Trained,
        writable: HubServer,
        monkeypatch: pytest.MonkeyPatch,
        option: tuple[str, ...],
        private: bool,
    ) -> None:
        assert publish(trained, "--repo", REPO, *option) == 0
        (request,) = [sent for path, sent in writable.sent if path == "/api/repos/create"]
        assert isinstance(request, dict) and (request["organization"], request["name"]) == ("owner", "name")
        # 0.30 says it by the one word, later versions by the other
        assert request.get("visibility", {True: "private", False: "public"}.get(request.get("private"))) == (
            "private" if private else "public"
        )
        monkeypatch.delenv("HF_TOKEN")
        if private:
            with pytest.raises(adfeatures.errors.DownloadError):
                adfeatures.create_model(weights=f"hf-hub:{REPO}", cache_dir=trained.path.parent / "empty")
        else:
            trained.is_served_by(adfeatures.create_model(weights=f"hf-hub:{REPO}"))

    def test_a_public_repository_must_be_meant(
        self, trained: Trained, writable: HubServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert publish(trained, "--repo", REPO, "--public") == 0
        assert publish(trained, "--repo", REPO, "--license", "mit") == 2
        assert "Say --public" in capsys.readouterr().err
        assert publish(trained, "--repo", REPO, "--license", "mit", "--public") == 0
        assert len(writable.pushed) == 2

    def test_a_private_one_stays_private(
        self, trained: Trained, writable: HubServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert publish(trained, "--repo", REPO) == 0
        assert publish(trained, "--repo", REPO, "--license", "mit", "--public") == 0
        assert "private as it was" in capsys.readouterr().out and REPO in writable.tokens


class TestBreakingOff:
    def test_dry_run_sends_nothing(
        self, trained: Trained, writable: HubServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        for options in (("--repo", REPO), ("--repo", REPO, "--public", "--folder", tmp_path), ()):
            assert publish(trained, "--dry-run", *options) == 0
            out = capsys.readouterr().out
            assert all(
                re.search(rf"{name}: \d+ bytes, sha256 [0-9a-f]{{64}}", out) for name in ("config.json", "README.md")
            )
        assert not writable.requests
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "README.md", "model.safetensors"}

    def test_nothing_new_is_no_commit(
        self, trained: Trained, writable: HubServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert publish(trained, "--repo", REPO) == 0
        head = writable.branches[REPO]["main"]
        with writable.counting() as requests:
            assert publish(trained, "--repo", REPO) == 0
        assert "nothing was sent" in capsys.readouterr().out
        assert writable.branches[REPO]["main"] == head and {request.method for request in requests} <= {"GET", "HEAD"}
        assert publish(trained, "--repo", REPO, "--data", "ours") == 0
        assert [paths for _, _, paths in writable.pushed] == [
            ["config.json", "model.safetensors", "README.md"],
            ["README.md"],
        ]

    def test_cut_in_the_middle_of_the_weights(
        self, trained: Trained, writable: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits between its attempts
        writable.fault(method="PUT", origin="storage", cut=1000, times=6)
        assert publish(trained, "--repo", REPO) == 2
        assert "run the same command again" in capsys.readouterr().err
        assert not writable.pushed and not writable.objects
        with writable.counting() as requests:
            assert publish(trained, "--repo", REPO) == 0
        assert not any("create" in request.path for request in requests)
        trained.is_served_by(adfeatures.create_model(weights=f"hf-hub:{REPO}"))

    def test_one_cut_is_mended_at_once(
        self, trained: Trained, writable: HubServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        writable.fault(method="PUT", origin="storage", cut=1000, times=1)
        assert publish(trained, "--repo", REPO) == 0
        assert len(writable.pushed) == 1

    @pytest.mark.parametrize("fault", [{"status": 500}, {"cut": 0}])
    def test_weights_that_arrived_are_not_sent_again(
        self, trained: Trained, writable: HubServer, capsys: pytest.CaptureFixture[str], fault: dict[str, int]
    ) -> None:
        """The commit fails, or it is made and the answer is lost."""
        writable.fault(method="POST", match="/commit/", times=1, **fault)
        assert publish(trained, "--repo", REPO) == 2
        assert "run the same command again" in capsys.readouterr().err
        with writable.counting() as requests:
            assert publish(trained, "--repo", REPO) == 0
        assert not any(request.method == "PUT" for request in requests)
        assert len(writable.pushed) == 1
        trained.is_served_by(adfeatures.create_model(weights=f"hf-hub:{REPO}"))

    def test_a_server_that_stays_broken(
        self, trained: Trained, writable: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        writable.fail(503, match="/preupload/")
        assert publish(trained, "--repo", REPO) == 2
        assert "HTTP 503" in capsys.readouterr().err


class TestRefusals:
    def refused(self, capsys: pytest.CaptureFixture[str], code: int) -> str:
        assert code == 2
        return capsys.readouterr().err

    def test_tokens(
        self, trained: Trained, hub: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.allow(TOKEN, "another")
        assert "needs a token" in self.refused(capsys, publish(trained, "--repo", REPO))
        assert not hub.requests
        monkeypatch.setenv("HF_TOKEN", "hf_expired")
        assert "not valid (HTTP 401: Invalid credentials" in self.refused(capsys, publish(trained, "--repo", REPO))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert "may not write to owner (HTTP 403: You don't have the rights" in self.refused(
            capsys, publish(trained, "--repo", REPO)
        )
        assert not hub.branches

    def test_names_that_are_taken(
        self, trained: Trained, writable: HubServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        writable.add("owner/other", "config.json", b'{"architecture": "resnet50"}', lfs=False)
        writable.add("owner/mess", "config.json", b"\xff[]", lfs=False)
        writable.add("owner/data", "train.csv", b"1", lfs=False)
        writable.add("owner/hidden", "x", b"1")
        writable.require_token("owner/hidden", "hf_of_somebody_else")
        heads = dict(writable.branches)
        for name, says in (
            ("owner/other", "holds resnet50, which adpretrain_timm would overwrite"),
            ("owner/mess", "holds something else"),
            ("owner/data", "holds other things: train.csv"),
            ("owner/hidden", "HTTP 409"),
        ):
            assert says in self.refused(capsys, publish(trained, "--repo", name, "--public"))
        assert writable.branches == heads and not writable.pushed

    def test_somebody_else_was_quicker(
        self, trained: Trained, writable: HubServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        writable.fail(412, match="/commit/", times=1)
        assert "changed it meanwhile" in self.refused(capsys, publish(trained, "--repo", REPO))

    def test_what_the_hub_objects_to_is_said(
        self, trained: Trained, writable: HubServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        says = self.refused(capsys, publish(trained, "--repo", REPO, "--license", "my own"))
        assert "HTTP 400: license must be one of" in says and "Mend that" in says
        writable.fail(402, match="/preupload/", times=1)
        assert "HTTP 402: fault on demand" in self.refused(capsys, publish(trained, "--repo", REPO))

    def test_no_network(
        self, trained: Trained, hub: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        assert "the connection failed" in self.refused(capsys, publish(trained, "--repo", REPO))
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in self.refused(capsys, publish(trained, "--repo", REPO))
        assert not hub.requests

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ([], "Say where to"),
            (["--repo", "name"], "write OWNER/name"),
            (["--repo", "owner/na me"], "not the name of a repository"),
            (["--name", "adpretrain_dinov2_base", "--dry-run"], "is a checkpoint of adpretrain_timm"),
            (["--name", "adpretrain_tim", "--dry-run"], "Did you mean 'adpretrain_timm'"),
            (["--backbone-weights", "random", "--dry-run"], "random backbone"),
            (["--data-license", "MIT", "--dry-run"], "--data NAME"),
            (["--backbone-weights", "gone.pth", "--dry-run"], "There is no file"),
        ],
    )
    def test_options(
        self,
        trained: Trained,
        writable: HubServer,
        capsys: pytest.CaptureFixture[str],
        options: Sequence[str],
        says: str,
    ) -> None:
        assert says in self.refused(capsys, publish(trained, *options))
        assert not writable.requests

    def test_files(self, trained: Trained, hub: HubServer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "empty.safetensors").touch()
        save_checkpoint(tmp_path / "alien.safetensors", {"x": torch.ones(2)})
        save_checkpoint(tmp_path / "lying.safetensors", {"x": torch.ones(2)}, metadata=trained.header)
        spoiled = load_file(trained.path)
        del spoiled["projector.l2_proj.x_ref"]
        save_checkpoint(tmp_path / "spoiled.safetensors", spoiled, metadata=trained.header)
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
            assert says in self.refused(capsys, main([str(tmp_path / name), "--folder", str(tmp_path / "out")]))
        assert not (tmp_path / "out").exists() and not hub.requests

    def test_projectors_on_imagebind_go_without_it(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        """Its weights are always given as a file, and are not ours to hand on."""
        torch.manual_seed(0)
        with torch.device("meta"):
            shapes = ResidualProjector((1280,) * 4, num_keys=2).state_dict()
        tensors = {f"projector.{key}": torch.zeros(value.shape, dtype=torch.bfloat16) for key, value in shapes.items()}
        training = json.dumps({**TRAINING, "backbone_weights": "/there/imagebind_huge.pth"})
        header = {"model": "adpretrain_imagebind_huge", "num_heads": "16", "training": training}
        save_checkpoint(tmp_path / "own.safetensors", tensors, metadata=header)
        assert main([str(tmp_path / "own.safetensors"), "--folder", str(tmp_path / "out")]) == 0
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.count('backbone_weights="/path/to/imagebind_huge.pth"') == 3 and "| backbone | CC-BY-NC-4.0" in card
        assert "must be got from https://github.com/facebookresearch/ImageBind" in card
        assert "CC-BY-NC-4.0" in self.refused(
            capsys, main([str(tmp_path / "own.safetensors"), "--dry-run", "--whole-model"])
        )

    def test_folders_that_hold_something_else(
        self, trained: Trained, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "README.md").write_text("my project")
        assert "is not empty and holds no model" in self.refused(capsys, publish(trained, "--folder", tmp_path))
        assert "is a file" in self.refused(capsys, publish(trained, "--folder", tmp_path / "README.md"))
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
        self, trained: Trained, capsys: pytest.CaptureFixture[str], tmp_path: Path, config: bytes, says: str
    ) -> None:
        (tmp_path / "config.json").write_bytes(config)
        assert says in self.refused(capsys, publish(trained, "--folder", tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]

    def test_the_backbone_that_it_was_trained_on(
        self, trained: Trained, writable: HubServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        unpublished = "Publish them with it: --backbone-weights"
        for used, says in (
            ("/there/other.pth", unpublished),
            ("/there/pytorch_model.bin", unpublished),
            ("random", "random backbone"),
        ):
            training = json.dumps({**TRAINING, "backbone_weights": used})
            path = str(trained.write(tmp_path / "other.safetensors", training=training))
            assert says in self.refused(capsys, main([path, "--dry-run"]))
        path = str(
            trained.write(
                tmp_path / "other.safetensors", training=json.dumps({**TRAINING, "backbone_weights": "/there/b.pth"})
            )
        )
        assert main([path, "--folder", str(tmp_path / "out"), "--backbone-weights", str(trained.save_backbone())]) == 0
        trained.is_served_by(adfeatures.create_model(weights=f"local-dir:{tmp_path / 'out'}", pretrained=False))
        assert "/there" not in "".join(load_checkpoint(tmp_path / "out" / "model.safetensors").metadata.values())
        # Said to be the published ones under another name, they stay where they are.
        assert main([path, "--folder", str(tmp_path / "published"), "--backbone-weights", "r160_in1k"]) == 0
        assert not any(
            key.startswith("backbone.")
            for key in load_checkpoint(tmp_path / "published" / "model.safetensors").state_dict
        )
        assert not writable.requests

    def test_backbones_that_timm_has_not_published(
        self, trained: Trained, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        _, entry = load_backbone("dpn48b", weights="random", levels=(1, 2))
        mean, std = entry.normalization
        facts = {
            "timm_name": "dpn48b",
            "blocks": entry.blocks,
            "channels": entry.channels,
            "reductions": entry.reductions,
        }
        header = {
            "model": "adpretrain_timm",
            "num_heads": "16",
            "backbone": json.dumps({**facts, "mean": mean, "std": std}),
        }
        tensors = ResidualProjector(entry.channels, num_keys=8).state_dict()
        save_checkpoint(
            tmp_path / "own.safetensors", {f"projector.{key}": value for key, value in tensors.items()}, metadata=header
        )
        says = self.refused(capsys, main([str(tmp_path / "own.safetensors"), "--dry-run"]))
        assert "timm has no published weights of dpn48b, so they must come along" in says

    def test_whole_models_keep_the_terms_of_the_backbone(
        self,
        trained: Trained,
        writable: HubServer,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(
            loading, "find_timm", lambda *of: dataclasses.replace(find_timm(*of), license="cc-by-nc-4.0")
        )
        options = ["--folder", tmp_path, "--license", "apache-2.0"]
        assert publish(trained, *options) == 0
        assert "cannot be apache-2.0" in self.refused(capsys, publish(trained, *options, "--whole-model"))
        assert publish(trained, "--folder", tmp_path, "--license", "cc-by-nc-4.0", "--whole-model") == 0


class TestFilesOfTheAuthors:
    @pytest.fixture
    def tiny(self, monkeypatch: pytest.MonkeyPatch) -> str:
        """A model of the catalog that the golden file, which has 32 channels, is a checkpoint of."""
        entry = dataclasses.replace(catalog.BACKBONES["dinov2_base"], channels=(32,) * 4)
        model = dataclasses.replace(catalog.MODELS["adpretrain_dinov2_base"], backbone="tiny")
        monkeypatch.setattr(catalog, "BACKBONES", {**catalog.BACKBONES, "tiny": entry})
        monkeypatch.setattr(catalog, "MODELS", {**catalog.MODELS, "adpretrain_tiny": model})
        return "adpretrain_tiny.realiad_norm"

    def test_republished_bit_for_bit(self, tiny: str, writable: HubServer, tmp_path: Path) -> None:
        original = load_checkpoint(GOLDEN)
        assert main([str(GOLDEN), "--name", tiny, "--repo", REPO]) == 0
        (tmp_path / "model.safetensors").write_bytes(written(writable)["model.safetensors"])
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
            assert (
                main([str(tmp_path / "model.safetensors"), "--repo", REPO]) == 0
            )  # the published file is the same model
        assert {request.method for request in requests} <= {"GET", "HEAD"}

    def test_their_terms_are_not_restated(self, tiny: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert main([str(GOLDEN), "--name", tiny, "--folder", str(tmp_path), "--license", "mit"]) == 2
        assert main([str(GOLDEN), "--name", tiny, "--folder", str(tmp_path), "--data", "ours"]) == 2
        assert main([str(GOLDEN), "--folder", str(tmp_path)]) == 2
        assert (
            "trained by others" in (err := capsys.readouterr().err)
            and "--name adpretrain_dinov2_base.realiad_norm" in err
        )
        assert main([str(GOLDEN), "--name", tiny, "--folder", str(tmp_path)]) == 0
        card = (tmp_path / "README.md").read_text()
        front = yaml.safe_load(card.split("---\n")[1])
        assert (front["license"], front["license_name"], front["datasets"]) == (
            "other",
            "unstated",
            ["Real-IAD/Real-IAD"],
        )
        assert "Real-IAD: CC-BY-NC-SA-4.0" in card and "unstated (code of the authors: MIT)" in card
        assert "on the test set of MVTec AD, by the authors" in card and "FeatureNorm, CFLOW, GLASS, UniAD" in card

    def test_your_own_training_is_not_theirs(
        self, tiny: str, trained: Trained, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        golden = {f"projector.{key}": value for key, value in load_checkpoint(GOLDEN).state_dict.items()}
        save_checkpoint(tmp_path / "own.safetensors", golden, metadata={"training": json.dumps(TRAINING)})
        assert main([str(tmp_path / "own.safetensors"), "--name", tiny, "--dry-run"]) == 2
        assert "leave out the tag" in capsys.readouterr().err

    @pytest.mark.slow
    def test_full_size(self, writable: HubServer, tmp_path: Path) -> None:
        projector = ResidualProjector((768,) * 4)
        (tmp_path / "checkpoints_pro_norm.pth").write_bytes(as_published(projector.state_dict()))
        name = "adpretrain_dinov2_base.realiad_norm"
        assert main([str(tmp_path / "checkpoints_pro_norm.pth"), "--name", name, "--repo", REPO]) == 0
        model = adfeatures.create_model(weights=f"hf-hub:{REPO}", backbone_weights="random")
        assert model.name == name
        for key, value in projector.state_dict().items():
            assert torch.equal(model.projector.state_dict()[key], value.bfloat16().float())


class TestModelCard:
    @pytest.fixture
    def card(self, trained: Trained, writable: HubServer) -> str:
        assert publish(trained, "--repo", REPO, "--license", "cc-by-nc-sa-4.0") == 0
        return written(writable)["README.md"].decode()

    def test_front_matter(self, card: str) -> None:
        front = yaml.safe_load(card.split("---\n")[1])
        assert front == {
            "license": "cc-by-nc-sa-4.0",
            "library_name": "timm",
            "pipeline_tag": "image-feature-extraction",
            "tags": [
                "adfeatures",
                "timm",
                "anomaly-detection",
                "industrial-inspection",
                "adpretrain",
                "arxiv:2511.05245",
            ],
            "datasets": ["Real-IAD/Real-IAD"],
            "base_model": "timm/test_vit.r160_in1k",
        }

    def test_says_what_a_user_must_know(self, card: str, trained: Trained) -> None:
        for fact in (
            "# name\n",
            PAPER,
            "`test_vit.r160_in1k`, blocks or stages 2, 5, with 64, 64 channels",
            "48 x 80 pixels",
            "the projector alone",
            "Real-IAD: CC-BY-NC-SA-4.0",
            "| backbone | apache-2.0",
            "| image AUROC | 0.9123 |",
            "| AUPRO | 0.8000 |",
            trained.header["selected_by"],
            "Ask your lawyer",
            '"lr": 0.0001',
        ):
            assert fact in card
        assert "/there" not in card

    def test_unknown_things_are_said_to_be_unknown(self, trained: Trained, tmp_path: Path) -> None:
        tensors = {f"projector.{key}": value for key, value in trained.projector.state_dict().items()}
        header = {
            key: text for key, text in trained.header.items() if key not in ("training", "training_data", "selected_by")
        }
        save_checkpoint(tmp_path / "own.safetensors", tensors, metadata=header)
        assert main([str(tmp_path / "own.safetensors"), "--folder", str(tmp_path / "out")]) == 0
        card = (tmp_path / "out" / "README.md").read_text()
        front = yaml.safe_load(card.split("---\n")[1])
        assert (front["license"], front["license_name"]) == ("other", "unstated") and "datasets" not in front
        assert (
            "training data | not stated" in card
            and "The file holds none. The file does not say what selected it" in card
        )

    def test_data_of_ones_own(self, trained: Trained, tmp_path: Path) -> None:
        options = ["--data", "procedural images of training.synthesize", "--data-license", "MIT"]
        assert publish(trained, "--folder", tmp_path, *options) == 0
        card = (tmp_path / "README.md").read_text()
        assert "procedural images of training.synthesize: MIT" in card and "Real-IAD:" not in card
        assert "datasets" not in yaml.safe_load(card.split("---\n")[1])

    def test_real_iad_keeps_its_terms(self, trained: Trained, tmp_path: Path) -> None:
        assert publish(trained, "--folder", tmp_path, "--data", "Real-IAD") == 0
        assert "Real-IAD: CC-BY-NC-SA-4.0" in (tmp_path / "README.md").read_text()

    def test_its_code_runs(self, card: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_photos(tmp_path / "good", range(3))
        monkeypatch.chdir(tmp_path)
        blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        assert len(blocks) == 3
        for block in blocks:
            namespace: dict[str, object] = {}
            exec(compile(block.replace("/path/to/adfeatures", str(REPOSITORY)), "README.md", "exec"), namespace)
            trained.is_served_by(namespace["model"])  # type: ignore[arg-type]

    def test_config_is_timms(self, card: str, writable: HubServer, trained: Trained) -> None:
        config = json.loads(written(writable)["config.json"])
        assert (config["architecture"], config["num_classes"], config["num_features"]) == ("adpretrain_timm", 0, 64)
        cfg = timm.models.PretrainedCfg(**config["pretrained_cfg"])  # knows every key
        assert (cfg.input_size, cfg.crop_pct, cfg.crop_mode, cfg.license) == (
            [3, 48, 80],
            1.0,
            "squash",
            "cc-by-nc-sa-4.0",
        )
        assert cfg.mean == list(json.loads(trained.header["backbone"])["mean"])

    def test_header_is_in_order(self, trained: Trained, tmp_path: Path) -> None:
        assert publish(trained, "--folder", tmp_path) == 0
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert file.metadata()["format"] == "adfeatures"
        first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert publish(trained, "--folder", tmp_path) == 0
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
