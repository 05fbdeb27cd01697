"""What ranks agree on, alone and as two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks

from adfeatures.errors import InputError
from training.distributed import barrier, gather, gather_objects, processes, rank, world_size


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_its_own_world() -> None:
    tensor = torch.ones(2, requires_grad=True)
    with processes("cpu") as device:
        assert device == torch.device("cpu")
        assert (rank(), world_size()) == (0, 1)
        assert gather(tensor) is tensor and gather_objects("own") == ["own"]
        barrier()
    assert not torch.distributed.is_initialized()


def test_without_a_name_the_device_is_the_one_there_is() -> None:
    with processes(None) as device:
        assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda", "tpu", "cuda:7"])
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=f"no device '{name}' for local rank 0: torch sees 0"), processes(name):
        pass


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="'cuda' for local rank 2: torch sees 2 CUDA devices"), processes("cuda"):
        pass


TWO = """
import torch
from training.distributed import gather, gather_objects, processes, rank, world_size
with processes("cpu"):
    assert world_size() == 2
    assert gather_objects({"rank": rank()}) == [{"rank": 0}, {"rank": 1}]
    whole = torch.arange(12.0).view(4, 3) + 1
    own = whole[2 * rank() : 2 * rank() + 2].clone().requires_grad_()
    gathered = gather(own)
    assert torch.equal(gathered, whole)
    # Twice the gradient of one process, since DistributedDataParallel takes the mean.
    (gathered**3).sum().backward()
    assert torch.equal(own.grad, 2 * 3 * own.detach() ** 2)
    assert torch.equal(gather(torch.tensor([rank()])), torch.tensor([0, 1]))
assert not torch.distributed.is_initialized()
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    done = run_ranks(2, tmp_path / "two.py")
    assert done.returncode == 0, done.stderr
