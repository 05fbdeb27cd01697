"""A scorer with a small network, trained on other products, that decides how much the distance of a patch counts.

Its weights come from ``python -m training.learn``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .evidence import LOOKS, SEEN, evidence, looks_of, own_spreads
from .references import Exclude, ReferenceBank
from .scoring import LocalCosineScorer, local_mean

# Of distances, so that their logarithms are finite.
_LEAST = 1e-3


class Head(nn.Module):
    """The factor by which each distance counts: small convolutions over what is seen of a patch at all levels.

    Args:
        levels: Number of levels.
        width: Hidden channels.
    """

    # The largest logarithm of a factor.
    MOST = 2.0

    def __init__(self, levels: int, width: int = 64) -> None:
        super().__init__()
        channels = levels * (SEEN + 2)
        self.mean, self.scale = (nn.Buffer(fill(channels)) for fill in (torch.zeros, torch.ones))
        around = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate", groups=width, bias=False)
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, width, 1), nn.GELU(), around),
            *(nn.Conv2d(width, width, 1), nn.GELU(), nn.Conv2d(width, levels, 1)),
        )
        # Before training no neighbor counts, and every factor is 1.
        nn.init.dirac_(around.weight, groups=width)
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, distances: Sequence[Tensor], scales: Sequence[Tensor], seen: Sequence[Tensor]) -> list[Tensor]:
        """The distances as they count, (B, h, w) per level, of the size of the first level.

        Args:
            distances: As multiples of what is normal, (B, h_l, w_l) per level.
            scales: What is normal, of the same shapes.
            seen: The rest of the evidence, (B, SEEN, h_l, w_l) per level.
        """
        x = self.shown(distances, scales, seen)
        x = ((x - self.mean.float()[:, None, None]) / self.scale.float()[:, None, None]).clamp(-4, 4)
        gates = self.layers(x.to(self.mean)).float()
        factors = (self.MOST * torch.tanh(gates / self.MOST)).exp()
        size = distances[0].shape[-2:]
        return [
            _resized(own[:, None], size)[:, 0] * factor
            for own, factor in zip(distances, factors.unbind(dim=1), strict=True)
        ]

    @staticmethod
    def shown(distances: Sequence[Tensor], scales: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
        """All levels of the evidence as one map (B, channels, h, w), of the size of the first level."""
        size = distances[0].shape[-2:]
        levels = [
            torch.cat([torch.stack([(own + _LEAST).log(), (scale + _LEAST).log()], dim=1), rest], dim=1)
            for own, scale, rest in zip(distances, scales, seen, strict=True)
        ]
        return torch.cat([_resized(level, size) for level in levels], dim=1)


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


class LearnedScorer(LocalCosineScorer, nn.Module):
    """Distances of ``LocalCosineScorer``, each times a factor that a head decides by what else is seen of the patch.

    Args:
        typical: As of ``CosineRingScorer``.
        normalization: Mean and standard deviation per channel of the images that the model takes.
        levels: Number of levels of the model.
    """

    form: str | None = "learned"
    looks = LOOKS

    def __init__(
        self,
        typical: Sequence[Sequence[float]] | None,
        normalization: tuple[Sequence[float], Sequence[float]],
        levels: int,
    ) -> None:
        nn.Module.__init__(self)
        LocalCosineScorer.__init__(self, typical)
        self.normalization = normalization
        self.head = Head(levels)

    def learn(self, bank: ReferenceBank, distances: Sequence[Tensor]) -> None:
        """Keep what is normal, and how far the rows are from other images."""
        super().learn(bank, distances)
        bank.own = [own_spreads(level) for level in distances]

    def described(self, features: list[Tensor], images: Tensor) -> list[Tensor]:
        """The features with the looks of their patches behind."""
        # Squares of brightness need more than half precision.
        images = images.float()
        mean, deviation = (images.new_tensor(part)[:, None, None] for part in self.normalization)
        images = images * deviation + mean
        grids = [(level.shape[2], level.shape[3]) for level in features]
        seen = {grid: local_mean(looks_of(images, grid)) for grid in dict.fromkeys(grids)}
        return [torch.cat([level, seen[grid].to(level)], dim=1) for level, grid in zip(features, grids, strict=True)]

    def compare(self, bank: ReferenceBank, patches: Sequence[Tensor], exclude: Exclude = None) -> list[Tensor]:
        """See ``evidence``."""
        return evidence(bank, patches, exclude)

    def distances(self, compared: Tensor) -> Tensor:
        """The first channel of the evidence."""
        return compared[:, 0]

    def patch_scores(self, features: Sequence[Tensor], scales: Sequence[Tensor | None]) -> list[Tensor]:
        """Distances as they count, all of the size of the first level. Arguments and errors as of the base class."""
        normal = self.normal(features, scales)
        multiples = [self.distances(level) / own for level, own in zip(features, normal, strict=True)]
        spread = [own.expand_as(level) for own, level in zip(normal, multiples, strict=True)]
        return self.head(multiples, spread, [level[:, 1:] for level in features])
