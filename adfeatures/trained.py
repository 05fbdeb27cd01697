"""The file of a trained projector: its weights, and what its header says of the model that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from . import catalog
from .backbones import check_fit, load_strictly
from .checkpoints import BACKBONE, Checkpoint, load_checkpoint, of_prefix
from .documents import DocumentError, Size, parse
from .errors import CheckpointError, UnknownNameError
from .projector import ResidualProjector

# In the header of a projector of features as they are, an ablation of the paper.
NO_RESIDUAL = "no_residual"
# Prefix of the keys in files of ours.
PROJECTOR = "projector."


@dataclass(frozen=True)
class TrainedWeights:
    """A file of trained weights: what it holds, and where it lies, for error messages."""

    checkpoint: Checkpoint
    source: str

    @classmethod
    def read(cls, path: Path) -> TrainedWeights:
        """Read a file. Errors as of ``load_checkpoint``."""
        return cls(load_checkpoint(path), str(path))

    @cached_property
    def backbone(self) -> dict[str, Tensor]:
        """Weights of the backbone, none where the file has the projector alone."""
        return of_prefix(self.checkpoint.state_dict, BACKBONE)

    @cached_property
    def projector(self) -> dict[str, Tensor]:
        """Weights of the projector."""
        return of_prefix(self.checkpoint.state_dict, PROJECTOR) or self.checkpoint.state_dict

    @property
    def num_heads(self) -> int:
        """Attention heads, which a state dict cannot tell: they stand in every header that is not the authors'."""
        return self.fact("num_heads", Annotated[int, (1, 1 << 16)]) or 16

    @property
    def img_size(self) -> tuple[int, int] | None:
        """Height and width that the header names."""
        return self.fact("img_size", Size | None)

    @property
    def takes_residuals(self) -> bool:
        """Whether the projector is one of residuals, as all are but for an ablation of the paper."""
        return NO_RESIDUAL not in self.checkpoint.metadata

    def identify(self, arch: str | None, tag: str | None) -> tuple[str, str | None]:
        """The model and the tag of these weights: those asked for, and else those that the header names.

        Raises:
            CheckpointError: If the two contradict each other, or there is neither.
        """
        header = self.checkpoint.metadata.get("model")
        try:
            found = catalog.find_model(header) if header is not None else None
        except UnknownNameError as error:
            problem = f"{self.source} is a checkpoint of {header!r}, which this version does not know"
            raise CheckpointError(f"{problem}. {error}") from error
        if found is None:
            if arch is None:
                problem = f"{self.source} does not say which model it is for"
                raise CheckpointError(f"{problem}. Name it: create_model(NAME, weights=...).")
            return arch, tag
        if arch and (found[0] != arch or (tag and found[1] and found[1] != tag)):
            problem = f"{self.source} is a checkpoint of {header}, not of {f'{arch}.{tag}' if tag else arch}"
            raise CheckpointError(f"{problem}. Create that model instead.")
        return found[0], tag or found[1]

    def create_projector(self, channels: Sequence[int]) -> ResidualProjector:
        """The projector of these weights.

        Raises:
            CheckpointError: If they are not exactly those of a projector of these channels.
        """
        projector = self._empty_projector(channels)
        load_strictly(projector, self.projector, self.source)
        return projector

    def check_projector(self, channels: Sequence[int]) -> None:
        """Raise what ``create_projector`` would, at no cost."""
        with torch.device("meta"):
            projector = self._empty_projector(channels)
        check_fit(projector, self.projector, self.source)

    def _empty_projector(self, channels: Sequence[int]) -> ResidualProjector:
        keys = self.projector.get("l1_proj.x_ref")
        return ResidualProjector(channels, self.num_heads, 2048 if keys is None else keys.shape[1])

    def fact(self, name: str, kind: Any) -> Any:
        """An entry of the header that holds JSON, None where there is none.

        Raises:
            CheckpointError: For anything but JSON of this kind, see ``adfeatures.documents.check``.
        """
        text = self.checkpoint.metadata.get(name)
        try:
            return parse(text, kind, f"the {name} of its header") if text is not None else None
        except DocumentError as error:
            raise self.header_error(f"{error}.") from error

    def header_error(self, problem: str) -> CheckpointError:
        """The error to raise about the header."""
        return CheckpointError(f"{self.source}: {problem}")
