"""The files of banks as containers: whatever goes in by product comes out by product."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adfeatures import bank_files
from adfeatures.errors import AdfeaturesError, CheckpointError


def unpack(facts: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return facts, tensors


def test_round_trip(tmp_path: Path) -> None:
    banks: dict[str, bank_files.Packed] = {
        "nut": ({"n": 1, "text": "ä"}, {"rows.0": torch.arange(6.0).view(2, 3).T, "scales": torch.ones(2)}),
        "": ({"n": None}, {"rows.0": torch.zeros(1, dtype=torch.int32)}),
        "0": ({}, {}),
    }
    bank_files.write(banks, tmp_path / "banks.safetensors")
    found = bank_files.read(tmp_path / "banks.safetensors", unpack)
    assert list(found) == list(banks)
    for product, (facts, tensors) in banks.items():
        assert found[product][0] == facts and found[product][1].keys() == tensors.keys()
        assert all(torch.equal(found[product][1][name], tensor) for name, tensor in tensors.items())
    assert os.listdir(tmp_path) == ["banks.safetensors"]


def test_failures_leave_nothing_and_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdfeaturesError, match="Cannot write"):
        bank_files.write({"a": ({}, {"x": torch.ones(1)})}, tmp_path / "file" / "bank.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"other\.safetensors is not a reference bank"):
        bank_files.read(tmp_path / "other.safetensors", unpack)

    def broken(facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        raise KeyError("rows")

    bank_files.write({"a": ({}, {"x": torch.ones(1)})}, tmp_path / "bank.safetensors")
    with pytest.raises(CheckpointError, match=r"bank\.safetensors is damaged"):
        bank_files.read(tmp_path / "bank.safetensors", broken)
