"""A projector to publish, and what a Hub holds afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from helpers.hub_server import HubServer
from safetensors.torch import save

from adfeatures import catalog, create_model
from adfeatures.checkpoints import save_checkpoint
from adfeatures.extractor import FeatureExtractor
from adfeatures.factory import load_backbone
from adfeatures.projector import ResidualProjector
from training.publish import main

GOLDEN = Path(__file__).parents[1] / "golden" / "upstream_checkpoint.pth"
REPO, TOKEN = "owner/name", "hf_of_the_owner"
TRAINING = {"data": "real_iad", "root": "/there/Real-IAD", "output": "/there/run", "backbone_weights": None, "lr": 1e-4}


def timm_header(entry: catalog.Backbone, img_size: tuple[int, int], num_heads: int = 16) -> dict[str, str]:
    """The header of weights that were trained on a backbone of timm."""
    mean, std = entry.normalization
    facts = {
        "timm_name": entry.timm_name,
        "blocks": entry.blocks,
        "channels": entry.channels,
        "reductions": entry.reductions,
        "mean": mean,
        "std": std,
    }
    sizes = {"num_heads": str(num_heads), "img_size": json.dumps(img_size)}
    return {"format": "adfeatures", "model": "adpretrain_timm", "backbone": json.dumps(facts), **sizes}


def save_projector(
    path: Path, projector: ResidualProjector, header: dict[str, str], metrics: dict[str, float] | None = None
) -> Path:
    """A projector as training.pretrain writes it."""
    tensors = {f"projector.{key}": value for key, value in projector.state_dict().items()}
    save_checkpoint(path, tensors, metrics=metrics, metadata=header)
    return path


class OwnCheckpoint:
    """A projector trained on a tiny backbone of timm, as training.pretrain leaves it.

    Attributes:
        path: Its file.
        header: What stands in it.
        projector: The module.
        whole: The state dict of the whole backbone, as timm publishes it.
    """

    def __init__(self, path: Path) -> None:
        torch.manual_seed(0)
        self.path = path
        self.whole = timm.create_model("test_vit").state_dict()
        _, entry = load_backbone("test_vit", weights=self.whole, levels=(2, 5), img_size=(48, 80))
        self.projector = ResidualProjector(entry.channels, num_heads=4, num_keys=8)
        for parameter in self.projector.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
        self.header = {
            **timm_header(entry, (48, 80), num_heads=4),
            "training": json.dumps(TRAINING),
            "selected_by": "AUPRO of FeatureNorm on held-out samples of the training data, after step 3",
            "training_data": "Real-IAD",
        }
        self.write(path)
        self.references, self.x = torch.randn(2, 3, 48, 80), torch.randn(1, 3, 48, 80)
        model = create_model(weights=path, backbone_weights=self.save_backbone())
        model.set_references(self.references)
        self.features = model(self.x)

    def write(self, path: Path, **header: str) -> Path:
        """Another file of the same weights, with other entries in the header."""
        return save_projector(path, self.projector, {**self.header, **header}, {"img_auc": 0.9123, "pix_pro": 0.8})

    def save_backbone(self) -> Path:
        """A file of the backbone's weights."""
        path = self.path.with_name("backbone.safetensors")
        path.write_bytes(save(self.whole))
        return path

    def is_served_by(self, model: object) -> None:
        """Assert that a loaded model gives the features of this one, bit for bit."""
        assert isinstance(model, FeatureExtractor)
        model.set_references(self.references)
        for found, expected in zip(model(self.x), self.features, strict=True):
            assert torch.equal(found, expected)

    def publish(self, *options: object) -> int:
        """Call the entry point for this file. Returns the exit code."""
        return main([str(self.path), *map(str, options)])


def files_in(hub: HubServer, repo: str = REPO) -> dict[str, bytes]:
    """What a repository holds."""
    return {path: file.content for path, file in hub.commits[hub.branches[repo]["main"]].items()}
