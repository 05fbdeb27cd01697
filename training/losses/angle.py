"""The angle loss: contrast of directions between normal and anomalous residual features (paper section 3.4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adfeatures.errors import InputError

# So many similarities of features are held at once: 16 MB in float32, a few times over.
SIMILARITIES = 2**22
ANCHORS = ("both", "first")


def angle_loss(
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    center: Tensor | None = None,
    temperature: float = 0.15,
    anchors: str = "both",
) -> Tensor:
    """Pull the two views of a patch together in direction, away from all patches of the other label.

    With u = normalize(feature - center), an anchor i whose other view is j costs -u_i . u_j / T + log sum_k exp(u_i .
    u_k / T), k running over the features of the other label in both views. The positive is not in the denominator, so
    the loss can be negative.

    Args:
        first: Projected residual features (N, C) of one level, first view.
        second: Those of the second view, (N, C).
        labels: (N,), 1 where anomalous, 0 where normal; the views share them.
        center: (C,) mean residual of normal patches, None for the origin.
        temperature: T.
        anchors: Features that the mean is taken over: those of "both" views, as in the published code, or of the
            "first", as in the paper.

    Returns:
        The loss, a scalar, computed in float32 for every lower precision; 0 with zero gradients where a label is
        absent.

    Raises:
        InputError: For shapes that do not agree, or other ``anchors``.
    """
    if first.ndim != 2 or first.shape != second.shape or labels.shape != first.shape[:1]:
        raise InputError(
            f"Expected two views (N, C) and labels (N,), got {[tuple(t.shape) for t in (first, second, labels)]}."
        )
    if anchors not in ANCHORS:
        raise InputError(f"anchors must be one of {ANCHORS}, got {anchors!r}.")
    with torch.autocast(first.device.type, enabled=False):
        features = torch.stack([first, second]).to(torch.promote_types(first.dtype, torch.float32))
        if center is not None:
            features = features - center.to(features.dtype)
        anomalous = labels > 0
        if anomalous.all() or not anomalous.any():
            return 0 * features.sum()
        units = F.normalize(features, dim=2)
        positives = (units[0] * units[1]).sum(dim=1) / temperature
        sides = (~anomalous, anomalous)
        sums = _CrossLogSumExp.apply(*(units[:, side].flatten(0, 1) for side in sides), temperature)
        views = slice(None) if anchors == "both" else slice(1)
        costs = [(own.view(2, -1) - positives[side])[views] for own, side in zip(sums, sides, strict=True)]
        return torch.cat([cost.flatten() for cost in costs]).mean()


class _CrossLogSumExp(torch.autograd.Function):
    """For unit vectors a (n, C), b (m, C): log sum exp of a . b / T, over b for each a, (n,), over a for each b, (m,).

    The matrix of similarities is shared by both sums and never held as a whole: the backward pass computes it again,
    chunk by chunk.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        over_b, over_a = a.new_empty(len(a)), a.new_full((len(b),), -torch.inf)
        for rows in _chunks(a, b):
            similarity = a[rows] / temperature @ b.T
            over_b[rows] = similarity.logsumexp(dim=1)
            torch.logaddexp(over_a, similarity.logsumexp(dim=0), out=over_a)
        ctx.save_for_backward(a, b, over_b, over_a)
        ctx.temperature = temperature
        return over_b, over_a

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        a, b, over_b, over_a = ctx.saved_tensors
        gradient_over_b, gradient_over_a = gradients
        gradient_a, gradient_b = torch.empty_like(a), torch.zeros_like(b)
        for rows in _chunks(a, b):
            similarity = a[rows] / ctx.temperature @ b.T
            weights = (similarity - over_b[rows, None]).exp() * gradient_over_b[rows, None]
            weights += (similarity - over_a).exp() * gradient_over_a
            weights /= ctx.temperature
            gradient_a[rows] = weights @ b
            gradient_b += weights.T @ a[rows]
        return gradient_a, gradient_b, None


def _chunks(a: Tensor, b: Tensor) -> Iterator[slice]:
    """Rows of a, few enough at a time for the bound on their similarities with all of b."""
    step = max(1, SIMILARITIES // len(b))
    return (slice(start, start + step) for start in range(0, len(a), step))
