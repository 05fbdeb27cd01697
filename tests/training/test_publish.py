"""The entry point: what was pushed over HTTP loads back, and options that contradict each other are refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
from helpers.hub_server import HubServer
from helpers.publishing import REPO, OwnCheckpoint, files_in

import adfeatures

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot pin down")


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    return capsys.readouterr().err


def test_what_was_pushed_loads_back(
    own: OwnCheckpoint, writable: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert own.publish("--repo", REPO) == 0
    assert f"{writable.url}/{REPO}, private" in capsys.readouterr().out
    assert files_in(writable).keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    own.is_served_by(adfeatures.create_model(weights=f"hf-hub:{REPO}"))
    adfeatures.register_with_timm()
    own.is_served_by(timm.create_model(f"hf-hub:{REPO}", pretrained=True))
    own.is_served_by(timm.create_model(f"hf-hub:{REPO}", pretrained=True, features_only=True))


@pytest.mark.parametrize("way", ["--whole-model", "--backbone-weights"])
def test_whole_model_needs_nothing_else(own: OwnCheckpoint, writable: HubServer, way: str) -> None:
    assert own.publish("--repo", REPO, way, *([own.save_backbone()] if way == "--backbone-weights" else [])) == 0
    asked_before = len(writable.requests)
    own.is_served_by(adfeatures.create_model(weights=f"hf-hub:{REPO}", pretrained=False))
    own.is_served_by(timm.create_model(f"hf-hub:{REPO}", pretrained=True))
    assert not any("timm" in request.path for request in writable.requests[asked_before:])


def test_dry_run_sends_nothing(
    own: OwnCheckpoint, writable: HubServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for options in (("--repo", REPO), ("--repo", REPO, "--public", "--folder", tmp_path), ()):
        assert own.publish("--dry-run", *options) == 0
        out = capsys.readouterr().out
        assert all(
            re.search(rf"{name}: \d+ bytes, sha256 [0-9a-f]{{64}}", out) for name in ("config.json", "README.md")
        )
    assert not writable.requests
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "README.md", "model.safetensors"}


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
    own: OwnCheckpoint,
    writable: HubServer,
    capsys: pytest.CaptureFixture[str],
    options: Sequence[str],
    says: str,
) -> None:
    assert says in refused(capsys, own.publish(*options))
    assert not writable.requests
