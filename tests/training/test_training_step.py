"""The training step against the trajectory of the original implementation, and N processes against one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_values import assert_near, fill, golden, value
from ranks import run_ranks

from adfeatures.projector import ResidualProjector
from training.config import PretrainConfig
from training.step import losses, train_step

LEVELS = range(4)


def original_masks(step: int) -> torch.Tensor:
    masks = torch.zeros(4, 1, 224, 224, dtype=torch.uint8)
    masks[1, :, 20:90, 30:120] = 1
    masks[3, :, 100 : 121 + 5 * step, 60:160] = 1
    return masks


def test_ten_steps_are_the_original_ones() -> None:
    projector = ResidualProjector([32] * 4)
    projector.load_state_dict(fill({key: list(tensor.shape) for key, tensor in projector.state_dict().items()}, "train.projector."))
    optimizer = torch.optim.Adam(projector.parameters(), lr=1e-4, weight_decay=5e-4)
    centers = [value(f"train.center.{level}", (32,), 0.1) for level in LEVELS]
    expected = golden("training")
    found = []
    for step in range(10):
        first = [value(f"train.{step}.r1.{level}", (4, 32, 16, 16)) for level in LEVELS]
        second = [one + value(f"train.{step}.r2.{level}", (4, 32, 16, 16), 0.3) for level, one in zip(LEVELS, first, strict=True)]
        projected = projector([torch.cat(pair) for pair in zip(first, second, strict=True)])
        views = [[level.chunk(2)[view] for level in projected] for view in range(2)]
        angle, norm = losses(*views, original_masks(step), centers, PretrainConfig())
        optimizer.zero_grad()
        (angle + norm).backward()
        optimizer.step()
        found.append([angle.item(), norm.item(), (angle + norm).item()])
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected["losses"], rtol=1e-3, atol=0)
    for name, final in expected.items():
        if name.startswith("final."):
            assert_near(projector.state_dict()[name.removeprefix("final.")], final, 1e-3)


RANKS = """
import sys, torch
from training.config import PretrainConfig
from training.distributed import processes, rank, world_size
from training.step import losses
from torch.nn.parallel import DistributedDataParallel
from adfeatures.projector import ResidualProjector

def run(path):
    torch.manual_seed(0)
    projector = ResidualProjector([8, 12], num_heads=4, num_keys=16)
    views = [[torch.randn(4, 8, 6, 6), torch.randn(4, 12, 3, 3)] for _ in range(2)]
    masks = torch.zeros(4, 1, 48, 48)
    masks[3, :, 10:40, 10:40] = 1  # of the four images only the last one, on the last rank, is anomalous
    centers = [torch.randn(8), None]
    model = DistributedDataParallel(projector) if world_size() > 1 else projector
    count = 4 // world_size()
    own = slice(rank() * count, (rank() + 1) * count)
    projected = model([torch.cat([one[own], other[own]]) for one, other in zip(*views)])
    first, second = zip(*(level.chunk(2) for level in projected))
    angle, norm = losses(first, second, masks[own], centers, PretrainConfig())
    (angle + norm).backward()
    if rank() == 0:
        torch.save({"losses": torch.stack([angle, norm]).detach(), **{n: p.grad for n, p in projector.named_parameters()}}, path)

with processes("cpu"):
    run(sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_give_the_gradients_of_one(tmp_path: Path, count: int) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    for processes, name in ((1, "one.pt"), (count, "many.pt")):
        done = run_ranks(processes, script, tmp_path / name)
        assert done.returncode == 0, done.stderr
    one, many = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "many.pt"))
    assert one["losses"].abs().min() > 0.1
    torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-6)


def small_step(labels: list[int], accumulate: int = 1) -> tuple[dict[str, float], bool]:
    """The values of a step on four small images with these labels, and whether it changed the projector."""
    torch.manual_seed(0)
    projector = ResidualProjector([8], num_heads=2, num_keys=4)
    optimizer = torch.optim.Adam(projector.parameters(), lr=1e-4)
    mask = torch.zeros(4, 1, 16, 16, dtype=torch.uint8)
    mask[torch.tensor(labels) > 0] = 1
    mask[..., 8:] = 0
    batch = {"views": torch.randn(4, 2, 3, 16, 16), "mask": mask, "label": torch.tensor(labels), "references": torch.randn(4, 2, 3, 16, 16)}
    backbone = torch.nn.Conv2d(3, 8, 4, 4)
    before = [parameter.clone() for parameter in projector.parameters()]
    config = PretrainConfig(precision="float32", accumulate=accumulate)
    values = train_step(projector, optimizer, batch, lambda images: [backbone(images)], None, [None], config)
    return values, not all(map(torch.equal, before, projector.parameters()))


def test_a_batch_without_anomalous_images_is_skipped() -> None:
    assert small_step([0, 0, 0, 0]) == ({"skipped": 1.0}, False)
    values, changed = small_step([0, 0, 0, 1])
    assert changed and values["loss"] == pytest.approx(values["angle"] + values["norm"])


def test_parts_without_anomalous_images_do_not_count() -> None:
    values, _ = small_step([0, 0, 0, 1], accumulate=2)
    alone, _ = small_step([0, 0, 0, 1])
    # The second part holds the anomalous image, and half of the normal ones to contrast it with.
    assert values["loss"] != alone["loss"] and values["angle"] != 0
