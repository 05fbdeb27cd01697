"""CFLOW against its formulas written out patch by patch, its schedule, and on images with a planted outlier."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.method_checks import (
    check_finds_what_is_planted,
    check_finite_on_small_sets,
    check_names_nan_features,
    check_refuses_nothing,
)
from helpers.planted import batches, patch_extractor
from scipy import stats
from torch import Tensor
from torch.nn import Module

from adfeatures.errors import InputError, UnknownNameError
from training.methods.base import Batch, Extractor
from training.methods.cflow import CFLOW
from training.methods.flows import ConditionalFlow, CouplingBlock, position_code, random_rotation
from training.methods.trained import seeded

EXTRACT = patch_extractor(6, 8, 7, 10)
M = TypeVar("M", bound=Module)


def quick(extractor: Extractor = EXTRACT, **settings: Any) -> CFLOW:
    return CFLOW(extractor, **{"blocks": 2, "meta_epochs": 3, "sub_epochs": 1, "chunk": 128, **settings})


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def disturbed(module: M, seed: int = 0) -> M:
    """The module in float64, no parameter at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


@pytest.mark.parametrize("channels", [2, 3, 6, 9])
def test_log_determinant_is_that_of_autograd(channels: int) -> None:
    flow = disturbed(ConditionalFlow(channels, 4))
    vectors, conditions = torch.randn(5, channels, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    mapped, log_det = flow(vectors, conditions)
    assert log_det.std() > 0.1
    for vector, condition, value, found in zip(vectors, conditions, mapped, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x, c=condition: flow(x[None], c[None])[0][0], vector)
        sign, expected = torch.linalg.slogdet(jacobian)
        assert sign == 1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        likelihood = stats.multivariate_normal(np.zeros(channels)).logpdf(value.detach().numpy()) + expected.item()
        found = flow.log_likelihood(vector[None], condition[None])[0].item()
        assert found == pytest.approx(likelihood / channels, abs=1e-5)


@pytest.mark.parametrize("channels", [2, 5, 8])
def test_a_block_is_the_stated_formula(channels: int) -> None:
    block = disturbed(CouplingBlock(channels, 3))
    p = {name: value.detach().numpy() for name, value in block.state_dict().items()}
    rng = np.random.default_rng(0)
    vectors, conditions = rng.normal(size=(4, channels)), rng.normal(size=(4, 3))
    mapped, log_det = block(torch.from_numpy(vectors), torch.from_numpy(conditions))
    for x, c, z, found in zip(vectors, conditions, mapped.detach().numpy(), log_det.tolist(), strict=True):
        kept, changed = x[: channels - channels // 2], x[channels - channels // 2 :]
        hidden = np.maximum(p["subnet.0.weight"] @ np.concatenate([kept, c]) + p["subnet.0.bias"], 0)
        assert len(hidden) == 2 * (channels - channels // 2 + 3)
        out = 0.1 * (p["subnet.2.weight"] @ hidden + p["subnet.2.bias"])
        s, t = 1.9 * np.tanh(out[: channels // 2]), out[channels // 2 :]
        scale = 0.1 * 2 * np.log(1 + np.exp(0.5 * p["raw_scale"]))
        joined = np.concatenate([kept, changed * np.exp(s) + t]) * scale + p["offset"]
        np.testing.assert_allclose(z, p["rotation"] @ joined, rtol=0, atol=1e-10)
        assert found == pytest.approx(s.sum() + np.log(scale).sum(), abs=1e-10)


def test_a_new_block_scales_by_one() -> None:
    block = CouplingBlock(6, 2).double()
    for parameter in block.subnet[2].parameters():
        torch.nn.init.zeros_(parameter)
    vectors = torch.randn(3, 6, dtype=torch.float64)
    mapped, log_det = block(vectors, torch.randn(3, 2, dtype=torch.float64))
    torch.testing.assert_close(mapped.norm(dim=1), vectors.norm(dim=1))
    torch.testing.assert_close(log_det, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_rotations_are_proper(size: int) -> None:
    rotation = random_rotation(size).double()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(torch.linalg.det(rotation)) == pytest.approx(1, abs=1e-5)


def test_rotations_are_uniform() -> None:
    rotations = torch.stack([random_rotation(3) for _ in range(2000)])
    # Every column of a uniform rotation is a uniform point of the sphere, whose coordinates are uniform (Archimedes).
    for row in range(3):
        for column in range(3):
            assert stats.kstest(rotations[:, row, column].numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("height", "width", "size"), [(1, 1, 128), (3, 5, 128), (16, 16, 128), (3, 2, 6)])
def test_position_code_is_the_stated_formula(height: int, width: int, size: int) -> None:
    half = size // 2
    expected = [
        (math.cos if k % 2 else math.sin)(place * math.exp(-(k - k % 2) * math.log(1e4) / half))
        for y, x in itertools.product(range(height), range(width))
        for place in (x, y)
        for k in range(half)
    ]
    found = position_code(height, width, size)
    torch.testing.assert_close(found, torch.tensor(expected).view(height * width, size), rtol=0, atol=1e-5)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Learning rate of every step that Adam takes."""
    rates = []
    original = torch.optim.Adam.step

    def step(self: torch.optim.Adam, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    return rates


def test_learning_rates_are_the_stated_ones(steps: list[float]) -> None:
    CFLOW(EXTRACT, levels=1, blocks=1, sub_epochs=2).fit(batches(6, seed=0, size=(8, 8), batch_size=2))
    expected = []
    for epoch in range(25):
        cosine = 2e-7 + (2e-4 - 2e-7) * (1 + math.cos(math.pi * epoch / 25)) / 2
        for step in range(6):
            warm_up = 2e-5 + (1.9686e-4 - 2e-5) * (6 * epoch + step) / 12
            expected.append(warm_up if epoch < 2 else cosine)
    assert steps == pytest.approx(expected, abs=2e-9)


@pytest.mark.parametrize(
    ("chunk", "per_batch"),
    [(128, 4), (200, 2), (512, 1), (4096, 1)],
    ids=["exact", "rest-left-out", "one", "fewer-than-a-chunk"],
)
def test_a_step_per_level_and_whole_chunk(steps: list[float], chunk: int, per_batch: int) -> None:
    CFLOW(EXTRACT, blocks=1, chunk=chunk, meta_epochs=2, sub_epochs=3).fit(batches(16, seed=0))
    assert len(steps) == 2 * 3 * 2 * 3 * per_batch


def test_training_is_adam_on_the_stated_loss() -> None:
    """Its equations written out: first and second moments of each flow by itself, at the rates of the warm-up."""
    train = batches(6, seed=0, size=(16, 16), batch_size=3)
    trained = CFLOW(EXTRACT, levels=2, blocks=1, chunk=24, meta_epochs=1, sub_epochs=1).fit(train)
    with seeded(0):
        flows = [ConditionalFlow(channels, 128, 1) for channels in (7, 10)]
    moments = [{p: (torch.zeros_like(p), torch.zeros_like(p)) for p in flow.parameters()} for flow in flows]
    steps, generator = [0, 0], torch.Generator().manual_seed(0)
    for number, batch in enumerate(train):
        rate = 2e-5 + (2e-7 + (2e-4 - 2e-7) * (1 + math.cos(math.pi * 2)) / 2 - 2e-5) * number / 2 / 2
        for level, (flow, features) in enumerate(zip(flows, EXTRACT(batch)[-2:], strict=True)):
            patches = features.permute(0, 2, 3, 1).reshape(48, -1)
            order = torch.randperm(48, generator=generator)
            for rows in (order[:24], order[24:]):
                z, log_det = flow(patches[rows], position_code(4, 4)[rows % 16])
                channels = patches.shape[1]
                logp = -channels / 2 * math.log(2 * math.pi) - z.square().sum(dim=1) / 2 + log_det
                loss = (1 + (-logp / channels).exp()).log().mean()
                gradients = torch.autograd.grad(loss, list(flow.parameters()))
                steps[level] += 1
                for parameter, gradient in zip(flow.parameters(), gradients, strict=True):
                    first, second = moments[level][parameter]
                    first.mul_(0.9).add_(0.1 * gradient)
                    second.mul_(0.999).add_(0.001 * gradient**2)
                    unbiased = first / (1 - 0.9 ** steps[level]), second / (1 - 0.999 ** steps[level])
                    with torch.no_grad():
                        parameter.sub_(rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8))
    with seeded(0):
        initial = [ConditionalFlow(channels, 128, 1) for channels in (7, 10)]
    for flow, expected, before in zip(trained.flows, flows, initial, strict=True):
        for ours, theirs, start in zip(flow.parameters(), expected.parameters(), before.parameters(), strict=True):
            assert (theirs - start).abs().max() > 3e-5
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_pass_trains_on_every_patch_of_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(ConditionalFlow, "log_likelihood", _recording(seen, ConditionalFlow.log_likelihood))
    quick(levels=1, meta_epochs=1, chunk=128).fit(batches(8, seed=0))
    expected = EXTRACT(batches(8, seed=0)[0])[-1].permute(0, 2, 3, 1).flatten(0, 2)
    trained = torch.cat(seen[:4])
    assert not torch.equal(trained, expected)
    assert torch.equal(trained[trained[:, 0].argsort()], expected[expected[:, 0].argsort()])


def _recording(seen: list[Tensor], original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def log_likelihood(self: ConditionalFlow, vectors: Tensor, conditions: Tensor) -> Tensor:
        seen.append(vectors)
        return original(self, vectors, conditions)

    return log_likelihood


def naive_log_likelihoods(cflow: CFLOW, loader: Sequence[Batch]) -> list[Tensor]:
    """Per level (N, h, w) in float64, patch by patch order written out."""
    levels = []
    for flow, index in zip(cflow.flows, range(-cflow.levels, 0), strict=True):
        maps = torch.cat([EXTRACT(batch)[index] for batch in loader])
        _, channels, height, width = maps.shape
        out = torch.zeros(len(maps), height, width, dtype=torch.float64)
        for y in range(height):
            for x in range(width):
                z, log_det = flow(maps[:, :, y, x], position_code(height, width)[y * width + x].expand(len(maps), -1))
                out[:, y, x] = (-channels / 2 * math.log(2 * math.pi) - z.square().sum(dim=1) / 2 + log_det) / channels
        levels.append(out.detach())
    return levels


@pytest.mark.parametrize("reference", ["train", "test"])
def test_predictions_are_the_stated_formula(reference: str) -> None:
    train, test = batches(8, seed=0), batches(11, seed=1, size=(32, 24), planted=True)
    cflow = quick(level_reference=reference).fit(train)
    found = cflow.predict(test)
    levels = naive_log_likelihoods(cflow, test)
    references = naive_log_likelihoods(cflow, train) if reference == "train" else levels
    total = torch.zeros(11, 32, 24, dtype=torch.float64)
    for level, other in zip(levels, references, strict=True):
        likelihoods = (level - other.max()).exp().clamp(max=1)[:, None]
        total += F.interpolate(likelihoods, (32, 24), mode="bilinear", align_corners=True)[:, 0]
    torch.testing.assert_close(found.maps, -total.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.scores, found.maps.flatten(1).max(dim=1).values, rtol=0, atol=0)
    # The original's map, the largest sum minus the sum, ranks alike.
    assert stats.spearmanr(found.maps.flatten(), (total.max() - total).flatten()).statistic == pytest.approx(
        1, abs=1e-6
    )
    assert found.maps.dtype == found.scores.dtype == torch.float32


def test_scores_depend_on_other_test_images_only_on_request() -> None:
    test = batches(16, seed=1, planted=True)
    for reference in ("train", "test"):
        cflow = quick(level_reference=reference).fit(batches(8, seed=0))
        whole, alone = cflow.predict(test).maps[:8], cflow.predict(test[:1]).maps
        assert torch.allclose(whole, alone, rtol=1e-4, atol=0) is (reference == "train")


def test_patches_likelier_than_all_of_training_hide_nothing() -> None:
    """Features far beyond a standard normal distribution, and a test image without any."""

    def loud(batch: Batch) -> list[Tensor]:
        return [100 * level for level in EXTRACT(batch)]

    cflow = quick(loud).fit(batches(8, seed=0))
    (test,) = batches(2, seed=1)
    found = cflow.predict([{**test, "image": test["image"] * torch.tensor([1.0, 0.0])[:, None, None, None]}])
    assert found.maps.isfinite().all() and found.scores.isfinite().all()
    torch.testing.assert_close(found.maps[1], torch.full((32, 32), -3.0))


def test_the_same_seed_gives_the_same_predictions() -> None:
    train, test = batches(16, seed=0), batches(4, seed=1)
    state = torch.get_rng_state()
    first = quick().fit(train)
    second, other = quick().fit(train), quick(seed=1).fit(train)
    assert torch.equal(first.predict(test).maps, second.predict(test).maps)
    assert torch.equal(first.fit(train).predict(test).maps, second.predict(test).maps)
    assert not torch.equal(first.predict(test).maps, other.predict(test).maps)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_callback_sees_every_meta_epoch_and_changes_nothing() -> None:
    train, test = batches(16, seed=0), batches(4, seed=1)
    seen: list[tuple[int, Tensor]] = []
    cflow = quick()
    cflow.fit(train, on_epoch=lambda epoch: seen.append((epoch, cflow.predict(test).maps)))
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert not torch.equal(seen[0][1], seen[2][1])
    assert torch.equal(seen[2][1], quick().fit(train).predict(test).maps)


@pytest.mark.slow
def test_finds_planted_outliers_and_nothing_where_nothing_is() -> None:
    cflow = CFLOW(EXTRACT, blocks=2, chunk=256, meta_epochs=4, sub_epochs=1, learning_rate=4e-3).fit(
        batches(40, seed=1)
    )
    check_finds_what_is_planted(cflow)


@pytest.mark.parametrize(
    ("extractor", "count", "size"),
    [
        (EXTRACT, 1, (32, 32)),
        (EXTRACT, 3, (4, 4)),
        (patch_extractor(5), 2, (8, 12)),
        (lambda batch: [F.avg_pool2d(EXTRACT(batch)[0], side) for side in (1, 2, 4)], 2, (16, 16)),
    ],
    ids=["one-image", "one-patch", "one-level", "pyramid"],
)
def test_small_training_sets_and_grids(extractor: Extractor, count: int, size: tuple[int, int]) -> None:
    check_finite_on_small_sets(quick(extractor), count, size)


def test_nan_features_are_named() -> None:
    check_names_nan_features(quick, EXTRACT)


def test_refuses() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean"):
        CFLOW(EXTRACT, level_reference="tests")
    check_refuses_nothing(quick)
    with pytest.raises(InputError, match="1 channel"):
        quick(patch_extractor(1)).fit(batches(2, seed=0))
    with pytest.raises(InputError, match="one size"):
        quick().fit(batches(2, seed=0)).predict(batches(2, seed=0) + batches(2, seed=0, size=(16, 32)))
