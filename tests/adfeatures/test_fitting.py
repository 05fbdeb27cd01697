"""From normal images to banks: which references are rotated where nobody says."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import adfeatures
from adfeatures.cli import main
from adfeatures.errors import ReferencesError
from adfeatures.extractor import FeatureExtractor
from adfeatures.fitting import CLOSER, _left_when_turned, _quarter_turns
from adfeatures.geometry import Geometry
from adfeatures.predictor import normal_photos

SIZE = (160, 160)

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot pin down")


def hammer(seed: int, *, anyhow: bool) -> Image.Image:
    """A part without symmetry, a little shifted, upright or in any orientation."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (640, 640), (70, 74, 80))
    draw = ImageDraw.Draw(image)
    draw.rectangle((300, 180, 350, 560), fill=(150, 100, 60))
    draw.polygon([(180, 110), (440, 130), (430, 200), (240, 210)], fill=(190, 190, 200))
    draw.ellipse((305, 480, 345, 520), fill=(30, 30, 30))
    draw.line([(320, 230), (320, 460)], fill=(110, 70, 40), width=6)
    angle = float(random.uniform(0, 360) if anyhow else random.uniform(-3, 3))
    shift = tuple(random.integers(-12, 13, 2).tolist())
    turned = image.rotate(angle, Image.Resampling.BICUBIC, translate=shift, fillcolor=(70, 74, 80))
    noise = np.random.default_rng(seed).normal(0, 3, (640, 640, 3))
    return Image.fromarray((np.asarray(turned) + noise).clip(0, 255).astype(np.uint8))


def apart(model: FeatureExtractor, images: list[Image.Image]) -> float:
    """The mean cosine distance of patches to those that they are matched with."""
    transform = adfeatures.create_transform(model)
    features = model.backbone_features(torch.stack([transform(image) for image in images]))
    pairs = zip(features, model.bank().match(features), strict=True)
    return float(torch.stack([1 - F.cosine_similarity(own, other).mean() for own, other in pairs]).mean())


@pytest.fixture(scope="module")
def model() -> FeatureExtractor:
    return adfeatures.create_model(img_size=SIZE)


@pytest.fixture(scope="module")
def lying() -> list[Image.Image]:
    return [hammer(seed, anyhow=True) for seed in range(8)]


def test_parts_in_any_orientation_are_matched_in_any(model: FeatureExtractor, lying: list[Image.Image]) -> None:
    model.set_references(lying)
    bank = model.bank()
    assert bank.record.rotations == 8 and bank.turned and bank.complete
    assert [len(level) for level in model.reference_features()] == [8] * 3
    assert model.fit_threshold() > 0 and len(bank.record.normal_scores) == 8
    by_default = [prediction.score for prediction in model.score(lying[:2])]
    model.set_references(lying, rotations=8)
    assert [prediction.score for prediction in model.score(lying[:2])] == by_default
    other = [hammer(seed, anyhow=True) for seed in range(20, 26)]
    turned = apart(model, other)
    model.set_references(lying, rotations=1)
    assert model.bank().record.rotations == 1 and not model.bank().turned
    assert turned < 0.9 * apart(model, other)


def test_others_are_not_rotated(model: FeatureExtractor, lying: list[Image.Image]) -> None:
    for images, geometry in (
        ([hammer(seed, anyhow=False) for seed in range(8)], Geometry()),
        (lying[:1], Geometry()),
        (lying, Geometry(320)),
    ):
        model.set_references(images, geometry=geometry)
        assert model.bank().record.rotations == 1
    earlier = adfeatures.create_model("residual_lite.in1k_v1", img_size=SIZE)
    another = adfeatures.create_model("residual_timm", pretrained=False, backbone="test_resnet@2,3", img_size=SIZE)
    for other in (earlier, another):
        other.set_references(lying[:4])
        assert other.bank().record.rotations == 1


def test_none_can_be_added_to_rotated_ones(model: FeatureExtractor, lying: list[Image.Image]) -> None:
    model.set_references(lying)
    with pytest.raises(ReferencesError, match="without rotated references, can be joined; set all references at once"):
        model.add_references(hammer(9, anyhow=True))
    assert model.bank().num_images == 8


def test_what_is_left_of_distances_is_that_of_all_patches(lying: list[Image.Image]) -> None:
    model = adfeatures.create_model(img_size=(96, 96))
    transform = adfeatures.create_transform(model)
    images = torch.stack([transform(image) for image in lying[:4]])
    (photos,) = normal_photos(model, images, 8)
    with torch.no_grad():
        found = _left_when_turned(model, _quarter_turns(model, photos).values())
        levels = zip(*(model.backbone_features(images.rot90(-turns, (2, 3))) for turns in range(4)), strict=True)
    ratios = []
    for turns in levels:
        features = [F.normalize(level.flatten(2).transpose(1, 2), dim=2) for level in turns]
        apart = []
        for count in (1, 4):
            of_images = []
            for image in range(4):
                others = torch.cat([own[torch.arange(4) != image].flatten(0, 1) for own in features[:count]])
                of_images.append(1 - (features[0][image] @ others.T).amax(dim=1))
            apart.append(torch.stack(of_images).mean(dim=1))
        ratios.append(apart[1] / apart[0])
    torch.testing.assert_close(found, torch.stack(ratios).log().mean(dim=0).exp(), rtol=1e-3, atol=0)
    assert found.min() < CLOSER


def test_the_command_says_it_and_the_bank_keeps_it(
    lying: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, image in enumerate(lying):
        image.save(tmp_path / f"{number}.png")
    bank = tmp_path / "bank.safetensors"
    arguments = ["fit", "--references", str(tmp_path), "--bank", str(bank), "--json"]
    for further, expected in (([], 8), (["--rotations", "1"], 1), (["--rotations", "3"], 3)):
        assert main([*arguments, *further]) == 0
        assert f'"rotations": {expected}' in capsys.readouterr().out
        model = adfeatures.create_model()
        model.load_references(bank)
        assert model.bank().record.rotations == expected and model.bank().turned is (expected > 1)
    score = ["score", "--output", str(tmp_path / "out"), str(tmp_path / "0.png")]
    for asked, expected in ((3, 0), (8, 2)):
        assert main([*score, "--bank", str(bank), "--rotations", str(asked)]) == expected
    assert "made with 3 rotations. Leave out --rotations" in capsys.readouterr().err
    scores = []
    for further in ([], ["--rotations", "1"]):
        assert main([*score, "--references", str(tmp_path), *further]) == 0
        with (tmp_path / "out" / "scores.csv").open() as table:
            scores.append(float(next(csv.DictReader(table))["score"]))
    # Of the same photo, against the references as they are and rotated.
    assert scores[0] != scores[1]
