"""Every method tells rendered defects from rendered good parts, and does not tell good parts from good parts.

The product is one of the procedural data set, sheets of vinyl: 40 normal images to learn from, of which 8 are the
references, 40 normal test images, 40 with defects of all kinds, and 40 more normal ones that are called anomalous. The
features are residuals of the embedded backbone at 128 x 128 pixels, in the batches and with the settings of the
evaluation. Only the numbers of epochs are smaller than the paper's, as stated below.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from adfeatures.scoring import auroc
from training.data import dataset
from training.data.draws import draw_references
from training.data.images import loader
from training.data.items import ANOMALOUS, NORMAL
from training.data.synthetic import DEFECTS, render
from training.evaluation.config import EvaluationConfig
from training.evaluation.fitting import settings, train_loader
from training.evaluation.model import load_model
from training.evaluation.product import Product
from training.evaluation.product_features import FeatureKind, ProductFeatures, residual_features
from training.evaluation.raw_features import KnownImages, RawFeatures
from training.evaluation.results import PRETRAINED
from training.methods import METHODS

PRODUCT, SIZE, COUNT, SHOTS = "vinyl", 128, 40, 8
# Of the paper's 25, 640 and 1000.
EPOCHS = {"cflow": 8, "glass": 2, "uniad": 5}
KIND = FeatureKind("squash", "squash", "in1k_v1", draw=0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The products "easy" and "control", which share their normal images, in the layout of MVTec AD."""
    root = tmp_path_factory.mktemp("proof")
    kinds = list(DEFECTS)

    def save(image: Image.Image, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)

    for number in range(COUNT):
        for folder, seed in (("train/good", number), ("test/good", 1000 + number)):
            picture, _ = render(PRODUCT, seed, size=SIZE)
            for product in ("easy", "control"):
                save(picture, root / product / folder / f"{number:03d}.png")
        picture, mask = render(PRODUCT, 2000 + number, kinds[number % len(kinds)], size=SIZE)
        assert mask is not None
        save(picture, root / "easy/test/bad" / f"{number:03d}.png")
        save(Image.fromarray(mask), root / "easy/ground_truth/bad" / f"{number:03d}.png")
        save(render(PRODUCT, 2000 + number, size=SIZE)[0], root / "control/test/bad" / f"{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def data(root: Path) -> tuple[RawFeatures, Product, Product, ProductFeatures]:
    raw = RawFeatures(load_model("residual_lite.in1k_v1", tuple(METHODS), img_size=SIZE), root / "cache")
    easy, control = products = [Product(name, dataset("folder"), root, raw) for name in ("easy", "control")]
    for product in products:
        raw.encode(product.train, "squash")
        product.truth("squash")
    references = [draw_references(product.train, SHOTS, 0) for product in products]
    features = residual_features(raw, KIND, products, references, leave_out=True, owner="test")
    return raw, easy, control, features


@pytest.mark.filterwarnings("ignore:GLASS made its textures")
@pytest.mark.parametrize(
    "method",
    [pytest.param(method, marks=[pytest.mark.release if method in EPOCHS else pytest.mark.slow]) for method in METHODS],
)
def test_method_finds_defects_and_nothing_else(
    method: str, data: tuple[RawFeatures, Product, Product, ProductFeatures]
) -> None:
    raw, easy, control, features = data
    assert [len([i for i in p.test if i.label == label]) for p in (easy, control) for label in (NORMAL, ANOMALOUS)] == [
        COUNT
    ] * 4
    config = EvaluationConfig(
        model="residual_lite.in1k_v1", dataset="folder", root="", output="", epochs=EPOCHS.get(method)
    )
    entry = METHODS[method]
    chosen = settings(entry, PRETRAINED, config, raw.model, "squash", ["easy"])
    if method in EPOCHS:
        assert chosen[str(entry.epochs)] == EPOCHS[method]
    # The normal images of both are the same, so one training serves both.
    batches = train_loader(entry, easy.train, raw.model, "squash", workers=0)
    fitted = entry.create(features.extractor, **chosen).fit(batches)
    found = []
    for product in (easy, control):
        scores = fitted.predict(loader(KnownImages(product.test, raw.model.img_size))).scores
        found.append(auroc(scores.tolist(), [item.label for item in product.test]))
    assert found[0] > 0.9
    assert 0.3 <= found[1] <= 0.7
