"""One process or many: everything that ranks have to agree on.

Without ``torchrun`` there is one rank, and nothing here communicates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from adfeatures.errors import AdfeaturesError, InputError
from adfeatures.locks import only_run_in

T = TypeVar("T")


@contextmanager
def processes(device: str | None) -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` started, if it did and they are not joined yet, for the length of the block.

    What holds on to their group, as DistributedDataParallel does, must not outlive the block: gloo's threads would run
    on, and a rank that ends while they do may abort.

    Args:
        device: "cpu", "cuda" or None for cuda where there is one.

    Yields:
        The device of this rank.

    Raises:
        InputError: For a device that is not there.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind not in ("cpu", "cuda") or (kind == "cuda" and torch.cuda.device_count() <= local_rank):
        raise InputError(
            f"There is no device {kind!r} for local rank {local_rank}: "
            f"torch sees {torch.cuda.device_count()} CUDA devices."
        )
    own = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield own
        return
    if kind == "cuda":
        torch.cuda.set_device(own)
    # Long enough for one rank to encode references or to validate while the others wait; torchrun ends them all when
    # one fails.
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(days=7))
    try:
        yield own
        # No rank may leave while another still talks to it.
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def only_command_in(folder: str | os.PathLike[str], *parts: str) -> Iterator[None]:
    """`adfeatures.locks.only_run_in` for all ranks together: rank 0 holds the folder, and all learn of a refusal."""
    with ExitStack() as held:
        agreed(lambda: held.enter_context(only_run_in(folder, *parts)) if rank() == 0 else None)
        yield


def agreed(function: Callable[[], T]) -> T:
    """Call a function, which does not communicate, on all ranks; what one raises of our errors is raised on all."""
    value, error = None, None
    try:
        value = function()
    except AdfeaturesError as raised:
        error = raised
    if found := next(filter(None, gather_objects(error)), None):
        raise found
    return cast(T, value)


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def cores() -> int:
    """Processors that this process may use: its share, where ``torchrun`` started several on this machine."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, own // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def barrier() -> None:
    """Wait for the other ranks."""
    if dist.is_initialized():
        dist.barrier()


def gather(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks along their first dimension, on every rank.

    Gradients flow back to the rank that they belong to.

    Where every rank computes the same loss of what was gathered, the gradient that reaches a rank is ``world_size``
    times its own share, so that the mean over the ranks, which DistributedDataParallel takes, is the gradient of one
    process.
    """
    return _Gather.apply(tensor) if world_size() > 1 else tensor


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensors = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(tensors, tensor.contiguous())
        ctx.length = len(tensor)
        return torch.cat(tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.narrow(0, rank() * ctx.length, ctx.length)
