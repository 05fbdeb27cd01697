"""What is asked of several methods alike, on planted outliers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import pytest
import torch
from helpers.planted import batches, labels
from torch import Tensor

from adfeatures.errors import InputError
from adfeatures.scoring import auroc

Make = Callable[..., Any]
Extractor = Callable[[Mapping[str, Any]], Sequence[Tensor]]


def check_finds_what_is_planted(
    method: Any, count: int = 40, size: tuple[int, int] = (32, 32), hits: float = 0.9
) -> None:
    """A fitted method tells images with an outlier from those without, and finds no difference between two of these.

    In more than this fraction, ``hits``, of the images the highest value of the map lies within the outlier.
    """
    normal, same = (batches(count, seed=seed, size=size) for seed in (2, 3))
    planted = batches(count, seed=3, planted=True, size=size)
    scores, others, predicted = method.predict(normal).scores, method.predict(same).scores, method.predict(planted)
    truth = torch.cat([labels(normal), labels(planted)])
    assert auroc(torch.cat([scores, predicted.scores]).numpy(), truth.numpy()) > 0.9
    assert 0.3 < auroc(torch.cat([scores, others]).numpy(), truth.numpy()) < 0.7
    masks = torch.cat([batch["mask"][:, 0] for batch in planted]).bool()
    assert auroc(predicted.maps.flatten().numpy(), masks.flatten().numpy()) > 0.9
    found = [float(mask.flatten()[map.argmax()]) for mask, map in zip(masks, predicted.maps, strict=True)]
    assert fmean(found) > hits


def check_finite_on_small_sets(method: Any, count: int, size: tuple[int, int]) -> None:
    """So few training images, of this size."""
    predictions = method.fit(batches(count, seed=0, size=size)).predict(batches(3, seed=1, size=size))
    assert predictions.maps.shape == (3, *size)
    assert predictions.maps.isfinite().all() and predictions.scores.isfinite().all()


def check_names_nan_features(make: Make, extractor: Extractor) -> None:
    """In training and in prediction, infinite ones too; ``make`` takes an extractor."""
    for value in (torch.nan, torch.inf):

        def broken(batch: Mapping[str, Any], value: float = value) -> list[Tensor]:
            levels = list(extractor(batch))
            levels[-1][torch.tensor([path is not None and path.endswith("005.png") for path in batch["path"]])] = value
            return levels

        with pytest.raises(InputError, match=r"noise/005\.png hold NaN"):
            make(broken).fit(batches(8, seed=0))
        with pytest.raises(InputError, match=r"noise/005\.png hold NaN"):
            make(broken).fit(batches(4, seed=0)).predict(batches(8, seed=0))


def check_refuses_nothing(make: Make) -> None:
    """Nothing to learn from, nothing learned, nothing to score."""
    with pytest.raises(InputError, match="drop_last"):
        make().fit([])
    with pytest.raises(InputError, match="call fit first"):
        make().predict(batches(2, seed=0))
    with pytest.raises(InputError, match="nothing to score"):
        make().fit(batches(2, seed=0)).predict([])
