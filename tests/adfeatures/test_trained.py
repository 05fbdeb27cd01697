"""What a file of trained weights holds, and what its header says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.published import as_published

from adfeatures.checkpoints import save_checkpoint
from adfeatures.errors import CheckpointError
from adfeatures.projector import ResidualProjector
from adfeatures.trained import TrainedWeights


def read(path: Path, prefix: str = "projector.", **header: str) -> TrainedWeights:
    torch.manual_seed(0)
    state = ResidualProjector((8, 12), num_heads=4, num_keys=6).state_dict()
    save_checkpoint(path, {prefix + key: value for key, value in state.items()}, metadata=header)
    return TrainedWeights.read(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "own.safetensors"


def test_parts_are_told_apart_by_their_prefix(path: Path) -> None:
    save_checkpoint(path, {"projector.a": torch.ones(1), "backbone.b": torch.zeros(2)})
    trained = TrainedWeights.read(path)
    assert list(trained.projector) == ["a"] and list(trained.backbone) == ["b"]
    for prefix in ("projector.", ""):
        projector = read(path, prefix).projector
        assert "l1_proj.x_ref" in projector and not any(key.startswith("projector.") for key in projector)


def test_published_files_have_a_projector_alone(tmp_path: Path) -> None:
    (tmp_path / "norm.pth").write_bytes(as_published(ResidualProjector((32,), num_keys=6).state_dict()))
    trained = TrainedWeights.read(tmp_path / "norm.pth")
    assert trained.backbone == {} and trained.num_heads == 16 and trained.img_size is None
    projector = trained.create_projector((32,))
    assert torch.equal(projector.state_dict()["l1_proj.x_ref"], trained.projector["l1_proj.x_ref"].float())


def test_the_projector_is_built_as_the_header_and_the_tensors_say(path: Path) -> None:
    trained = read(path, num_heads="4", img_size="[56, 84]")
    projector = trained.create_projector((8, 12))
    assert (projector.num_heads, projector.channels) == ((4, 4), (8, 12))
    assert trained.img_size == (56, 84)
    for key, value in projector.state_dict().items():
        assert torch.equal(value, trained.projector[key])
    trained.check_projector((8, 12))
    for channels in ((8,), (8, 16), (8, 12, 8)):
        for check in (trained.check_projector, trained.create_projector):
            with pytest.raises(CheckpointError, match=r"own\.safetensors does not fit"):
                check(channels)


@pytest.mark.parametrize(
    ("header", "attribute", "says"),
    [
        ({"num_heads": "0"}, "num_heads", "num_heads of its header must be a whole number from 1 to 65,536, not 0"),
        ({"num_heads": "true"}, "num_heads", "num_heads of its header must be a whole number, not True"),
        ({"num_heads": "9" * 30}, "num_heads", "must be a whole number, not 9{30}"),
        ({"num_heads": "1" + "0" * 400}, "num_heads", "a whole number"),
        ({"num_heads": "NaN"}, "num_heads", "not JSON"),
        ({"img_size": "[" * 100_000}, "img_size", "not JSON"),
        ({"img_size": "[1e999, 1]"}, "img_size", "not JSON"),
        ({"img_size": f"[{'9' * 30}, 1]"}, "img_size", r"\[height, width\]"),
        ({"num_heads": "x"}, "num_heads", "not JSON"),
        ({"img_size": "[1]"}, "img_size", r"\[height, width\]"),
        ({"img_size": "3"}, "img_size", r"\[height, width\]"),
    ],
)
def test_headers_that_make_no_sense(path: Path, header: dict[str, str], attribute: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=rf"own\.safetensors.*{says}"):
        getattr(read(path, **header), attribute)


@pytest.mark.parametrize(
    ("model", "asked", "found"),
    [
        ("adpretrain_clip_base.realiad_norm", (None, None), ("adpretrain_clip_base", "realiad_norm")),
        ("adpretrain_clip_base.realiad_norm", ("adpretrain_clip_base", None), ("adpretrain_clip_base", "realiad_norm")),
        ("adpretrain_clip_base", ("adpretrain_clip_base", "realiad_angle"), ("adpretrain_clip_base", "realiad_angle")),
        (None, ("adpretrain_timm", None), ("adpretrain_timm", None)),
    ],
)
def test_model_and_tag(
    path: Path, model: str | None, asked: tuple[str | None, str | None], found: tuple[str, str | None]
) -> None:
    assert read(path, **({} if model is None else {"model": model})).identify(*asked) == found


@pytest.mark.parametrize(
    ("model", "asked", "says"),
    [
        (None, (None, None), "does not say which model"),
        (
            "adpretrain_clip_base",
            ("adpretrain_timm", None),
            "checkpoint of adpretrain_clip_base, not of adpretrain_timm",
        ),
        ("adpretrain_clip_base.realiad_norm", ("adpretrain_clip_base", "realiad_angle"), "not of .*realiad_angle"),
        ("adpretrain_clip_bass", (None, None), "does not know.*Did you mean"),
    ],
)
def test_contradictions(path: Path, model: str | None, asked: tuple[str | None, str | None], says: str) -> None:
    with pytest.raises(CheckpointError, match=rf"own\.safetensors.*{says}"):
        read(path, **({} if model is None else {"model": model})).identify(*asked)
