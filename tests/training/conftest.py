"""Fixtures that test files of training share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from helpers.hub_server import HubServer
from helpers.publishing import TOKEN, OwnCheckpoint
from safetensors.torch import save

from adfeatures import catalog


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch, as the workers of the commands have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> OwnCheckpoint:
    """A projector of one's own to publish."""
    return OwnCheckpoint(tmp_path_factory.mktemp("own") / "checkpoints_pro_norm.safetensors")


@pytest.fixture
def writable(hub: HubServer, own: OwnCheckpoint, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A Hub that has the backbone of ``own`` and that we may write to."""
    hub.add("timm/test_vit.r160_in1k", "model.safetensors", save(own.whole))
    hub.allow(TOKEN, "owner")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of the catalog that the golden file, which has 32 channels, is a checkpoint of."""
    entry = dataclasses.replace(catalog.BACKBONES["dinov2_base"], channels=(32,) * 4)
    model = dataclasses.replace(catalog.MODELS["adpretrain_dinov2_base"], backbone="tiny")
    monkeypatch.setattr(catalog, "BACKBONES", {**catalog.BACKBONES, "tiny": entry})
    monkeypatch.setattr(catalog, "MODELS", {**catalog.MODELS, "adpretrain_tiny": model})
    return "adpretrain_tiny.realiad_norm"
