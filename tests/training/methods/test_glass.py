"""GLASS against the stated steps written out, its batches, and on images with a planted outlier."""

from __future__ import annotations

from pathlib import Path
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
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from adfeatures.errors import InputError
from training.methods.base import Batch, Extractor
from training.methods.glass import GLASS, hard_focal_loss, project
from training.methods.patches import neighborhood_vectors

EXTRACT = patch_extractor(5, 8, 7)


def quick(extractor: Extractor = EXTRACT, **settings: Any) -> GLASS:
    return GLASS(extractor, **{"dim": 12, "hidden": 16, "epochs": 2, **settings})


def patch_vectors(images: Tensor) -> Tensor:
    return neighborhood_vectors(EXTRACT({"image": images})[-2:], 12)


def test_projection_keeps_the_direction_and_bounds_the_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    points, center = (torch.randn(50, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    points = center + (points - center) * torch.logspace(-1, 1, 50, dtype=torch.float64)[:, None]
    for point, middle, found in zip(points, center, project(points, center, torch.tensor(1.5), (2, 4)), strict=True):
        distance = float(((point - middle) ** 2).sum() ** 0.5)
        expected = middle + (point - middle) / distance * min(max(distance, 3.0), 6.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_focal_loss_is_the_stated_formula() -> None:
    rng = np.random.default_rng(0)
    scores, target = rng.uniform(size=101), rng.integers(0, 2, 101)
    error = (scores - target) ** 2
    losses = []
    for s, m in zip(scores[error >= np.median(error)], target[error >= np.median(error)], strict=True):
        one_hot = np.clip([1 - m, m], 1e-5, 1 - 1e-5)
        p = one_hot @ [1 - s, s] + 1e-5
        losses.append(-((1 - p) ** 2) * np.log(p))
    found = hard_focal_loss(torch.from_numpy(scores), torch.from_numpy(target).double())
    assert len(losses) == 51
    assert float(found) == pytest.approx(np.mean(losses), abs=1e-12)


def test_focal_loss_of_certain_scores_is_finite() -> None:
    scores = torch.tensor([0.0, 1.0], requires_grad=True)
    loss = hard_focal_loss(scores, torch.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.isfinite() and scores.grad is not None and scores.grad.isfinite().all()


def naive_loss(glass: GLASS, batch: Batch, augmented: Tensor, masks: Tensor, generator: torch.Generator) -> Tensor:
    """The loss of a batch as the paper's steps say it, with probabilities and an in-place ascent."""
    embed = lambda images: glass.adapt(patch_vectors(images)).flatten(0, 2)  # noqa: E731
    bce = torch.nn.BCELoss()
    score = lambda vectors: torch.sigmoid(glass.discriminator(vectors))  # noqa: E731
    u, v = embed(batch["image"]), embed(augmented)
    m = F.max_pool2d(masks, 4).flatten() == 1
    c = glass.center.repeat(len(batch["image"]), 1, 1, 1).flatten(0, 2)
    g = u + glass.deviation * torch.randn(u.shape, generator=generator)
    if not g.requires_grad:
        g.requires_grad_()
    r = torch.quantile(torch.cat([(v - c)[~m], u - c]).norm(dim=1), 0.75).detach()

    def pull(x: Tensor, low: float, high: float) -> Tensor:
        h = x - c
        d = h.norm(dim=1, keepdim=True)
        return c + h / d * d.clamp(low * r, high * r)

    for step in range(20):
        both = score(torch.cat([u, g]))
        direction = torch.autograd.grad(bce(both[len(u) :], torch.ones(len(u), 1)), g)[0]
        g = g + 0.001 * direction / direction.norm(dim=1, keepdim=True)
        if step in (4, 9, 14, 19):
            g = pull(g, 1, 2)
    both = score(torch.cat([u, g]))
    loss = bce(both[: len(u)], torch.zeros(len(u), 1)) + bce(both[len(u) :], torch.ones(len(u), 1))
    moved = v.clone()
    moved[m] = pull(v, 2, 4)[m]
    s = score(moved)[:, 0]
    error = (s - m.float()) ** 2
    hard = error >= torch.quantile(error, 0.5)
    p = torch.where(m, s, 1 - s)[hard]
    return loss + (-((1 - p) ** 2) * p.log()).mean()


@pytest.mark.parametrize("adapter", [False, True])
def test_loss_and_gradients_are_those_of_the_stated_steps(adapter: bool) -> None:
    (batch,) = batches(6, seed=0)
    # With so small a deviation the textures are strong, so that some defects lie beyond the outer radius.
    glass = quick(adapter=adapter, noise=0.3, epochs=1, std=(0.01, 0.01, 0.01)).fit([batch])
    glass.discriminator.train()
    augmented, masks = glass.synthesis(batch, np.random.default_rng(5))
    parameters = [*glass.discriminator.parameters(), *glass.adapt.parameters()]
    state = {name: value.clone() for name, value in glass.discriminator.state_dict().items()}
    found = glass._loss(batch, np.random.default_rng(5), torch.Generator().manual_seed(5))
    found_gradients = torch.autograd.grad(found, parameters)
    found_state = {name: value.clone() for name, value in glass.discriminator.state_dict().items()}
    glass.discriminator.load_state_dict(state)
    expected = naive_loss(glass, batch, augmented, masks, torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(found_gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
    # The statistics of batch norm are updated by the 21 evaluations of both kinds of vectors and that of the local
    # anomalies.
    assert int(found_state["1.num_batches_tracked"]) == int(state["1.num_batches_tracked"]) + 22
    torch.testing.assert_close(found_state["1.running_mean"], glass.discriminator.state_dict()["1.running_mean"])


@pytest.mark.parametrize("adapter", [False, True])
def test_predictions_are_the_stated_formula(adapter: bool) -> None:
    glass = quick(adapter=adapter).fit(batches(9, seed=0))
    test = batches(5, seed=1, size=(32, 40), batch_size=2, planted=True)
    found = glass.predict(test)
    p = glass.discriminator.state_dict()
    vectors = patch_vectors(torch.cat([batch["image"] for batch in test]))
    if adapter:
        q = glass.adapt.state_dict()
        vectors = vectors @ q["weight"].T + q["bias"]
    hidden = vectors @ p["0.weight"].T + p["0.bias"]
    hidden = (hidden - p["1.running_mean"]) / (p["1.running_var"] + 1e-5) ** 0.5 * p["1.weight"] + p["1.bias"]
    hidden = torch.where(hidden > 0, hidden, 0.2 * hidden)
    patches = 1 / (1 + torch.exp(-(hidden @ p["3.weight"].T)))[..., 0]
    torch.testing.assert_close(found.scores, patches.flatten(1).max(dim=1).values, rtol=1e-4, atol=1e-5)
    for map_, patch in zip(found.maps, patches, strict=True):
        upsampled = F.interpolate(patch[None, None], (32, 40), mode="bilinear", align_corners=False)[0, 0]
        np.testing.assert_allclose(map_, gaussian_filter(upsampled.numpy(), 4), rtol=0, atol=1e-5)


def test_center_is_the_mean_of_the_training_images() -> None:
    train = batches(11, seed=0)
    glass = quick(epochs=1).fit(train)
    expected = patch_vectors(torch.cat([batch["image"] for batch in train])).mean(dim=0)
    torch.testing.assert_close(glass.center, expected, rtol=0, atol=1e-5)


def test_initial_weights_are_normal_by_xavier() -> None:
    glass = GLASS(EXTRACT, dim=300, hidden=200, epochs=0, adapter=True).fit(batches(2, seed=0))
    discriminator, adapter = glass.discriminator.state_dict(), glass.adapt.state_dict()
    assert discriminator["0.weight"].std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.03)
    assert discriminator["3.weight"].std().item() == pytest.approx((2 / 201) ** 0.5, rel=0.2)
    assert adapter["weight"].std().item() == pytest.approx((2 / 600) ** 0.5, rel=0.03)
    assert "3.bias" not in discriminator


@pytest.mark.parametrize("adapter", [False, True])
def test_optimizers_are_the_stated_ones(adapter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int, float, float, tuple[float, float]]] = []

    def recording(original: Any) -> Any:
        def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            (group,) = self.param_groups
            rate, decay = group["lr"], group["weight_decay"]
            taken.append((type(self).__name__, len(group["params"]), rate, decay, group["betas"]))
            return original(self, *args, **kwargs)

        return step

    monkeypatch.setattr(torch.optim.AdamW, "step", recording(torch.optim.AdamW.step))
    monkeypatch.setattr(torch.optim.Adam, "step", recording(torch.optim.Adam.step))
    quick(adapter=adapter, epochs=1).fit(batches(8, seed=0))
    # Weight and bias of the first layer and of batch norm, weight of the last.
    expected = [("AdamW", 5, 2e-4, 0.01, (0.9, 0.999))]
    assert list(dict.fromkeys(taken)) == expected + [("Adam", 2, 1e-4, 1e-5, (0.9, 0.999))] * adapter


def test_noise_depends_on_the_adapter() -> None:
    assert quick().deviation == 0.005
    assert quick(adapter=True).deviation == 0.015
    assert quick(adapter=True, noise=0.1).deviation == 0.1


@pytest.mark.parametrize(("samples", "steps"), [(15, 2), (16, 3), (392, 4)], ids=["within", "exactly", "small-class"])
def test_an_epoch_ends_beyond_its_samples(samples: int, steps: int) -> None:
    glass = quick(epochs=2, samples_per_epoch=samples).fit(batches(32, seed=0))
    assert int(glass.discriminator.state_dict()["1.num_batches_tracked"]) == 2 * steps * 22


def test_augmented_images_reach_the_extractor_without_their_paths() -> None:
    calls = []

    def spy(batch: Batch) -> list[Tensor]:
        calls.append(batch)
        return EXTRACT(batch)

    train = batches(8, seed=0)
    quick(spy, epochs=1).fit(train)
    named, nameless = [c for c in calls if c["path"] == train[0]["path"]], [c for c in calls if c["path"] == [None] * 8]
    assert len(nameless) == 1 and len(named) + len(nameless) == len(calls)
    assert all(torch.equal(call["image"], train[0]["image"]) for call in named)
    changed = (nameless[0]["image"] != train[0]["image"]).flatten(1)
    assert changed.any(dim=1).all() and not changed.all()
    assert nameless[0]["product"] == train[0]["product"] and nameless[0]["origin"] == train[0]["path"]


def test_augmented_images_are_of_the_type_of_the_images() -> None:
    kernel = torch.randn(5, 3, 4, 4).bfloat16()

    def extractor(batch: Batch) -> list[Tensor]:
        return [F.conv2d(batch["image"], kernel, stride=4)]

    train = [{**batch, "image": batch["image"].bfloat16()} for batch in batches(8, seed=0)]
    assert quick(extractor).fit(train).predict(train).maps.isfinite().all()


def test_textures_and_foregrounds_are_used(tmp_path: Path) -> None:
    (tmp_path / "dtd" / "dotted").mkdir(parents=True)
    (tmp_path / "masks" / "noise").mkdir(parents=True)
    Image.new("RGB", (50, 40), (0, 0, 0)).save(tmp_path / "dtd" / "dotted" / "a.jpg")
    for number in range(3):
        mask = np.zeros((32, 32), np.uint8)
        mask[:, :8] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / "noise" / f"{number:03d}.png")
    calls = []

    def spy(batch: Batch) -> list[Tensor]:
        calls.append(batch)
        return EXTRACT(batch)

    train = batches(3, seed=0)
    quick(spy, textures=tmp_path / "dtd", foregrounds=str(tmp_path / "masks")).fit(train)
    augmented = [call["image"] for call in calls if call["path"][0] is None]
    assert len(augmented) == 2
    for images in augmented:
        assert torch.equal(images[..., 8:], train[0]["image"][..., 8:])
        assert (images[..., :8] != train[0]["image"][..., :8]).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("adapter", [False, True])
def test_the_same_seed_gives_the_same_predictions(adapter: bool) -> None:
    train, test = batches(16, seed=0), batches(4, seed=1)
    state, np_state = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
    first, second = quick(adapter=adapter).fit(train), quick(adapter=adapter).fit(train)
    other = quick(adapter=adapter, seed=1).fit(train)
    assert torch.equal(first.predict(test).maps, second.predict(test).maps)
    assert torch.equal(first.fit(train).predict(test).scores, second.predict(test).scores)
    assert not torch.equal(first.predict(test).maps, other.predict(test).maps)
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(
        np.random.get_state(legacy=False)["state"]["key"], np_state
    )


def test_the_callback_sees_every_epoch_and_changes_nothing() -> None:
    train, test = batches(16, seed=0), batches(4, seed=1)
    seen = []
    glass = quick(epochs=3)
    glass.fit(train, on_epoch=lambda epoch: seen.append((epoch, glass.predict(test).maps)))
    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert not torch.equal(seen[0][1], seen[2][1])
    assert torch.equal(seen[2][1], quick(epochs=3).fit(train).predict(test).maps)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_finds_planted_outliers_and_nothing_where_nothing_is(adapter: bool) -> None:
    # The reduced epochs need a higher learning rate: at the paper's, 30 steps hardly leave the initial weights.
    extractor = patch_extractor(12, 9, 16, 16)
    glass = GLASS(extractor, adapter=adapter, dim=32, hidden=32, epochs=6, learning_rate=0.02).fit(batches(40, seed=1))
    check_finds_what_is_planted(glass, hits=0.75)


def test_scores_do_not_depend_on_the_other_images() -> None:
    glass = quick().fit(batches(8, seed=0))
    test = batches(8, seed=1)
    alone = [glass.predict(batches(8, seed=1, batch_size=1)[i : i + 1]).maps for i in range(8)]
    torch.testing.assert_close(glass.predict(test).maps, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    ("extractor", "count", "size"),
    [
        (EXTRACT, 1, (32, 32)),
        (EXTRACT, 3, (4, 4)),
        (patch_extractor(3), 2, (8, 12)),
        (lambda batch: [F.avg_pool2d(EXTRACT(batch)[0], side) for side in (1, 2, 4)], 9, (16, 16)),
    ],
    ids=["one-image", "one-patch", "one-level", "pyramid"],
)
def test_small_training_sets_and_grids(extractor: Extractor, count: int, size: tuple[int, int], adapter: bool) -> None:
    check_finite_on_small_sets(quick(extractor, adapter=adapter), count, size)


def test_nan_features_are_named() -> None:
    def broken_by_textures(batch: Batch) -> list[Tensor]:
        return [level * (torch.nan if batch["path"][0] is None else 1) for level in EXTRACT(batch)]

    check_names_nan_features(quick, EXTRACT)
    with pytest.raises(InputError, match="an augmented image hold NaN"):
        quick(broken_by_textures).fit(batches(8, seed=0))


def test_refuses() -> None:
    check_refuses_nothing(quick)
    with pytest.raises(InputError, match="single image of one patch"):
        quick().fit(batches(1, seed=0, size=(4, 4)))
