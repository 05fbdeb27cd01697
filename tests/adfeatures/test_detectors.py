"""What the options of the command make: contradictions are refused before anything is computed."""

from __future__ import annotations

import re

import pytest
from helpers.models import write_photos

from adfeatures.cli import _parser, main
from adfeatures.detectors import detector_of, model_of, model_of_bank
from adfeatures.errors import InputError, ReferencesError


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bank")
    write_photos(folder / "good", range(2))
    file = folder / "part.safetensors"
    assert main(["fit", "--references", str(folder / "good"), "--bank", str(file), "--device", "cpu"]) == 0
    return str(file)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--bank part.onnx --runtime torch", "torch cannot run part.onnx. Give the bank"),
        ("--bank part.onnx --weights mine.safetensors", "weights are inside part.onnx: leave out --weights"),
        ("--bank part.onnx --device cuda", "onnx runs on the CPU here: leave out --device"),
        ("--references good --runtime openvino --device mps", "openvino runs on the CPU here"),
        ("--references good --dtype bfloat16", "torch computes in float32 here"),
        ("--references good --device nowhere", "The device 'nowhere' cannot be used"),
    ],
)
def test_contradictions(options: str, reason: str) -> None:
    given = _parser().parse_args(["score", "--output", "out", *options.split(), "new"])
    with pytest.raises(InputError, match=re.escape(reason)):
        detector_of(given)


def test_the_model_is_that_of_the_bank(bank: str) -> None:
    given = _parser().parse_args(["score", "--output", "out", "--bank", bank, "--max-pixels", "1000", "new"])
    model = model_of_bank(given)
    assert model.name == "residual_lite.in1k_v2" and model.max_pixels == 1000 and len(model.references) == 1
    assert not model_of(given, None).references
    given = _parser().parse_args(["score", "--output", "out", "--bank", bank, "--bit-depth", "12", "new"])
    with pytest.raises(InputError, match="made of images of 16 bits.*fit --bit-depth 12"):
        model_of_bank(given)
    given = _parser().parse_args(["score", "--output", "out", "--bank", bank, "--model", "adpretrain_clip_base", "new"])
    with pytest.raises(ReferencesError, match="made with residual_lite.in1k_v2, not with adpretrain_clip_base"):
        detector_of(given)
