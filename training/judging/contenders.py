"""What is compared: models of the catalog, and plain ways to score the same features against the same references."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import adfeatures
from adfeatures import scoring, thresholds
from adfeatures.backbones import Encoder
from adfeatures.checkpoints import weights_fingerprint
from adfeatures.references import ReferenceBank

from ..methods import PatchCore

BATCH_SIZE = 8
# PatchCore's vectors are as long as the features of the smallest backbone allow without padding.
DIMENSIONS = 192
# Of the scores of the references, each left out, that the thresholds of the plain ways are.
QUANTILE = 0.99


class Verdict(NamedTuple):
    """What a way to score says: ``maps`` (N, H, W), ``scores`` (N,), and the threshold from the references alone.

    The threshold is NaN where there is one reference.
    """

    maps: np.ndarray
    scores: np.ndarray
    threshold: float


class Contender(Protocol):
    """One or several ways to score, which share what they can.

    Attributes:
        names: What each is called.
    """

    names: tuple[str, ...]

    def take(self, references: Sequence[Image.Image], tests: Sequence[Image.Image]) -> None:
        """Take the pictures of a product, in place of those before: references to draw from, and those to score."""

    def judge(self, drawn: Sequence[int]) -> Mapping[str, Verdict]:
        """What each way says of the test pictures, with these of the references."""


class Remembered(Encoder):
    """A backbone that encodes each image once, until it is told to forget.

    Args:
        backbone: The backbone.
    """

    def __init__(self, backbone: Encoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.levels, self.channels = backbone.levels, backbone.channels
        self.reductions, self.patch_size = backbone.reductions, backbone.patch_size
        self._maps: dict[bytes, list[Tensor]] = {}

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps of a batch (B, 3, H, W)."""
        names = [image.numpy().tobytes() for image in x]
        new = [number for number, name in enumerate(names) if name not in self._maps]
        for number in new:
            self._maps[names[number]] = [level[0] for level in self.backbone(x[number : number + 1])]
        return [torch.stack(level) for level in zip(*(self._maps[name] for name in names), strict=True)]

    def forget(self) -> None:
        """Forget all images."""
        self._maps.clear()


class Model:
    """A model of the catalog, through its public surface alone.

    Args:
        name: Its name with tag.
        memory: Backbones that remember, by the hash of their weights; that of the model is put there.
        rotations: As of ``set_references``.
    """

    def __init__(self, name: str, memory: dict[str, Remembered], rotations: int | None = None) -> None:
        self.name = name if rotations is None else f"{name}, {rotations} rotations"
        self.names: tuple[str, ...] = (self.name,)
        self.rotations = rotations
        self.extractor = adfeatures.create_model(name)
        key = f"{self.extractor.levels} {weights_fingerprint(self.extractor.backbone.state_dict())}"
        self.encode = self.extractor.backbone = memory.setdefault(key, Remembered(self.extractor.backbone))
        self.transform = adfeatures.create_transform(self.extractor)

    def take(self, references: Sequence[Image.Image], tests: Sequence[Image.Image]) -> None:
        """See `Contender`."""
        self.references, self.tests = (
            torch.stack([self.transform(i) for i in images]) for images in (references, tests)
        )

    def judge(self, drawn: Sequence[int]) -> Mapping[str, Verdict]:
        """See `Contender`."""
        with warnings.catch_warnings():
            # Few references are what is asked for here.
            warnings.simplefilter("ignore", UserWarning)
            self.extractor.set_references(self.references[list(drawn)], rotations=self.rotations)
            threshold = self.extractor.fit_threshold() if len(drawn) > 1 else float("nan")
        parts = [self.extractor.anomaly_map(batch) for batch in self.tests.split(BATCH_SIZE)]
        maps, scores = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
        return {self.name: Verdict(maps, scores, threshold)}


class Plain:
    """Raw residual norm and cosine distance to the nearest patch: one search for both, no statistics of the references.

    Args:
        model: Whose features.
    """

    names: tuple[str, ...] = ("raw residual norm", "cosine matching")

    def __init__(self, model: Model) -> None:
        self.model = model

    def take(self, references: Sequence[Image.Image], tests: Sequence[Image.Image]) -> None:
        """See `Contender`; the model takes the pictures itself."""

    @torch.no_grad()
    def judge(self, drawn: Sequence[int]) -> Mapping[str, Verdict]:
        """See `Contender`."""
        encode = self.model.encode
        references = encode(self.model.references[list(drawn)])
        bank = ReferenceBank.from_features(references)
        tests = [self._maps(encode(batch), bank) for batch in self.model.tests.split(BATCH_SIZE)]
        alone = self._maps(references, bank, list(range(len(drawn)))) if len(drawn) > 1 else None
        verdicts = {}
        for index, name in enumerate(self.names):
            maps = torch.cat([part[index] for part in tests]).numpy()
            normal = None if alone is None else alone[index].amax(dim=(1, 2)).numpy()
            verdicts[name] = Verdict(maps, maps.max(axis=(1, 2)), _threshold(normal))
        return verdicts

    def _maps(
        self, features: Sequence[Tensor], bank: ReferenceBank, exclude: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        pairs = list(zip(features, bank.match(features, exclude), strict=True))
        norms = [(own - other).norm(dim=1) for own, other in pairs]
        cosines = [1 - F.cosine_similarity(own, other, dim=1) for own, other in pairs]
        return self._map(norms), self._map(cosines)

    def _map(self, levels: Sequence[Tensor]) -> Tensor:
        size = self.model.extractor.img_size
        full = [F.interpolate(level[:, None], size, mode="bilinear", align_corners=False)[:, 0] for level in levels]
        return scoring.smooth(torch.stack(full).mean(dim=0), scoring.SIGMA)


class Coreset:
    """PatchCore on all features of a model.

    Args:
        model: Whose features.
    """

    names: tuple[str, ...] = ("PatchCore",)

    def __init__(self, model: Model) -> None:
        self.model = model

    def take(self, references: Sequence[Image.Image], tests: Sequence[Image.Image]) -> None:
        """See `Contender`; the model takes the pictures itself."""

    def judge(self, drawn: Sequence[int]) -> Mapping[str, Verdict]:
        """See `Contender`."""
        method = PatchCore(lambda batch: self.model.encode(batch["image"]), dim=DIMENSIONS)
        references = [{"image": self.model.references[index, None], "path": [str(index)]} for index in drawn]
        method.fit(references)
        found = method.predict([{"image": batch} for batch in self.model.tests.split(BATCH_SIZE)])
        normal = method.predict(references, leave_one_out=True).scores.numpy() if len(drawn) > 1 else None
        return {self.names[0]: Verdict(found.maps.numpy(), found.scores.numpy(), _threshold(normal))}


def _threshold(normal: np.ndarray | None) -> float:
    return float("nan") if normal is None else thresholds.normal_quantile(normal, QUANTILE)
