"""Engines that score on several processes and machines: the ranks of ``torchrun``, and Ray Data.

The process that lists the images writes all results, so that the others need to see the images and weights alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist

from .detectors import detector_of
from .errors import AdfeaturesError, InputError
from .inspection import Engine, Outcome, Terms, outcomes
from .predictor import Detector
from .results import ImageRow
from .runtime import load_extra

Item = TypeVar("Item")
# What a process answers to its share of the files.
Answer: TypeAlias = "list[Outcome] | AdfeaturesError"
# Batches that a rank scores between two meetings, and batches that Ray is given at a time.
ROUND, WINDOW = 4, 4096
# How often a worker of Ray that dies is replaced, and how many of them a single photo may end.
RESTARTS, TRIES = 20, 2
_KEPT = "Finished rows are kept. Run the same command with --resume to continue."


def answer(model: Detector, files: Sequence[str], terms: Terms) -> Answer:
    """Score files, to be told elsewhere what came of them."""
    try:
        return list(outcomes(model, files, terms))
    except AdfeaturesError as error:
        return error


def _told(found: Answer) -> list[Outcome]:
    if isinstance(found, AdfeaturesError):
        raise found
    return found


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _shares(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while share := list(islice(items, size)):
        yield share


def engine_of(options: argparse.Namespace, model: Detector) -> Engine | None:
    """What scores by the options and the way that this process was started, None for this process alone."""
    if options.engine != "ray":
        return partial(over_ranks, model) if dist.is_initialized() else None
    if dist.is_initialized():
        raise InputError("torchrun and --engine ray cannot be combined: start it without torchrun.")
    return partial(over_ray, options)


@contextmanager
def ranks() -> Iterator[int]:
    """Join the processes that ``torchrun`` started, if it did, for the length of the block.

    Each computes on a GPU of its own where it computes on GPUs.

    Yields:
        The rank of this process.

    Raises:
        InputError: For more processes on a machine than it has GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield 0
        return
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if count:
        if local >= count:
            raise InputError(f"There are {count} GPUs, too few for local rank {local}. Start one process per GPU.")
        torch.cuda.set_device(local)
    # Long enough to list many images while the others wait; torchrun ends them all when one fails.
    _meet(dist.init_process_group, "gloo", timeout=timedelta(days=1))
    try:
        yield dist.get_rank()
        _dismiss()
    except AdfeaturesError:
        _dismiss()
        raise
    finally:
        dist.destroy_process_group()


def _dismiss() -> None:
    """Have the other ranks, which wait for their next share, end their work."""
    if dist.get_rank() == 0:
        with suppress(AdfeaturesError):  # They are gone.
            _scatter([None] * dist.get_world_size())


def over_ranks(model: Detector, files: Iterable[str], terms: Terms) -> Generator[Outcome]:
    """An engine for rank 0, where the other ranks ``serve``."""
    world = dist.get_world_size()
    shares = _shares(files, ROUND * terms.batch_size)
    while asked := [(share, terms) for share in islice(shares, world)]:
        told: list[Any] = [None] * world
        own = _scatter(asked + [([], terms)] * (world - len(asked)))
        _meet(dist.gather_object, answer(model, *own), told)
        for found in told:
            yield from _told(found)


def serve(options: argparse.Namespace) -> None:
    """Score what rank 0 asks for until it is done.

    Raises:
        AdfeaturesError: If it is gone.
    """
    model = _quiet_detector(options)
    while (own := _scatter(None)) is not None:
        _meet(dist.gather_object, answer(model, *own), None)


def _quiet_detector(options: argparse.Namespace) -> Detector:
    """As the process that writes the results has it too, which has said what there is to say of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return detector_of(options)


def _scatter(values: list[Any] | None) -> Any:
    own: list[Any] = [None]
    _meet(dist.scatter_object_list, own, values)
    return own[0]


def _meet(function: Callable[..., object], *values: object, **options: object) -> None:
    try:
        function(*values, **options)
    except RuntimeError as error:
        raise AdfeaturesError(
            f"A process of this run has ended or cannot be reached ({_reason(error)}). {_KEPT}"
        ) from error


class _Begun:
    """How often work was begun that was never ended, kept where no worker that dies takes it along."""

    def __init__(self) -> None:
        self._counts: Counter[Hashable] = Counter()

    def add(self, work: Hashable, count: int) -> int:
        """The count with what is added to it."""
        self._counts[work] += count
        return self._counts[work]


class _Worker:
    """What an actor of Ray holds: a detector of its own.

    Args:
        options: What the detector is made by.
        begun: ``_Begun.add`` on an actor that all workers share.
    """

    def __init__(self, options: argparse.Namespace, begun: Callable[[Hashable, int], int]) -> None:
        self._model, self._begun = _quiet_detector(options), begun

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        files, terms = pickle.loads(row["asked"])
        sound = files
        if self._begun(tuple(files), 1) > 1:
            sound = [file for file in files if self._can_score(file, terms)]
        told = answer(self._model, sound, terms)
        if isinstance(told, list):
            rest = iter(told)
            told = [next(rest) if file in sound else _deadly(file) for file in files]
        return {"told": pickle.dumps(told)}

    def _can_score(self, file: str, terms: Terms) -> bool:
        """Whether this process outlives a photo, unless others did not."""
        if self._begun(file, 1) > TRIES:
            return False
        answer(self._model, [file], terms)
        self._begun(file, -1)
        return True


def _deadly(file: str) -> Outcome:
    reason = f"{TRIES + 1} processes died while reading it, perhaps out of memory. Make it smaller, or save it again."
    return Outcome(ImageRow(file, error=f"Cannot read {file}: {reason}"))


def _add(begun: Any, work: Hashable, count: int) -> int:
    return int(load_extra("ray", "ray").get(begun.add.remote(work, count)))


def over_ray(options: argparse.Namespace, files: Iterable[str], terms: Terms) -> Generator[Outcome]:
    """An engine on the cluster that RAY_ADDRESS names, or on this machine: see ``adfeatures score``.

    Each worker computes with as many threads as this process, so that its sums are the same. One that dies is replaced;
    a photo that repeatedly ends workers, perhaps for lack of memory, gets a row with the error.

    Raises:
        InputError: If Ray is not installed.
        AdfeaturesError: If Ray cannot be started, or workers die again and again.
    """
    load_extra("pyarrow", "ray")
    ray, data = load_extra("ray", "ray"), load_extra("ray.data", "ray")
    context = data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # What it loses is told below.
    on_gpu = str(options.device or "").startswith("cuda")
    kind, each = ("GPU", 1) if on_gpu else ("CPU", torch.get_num_threads())
    if not ray.is_initialized():
        try:
            ray.init(logging_level=logging.ERROR, include_dashboard=False)
        except Exception as error:  # It has no type of its own for some.
            raise AdfeaturesError(
                f"Ray cannot be started ({_reason(error)}). Run again, or see whether RAY_ADDRESS names a cluster."
            ) from error
    try:
        asked_for = (pickle.dumps((share, terms)) for share in _shares(files, terms.batch_size))
        for window in _shares(asked_for, WINDOW):
            size = max(1, int(ray.cluster_resources().get(kind, 0) // each))
            begun = ray.remote(num_cpus=0)(_Begun).remote()
            asked = data.from_items([{"asked": share} for share in window], override_num_blocks=len(window))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
                told = asked.map(
                    _Worker,
                    fn_constructor_args=[options, partial(_add, begun)],
                    compute=data.ActorPoolStrategy(size=min(size, len(window))),
                    max_restarts=RESTARTS,
                    max_task_retries=RESTARTS,
                    **{f"num_{kind.lower()}s": each},
                )
            for row in told.iter_rows():
                yield from _told(pickle.loads(row["told"]))
    except ray.exceptions.RayError as error:
        raise AdfeaturesError(f"Ray has lost its workers ({_reason(error)}). {_KEPT}") from error
