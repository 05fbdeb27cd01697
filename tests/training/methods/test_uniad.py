"""UniAD against a transformer written out in numpy, its optimization, and on images with a planted outlier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from torch import Tensor

from adfeatures.errors import InputError
from training.methods import uniad
from training.methods.base import Batch, Extractor
from training.methods.uniad import ReconstructionTransformer, UniAD, jittered, neighbor_mask

EXTRACT = patch_extractor(4, 6, 5)


def quick(extractor: Extractor = EXTRACT, **settings: Any) -> UniAD:
    return UniAD(extractor, **{"hidden": 16, "heads": 2, "layers": 2, "feed_forward": 24, "epochs": 2, **settings})


@pytest.mark.parametrize(("grid", "side"), [((8, 8), 7), ((9, 12), 7), ((2, 9), 7), ((10, 8), 3), ((8, 8), 1)])
def test_neighbor_mask_is_the_naive_loop(grid: tuple[int, int], side: int) -> None:
    mask = neighbor_mask(grid, side).view(*grid, *grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            expected = torch.zeros(grid, dtype=torch.bool)
            expected[max(0, i - side // 2) : i + side // 2 + 1, max(0, j - side // 2) : j + side // 2 + 1] = True
            assert torch.equal(mask[i, j], expected)


@pytest.mark.parametrize(
    ("grid", "side"),
    [((7, 7), 5), ((5, 6), 5), ((4, 4), 3), ((3, 1), 1), ((2, 2), 1)],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_on_small_grids_the_mask_leaves_something(grid: tuple[int, int], side: int) -> None:
    mask = neighbor_mask(grid, 7)
    assert torch.equal(mask, neighbor_mask((*grid,), side))
    assert mask.diagonal().all() and not mask.all(dim=1).any()


def test_a_single_position_attends_to_itself() -> None:
    assert not neighbor_mask((1, 1), 7).any()


def test_jitter_is_normal_noise_relative_to_the_norm() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 400, 6, 6) * torch.tensor([1.0, 10.0])[:, None, None, None]
    noise = jittered(features, 20) - features
    for image, changes in zip(features, noise, strict=True):
        for y in range(6):
            for x in range(6):
                deviation = 20 * float(image[:, y, x].square().sum()) ** 0.5 / 400
                assert float(changes[:, y, x].std()) == pytest.approx(deviation, rel=0.2)
    standard = noise / (20 * features.norm(dim=1, keepdim=True) / 400)
    assert float(standard.std()) == pytest.approx(1, rel=0.02) and float(standard.mean()) == pytest.approx(0, abs=0.02)
    assert torch.equal(jittered(features, 0), features)


def naive_reconstruction(
    state: Mapping[str, Tensor], features: Tensor, heads: int, layers: int, mask: np.ndarray
) -> np.ndarray:
    """The network in evaluation mode, written out in float64 for one map (C, h, w)."""
    p = {name: value.double().numpy() for name, value in state.items()}
    channels, height, width = features.shape
    x = features.double().numpy().reshape(channels, -1).T
    position = np.stack([np.concatenate([p["columns"][j], p["rows"][i]]) for i in range(height) for j in range(width)])

    def norm(name: str, tokens: np.ndarray) -> np.ndarray:
        centered = tokens - tokens.mean(axis=1, keepdims=True)
        return (
            centered / np.sqrt((centered**2).mean(axis=1, keepdims=True) + 1e-5) * p[f"{name}.weight"]
            + p[f"{name}.bias"]
        )

    def attention(name: str, queries: np.ndarray, memory: np.ndarray) -> np.ndarray:
        weights, biases = (
            np.split(p[f"{name}.attention.in_proj_weight"], 3),
            np.split(p[f"{name}.attention.in_proj_bias"], 3),
        )
        inputs = (queries + position, memory + position, memory)
        q, k, v = (part @ w.T + b for part, w, b in zip(inputs, weights, biases, strict=True))
        size = q.shape[1] // heads
        joined = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            logits = np.where(mask, -np.inf, q[:, part] @ k[:, part].T / np.sqrt(size))
            shares = np.exp(logits - logits.max(axis=1, keepdims=True))
            joined.append(shares / shares.sum(axis=1, keepdims=True) @ v[:, part])
        out = (
            np.concatenate(joined, axis=1) @ p[f"{name}.attention.out_proj.weight"].T
            + p[f"{name}.attention.out_proj.bias"]
        )
        return norm(f"{name}.norm", queries + out)

    def feed_forward(name: str, tokens: np.ndarray) -> np.ndarray:
        hidden = np.maximum(tokens @ p[f"{name}.layers.0.weight"].T + p[f"{name}.layers.0.bias"], 0)
        return norm(f"{name}.norm", tokens + hidden @ p[f"{name}.layers.3.weight"].T + p[f"{name}.layers.3.bias"])

    encoded = x @ p["input.weight"].T + p["input.bias"]
    for i in range(layers):
        encoded = feed_forward(f"encoder.{i}.feed_forward", attention(f"encoder.{i}.attention", encoded, encoded))
    decoded = encoded
    for i in range(layers):
        tokens = attention(f"decoder.{i}.of_encoded", p[f"decoder.{i}.queries"], encoded)
        tokens = attention(f"decoder.{i}.of_decoded", tokens, decoded)
        decoded = feed_forward(f"decoder.{i}.feed_forward", tokens)
    return (norm("norm", decoded) @ p["output.weight"].T + p["output.bias"]).T.reshape(channels, height, width)


def test_the_network_is_the_naive_transformer() -> None:
    torch.manual_seed(0)
    network = ReconstructionTransformer(
        6, torch.Size((9, 8)), hidden=12, heads=3, layers=2, feed_forward=20, dropout=0.5, neighbors=7
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        features = torch.randn(2, 6, 9, 8)
        found = network(features)
    mask = np.array([[abs(a // 8 - b // 8) <= 3 and abs(a % 8 - b % 8) <= 3 for b in range(72)] for a in range(72)])
    for image, reconstruction in zip(features, found, strict=True):
        np.testing.assert_allclose(
            reconstruction, naive_reconstruction(network.state_dict(), image, 3, 2, mask), rtol=0, atol=1e-4
        )


def test_a_position_is_not_reconstructed_from_its_neighborhood_in_one_layer() -> None:
    torch.manual_seed(0)
    network = ReconstructionTransformer(
        5, torch.Size((8, 12)), hidden=8, heads=2, layers=1, feed_forward=8, dropout=0, neighbors=7
    ).eval()
    features = torch.randn(1, 5, 8, 12, requires_grad=True)
    # Through the encoder's layer, a neighbor can reach every position; by the decoder's attention alone it cannot.
    tokens = network.input(features.flatten(2).transpose(1, 2))
    attention = network.get_submodule("encoder.0.attention.attention")
    attended = attention(tokens, tokens, tokens, attn_mask=network.mask, need_weights=False)[0]
    (gradient,) = torch.autograd.grad(attended.view(8, 12, 8)[4, 5].square().sum(), features)
    reached = gradient[0].abs().sum(dim=0) > 0
    blocked = torch.zeros(8, 12, dtype=torch.bool)
    blocked[1:8, 2:9] = True
    queries_itself = torch.zeros(8, 12, dtype=torch.bool)
    queries_itself[4, 5] = True
    assert torch.equal(reached, ~blocked | queries_itself)


def test_initial_weights_are_uniform_by_xavier() -> None:
    torch.manual_seed(0)
    network = ReconstructionTransformer(
        30, torch.Size((6, 5)), hidden=40, heads=4, layers=1, feed_forward=50, dropout=0.1, neighbors=7
    )
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert 0.95 * bound < module.weight.abs().max().item() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
            assert not module.bias.any(), name
    for codes in (network.rows, network.columns):
        assert 0 <= codes.min().item() < 0.1 and 0.9 < codes.max().item() <= 1


def test_layers_start_as_copies_but_for_their_linear_maps() -> None:
    torch.manual_seed(0)
    network = ReconstructionTransformer(
        6, torch.Size((3, 3)), hidden=12, heads=3, layers=3, feed_forward=20, dropout=0.1, neighbors=3
    )
    for stack in (network.encoder, network.decoder):
        first, *others = stack
        linear = {f"{name}.weight" for name, module in first.named_modules() if isinstance(module, torch.nn.Linear)}
        copied = {name for name, _ in first.named_parameters()} - linear
        assert any("in_proj_weight" in name for name in copied) and len(linear) >= 3
        for other in map(dict, (layer.named_parameters() for layer in others)):
            for name, parameter in first.named_parameters():
                assert torch.equal(parameter, other[name]) == (name in copied), name
                assert parameter.data_ptr() != other[name].data_ptr()


def test_predictions_are_the_stated_formula() -> None:
    method = quick().fit(batches(8, seed=0))
    test = batches(5, seed=1, batch_size=3, planted=True)
    found = method.predict(test)
    assert method.network is not None
    features = torch.cat([torch.cat(EXTRACT(batch), dim=1) for batch in test])
    for map_, score, image in zip(found.maps, found.scores, features, strict=True):
        mask = neighbor_mask((8, 8), 7).numpy()
        difference = naive_reconstruction(method.network.state_dict(), image, 2, 2, mask) - image.double().numpy()
        distance = torch.from_numpy((difference**2).sum(axis=0) ** 0.5)
        expected = F.interpolate(distance[None, None], (32, 32), mode="bilinear", align_corners=True)[0, 0]
        torch.testing.assert_close(map_, expected.float(), rtol=1e-4, atol=1e-4)
        assert score == map_.max()


def test_levels_of_a_pyramid_meet_on_the_coarsest_grid() -> None:
    def pyramid(batch: Batch) -> list[Tensor]:
        finest = EXTRACT(batch)[0]
        return [finest, F.avg_pool2d(finest, 2), finest[:, :2]]

    method = quick(pyramid).fit(batches(4, seed=0, size=(32, 48)))
    assert method.network is not None and tuple(method.network.grid) == (4, 6)
    (batch,) = batches(1, seed=0, size=(32, 48))
    found = method._features(batch, method.network)
    finest = EXTRACT(batch)[0]
    rows, columns = torch.linspace(0, 7, 4, dtype=torch.float64), torch.linspace(0, 11, 6, dtype=torch.float64)
    for y, row in enumerate(rows.tolist()):
        for x, column in enumerate(columns.tolist()):
            above, left = min(int(row), 6), min(int(column), 10)
            down, across = row - above, column - left
            corners = finest[0, :, above : above + 2, left : left + 2]
            upper = corners[:, 0, 0] * (1 - across) + corners[:, 0, 1] * across
            lower = corners[:, 1, 0] * (1 - across) + corners[:, 1, 1] * across
            expected = upper * (1 - down) + lower * down
            torch.testing.assert_close(found[0, :4, y, x], expected, rtol=0, atol=1e-4)
            torch.testing.assert_close(found[0, 8:, y, x], expected[:2], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[:, 4:8], F.avg_pool2d(finest, 2))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, float]]:
    """Learning rate, weight decay and gradient norm of every step that AdamW takes."""
    taken = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        (group,) = self.param_groups
        norm = torch.stack([p.grad.norm() for p in group["params"]]).norm()
        taken.append((group["lr"], group["weight_decay"], norm.item()))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return taken


def test_optimization_is_the_stated_one(
    steps: list[tuple[float, float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uniad, "DECAY_EVERY", 3)
    quick(epochs=8).fit(batches(4, seed=0, batch_size=2))
    rates, decays, norms = zip(*steps, strict=True)
    # The rate falls one epoch late, as in the original: epochs 0 to 3, 4 to 6, 7.
    assert rates == pytest.approx([1e-4] * 8 + [1e-5] * 6 + [1e-6] * 2)
    assert set(decays) == {1e-4}
    assert max(norms) == pytest.approx(0.1, rel=1e-3)


def test_what_is_jittered_is_reconstructed_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of the mean squared distance of the reconstruction from the features without jitter."""
    (batch,) = batches(3, seed=0)
    monkeypatch.setattr(uniad, "jittered", lambda features, scale: features + scale)
    states: list[tuple[dict[str, Tensor], Tensor, tuple[float, float]]] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        assert method.network is not None
        state = {name: value.clone() for name, value in method.network.state_dict().items()}
        gradient = method.network.get_parameter("output.bias").grad
        assert gradient is not None
        states.append((state, gradient.clone(), self.param_groups[0]["betas"]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    method = quick(dropout=0, jitter=0.5, epochs=1)
    method.fit([batch])
    ((state, gradient, betas),) = states
    features = torch.cat(EXTRACT(batch), dim=1)
    mask = neighbor_mask((8, 8), 7).numpy()
    differences = [naive_reconstruction(state, image + 0.5, 2, 2, mask) - image.double().numpy() for image in features]
    expected = torch.from_numpy(np.mean(differences, axis=(0, 2, 3)))
    # Of the gradient its direction is left: all gradients together are cut to a length.
    torch.testing.assert_close(gradient.double() / gradient.norm(), expected / expected.norm(), rtol=0, atol=1e-5)
    assert betas == (0.9, 0.999)


def test_dropout_and_jitter_act_in_training_only() -> None:
    train, test = batches(8, seed=0), batches(4, seed=1)
    plain = quick(dropout=0, jitter=0).fit(train).predict(test).maps
    assert not torch.equal(plain, quick(dropout=0).fit(train).predict(test).maps)
    assert not torch.equal(plain, quick(jitter=0).fit(train).predict(test).maps)
    method = quick().fit(train)
    assert torch.equal(method.predict(test).maps, method.predict(test).maps)


def test_the_same_seed_gives_the_same_predictions() -> None:
    train, test = batches(16, seed=0), batches(4, seed=1)
    state = torch.get_rng_state()
    first, second, other = quick().fit(train), quick().fit(train), quick(seed=1).fit(train)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(first.predict(test).maps, second.predict(test).maps)
    assert torch.equal(first.fit(train).predict(test).maps, second.predict(test).maps)
    assert not torch.equal(first.predict(test).maps, other.predict(test).maps)


def test_the_callback_sees_every_tenth_epoch_and_the_last_and_changes_nothing() -> None:
    train, test = batches(4, seed=0, size=(16, 16)), batches(4, seed=1, size=(16, 16))
    seen = []
    method = quick(epochs=23)
    method.fit(train, on_epoch=lambda epoch: seen.append((epoch, method.predict(test).maps, torch.rand(3))))
    assert [epoch for epoch, *_ in seen] == [10, 20, 23]
    assert not torch.equal(seen[0][1], seen[2][1])
    assert torch.equal(seen[2][1], quick(epochs=23).fit(train).predict(test).maps)


@pytest.mark.slow
def test_finds_planted_outliers_and_nothing_where_nothing_is() -> None:
    # The reduced epochs go with a higher learning rate.
    train = [
        batch for pair in zip(batches(40, seed=1), batches(40, seed=4, product="other"), strict=True) for batch in pair
    ]
    method = UniAD(EXTRACT, hidden=64, heads=4, layers=1, feed_forward=64, epochs=4, learning_rate=2e-3).fit(train)
    check_finds_what_is_planted(method)


@pytest.mark.slow
def test_learns_what_can_be_reconstructed() -> None:
    """Features that follow from those of other positions are reconstructed ever better."""

    def same_everywhere(batch: Batch) -> list[Tensor]:
        return [EXTRACT(batch)[1].mean(dim=(2, 3), keepdim=True).expand(-1, -1, 8, 8) * 10]

    test = batches(8, seed=1)
    # So few channels that the paper's jitter would drown them.
    methods = [
        quick(same_everywhere, epochs=epochs, learning_rate=5e-3, jitter=1).fit(batches(32, seed=0))
        for epochs in (1, 20)
    ]
    first, later = (method.predict(test).maps.mean() for method in methods)
    assert later < 0.6 * first


@pytest.mark.parametrize(
    ("extractor", "count", "size"),
    [(EXTRACT, 1, (32, 32)), (EXTRACT, 3, (4, 4)), (EXTRACT, 3, (8, 8)), (patch_extractor(1), 2, (8, 36))],
    ids=["one-image", "one-patch", "four-patches", "one-channel"],
)
def test_small_training_sets_and_grids(extractor: Extractor, count: int, size: tuple[int, int]) -> None:
    check_finite_on_small_sets(quick(extractor), count, size)


def test_nan_features_are_named() -> None:
    check_names_nan_features(quick, EXTRACT)


def test_refuses() -> None:
    for settings in ({"hidden": 15, "heads": 3}, {"hidden": 16, "heads": 3}):
        with pytest.raises(InputError, match="hidden must be even"):
            quick(EXTRACT, **settings)
    check_refuses_nothing(quick)
    with pytest.raises(InputError, match=r"maps of \(8, 8\) positions, got \(4, 8\)"):
        quick().fit(batches(2, seed=0)).predict(batches(2, seed=0, size=(16, 32)))
