"""The model card says what a user must know, and its code runs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from helpers.hub_server import HubServer
from helpers.models import write_photos
from helpers.publishing import GOLDEN, REPO, TRAINING, OwnCheckpoint, files_in
from timm.models import get_pretrained_cfg

from adfeatures import catalog
from adfeatures.checkpoints import Checkpoint, save_checkpoint
from adfeatures.projector import ResidualProjector
from adfeatures.resolve import BackboneSpec
from training.publish import main
from training.publishing.config import PublishConfig
from training.publishing.model_card import PAPER, model_card

REPOSITORY = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot pin down")


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    return capsys.readouterr().err


@pytest.fixture
def card(own: OwnCheckpoint, writable: HubServer) -> str:
    assert own.publish("--repo", REPO, "--license", "cc-by-nc-sa-4.0") == 0
    return files_in(writable)["README.md"].decode()


def test_front_matter(card: str) -> None:
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


def test_says_what_a_user_must_know(card: str, own: OwnCheckpoint) -> None:
    # older versions of timm do not say it
    license_of_backbone = get_pretrained_cfg("test_vit").license or "see the model's page"
    assert license_of_backbone == "apache-2.0" or timm.__version__ < "1.0.22"
    for fact in (
        "# name\n",
        PAPER,
        "`test_vit.r160_in1k`, blocks or stages 2, 5, with 64, 64 channels",
        "48 x 80 pixels",
        "the projector alone",
        "Real-IAD: CC-BY-NC-SA-4.0",
        f"| backbone | {license_of_backbone}",
        "| image AUROC | 0.9123 |",
        "| AUPRO | 0.8000 |",
        own.header["selected_by"],
        "Ask your lawyer",
        '"lr": 0.0001',
    ):
        assert fact in card
    assert "/there" not in card


def test_unknown_things_are_said_to_be_unknown(own: OwnCheckpoint, tmp_path: Path) -> None:
    tensors = {f"projector.{key}": value for key, value in own.projector.state_dict().items()}
    header = {key: text for key, text in own.header.items() if key not in ("training", "training_data", "selected_by")}
    save_checkpoint(tmp_path / "own.safetensors", tensors, metadata=header)
    assert main([str(tmp_path / "own.safetensors"), "--folder", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["license"], front["license_name"]) == ("other", "unstated") and "datasets" not in front
    assert (
        "training data | not stated" in card and "The file holds none. The file does not say what selected it" in card
    )


def test_data_of_ones_own(own: OwnCheckpoint, tmp_path: Path) -> None:
    options = ["--data", "procedural images of training.synthesize", "--data-license", "MIT"]
    assert own.publish("--folder", tmp_path, *options) == 0
    card = (tmp_path / "README.md").read_text()
    assert "procedural images of training.synthesize: MIT" in card and "Real-IAD:" not in card
    assert "datasets" not in yaml.safe_load(card.split("---\n")[1])


def test_real_iad_keeps_its_terms(own: OwnCheckpoint, tmp_path: Path) -> None:
    assert own.publish("--folder", tmp_path, "--data", "Real-IAD") == 0
    assert "Real-IAD: CC-BY-NC-SA-4.0" in (tmp_path / "README.md").read_text()


def test_its_code_runs(card: str, own: OwnCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path / "good", range(3))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        namespace: dict[str, object] = {}
        exec(compile(block.replace("/path/to/adfeatures", str(REPOSITORY)), "README.md", "exec"), namespace)
        own.is_served_by(namespace["model"])


def test_their_terms_are_not_restated(tiny: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(GOLDEN), "--name", tiny, "--folder", str(tmp_path), "--license", "mit"]) == 2
    assert main([str(GOLDEN), "--name", tiny, "--folder", str(tmp_path), "--data", "ours"]) == 2
    assert main([str(GOLDEN), "--folder", str(tmp_path)]) == 2
    assert (
        "trained by others" in (err := capsys.readouterr().err) and "--name adpretrain_dinov2_base.realiad_norm" in err
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


def test_projectors_on_imagebind_go_without_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its weights are always given as a file, and are not ours to hand on."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = ResidualProjector((1280,) * 4, num_keys=2).state_dict()
    tensors = {f"projector.{key}": torch.zeros(value.shape, dtype=torch.bfloat16) for key, value in shapes.items()}
    training = json.dumps({**TRAINING, "root": 3, "backbone_weights": "/there/imagebind_huge.pth"})
    header = {"model": "adpretrain_imagebind_huge", "num_heads": "16", "training": training}
    save_checkpoint(tmp_path / "own.safetensors", tensors, metadata=header)
    assert main([str(tmp_path / "own.safetensors"), "--folder", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count('backbone_weights="/path/to/imagebind_huge.pth"') == 3 and "| backbone | CC-BY-NC-4.0" in card
    assert "must be got from https://github.com/facebookresearch/ImageBind" in card
    assert "CC-BY-NC-4.0" in refused(capsys, main([str(tmp_path / "own.safetensors"), "--dry-run", "--whole-model"]))


def described(config: PublishConfig, weights: Checkpoint, **entry: Any) -> str:
    """The card of a projector on DINOv2, whose description is changed as said."""
    base = catalog.BACKBONES["dinov2_base"]
    return model_card(config, BackboneSpec("the_backbone", dataclasses.replace(base, **entry)), weights)


def test_says_where_the_backbone_is() -> None:
    projector = Checkpoint({"projector.x": torch.ones(1)}, {}, {"model": "adpretrain_dinov2_base"})
    whole = Checkpoint({**projector.state_dict, "backbone.x": torch.ones(1)}, {}, projector.metadata)
    here, fetched = "- Weights here: the projector", "is fetched from [a/b](https://huggingface.co/a/b).\n"
    by_hand = {"hub_file": None, "original_file": "f", "origin": "o"}
    for weights, entry, says in (
        (projector, {"asset": "a.bin"}, f"{here} alone. The backbone is in the package.\n"),
        (projector, {"hub_file": ("a/b", "c")}, f"{here} alone. The backbone {fetched}"),
        (projector, by_hand, f"{here} alone. The backbone, f, must be got from o and given as `backbone_weights`.\n"),
        (whole, by_hand, f"{here} and the backbone. Nothing else is downloaded.\n"),
    ):
        card = described(PublishConfig(), weights, **entry)
        assert says in card
        assert card.count('backbone_weights="/path/to/f"') == (3 if "must be got" in says else 0)


def test_every_metric_that_is_stored_goes_by_its_title() -> None:
    stored = {"img_auc": 0.5, "pix_auc": 0.25, "pix_pro": 0.125, "another": 1.0}
    card = described(PublishConfig(), Checkpoint({}, stored, {"model": "adpretrain_dinov2_base"}))
    rows = "| image AUROC | 0.5000 |\n| pixel AUROC | 0.2500 |\n| AUPRO | 0.1250 |\n| another | 1.0000 |\n"
    assert f"| metric | value |\n|---|---|\n{rows}\nThe file does not say what selected it" in card
    selected = {"model": "adpretrain_dinov2_base", "selected_by": "luck"}
    card = described(PublishConfig(), Checkpoint({}, stored, selected))
    assert "Selected by: luck. The metrics were measured on the data that selected it, and flatter it.\n" in card


def test_places_and_titles() -> None:
    weights = Checkpoint({}, {}, {"model": "adpretrain_dinov2_base"})
    on_hub = described(PublishConfig(repo="me/parts"), weights)
    assert on_hub.count('"hf-hub:me/parts"') == 3 and "\n# parts\n" in on_hub
    in_folder = described(PublishConfig(), weights)
    assert in_folder.count('"local-dir:/path/to/this/folder"') == 3 and "\n# adpretrain_dinov2_base\n" in in_folder
    assert "{" not in in_folder and in_folder.endswith("your own parts.\n")


def test_data_whose_terms_nobody_said() -> None:
    header = {"model": "adpretrain_dinov2_base", "training_data": "parts"}
    assert "| training data | parts: terms not stated |" in described(PublishConfig(), Checkpoint({}, {}, header))
    assert "| training data | mine: MIT |" in described(
        PublishConfig(data="mine", data_license="MIT"), Checkpoint({}, {}, header)
    )
