"""The norm loss against values of the original implementation and against the formula of the paper, written out."""

from __future__ import annotations

import pytest
import torch
from helpers.golden_values import assert_near, golden, value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adfeatures.errors import InputError, UnknownNameError
from training.losses import norm_loss

GOLDEN = golden("losses")
FEATURES = value("loss.e1", (400, 32))
MASK = (torch.arange(400) % 9 == 0).long()
NORM_CASES = {
    "mixed": (0.35, MASK),
    "all_normal": (0.35, torch.zeros_like(MASK)),
    "all_abnormal": (0.35, torch.ones_like(MASK)),
    "large": (3.0, MASK),
    "tiny": (0.01, MASK),
}


def plain_norm_loss(features: Tensor, labels: Tensor, radius: float, margin: float, squared: bool) -> Tensor:
    norms = features.double().pow(2).sum(1)
    norms = ((norms if squared else norms.sqrt()) + 1).sqrt() - 1
    outer = min([0.9 * float(a.detach()) for a, label in zip(norms, labels, strict=True) if label] + [radius])
    inner = 0.99 * outer
    too_far = [a - outer for a, label in zip(norms, labels, strict=True) if not label and a > outer]
    too_near = [inner - a for a, label in zip(norms, labels, strict=True) if not label and a < inner]
    hidden = [outer + margin - a for a, label in zip(norms, labels, strict=True) if label and a < outer + margin]
    loss = torch.zeros((), dtype=torch.float64)
    for excesses in (too_far, too_near, hidden):
        costs = [x.detach().clamp(max=60).exp() * torch.logaddexp(x, torch.zeros_like(x)) for x in excesses]
        loss = loss + (torch.stack(costs).mean() if costs else 0)
    return loss


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@pytest.mark.parametrize("case", NORM_CASES)
def test_it_is_the_original_one(case: str) -> None:
    scale, labels = NORM_CASES[case]
    features = (FEATURES * scale).requires_grad_()
    loss = norm_loss(features, labels)
    loss.backward()
    assert_near(loss.detach(), GOLDEN[f"norm.{case}.loss"], 1e-5)
    assert_near(gradient(features), GOLDEN[f"norm.{case}.grad"], 1e-4)


@settings(max_examples=25)
@given(
    st.integers(0, 10_000),
    st.integers(1, 30),
    st.sampled_from([1e-4, 0.01, 0.3, 1, 4]),
    st.sampled_from(["code", "paper"]),
)
def test_it_is_its_formula(seed: int, count: int, scale: float, pseudo_huber: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 6, generator=generator) * scale
    labels = torch.randint(2, (count,), generator=generator)
    ours, plain = features.clone().requires_grad_(), features.double().requires_grad_()
    loss = norm_loss(ours, labels, 0.3, 0.5, pseudo_huber)
    expected = plain_norm_loss(plain, labels, 0.3, 0.5, pseudo_huber == "paper")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    (loss + 0 * ours.sum()).backward()
    (expected + 0 * plain.sum()).backward()
    assert_near(gradient(ours), gradient(plain).float(), 1e-4)


def test_double_precision_is_kept() -> None:
    features = FEATURES[:20].double()
    expected = plain_norm_loss(features, MASK[:20], 0.4, 0.75, False)
    torch.testing.assert_close(norm_loss(features, MASK[:20]), expected, rtol=1e-12, atol=0)


def test_features_at_the_origin_give_no_nan() -> None:
    features = torch.zeros(6, 4, requires_grad=True)
    norm_loss(features, torch.tensor([0, 0, 0, 1, 1, 1])).backward()
    assert torch.isfinite(gradient(features)).all()


def test_bfloat16_is_stable_under_autocast() -> None:
    features = FEATURES.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = norm_loss(features, MASK)
    assert loss.dtype == torch.float32
    assert_near(loss, plain_norm_loss(features, MASK, 0.4, 0.75, False).float(), 1e-5)


def published_norm_loss(features: Tensor, labels: Tensor) -> Tensor:
    """As the published training computes it: every operation in the precision of the features, the radii exact."""
    norms = (features.norm(dim=1) + 1).sqrt() - 1
    normal, hidden = norms[labels == 0], norms[labels == 1]
    outer = min(0.9 * hidden.min().item(), 0.4) if len(hidden) else 0.4
    inner, bound = 0.99 * outer, outer + 0.75
    loss = torch.zeros((), dtype=features.dtype)
    for excess in (normal[normal > outer] - outer, inner - normal[normal < inner], bound - hidden[hidden < bound]):
        if len(excess):
            loss = loss + (torch.nn.functional.softplus(excess) * excess.detach().exp()).mean()
    return loss


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.sampled_from([0.0, 0.01, 0.1, 0.3, 1, 10]))
def test_in_bfloat16_it_is_the_published_one(seed: int, count: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = (torch.randn(count, 6, generator=generator) * scale).bfloat16()
    labels = torch.randint(2, (count,), generator=generator)
    ours, plain = (features.clone().requires_grad_() for _ in range(2))
    loss, expected = norm_loss(ours, labels, dtype=torch.bfloat16), published_norm_loss(plain, labels)
    assert loss.dtype == torch.bfloat16
    # On a CPU torch.mean rounds the sum and the quotient, here and on a GPU the quotient alone: once for each set.
    torch.testing.assert_close(loss, expected, rtol=2**-7, atol=0)
    (loss + 0 * ours.sum()).backward()
    (expected + 0 * plain.sum()).backward()
    torch.testing.assert_close(gradient(ours), gradient(plain), rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("pseudo_huber", ["code", "paper"])
@pytest.mark.parametrize("norm", [8000, 1e6])
def test_in_bfloat16_large_features_stay_finite(norm: float, pseudo_huber: str) -> None:
    features = (torch.nn.functional.normalize(FEATURES, dim=1) * norm).bfloat16().requires_grad_()
    loss = norm_loss(features, MASK, pseudo_huber=pseudo_huber, dtype=torch.bfloat16)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(gradient(features)).all()


@pytest.mark.parametrize("pseudo_huber", ["code", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [1, 100, 8000, 1e6])
def test_large_features_give_what_float64_gives(norm: float, dtype: torch.dtype, pseudo_huber: str) -> None:
    features = torch.nn.functional.normalize(FEATURES, dim=1) * torch.linspace(norm / 1000, norm, 400)[:, None]
    ours = features.to(dtype).requires_grad_()
    plain = ours.detach().double().requires_grad_()
    loss = norm_loss(ours, MASK, pseudo_huber=pseudo_huber)
    expected = plain_norm_loss(plain, MASK, 0.4, 0.75, pseudo_huber == "paper")
    assert torch.isfinite(loss) and loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    expected.backward()
    # The gradient of features in bfloat16 is rounded to that in the end.
    rounding = 2**-8 if dtype == torch.bfloat16 else 0
    bound = rounding * gradient(plain).abs() + 1e-4 * gradient(plain).abs().max()
    assert ((gradient(ours).double() - gradient(plain)).abs() <= bound).all()


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="features"):
        norm_loss(FEATURES, MASK[:3])
    with pytest.raises(UnknownNameError, match="paper"):
        norm_loss(FEATURES, MASK, pseudo_huber="papers")
