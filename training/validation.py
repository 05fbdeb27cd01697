"""What a projector is worth while it trains: FeatureNorm and PatchCore on products with a few references, which select checkpoints."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from tqdm.auto import tqdm

from adfeatures.extractor import FeatureExtractor
from adfeatures.images import ImageTransform, build_transform, read_image
from adfeatures.loading import Encoder
from adfeatures.projector import ResidualProjector

from . import metrics
from .data import mvtec
from .data.images import ImageDataset, loader
from .data.items import ANOMALOUS, NORMAL, Item
from .distributed import gather_objects, rank, world_size
from .methods import FeatureNorm, PatchCore
from .methods.base import Batch, Extractor

SHOTS = 8
BATCH = 16
# The method that stands for each loss in the names of the checkpoints, and the metrics that select them.
METHODS = {"norm": FeatureNorm, "angle": PatchCore}
CRITERIA = {"img": "image_auroc", "pix": "pixel_auroc", "pro": "aupro"}

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Trial:
    """One product to evaluate on.

    Attributes:
        references: Normal images by view ("" where a data set has none).
        train: Normal images for methods that need some.
        test: Normal and anomalous images.
    """

    product: str
    references: Mapping[str, Sequence[Item]]
    train: Sequence[Item]
    test: Sequence[Item]


def held_out_trials(train: Sequence[Item], held_out: Sequence[Item], limit: int, seed: int) -> list[Trial]:
    """A trial for each product with normal and anomalous images among the held-out ones.

    Args:
        train: Normal images that were not held out.
        held_out: The held-out images.
        limit: Most images of a product for training, and of each label for the test.
        seed: Decides which.
    """
    trials = []
    for product in sorted({item.product for item in held_out}):
        own = _shuffled([item for item in train if item.product == product], seed)
        tests = [_shuffled([i for i in held_out if (i.product, i.label) == (product, label)], seed) for label in (NORMAL, ANOMALOUS)]
        if own and all(tests):
            test = [item for items in tests for item in items[:limit]]
            views = sorted({item.view for item in test})
            references = {view: [item for item in own if item.view == view][:SHOTS] for view in views}
            rest = [item for item in own if item.view in views and item not in references[item.view]]
            trials.append(Trial(product, references, (rest or own)[:limit], test))
    return trials


def mvtec_trials(root: str) -> list[Trial]:
    """Every product of MVTec AD, with the first training images as references, as the published weights were selected."""
    trials = []
    for product in mvtec.PRODUCTS:
        train = mvtec.find_items(root, "train", [product])
        trials.append(Trial(product, {"": train[:SHOTS]}, train, mvtec.find_items(root, "test", [product])))
    return trials


class Validation:
    """Evaluates projectors on trials; the references are encoded once.

    Args:
        backbone: The frozen encoder.
        trials: What to evaluate on; several processes share them.
        img_size: Height and width of the input.
        statistics: Mean and standard deviation of the input's channels.
        preset: Geometry of the test and training images, see ``adfeatures.create_transform``.
        reference_preset: Geometry of the references.
        methods: Which of METHODS.
        workers: Processes that read images.
    """

    def __init__(
        self,
        backbone: Encoder,
        trials: Sequence[Trial],
        *,
        img_size: tuple[int, int],
        statistics: tuple[Sequence[float], Sequence[float]],
        preset: str = "squash",
        reference_preset: str = "squash",
        methods: Sequence[str] = tuple(METHODS),
        workers: int = 0,
    ) -> None:
        mean, std = statistics
        self.trials = list(trials)[rank() :: world_size()]
        self.transform = build_transform(img_size, mean, std, preset=preset)
        self.methods, self.workers = methods, workers
        self.device = next(backbone.parameters()).device
        cfg = {"mean": mean, "std": std}
        self.extractor = FeatureExtractor(backbone, None, name="validation", img_size=img_size, pretrained_cfg=cfg)
        reference_transform = build_transform(img_size, mean, std, preset=reference_preset)
        for trial in self.trials:
            for view, items in trial.references.items():
                self.extractor.set_references(_read(items, reference_transform).to(self.device), product=_bank(trial.product, view))

    def run(self, projector: ResidualProjector | None) -> Scores:
        """Means over the products of image AUROC, pixel AUROC and AUPRO, as "img", "pix" and "pro", for each method.

        Args:
            projector: The projector; it is not changed. None evaluates the residuals themselves.
        """
        self.extractor.projector = None if projector is None else copy.deepcopy(projector).float().requires_grad_(False)
        own = [self._evaluate(trial) for trial in tqdm(self.trials, desc="validation", unit="product", leave=False, disable=None)]
        scores = [score for part in gather_objects(own) for score in part]
        return {method: {key: fmean(score[method][key] for score in scores) for key in CRITERIA} for method in self.methods}

    def _evaluate(self, trial: Trial) -> Scores:
        features = self._features(trial)
        train, test = (loader(ImageDataset(items, self.transform), BATCH, workers=self.workers) for items in (trial.train, trial.test))
        masks = torch.cat([batch["mask"][:, 0] for batch in test])
        labels = torch.tensor([item.label for item in trial.test])
        scores = {}
        for name in self.methods:
            predictions = METHODS[name](features).fit(train).predict(test)
            found = metrics.evaluate(predictions.maps, masks, labels, predictions.scores)
            scores[name] = {key: float(getattr(found, field)) for key, field in CRITERIA.items()}
        return scores

    def _features(self, trial: Trial) -> Extractor:
        views = {item.image: item.view for items in (trial.train, trial.test) for item in items}

        def extract(batch: Batch) -> list[Tensor]:
            banks = [_bank(trial.product, views[path]) for path in batch["path"]]
            return self.extractor(batch["image"].to(self.device), banks)

        return extract


def _bank(product: str, view: str) -> str:
    return f"{product}/{view}"


def _read(items: Sequence[Item], transform: ImageTransform) -> Tensor:
    return torch.stack([transform(read_image(item.image)) for item in items])


def _shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """The items in an order that depends on the seed and on their names within the data set, not on where it lies or how it is sorted."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed}:{item.sample}:{item.image.rpartition('/')[2]}".encode()).digest())
