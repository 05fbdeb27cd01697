"""One product under the protocol, with contenders whose verdicts are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from PIL import Image

from training.judging.contenders import Verdict
from training.judging.products import Pictures
from training.judging.protocol import FULL, QUICK, THRESHOLDS, Result, Size, judged


def pictures() -> Pictures:
    blank = Image.new("RGB", (320, 320))
    masks = np.zeros((6, 320, 320), bool)
    masks[3, 100:140, 40:80] = masks[4, 200:220, 12:32] = True
    masks[5] = True
    return Pictures([blank] * 9, [blank] * 6, ["", "", "", "stain", "blur", "tint"], masks, np.arange(6) != 5)


class Known:
    """Finds the first defect alone, whatever the references, and keeps what it was given."""

    names: tuple[str, ...] = ("known",)

    def __init__(self) -> None:
        self.drawn: list[tuple[int, ...]] = []

    def take(self, references: Sequence[Image.Image], tests: Sequence[Image.Image]) -> None:
        """Nothing to prepare."""

    def judge(self, drawn: Sequence[int]) -> Mapping[str, Verdict]:
        """Scores 0 to 3 for good ones, then 9, 1.5 and 1.5."""
        self.drawn.append(tuple(drawn))
        maps = pictures().masks.astype(np.float32) * 0.5
        maps[4] = 0.2
        threshold = 2.5 if len(drawn) > 1 else float("nan")
        return {"known": Verdict(maps, np.array([0, 1, 3, 9, 1.5, 1.5]), threshold)}


def test_metrics_are_those_of_the_verdicts() -> None:
    (result,) = judged("page", pictures(), [Known()], Size(9, 3, 3, {4: 1}))
    # Of 9 pairs the defective one scores higher in 3, 2 and 2.
    assert result.image_auroc == pytest.approx(7 / 9)
    assert result.found == pytest.approx(1 / 3) and result.flagged == pytest.approx(1 / 3)
    assert result.missed == "blur tint" and (result.product, result.group, result.shots) == ("page", "print", 4)
    # In cells of 4 x 4 pixels: 100 of one defect at 0.5, 25 of another among 6,375 normal ones at 0.2, the rest at 0;
    # the picture that has changed as a whole is left out.
    normal, tied = 4 * 6400 - 100 + 6400 - 25, 6375
    below = normal - tied
    assert result.pixel_auroc == pytest.approx((100 * normal + 25 * (below + tied / 2)) / (125 * normal), abs=1e-4)


def test_every_draw_is_of_its_size_another_one_and_the_same_each_time() -> None:
    size = Size(9, 3, 3, {1: 2, 2: 1, 8: 5})
    runs = []
    for _ in range(2):
        contender = Known()
        results = list(judged("page", pictures(), [contender], size))
        assert [(result.shots, result.draw) for result in results] == [
            (1, 0),
            (1, 1),
            (2, 0),
            *((8, d) for d in range(5)),
        ]
        assert all(math.isnan(result.found) == (result.shots == 1) for result in results)
        runs.append(contender.drawn)
    assert runs[0] == runs[1] and [len(set(drawn)) for drawn in runs[0]] == [1, 1, 2, 8, 8, 8, 8, 8]
    assert len(set(runs[0][3:])) > 1


def test_the_protocol_draws_what_it_promises() -> None:
    assert FULL.draws[8] >= 5 and set(FULL.draws) == {1, 2, 4, 8, 16}
    for size in (FULL, QUICK):
        # Draws of the largest sets are not all the same.
        assert size.references > max(size.draws)
    assert set(THRESHOLDS.draws) == {4, 8, 16, 64} and THRESHOLDS.references >= 64
    assert {field for field in Result.__dataclass_fields__} >= {
        "image_auroc",
        "pixel_auroc",
        "aupro",
        "found",
        "flagged",
    }
