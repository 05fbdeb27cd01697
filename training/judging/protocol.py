"""One product under the protocol: every contender, every draw of references."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adfeatures.scoring import auroc

from ..metrics import evaluate
from .contenders import Contender, Verdict
from .products import SETS, Pictures

# Pixel metrics are of cells of this many pixels a side: the middle of the map, and any pixel of the mask.
CELL = 4


@dataclass(frozen=True)
class Size:
    """How many pictures of a product there are, and how many sets of references are drawn.

    Attributes:
        references: Normal pictures to draw from.
        good: Normal pictures to score.
        bad: Defective pictures to score.
        draws: Sets of references by the number of references in one.
    """

    references: int
    good: int
    bad: int
    draws: Mapping[int, int]


FULL = Size(references=24, good=12, bad=18, draws={1: 2, 2: 1, 4: 1, 8: 5, 16: 1})
QUICK = Size(references=12, good=8, bad=9, draws={8: 1})
# What thresholds promise is about good pictures, which need to be many.
THRESHOLDS = Size(references=64, good=20, bad=9, draws={4: 4, 8: 4, 16: 2, 64: 1})


@dataclass(frozen=True)
class Result:
    """What one contender is worth on one product with one set of references, as fractions.

    Attributes:
        found: Share of the defective pictures above the threshold, NaN where there is none.
        flagged: Share of the good pictures above it.
        missed: The kind of each defective picture that was not found, to look at.
    """

    product: str
    group: str
    contender: str
    shots: int
    draw: int
    image_auroc: float
    pixel_auroc: float
    aupro: float
    found: float
    flagged: float
    missed: str


def judged(name: str, pictures: Pictures, contenders: Sequence[Contender], size: Size) -> Iterator[Result]:
    """The results of a product.

    Args:
        name: The product, of one of the SETS.
        pictures: Its pictures.
        contenders: What is compared. They are given the pictures in this order.
        size: How many sets of references are drawn.
    """
    product = next(table[name] for table in SETS.values() if name in table)
    for contender in contenders:
        contender.take(pictures.references, pictures.tests)
    for shots, draws in size.draws.items():
        for draw in range(draws):
            rng = np.random.default_rng((zlib.crc32(name.encode()), shots, draw))
            drawn = sorted(rng.choice(len(pictures.references), shots, replace=False).tolist())
            for contender in contenders:
                for title, verdict in contender.judge(drawn).items():
                    yield Result(name, product.group, title, shots, draw, **_metrics(pictures, verdict))


def _metrics(pictures: Pictures, verdict: Verdict) -> dict[str, Any]:
    labels, located = pictures.labels, pictures.located
    maps = verdict.maps[located][:, CELL // 2 :: CELL, CELL // 2 :: CELL]
    count, height, width = maps.shape
    masks = pictures.masks[located].reshape(count, height, CELL, width, CELL).any(axis=(2, 4))
    of_pixels = evaluate(maps, masks, labels[located], verdict.scores[located])
    above = verdict.scores > verdict.threshold
    decided = not np.isnan(verdict.threshold)
    return {
        "image_auroc": auroc(verdict.scores, labels),
        "pixel_auroc": of_pixels.pixel_auroc,
        "aupro": of_pixels.aupro,
        "found": float(above[labels == 1].mean()) if decided else float("nan"),
        "flagged": float(above[labels == 0].mean()) if decided else float("nan"),
        "missed": " ".join(k for k, a in zip(pictures.kinds, above, strict=True) if k and not a) if decided else "",
    }
