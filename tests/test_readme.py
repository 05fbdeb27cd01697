"""What the README shows is run: its Python blocks in order, and its commands, on photos and a loopback Hub."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.hub_server import HubServer
from helpers.models import photo, write_photos
from helpers.published import as_published
from PIL import Image
from safetensors.torch import save

import adfeatures
from adfeatures import catalog
from adfeatures.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_input: None) -> Path:
    """A folder with the photos that the README speaks of."""
    write_photos(tmp_path / "good", range(8))
    write_photos(tmp_path / "new", range(20, 22))
    Image.new("L", photo(0).size, "white").save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*cannot pin down")
def test_commands(workplace: Path) -> None:
    lines = [line.partition("#")[0] for block in blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("adfeatures ") and "download" not in line]
    assert {command[1] for command in commands} >= {"fit", "score"}
    for command in commands:
        assert main(command[1:]) == 0
    write_photos(workplace / "more", range(8, 10))
    (workplace / "names.txt").write_text("new/020.png\n")
    for name, *options in (shlex.split(row) for row in re.findall(r"\| `((?:fit|score) [^`]*)`", README)):
        target = (
            "--references good/ --bank other.safetensors" if name == "fit" else "--bank part.safetensors --output other"
        )
        assert main([name, *target.split(), *options]) == 0
    assert "pip install . && adfeatures demo" in README and 'pip install ".[test]" && pytest' in README


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*cannot pin down")
def test_python_blocks(workplace: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # A third of the blocks, of the same width: what is shown does not depend on the depth.
    shallow = replace(catalog.BACKBONES["dinov2_base"], blocks=(1, 2, 3, 4))
    monkeypatch.setattr(catalog, "BACKBONES", {**catalog.BACKBONES, "dinov2_base": shallow})
    model = adfeatures.create_model("adpretrain_dinov2_base", pretrained=False)
    assert model.projector is not None
    for kind in ("norm", "angle"):
        hub.add(
            "xcyao00/ADPretrain", f"dino-base/checkpoints_pro_{kind}.pth", as_published(model.projector.state_dict())
        )
    hub.add("timm/vit_base_patch14_dinov2.lvd142m", "model.safetensors", save(model.backbone.state_dict()))
    del model
    namespace: dict[str, object] = {"CHECKOUT": str(Path(__file__).parents[1])}
    code = blocks("python")
    assert len(code) >= 3
    for block in code:
        exec(compile(block.replace("/path/to/checkout", str(namespace["CHECKOUT"])), "README.md", "exec"), namespace)
    maps: Any = namespace["maps"]
    assert [tuple(level.shape) for level in maps] == [(1, 768, 16, 16)] * 4


def test_table_lists_every_model() -> None:
    for name in adfeatures.list_models():
        assert f"`{name}`" in README


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (Path(__file__).parents[1] / target).exists(), target
