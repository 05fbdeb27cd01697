"""A training run on disk: the state to resume from, the log, the best checkpoints.

Whatever was written stays usable.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypedDict

import torch

from adfeatures.checkpoints import atomic_path, is_finite, regular_file, save_checkpoint
from adfeatures.documents import check, dumps, parse
from adfeatures.errors import AdfeaturesError, CheckpointError, InputError
from adfeatures.pickles import read_pickle
from adfeatures.projector import ResidualProjector
from adfeatures.trained import PROJECTOR

from ..data import DATASETS
from ..distributed import barrier, rank, world_size
from ..metrics import CRITERIA, SELECTED_BY
from .config import PUBLISHED, PretrainConfig
from .curves import LOG
from .validation import Scores

STATE = "state.pt"
# What selects the checkpoints, for people.
_VALIDATED_ON = {
    "held_out": "held-out samples of the training data",
    **{name: f"the test set of {tree.title}" for name, tree in DATASETS.items()},
}
_Count: TypeAlias = Annotated[int, (0, 2**62)]


class _State(TypedDict):
    position: tuple[_Count, _Count, _Count, _Count]
    best: dict[str, float]
    config: str
    inputs: dict[str, str]
    world_size: int
    log_bytes: _Count
    rng: list[torch.Tensor]
    projector: dict[str, torch.Tensor]
    optimizer: dict[str, Any]


# Adam's averages of a gradient and of its square.
_AVERAGES = ("exp_avg", "exp_avg_sq")
# Most that the first can be, in roots of the second; and what is lost where squares underflow.
_MOST_ROOTS, _TINY = 10, 1e-15


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
        self.folder = Path(config.output)
        self.epoch = self.step = self.step_of_epoch = self.validated = 0
        self.best: dict[str, float] = {}
        self._log_bytes = 0
        self._config = config
        self._validated_on = _VALIDATED_ON.get(config.validation)
        self._inputs: dict[str, str] = {}
        self._found = self._load()

    @property
    def is_new(self) -> bool:
        """Whether there is nothing to resume from."""
        return self._found is None

    def depend_on(self, name: str, digest: str) -> None:
        """Say by its digest what else the run depends on.

        Raises:
            InputError: If the run in the folder had something else in its place.
        """
        self._inputs[name] = digest
        if self._found is None:
            return
        with self._reading():
            found = self._found["inputs"]
            # The second is the name in the states of an earlier version.
            same = digest in (found.get(name), found.get(name.replace("centers", "centres")))
        if not same:
            raise InputError(
                f"{self.folder} holds a run with other {name}. Give the same again, or choose another --output."
            )

    def resume(self, projector: ResidualProjector, optimizer: torch.optim.Optimizer, header: Mapping[str, str]) -> None:
        """Go on where the run in the folder was, if there is one.

        Args:
            projector: Saved and restored, and what the checkpoints hold.
            optimizer: Saved and restored.
            header: Metadata of the checkpoints; the config is added to it.

        Raises:
            CheckpointError: If the state does not fit.
        """
        self._projector, self._optimizer, self._header = projector, optimizer, header
        if self._found is not None:
            with self._reading():
                self._restore(self._found)
            self._found = None
        if rank() == 0:
            self._tidy()
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
                file.write(dumps(line) + "\n")
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
                "config": self._config.to_text(),
                "inputs": self._inputs,
                "world_size": world_size(),
                "log_bytes": log.stat().st_size if log.exists() else 0,
                "rng": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])],
                "projector": self._projector.state_dict(),
                "optimizer": self._optimizer.state_dict(),
            }
            with atomic_path(self.folder / STATE) as temporary:
                _save(state, temporary)
                if self._board is not None:
                    self._board.flush()
        barrier()

    def keep_best(self, scores: Scores) -> None:
        """Write ``checkpoints_{img,pix,pro}_{norm,angle}.safetensors`` for each criterion that was surpassed."""
        for method, found in scores.items():
            metrics = {
                criterion.stored: found[criterion.key] for criterion in CRITERIA if isfinite(found[criterion.key])
            }
            for criterion in CRITERIA:
                name, value = f"checkpoints_{criterion.key}_{method}", found[criterion.key]
                if value > self.best.get(name, 0.0):
                    self.best[name] = value
                    how = "approximate " if criterion.key == "pro" and self._config.recipe == PUBLISHED else ""
                    selected = f"{how}{criterion.title} of {SELECTED_BY[method]} on {self._validated_on}"
                    self._keep(name, selected, metrics)

    def keep_last(self) -> None:
        """Write ``checkpoint_last.safetensors``, the projector as it is now."""
        self._keep("checkpoint_last", "nothing: the last one", {})

    def _keep(self, name: str, selected_by: str, metrics: Mapping[str, float]) -> None:
        if rank() == 0:
            tensors = {f"{PROJECTOR}{key}": value for key, value in self._projector.state_dict().items()}
            selected = f"{selected_by}, after step {self.step}"
            metadata = {**self._header, "training": self._config.to_text(), "selected_by": selected}
            save_checkpoint(self.folder / f"{name}.safetensors", tensors, metrics=metrics, metadata=metadata)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._projector.load_state_dict(state["projector"])
        # The config is the same, and so are the settings that it gave the optimizer.
        settings = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
        _check_values(self._projector, self._optimizer)
        self.epoch, self.step, self.step_of_epoch, self.validated = state["position"]
        self.best, (cpu, *devices) = state["best"], state["rng"]
        torch.set_rng_state(cpu)
        if devices and len(devices) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(devices)
        self._log_bytes = int(state["log_bytes"])

    def _tidy(self) -> None:
        """Remove of the log what will be done, and logged, again."""
        try:
            if (self.folder / LOG).exists():
                os.truncate(self.folder / LOG, min(self._log_bytes, os.path.getsize(self.folder / LOG)))
        except OSError as error:
            raise AdfeaturesError(
                f"Cannot write to {self.folder}: {error}. Make it writable or choose another --output."
            ) from error

    def _load(self) -> dict[str, Any] | None:
        """The state in the folder, if it is of the same config and as many processes."""
        if not os.path.lexists(self.folder / STATE):
            return None
        with self._reading():
            content = read_pickle(regular_file(self.folder / STATE))
            state: dict[str, Any] = check(content, _State)
            given, processes = parse(state["config"], dict[str, Any]), state["world_size"]
        if changed := self._config.changed_since(given):
            raise InputError(
                f"{self.folder} holds a run of another config: {'; '.join(changed)}. Choose another --output."
            )
        if processes != world_size():
            raise InputError(
                f"{self.folder} holds a run on {processes} processes, now there are {world_size()}. "
                "Start as many (torchrun --nproc-per-node), or choose another --output."
            )
        return state

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Errors of a state that is damaged, or none, as CheckpointError."""
        try:
            yield
        except Exception as error:  # a damaged state makes its reader fail in any way
            raise CheckpointError(
                f"{self.folder / STATE} cannot be resumed from ({str(error)[:300]}). "
                "Choose another --output, or remove the file to begin again."
            ) from error


def _check_values(projector: ResidualProjector, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for what torch would accept: the run would continue with NaN, or fail much later."""
    tensors = projector.state_dict()
    for number, (parameter, own) in enumerate(optimizer.state.items()):
        if own.keys() != {"step", *_AVERAGES}:
            raise ValueError(f"the values {number} of the optimizer are not those of Adam")
        check(float(own["step"]), Annotated[float, (0, 2**53)], "the step of the optimizer")
        for name in _AVERAGES:
            if own[name].shape != parameter.shape:
                raise ValueError(f"{name} {number} of the optimizer is not of the shape of its parameter")
            tensors[f"{name} {number} of the optimizer"] = own[name]
        mean, mean_of_squares = (own[name].double() for name in _AVERAGES)
        # With Adam's decay rates no gradients bring one above 7.3 of the other; negative squares have no root.
        most = _MOST_ROOTS * mean_of_squares.sqrt() + _TINY
        if is_finite(mean_of_squares) and not (mean.abs() <= most).all():
            raise ValueError(f"the averages {number} of the optimizer are of no gradients")
    if odd := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise ValueError(f"{odd[0]} holds NaN or infinite values")


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

        return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
    except ImportError:
        return None
    except OSError as error:
        raise AdfeaturesError(
            f"Cannot write to {folder}: {error}. Free some space or choose another --output."
        ) from error
