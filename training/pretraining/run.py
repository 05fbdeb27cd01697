"""A training run on disk: the state to resume from, the log, the best checkpoints.

Whatever was written stays usable.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from adfeatures.checkpoints import atomic_path, save_checkpoint
from adfeatures.errors import AdfeaturesError, CheckpointError, InputError
from adfeatures.projector import ResidualProjector
from adfeatures.trained import PROJECTOR

from ..distributed import barrier, rank, world_size
from ..metrics import CRITERIA, SELECTED_BY
from .config import FREE, PretrainConfig
from .curves import draw_curves
from .validation import Scores

STATE, LOG, CURVES = "state.pt", "log.jsonl", "curves.png"
_VALIDATED_ON = {"held_out": "held-out samples of the training data", "mvtec": "the test set of MVTec AD"}
# Names of the files that ``atomic_path`` writes to; one that is there was left by a process that was killed.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.\w+")
# What torch raises of a file that is no state, or not whole, and what is raised of one that holds something else.
_DAMAGE = (pickle.UnpicklingError, OSError, EOFError, RuntimeError, LookupError, TypeError, ValueError, AttributeError)


class TrainingRun:
    """The folder of a run. Only rank 0 writes.

    Args:
        config: The config; its ``output`` is the folder.

    Attributes:
        epoch: Epochs that are finished.
        step: Steps that are done, and ``step_of_epoch`` those of the unfinished epoch.
        validated: The step after which the last validation was made.
        best: The best value so far for each checkpoint that is kept.

    Raises:
        InputError: If the folder holds a run of another config or another number of processes.
        CheckpointError: If its state cannot be read.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.folder, self.config = Path(config.output), config
        self.epoch = self.step = self.step_of_epoch = self.validated = 0
        self.best: dict[str, float] = {}
        self._inputs: dict[str, str] = {}
        self._resumable: Mapping[str, Any] = {}
        self._board: Any = None
        self._found: dict[str, Any] | None = None
        if (self.folder / STATE).exists():
            with _reading(self.folder / STATE):
                self._found = torch.load(self.folder / STATE, map_location="cpu", weights_only=True)
                self._check(json.loads(self._found["config"]), self._found["world_size"])
                # As a state of an earlier version has it.
                self._found["inputs"].setdefault("centers", self._found["inputs"].get("centres"))

    def depend_on(self, name: str, digest: str) -> None:
        """Say by its digest what else the run depends on.

        Raises:
            InputError: If the run in the folder had something else in its place.
        """
        self._inputs[name] = digest
        if self._found is not None and self._found["inputs"].get(name) != digest:
            raise InputError(
                f"{self.folder} holds a run with other {name}. Give the same again, or choose another --output."
            )

    def resume(self, **resumable: Any) -> None:
        """Go on where the run in the folder was, if there is one.

        Args:
            resumable: What is saved and restored: modules and optimizers by name.

        Raises:
            CheckpointError: If the state does not fit.
        """
        self._resumable, log_bytes = resumable, 0
        if self._found is not None:
            with _reading(self.folder / STATE):
                log_bytes = self._restore(self._found)
            self._found = None
        if rank() == 0:
            self._tidy(log_bytes)
        self._board = _tensorboard(self.folder, self.step + 1)

    def advance(self) -> None:
        """Count a step."""
        self.step, self.step_of_epoch = self.step + 1, self.step_of_epoch + 1

    def log(self, kind: str, values: Mapping[str, Any]) -> None:
        """Append a line to log.jsonl, and to TensorBoard where it is installed."""
        if rank():
            return
        line = {"kind": kind, "epoch": self.epoch, "step": self.step, **values}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if self._board is not None:
                for name, value in _flat({kind: values}):
                    self._board.add_scalar(name, value, self.step)
        except OSError as error:
            raise AdfeaturesError(
                f"Cannot write the log in {self.folder}: {error}. Free some space; the same command resumes."
            ) from error

    def save(self) -> None:
        """Write the state to resume from, atomically."""
        if rank() == 0:
            log = self.folder / LOG
            state = {
                "position": [self.epoch, self.step, self.step_of_epoch, self.validated],
                "best": dict(self.best),
                "config": json.dumps(dataclasses.asdict(self.config)),
                "inputs": self._inputs,
                "world_size": world_size(),
                "log_bytes": log.stat().st_size if log.exists() else 0,
                "rng": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])],
                **{name: each.state_dict() for name, each in self._resumable.items()},
            }
            with atomic_path(self.folder / STATE) as temporary:
                _save(state, temporary)
                if self._board is not None:
                    self._board.flush()
        barrier()

    def keep_best(self, scores: Scores, projector: ResidualProjector, header: Mapping[str, str]) -> None:
        """Write ``checkpoints_{img,pix,pro}_{norm,angle}.safetensors`` for each criterion that was surpassed."""
        for method, found in scores.items():
            metrics = {
                criterion.stored: found[criterion.key] for criterion in CRITERIA if isfinite(found[criterion.key])
            }
            for criterion in CRITERIA:
                name, value = f"checkpoints_{criterion.key}_{method}", found[criterion.key]
                if value > self.best.get(name, 0.0):
                    self.best[name] = value
                    data = _VALIDATED_ON[self.config.validation]
                    selected = f"{criterion.title} of {SELECTED_BY[method]} on {data}, after step {self.step}"
                    self._write(name, projector, {**header, "selected_by": selected}, metrics)

    def keep_last(self, projector: ResidualProjector, header: Mapping[str, str]) -> None:
        """Write ``checkpoint_last.safetensors``, the projector as it is now."""
        selected = f"nothing: the last one, after step {self.step}"
        self._write("checkpoint_last", projector, {**header, "selected_by": selected}, {})

    def draw(self) -> None:
        """Draw the losses and metrics of the log to curves.png."""
        if rank() == 0:
            draw_curves(self.folder / LOG, self.folder / CURVES)

    def _write(
        self, name: str, projector: ResidualProjector, metadata: Mapping[str, str], metrics: Mapping[str, float]
    ) -> None:
        if rank() == 0:
            tensors = {f"{PROJECTOR}{key}": value for key, value in projector.state_dict().items()}
            save_checkpoint(self.folder / f"{name}.safetensors", tensors, metrics=metrics, metadata=metadata)

    def _tidy(self, log_bytes: int) -> None:
        """Remove what killed processes left half written, and of the log what will be done, and logged, again."""
        try:
            for path in self.folder.rglob(".*"):
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink()
            if (self.folder / LOG).exists():
                os.truncate(self.folder / LOG, min(log_bytes, os.path.getsize(self.folder / LOG)))
        except OSError as error:
            raise AdfeaturesError(
                f"Cannot write to {self.folder}: {error}. Make it writable or choose another --output."
            ) from error

    def _restore(self, state: Mapping[str, Any]) -> int:
        """Take over the state. The length of the log at that time is returned, in bytes."""
        for name, each in self._resumable.items():
            each.load_state_dict(state[name])
        self.epoch, self.step, self.step_of_epoch, self.validated = state["position"]
        self.best, (cpu, *devices) = state["best"], state["rng"]
        torch.set_rng_state(cpu)
        if devices and len(devices) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(devices)
        return int(state["log_bytes"])

    def _check(self, other: Mapping[str, Any], processes: int) -> None:
        own = json.loads(json.dumps(dataclasses.asdict(self.config)))
        changed = [
            f"{name} was {other.get(name)!r}, is {value!r}"
            for name, value in own.items()
            if name not in FREE and other.get(name) != value
        ]
        if changed:
            raise InputError(
                f"{self.folder} holds a run of another config: {'; '.join(changed)}. Choose another --output."
            )
        if processes != world_size():
            raise InputError(
                f"{self.folder} holds a run on {processes} processes, now there are {world_size()}. "
                "Start as many (torchrun --nproc-per-node), or choose another --output."
            )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of a state that is damaged, or none, as CheckpointError."""
    try:
        yield
    except AdfeaturesError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path} cannot be resumed from ({error}). Choose another --output, or remove the file to begin again."
        ) from error


def _save(state: Mapping[str, Any], path: Path) -> None:
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        # Behind torch's error about positions in the file stands what went wrong, such as a full disk.
        raise OSError(str(error.__context__ or error).partition("\n")[0]) from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings, by names like "validation/norm/pro"."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _tensorboard(folder: Path, first_step: int) -> Any:
    """A writer that hides what an earlier process logged from the first step on; None without TensorBoard."""
    if rank():
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    try:
        return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
    except OSError as error:
        raise AdfeaturesError(
            f"Cannot write to {folder}: {error}. Free some space or choose another --output."
        ) from error
