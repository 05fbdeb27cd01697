"""The angle loss against values of the original implementation and against the formula of the paper, written out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.golden_values import assert_near, golden, value
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adfeatures.errors import InputError
from training.losses import angle, angle_loss

GOLDEN = golden("losses")
FIRST = value("loss.e1", (400, 32))
SECOND = FIRST + value("loss.e2", (400, 32), 0.3)
CENTER = value("loss.center", (32,), 0.2)
MASK = (torch.arange(400) % 9 == 0).long()


def plain_angle_loss(
    first: Tensor, second: Tensor, labels: Tensor, center: Tensor, temperature: float, anchors: str
) -> Tensor:
    """The formula, term by term, in float64."""
    first, second = (torch.nn.functional.normalize(view.double() - center.double(), dim=1) for view in (first, second))
    both, both_labels = torch.cat([first, second]), torch.cat([labels, labels])
    others = torch.cat([second, first])
    terms = []
    for i in range(len(both) if anchors == "both" else len(first)):
        opposite = both[both_labels != both_labels[i]]
        positive = (both[i] @ others[i] / temperature).exp()
        terms.append(-torch.log(positive / (both[i] @ opposite.T / temperature).exp().sum()))
    return torch.stack(terms).mean()


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@pytest.mark.parametrize("case", ["center", "no_center"])
def test_it_is_the_original_one(case: str) -> None:
    first, second = FIRST.clone().requires_grad_(), SECOND.clone().requires_grad_()
    loss = angle_loss(first, second, MASK, CENTER if case == "center" else None)
    loss.backward()
    assert_near(loss.detach(), GOLDEN[f"angle.{case}.loss"], 1e-5)
    assert_near(
        [gradient(first), gradient(second)], [GOLDEN[f"angle.{case}.grad_e1"], GOLDEN[f"angle.{case}.grad_e2"]], 1e-4
    )


@settings(max_examples=25)
@given(
    st.integers(0, 10_000),
    st.integers(2, 40),
    st.integers(1, 9),
    st.sampled_from(["both", "first"]),
    st.sampled_from([0.15, 1.0]),
)
def test_it_is_its_formula(seed: int, count: int, channels: int, anchors: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, count, channels, generator=generator).unbind()
    center, labels = torch.randn(channels, generator=generator) / 4, torch.randint(2, (count,), generator=generator)
    labels[:2] = torch.tensor([0, 1])
    ours, plain = ([view.clone().requires_grad_() for view in (first, second)] for _ in range(2))
    loss = angle_loss(ours[0], ours[1], labels, center, temperature, anchors)
    expected = plain_angle_loss(plain[0], plain[1], labels, center, temperature, anchors)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    expected.backward()
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(angle, "SIMILARITIES", 1000)  # 11 rows of 712 against 90 others at a time
    test_it_is_the_original_one("center")
    monkeypatch.setattr(angle, "SIMILARITIES", 1)
    test_it_is_the_original_one("no_center")


def test_double_precision_is_kept() -> None:
    first, second, center = (tensor.double() for tensor in (FIRST[:20], SECOND[:20], CENTER))
    found = angle_loss(first, second, MASK[:20], center)
    expected = plain_angle_loss(first, second, MASK[:20], center, 0.15, "both")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    views = first[:6, :3].clone().requires_grad_(), second[:6, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda one, other: angle_loss(one, other, MASK[4:10], center[:3]), views)


@pytest.mark.parametrize("label", [0, 1])
def test_it_without_one_of_the_labels_is_zero(label: int) -> None:
    first, second = FIRST.clone().requires_grad_(), SECOND.clone().requires_grad_()
    loss = angle_loss(first, second, torch.full((400,), label))
    loss.backward()
    assert loss.item() == 0 and not gradient(first).any() and not gradient(second).any()


def test_features_at_the_origin_give_no_nan() -> None:
    first, second = torch.zeros(6, 4, requires_grad=True), torch.zeros(6, 4, requires_grad=True)
    angle_loss(first, second, torch.tensor([0, 0, 0, 1, 1, 1])).backward()
    assert torch.isfinite(gradient(first)).all() and torch.isfinite(gradient(second)).all()


def test_bfloat16_is_stable_under_autocast() -> None:
    # The original's exp(s / T) of 800 negatives a feature overflows nothing here, and the sums keep float32's
    # precision.
    first, second = FIRST.bfloat16(), SECOND.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = angle_loss(first, second, MASK, CENTER)
    assert loss.dtype == torch.float32
    assert_near(loss, plain_angle_loss(first, second, MASK, CENTER, 0.15, "both").float(), 1e-5)


def test_low_temperature_does_not_overflow() -> None:
    loss = angle_loss(FIRST, SECOND, MASK, temperature=1e-3)
    expected = plain_angle_loss(FIRST, SECOND, MASK, torch.zeros(32), 1e-3, "both")
    assert not torch.isfinite(torch.exp(torch.tensor(1 / 1e-3)))
    assert torch.isfinite(loss)
    assert not torch.isfinite(expected) or torch.isclose(loss.double(), expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [1, 8000, 1e6])
def test_large_features_give_what_float64_gives(norm: float, dtype: torch.dtype) -> None:
    scales = torch.linspace(norm / 100, norm, 400)[:, None]
    views = [(torch.nn.functional.normalize(view, dim=1) * scales)[:90].to(dtype) for view in (FIRST, SECOND)]
    ours = [view.clone().requires_grad_() for view in views]
    plain = [view.double().requires_grad_() for view in views]
    loss = angle_loss(ours[0], ours[1], MASK[:90], CENTER)
    expected = plain_angle_loss(plain[0], plain[1], MASK[:90], CENTER, 0.15, "both")
    assert torch.isfinite(loss) and loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    expected.backward()
    for one, other in zip(ours, plain, strict=True):
        # The gradient of features in bfloat16 is rounded to that in the end.
        rounding = 2**-8 if dtype == torch.bfloat16 else 0
        bound = rounding * gradient(other).abs() + 1e-4 * gradient(other).abs().max()
        assert ((gradient(one).double() - gradient(other)).abs() <= bound).all()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory of a process is read from /proc")
def test_memory_is_bounded_for_tens_of_thousands_of_patches() -> None:
    code = """
import torch
from training.losses import angle_loss
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
features = torch.randn(2, 100_000, 8, requires_grad=True)
few = torch.arange(100_000) % 500 == 0
angle_loss(*features[:, :64], few[:64]).backward()
before = peak()
for labels in (few, ~few):
    angle_loss(*features, labels).backward()
assert features.grad.isfinite().all()
print(peak() - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    )
    # The similarities of 400 features of one label with 199,600 of the other are 305 MB, and several times as much is
    # needed of them.
    assert float(result.stdout) < 450


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="two views"):
        angle_loss(FIRST, SECOND[:3], MASK)
    with pytest.raises(InputError, match="anchors"):
        angle_loss(FIRST, SECOND, MASK, anchors="all")
