"""The norm loss: residual features of normal patches on a small sphere, anomalous ones outside (paper section 3.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adfeatures.catalog import unknown
from adfeatures.errors import InputError, UnknownNameError

# Fraction of the smallest anomalous norm that the radius stays below, and of the radius that normal norms stay above.
OUTER_FRACTION, INNER_FRACTION = 0.9, 0.99
# Weights grow no further than exp of this, so that the sum of 10^5 features of norm 10^6 is finite in float32.
STEEPEST = 60
_NORMS = {
    "code": lambda features: torch.linalg.vector_norm(features, dim=1),
    "paper": lambda features: features.square().sum(dim=1),
}


def norm_loss(
    features: Tensor,
    labels: Tensor,
    radius: float = 0.4,
    margin: float = 0.75,
    pseudo_huber: str = "code",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Pull the norms A of normal features between two radii, push anomalous ones beyond the outer one plus a margin.

    The outer radius moves: it is 0.9 of the smallest anomalous norm of the batch, at most ``radius``; the inner one is
    0.99 of it. A feature on the wrong side of its bound by x costs exp(x) softplus(x), where the first factor is a
    weight without gradient, here constant from x = 60 on. Each of the three sets (normal too far, normal too near,
    anomalous too near) counts by its mean, an empty one not at all. The moving radius and the inner bound stand in the
    published code only.

    Args:
        features: Projected residual features (N, C) of one level.
        labels: (N,), 1 where anomalous, 0 where normal.
        radius: Largest outer radius.
        margin: Distance between the outer radius and the bound of anomalous features.
        pseudo_huber: A = sqrt(norm + 1) - 1, with the norm itself ("code", which made the published weights) or squared
            ("paper").
        dtype: Precision to compute in; the default is float32, or that of the features where it is higher. In bfloat16
            each operation is rounded as in the published training, where norms below 1 are multiples of 1/128.

    Returns:
        The loss, a scalar >= 0, of that precision.

    Raises:
        InputError: For shapes that do not agree.
        UnknownNameError: For another ``pseudo_huber``.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise InputError(
            f"Expected features (N, C) and labels (N,), got {tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if pseudo_huber not in _NORMS:
        raise UnknownNameError(unknown("pseudo_huber", pseudo_huber, _NORMS))
    dtype = dtype or torch.promote_types(features.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        norms = _NORMS[pseudo_huber](features.to(dtype))
        # sqrt(norms + 1) - 1; the cancellation of small norms is a part of what the published training computes.
        norms = (norms + 1).sqrt() - 1 if dtype == torch.bfloat16 else norms / ((norms + 1).sqrt() + 1)
        anomalous, exact = labels > 0, norms.detach().to(torch.promote_types(dtype, torch.float32))
        limits = torch.where(anomalous, OUTER_FRACTION * exact, radius)
        outer = torch.cat([limits, limits.new_full((1,), radius)]).min()
        inner, bound = INNER_FRACTION * outer, outer + margin
        return (
            _mean_excess(norms, outer, ~anomalous)
            + _mean_excess(inner, norms, ~anomalous)
            + _mean_excess(bound, norms, anomalous)
        )


def _mean_excess(high: Tensor, low: Tensor, members: Tensor) -> Tensor:
    """Mean of exp(x) softplus(x) over the members with x = high - low > 0; 0 where there are none.

    Where the norms are bfloat16, their bounds are float32. No synchronization with the device.
    """
    wide, dtype = torch.promote_types(high.dtype, low.dtype), torch.result_type(high, low)
    counted = members & (high > low)
    # Not counted ones may be of any size.
    excess = torch.where(counted, (high.to(wide) - low.to(wide)).to(dtype), 0)
    costs = excess.detach().clamp_max(STEEPEST).exp() * F.softplus(excess)
    total = torch.where(counted, costs, 0).sum(dtype=wide)
    return (total / counted.sum().clamp_min(1)).to(dtype)
