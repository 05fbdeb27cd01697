"""The command that computes centers: of what the pretraining sees, and what it says when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.real_iad_tree import write_real_iad

from adfeatures.factory import load_backbone
from training import centers
from training.data import real_iad
from training.pretraining.centers import compute_centers, load_centers
from training.pretraining.config import CentersConfig
from training.pretraining.frozen_backbone import FrozenBackbone

pytestmark = pytest.mark.filterwarnings("ignore:Fewer normal images")


def run(root: Path, output: Path | str, options: str = "--workers 0") -> int:
    arguments = ["--root", str(root), "--output", str(output), "--backbone", "efficientnet_lite", "--device", "cpu"]
    return centers.main([*arguments, *options.split()])


def test_they_are_of_what_the_pretraining_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_real_iad(tmp_path / "data", ("gasket", "rivet"), ok=3, ng=2, views=2)
    output = tmp_path / "centers.safetensors"
    assert run(root, output, "--img-size 32 48 --held-out 0.4 --workers 0") == 0
    assert capsys.readouterr().out == f"{output}: done\n"
    backbone = FrozenBackbone("efficientnet_lite", *load_backbone("efficientnet_lite", img_size=(32, 48)))
    assert len(set(backbone.entry.channels)) == 3
    train, held_out = real_iad.split_by_sample(real_iad.read(root), 0.4, 42)
    assert held_out
    given = CentersConfig(output=str(tmp_path / "expected.safetensors"), workers=0)
    expected = compute_centers(given, backbone, train, real_iad.reference_pool(train))
    found = load_centers(output, backbone)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_errors_take_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "nowhere", tmp_path / "centers.safetensors") == 2
    assert capsys.readouterr().err.startswith("training.centers: error: There is no folder")
    assert run(tmp_path, "centers.pth") == 2
    assert "Centers are written as .safetensors, not centers.pth" in capsys.readouterr().err


def test_errors_in_workers_read_as_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = write_real_iad(tmp_path, ("gasket",), ok=3, ng=1, views=1)
    for path in broken.rglob("*_OK_*.jpg"):
        path.write_bytes(b"no image")
    assert run(broken, tmp_path / "centers.safetensors", "--img-size 32 --workers 1") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("training.centers: error: 10 images in a row could not be read")


def test_several_processes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(centers, "world_size", lambda: 2)
    assert run(tmp_path, tmp_path / "centers.safetensors") == 2
    assert "Centers are computed by one process" in capsys.readouterr().err
