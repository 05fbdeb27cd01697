"""The training step against the trajectory of the original implementation, and N processes against one."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers.golden_values import assert_near, fill, golden, value
from helpers.models import photo
from helpers.ranks import run_ranks

from adfeatures.images import build_transform, normalized
from adfeatures.projector import ResidualProjector
from training.pretraining.config import PretrainConfig
from training.pretraining.residuals import batch_residuals
from training.pretraining.step import encode_images, losses, on_device, train_step, view_residuals

LEVELS = range(4)


def original_masks(step: int) -> torch.Tensor:
    masks = torch.zeros(4, 1, 224, 224, dtype=torch.uint8)
    masks[1, :, 20:90, 30:120] = 1
    masks[3, :, 100 : 121 + 5 * step, 60:160] = 1
    return masks


@pytest.mark.slow
def test_ten_steps_are_the_original_ones() -> None:
    projector = ResidualProjector([32] * 4)
    projector.load_state_dict(
        fill({key: list(tensor.shape) for key, tensor in projector.state_dict().items()}, "train.projector.")
    )
    optimizer = torch.optim.Adam(projector.parameters(), lr=1e-4, weight_decay=5e-4)
    centers = [value(f"train.center.{level}", (32,), 0.1) for level in LEVELS]
    expected = golden("training")
    found = []
    for step in range(10):
        first = [value(f"train.{step}.r1.{level}", (4, 32, 16, 16)) for level in LEVELS]
        second = [
            one + value(f"train.{step}.r2.{level}", (4, 32, 16, 16), 0.3)
            for level, one in zip(LEVELS, first, strict=True)
        ]
        projected = projector([torch.cat(pair) for pair in zip(first, second, strict=True)])
        views = [level.chunk(2) for level in projected]
        ones, others = [view[0] for view in views], [view[1] for view in views]
        angle, norm = losses(ones, others, original_masks(step), centers, PretrainConfig())
        optimizer.zero_grad()
        (angle + norm).backward()
        optimizer.step()
        found.append([angle.item(), norm.item(), (angle + norm).item()])
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected["losses"], rtol=1e-3, atol=0)
    for name, final in expected.items():
        if name.startswith("final."):
            assert_near(projector.state_dict()[name.removeprefix("final.")], final, 1e-3)


@pytest.mark.slow
def test_three_steps_in_bfloat16_are_the_published_ones() -> None:
    """Matching, projector, losses and Adam, all in bfloat16.

    Beside sums in another order, attention is fused here, and the gradients of both views are rounded once.
    """
    projector = ResidualProjector([32] * 4)
    shapes = {key: list(tensor.shape) for key, tensor in projector.state_dict().items()}
    projector.load_state_dict(fill(shapes, "train16.projector."))
    projector.bfloat16()
    before = {name: tensor.clone() for name, tensor in projector.state_dict().items()}
    optimizer = torch.optim.Adam(projector.parameters(), lr=1e-4, weight_decay=5e-4, fused=False)
    centers = [value(f"train16.center.{level}", (32,), 0.1) for level in LEVELS]
    config, found = PretrainConfig(recipe="published"), []
    for step in range(3):
        first = [value(f"train16.{step}.f1.{level}", (4, 32, 16, 16)) for level in LEVELS]
        views, references = [], []
        for level, one in enumerate(first):
            other = one + value(f"train16.{step}.f2.{level}", (4, 32, 16, 16), 0.3)
            near = 0.8 * one[:, None] + value(f"train16.{step}.refs.{level}", (4, 4, 32, 16, 16), 0.5)
            views.append(torch.stack([one, other], dim=1).flatten(0, 1).bfloat16())
            references.append(near.flatten(0, 1).bfloat16())
        # In the place of images come as many numbers, and of their encoding the features.
        batch = {"views": torch.zeros(4, 2, 1), "references": torch.zeros(16, 1), "label": torch.tensor([0, 1, 0, 1])}
        batch |= {"mask": original_masks(step), "reference_indices": torch.arange(16).view(4, 4)}
        encoders = (Mock(return_value=views), Mock(return_value=references))
        values = train_step(projector, optimizer, batch, encoders, centers, config)
        found.append([values["angle"], values["norm"]])
    expected = golden("training_bf16")
    off = (torch.tensor(found) / expected["losses"] - 1).abs()
    assert off[0].max() < 1e-3 and off.max() < 2e-3
    updates = [
        torch.cat([(weights[name].float() - before[name].float()).flatten() for name in before if name[:2] == "l1"])
        for weights in (
            projector.state_dict(),
            {name.removeprefix("weights."): tensor for name, tensor in expected.items()},
        )
    ]
    ours, theirs = updates
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9995
    torch.testing.assert_close(ours.norm(), theirs.norm(), rtol=1e-2, atol=0)
    # Half of what lies between two numbers of 1/16 and more is above any update of this rate.
    old, new = (
        torch.cat([part[f"l{level + 1}_proj.x_ref"] for level in LEVELS]) for part in (before, projector.state_dict())
    )
    large, moved = old.abs() >= 1 / 16, new != old
    assert large.any() and moved.any() and not moved[large].any()


RANKS = """
import sys, torch
from training.pretraining.config import PretrainConfig
from training.pretraining.dataset import StepSampler
from training.distributed import processes, rank, world_size
from training.pretraining.step import train_step
from torch.nn.parallel import DistributedDataParallel
from adfeatures.projector import ResidualProjector

def run(path, accumulate):
    torch.manual_seed(0)
    projector = ResidualProjector([8, 12], num_heads=4, num_keys=16)
    backbone = torch.nn.Conv2d(3, 8, 8, 8), torch.nn.Conv2d(3, 12, 16, 16)
    centers = [torch.randn(8), torch.randn(12)]
    views, references = torch.randn(4, 2, 3, 48, 48), torch.randn(4, 2, 3, 48, 48)
    share = StepSampler(4, 4, 0).share
    batch = {"views": views[share], "references": references[share].flatten(0, 1)}
    batch["reference_indices"] = torch.arange(len(batch["references"])).view(-1, 2)
    # Of the four images only the last one, on the last rank, is anomalous.
    label, mask = torch.tensor([0, 0, 0, 1]), torch.zeros(4, 1, 48, 48, dtype=torch.uint8)
    mask[3, :, 10:40, 10:40] = 1
    batch["label"], batch["mask"] = label[share], mask[share]
    encode = lambda images: [level(images).detach() for level in backbone]
    model = DistributedDataParallel(projector) if world_size() > 1 else projector
    values = train_step(
        model,
        torch.optim.SGD(projector.parameters()),
        batch,
        (encode, encode),
        centers,
        PretrainConfig(precision="float32", accumulate=accumulate),
    )
    if rank() == 0:
        gradients = {name: parameter.grad for name, parameter in projector.named_parameters()}
        torch.save({"values": values, **gradients}, path)

with processes("cpu"):
    run(sys.argv[1], int(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("count", "accumulate"), [(2, 1), pytest.param(4, 1, marks=pytest.mark.release), (2, 2)])
def test_processes_give_the_gradients_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, accumulate: int
) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "one.pt"), str(accumulate)])
    runpy.run_path(str(script), run_name="__main__")
    done = run_ranks(count, script, tmp_path / "many.pt", str(accumulate))
    assert done.returncode == 0, done.stderr
    one, many = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "many.pt"))
    assert min(abs(one["values"][name]) for name in ("angle", "norm")) > 0.1
    assert one["l1_proj.layers.0.mlp.fc2.weight"].abs().max() > 0.01
    torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-6)


def small_step(
    labels: list[int], accumulate: int = 1, images: slice = slice(None), called_anomalous: bool = False
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """The values of a step on some of four small images with these labels, and how it changed the projector."""
    torch.manual_seed(0)
    projector = ResidualProjector([8], num_heads=2, num_keys=4)
    optimizer = torch.optim.SGD(projector.parameters(), lr=1)
    mask = torch.zeros(4, 1, 16, 16, dtype=torch.uint8)
    mask[torch.tensor(labels) > 0] = 1
    mask[..., 8:] = 0
    batch = {
        "views": torch.randn(4, 2, 3, 16, 16),
        "mask": mask,
        "label": torch.tensor(labels),
        "reference_indices": torch.arange(8).view(4, 2),
    }
    backbone = torch.nn.Conv2d(3, 8, 4, 4)
    before = [parameter.clone() for parameter in projector.parameters()]
    config = PretrainConfig(precision="float32", accumulate=accumulate)
    references = torch.randn(8, 3, 16, 16)
    batch = {name: value[images] for name, value in batch.items()} | {"references": references}
    if called_anomalous:
        batch["label"] = torch.ones_like(batch["label"])

    def encode(images: torch.Tensor) -> list[torch.Tensor]:
        return [backbone(images)]

    values = train_step(projector, optimizer, batch, (encode, encode), [None], config)
    return values, [after.detach() - old for after, old in zip(projector.parameters(), before, strict=True)]


def test_all_tensors_go_to_the_device() -> None:
    batch = {name: torch.ones(1) for name in ("views", "mask", "label", "reference_indices")}
    moved = on_device({**batch, "reference_maps": [torch.ones(1)], "path": ["a"]}, torch.device("meta"))
    assert {level.device.type for level in moved.pop("reference_maps")} == {"meta"}
    assert {key: value.device.type for key, value in moved.items()} == dict.fromkeys(batch, "meta")


def test_references_are_encoded_once_each_for_those_that_drew_them() -> None:
    """Against encoding them anew for each image, and with maps that were kept."""
    torch.manual_seed(0)
    backbone = torch.nn.Conv2d(3, 8, 4, 4)
    views, references = torch.randn(3, 2, 3, 16, 16), torch.randn(5, 3, 16, 16)
    indices = torch.tensor([[1, 1, 4], [4, 0, 1], [0, 4, 4]])
    encoded: list[torch.Tensor] = []

    def encode(images: torch.Tensor) -> list[torch.Tensor]:
        return [backbone(images)]

    def note(images: torch.Tensor) -> list[torch.Tensor]:
        encoded.append(images)
        return encode(images)

    batch: dict[str, Any] = {"views": views, "reference_indices": indices}
    found = view_residuals({**batch, "references": references}, encode, note)
    assert len(encoded) == 1 and torch.equal(encoded[0], references[[0, 1, 4]])
    kept = view_residuals({**batch, "reference_maps": encode(references)}, encode, lambda _: pytest.fail("encoded"))
    for number in range(2):
        for row in range(3):
            (expected,) = batch_residuals(
                encode(views[row : row + 1, number]), [backbone(references[indices[row]])[None]]
            )
            for one in (found, kept):
                torch.testing.assert_close(one[number][0][row], expected[0])


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_images_are_normalized_where_they_are_encoded(precision: str) -> None:
    """To the very bits that the transform gives."""
    transform = build_transform((16, 16), (0.48, 0.45, 0.40), (0.22, 0.25, 0.27))
    photos = [photo(seed, (16, 16)) for seed in range(3)]
    seen: list[torch.Tensor] = []
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    backbone = torch.nn.Conv2d(3, 8, 4, 4).to(dtype)
    backbone.register_forward_pre_hook(lambda _, images: seen.append(images[0]))
    maps = encode_images(
        torch.from_numpy(np.stack([np.asarray(one) for one in photos])),
        (transform.mean, transform.std),
        torch.nn.Sequential(backbone, torch.nn.Unflatten(0, (1, -1))),
        torch.device("cpu"),
        precision,
    )
    assert torch.equal(seen[0], torch.stack([transform(one) for one in photos]).to(dtype))
    assert maps[0].dtype == dtype


@pytest.mark.gpu
def test_images_are_normalized_to_the_same_bits_on_any_device() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(-1, -1, 3)
    statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert torch.equal(normalized(pixels.cuda(), *statistics).cpu(), normalized(pixels, *statistics))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_anomalous_images_is_skipped(accumulate: int) -> None:
    values, changes = small_step([0, 0, 0, 0], accumulate)
    assert values == {"skipped": 1.0} and not any(change.any() for change in changes)
    values, changes = small_step([0, 0, 0, 1])
    assert any(change.any() for change in changes) and values["loss"] == pytest.approx(values["angle"] + values["norm"])


def test_accumulation_takes_the_mean_over_the_micro_batches() -> None:
    values, changes = small_step([1, 0, 0, 1], accumulate=2)
    (first, first_changes), (second, second_changes) = (
        small_step([1, 0, 0, 1], images=images) for images in (slice(2), slice(2, 4))
    )
    assert values == pytest.approx({name: (first[name] + second[name]) / 2 for name in values}, rel=1e-5)
    expected = [(one + other) / 2 for one, other in zip(first_changes, second_changes, strict=True)]
    torch.testing.assert_close(changes, expected, rtol=1e-4, atol=1e-6)


def test_micro_batches_without_anomalous_images_count_where_the_batch_has_one() -> None:
    values, changes = small_step([0, 0, 0, 1], accumulate=2)
    marked, marked_changes = small_step([0, 0, 0, 1], images=slice(2, 4))
    # The normal half by itself: its batch would be skipped, so an image is called anomalous whose mask is empty.
    normal, normal_changes = small_step([0, 0, 0, 1], images=slice(0, 2), called_anomalous=True)
    assert normal["angle"] == 0 and normal["norm"] > 0
    assert values == pytest.approx({name: (marked[name] + normal[name]) / 2 for name in values}, rel=1e-5)
    expected = [(one + other) / 2 for one, other in zip(marked_changes, normal_changes, strict=True)]
    torch.testing.assert_close(changes, expected, rtol=1e-4, atol=1e-6)
