"""Scores of views and parts against loops over them."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import torch

from training import metrics
from training.data.items import Item
from training.evaluation.views import by_view, part_auroc
from training.methods.base import Predictions


def made(parts: int = 8) -> tuple[list[Item], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Items of five views a part, scores, maps and masks; the last view never shows a defect."""
    items = [
        Item(f"{part}_C{view}.jpg", 0, "toy", view=f"C{view}", sample=f"toy/S{part}")
        for view in range(1, 6)
        for part in range(parts)
    ]
    torch.manual_seed(0)
    masks = torch.zeros(len(items), 8, 8, dtype=torch.uint8)
    for index, item in enumerate(items):
        if int(item.sample[-1]) % 2 and item.view not in ("C5", f"C{int(item.sample[-1]) % 4 + 1}"):
            masks[index, 2:5, 3:6] = 1
    return items, torch.rand(len(items)), torch.rand(len(items), 8, 8), masks


def test_a_part_is_its_highest_view() -> None:
    items, scores, _, masks = made()
    labels = masks.flatten(1).any(dim=1).long()
    highest: dict[str, float] = {}
    anomalous: dict[str, bool] = {}
    for item, score, label in zip(items, scores.tolist(), labels.tolist(), strict=True):
        highest[item.sample] = max(highest.get(item.sample, -1.0), score)
        anomalous[item.sample] = anomalous.get(item.sample, False) or bool(label)
    pairs = [
        (highest[bad] > highest[good]) + 0.5 * (highest[bad] == highest[good])
        for bad in highest
        for good in highest
        if anomalous[bad] and not anomalous[good]
    ]
    assert len(pairs) == 16 and abs(part_auroc(items, scores, labels) - np.mean(pairs)) < 1e-12
    assert math.isnan(part_auroc(items, scores, torch.zeros(40)))


def test_each_view_has_the_metrics_of_its_images() -> None:
    items, scores, maps, masks = made()
    labels = masks.flatten(1).any(dim=1).long()
    found = by_view(items, Predictions(maps, scores), masks, labels)
    assert list(found) == ["C1", "C2", "C3", "C4", "C5"]
    own = slice(8, 16)
    expected = metrics.evaluate(maps[own], masks[own], labels[own], scores[own])
    assert found["C2"] == asdict(expected) and 0 < expected.image_auroc < 1
    assert all(math.isnan(value) for value in found["C5"].values())
    assert by_view([Item("a.png", 0, "nut")], Predictions(maps[:1], scores[:1]), masks[:1], labels[:1]) == {}
