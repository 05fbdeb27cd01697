"""The demo: what it says of the samples is what their masks and scores say."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

import adfeatures
from adfeatures.demo import SAMPLES, run_demo
from adfeatures.errors import AdfeaturesError
from adfeatures.extractor import FeatureExtractor
from adfeatures.sources import list_images

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot pin down")


@pytest.mark.slow
def test_the_numbers_are_those_of_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, references = list_images(SAMPLES / "test", recursive=True), list_images(SAMPLES / "references")
    encoded: list[int] = []
    encode = FeatureExtractor.backbone_features

    def counted(model: FeatureExtractor, x: Tensor) -> list[Tensor]:
        encoded.append(len(x))
        return encode(model, x)

    monkeypatch.setattr(FeatureExtractor, "backbone_features", counted)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*looks anomalous")
        summary = run_demo(tmp_path)
    # Each photo is looked at once, and the references also in three turns.
    assert sum(encoded) == len(files) + 4 * len(references)
    scores = [p.score for p in adfeatures.create_model(references=SAMPLES / "references").score(files)]
    defective = [path.parent.name != "good" for path in files]
    assert summary["image_auroc"] == pytest.approx(roc_auc_score(defective, scores))
    assert summary["image_auroc"] == 1 and summary["pixel_auroc"] > 0.95
    assert summary["anomalous"] == sum(defective) == 9 and summary["normal"] == len(files) - 9
    assert json.loads((tmp_path / "summary.json").read_text())["image_auroc"] == summary["image_auroc"]
    with Image.open(tmp_path / "demo.png") as picture:
        kinds = {path.parent for path in files}
        assert picture.width > 300 * len(kinds)


def test_every_defect_has_a_mask_and_good_parts_have_none() -> None:
    for path in list_images(SAMPLES / "test", recursive=True):
        mask = SAMPLES / "masks" / path.parent.name / f"{path.stem}.png"
        assert mask.exists() == (path.parent.name != "good")
        if mask.exists():
            with Image.open(mask) as drawn, Image.open(path) as image:
                assert drawn.size == image.size and drawn.convert("L").getextrema() == (0, 255)


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdfeaturesError, match="Cannot write"):
        run_demo(tmp_path / "file")
