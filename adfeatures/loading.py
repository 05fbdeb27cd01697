"""From names and places to backbones with weights, and to the files of trained projectors."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import catalog
from .backbones import (
    EfficientNet,
    StateDict,
    VisionTransformer,
    check_fit,
    check_levels,
    check_size,
    create_backbone,
    load_strictly,
)
from .checkpoints import Checkpoint, convert, load_checkpoint
from .errors import CheckpointError, InputError, UnknownNameError
from .hub import resolve
from .projector import ResidualProjector
from .timm_backbones import TimmBackbone, find_timm

_logger = logging.getLogger(__name__)

Encoder: TypeAlias = "VisionTransformer | EfficientNet | TimmBackbone"
Weights: TypeAlias = "str | os.PathLike[str] | None"
ASSETS = Path(__file__).parent / "assets"
RANDOM = "random"
PROJECTOR, BACKBONE = "projector.", "backbone."
_PLACE = "hf-hub:{}:{}"


def load_backbone(
    name: str,
    *,
    weights: Weights | StateDict | Trained = None,
    img_size: int | tuple[int, int] | None = None,
    levels: Sequence[int] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[Encoder, catalog.Backbone]:
    """Create a frozen encoder, in eval mode, on the CPU.

    Args:
        name: A name of ``catalog.BACKBONES``, or that of a vision transformer or convolutional pyramid in timm, with or
            without ``.tag``.
        weights: None for the published ones, "random", a path, "hf-hub:owner/repo[@revision][:path/in/repo]",
            "local-dir:/path", a state dict, or a file of trained weights that holds them.
        img_size: Input size in pixels that must be possible, one side or (H, W). The default is that of the backbone.
        levels: Blocks or stages, counted from 1, whose outputs are returned. The default is that of the backbone.
        cache_dir: Folder of downloaded weights. The default is that of huggingface_hub.

    Returns:
        The module, which maps (B, 3, H, W) to a list of (B, C_l, h_l, w_l), and its description, with the levels and
        the size asked for.

    Raises:
        UnknownNameError: For an unknown backbone.
        InputError: For levels or a size that it cannot have, or weights that must be given by hand.
        DownloadError: If weights cannot be found or fetched.
        CheckpointError: If weights are damaged or those of another backbone.
    """
    entry = find_backbone(name, levels, img_size)
    state, source = _read_backbone(name, entry, weights, cache_dir)
    if state is not None and "NC" in entry.license.upper():
        _logger.warning("The weights of %s are licensed %s: not for commercial use.", name, entry.license)
    if entry.family == "timm":
        backbone: Encoder = TimmBackbone(str(entry.timm_name).partition(".")[0], entry.blocks, state, source)
    else:
        backbone = create_backbone(name, weights=state, img_size=entry.img_size, levels=levels, source=source)
    return backbone.requires_grad_(False).eval(), entry


def find_backbone(
    name: str, levels: Sequence[int] | None = None, img_size: int | tuple[int, int] | None = None
) -> catalog.Backbone:
    """The description of a backbone of the catalog or of timm. Arguments and errors as in ``load_backbone``."""
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    if name not in catalog.BACKBONES:
        return find_timm(name, levels, size)
    entry = catalog.BACKBONES[name]
    entry = replace(entry, img_size=check_size(size or entry.img_size, entry.patch_size))
    if levels is None or tuple(levels) == entry.blocks:
        return entry
    if entry.family == "efficientnet":
        raise InputError(f"{name} is convolutional: its levels cannot be changed.")
    levels, count = check_levels(levels, max(entry.blocks)), len(levels)
    return replace(entry, blocks=levels, channels=entry.channels[:1] * count, reductions=entry.reductions[:1] * count)


def check_fetchable(name: str, entry: catalog.Backbone) -> None:
    """Make sure that the weights of a backbone can be had without the user's help.

    Raises:
        InputError: Otherwise, saying where they are.
    """
    if entry.family == "timm" and entry.hub_file is None:
        raise InputError(f'timm names no published weights of {name}. Give their path, or "random" if that is meant.')
    if entry.asset is None and entry.hub_file is None:
        where = f"get {entry.original_file} from {entry.origin} and give its path as the weights of the backbone"
        raise InputError(
            f"The weights of {name} (license: {entry.license}) are never fetched by themselves. If the license allows your use, {where}: "
            f'backbone_weights="/path/to/{entry.original_file}" of create_model.'
        )


def published_backbone(name: str, entry: catalog.Backbone, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The file of a backbone's published weights, from the package, the cache or the Hub.

    Raises:
        InputError: For weights that must be given by hand.
        DownloadError: If they cannot be fetched.
    """
    if entry.asset is not None:
        return ASSETS / entry.asset
    check_fetchable(name, entry)
    return resolve(_PLACE.format(*entry.hub_file), cache_dir=cache_dir)  # type: ignore[misc]


def _read_backbone(
    name: str, entry: catalog.Backbone, weights: Any, cache_dir: str | os.PathLike[str] | None
) -> tuple[StateDict | None, str]:
    """A state dict, None for random weights, and where it came from."""
    if isinstance(weights, Trained):
        return weights.backbone, weights.source
    if isinstance(weights, Mapping):
        return weights, "the given state dict"
    if weights == RANDOM:
        return None, RANDOM
    if weights is None or (weights == entry.tag and entry.tag):
        path = published_backbone(name, entry, cache_dir)
    else:
        path = resolve(weights, candidates=("model.safetensors", entry.original_file), cache_dir=cache_dir)
    state = load_checkpoint(path).state_dict
    return _part(state, BACKBONE) or state, str(path)


def _part(state: StateDict, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


@dataclass(frozen=True)
class Trained:
    """A file of trained weights: what it holds, and where it lies, for error messages."""

    checkpoint: Checkpoint
    source: str

    @property
    def model(self) -> tuple[str, str | None] | None:
        """The model and the tag that the header names, None where it names none.

        Raises:
            CheckpointError: For a model that is not in the catalog.
        """
        name = self.checkpoint.metadata.get("model")
        try:
            return catalog.find_model(name) if name is not None else None
        except UnknownNameError as error:
            raise CheckpointError(
                f"{self.source} is a checkpoint of {name!r}, which this version does not know. {error}"
            ) from error

    @property
    def backbone(self) -> dict[str, Tensor]:
        return _part(self.checkpoint.state_dict, BACKBONE)

    @property
    def projector(self) -> dict[str, Tensor]:
        return _part(self.checkpoint.state_dict, PROJECTOR) or self.checkpoint.state_dict

    @property
    def num_heads(self) -> int:
        # A state dict cannot tell, so it stands in the metadata of every file that is not the authors'.
        heads = self.fact("num_heads")
        if heads is not None and (type(heads) is not int or heads < 1):
            raise CheckpointError(
                f"{self.source}: the num_heads of its header must be a positive number, got {heads!r}."
            )
        return heads or 16

    @property
    def img_size(self) -> tuple[int, int] | None:
        """Height and width that the header names."""
        size = self.fact("img_size")
        if size is None:
            return None
        if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)):
            raise CheckpointError(f"{self.source}: the img_size of its header must be [height, width], got {size!r}.")
        return size[0], size[1]

    def find_backbone(self, arch: str) -> tuple[str, catalog.Backbone]:
        """The name and the description of the backbone that the weights belong to, with the input size of the model.

        The header must describe a backbone of timm, and may describe one of the catalog, where the levels are not the
        usual ones.

        Raises:
            CheckpointError: If the header says nothing that it must, or something that the backbone does not bear out.
        """
        name, facts = catalog.MODELS[arch].backbone, self.fact("backbone")
        if name and facts is None:
            return name, replace(catalog.BACKBONES[name], img_size=self.img_size or catalog.BACKBONES[name].img_size)
        try:
            name, blocks = name or facts["timm_name"], tuple(facts["blocks"])
            claimed = (tuple(facts["channels"]), tuple(facts["reductions"]))
            mean, std = (tuple(map(float, facts[key])) for key in ("mean", "std"))
            entry = find_backbone(name, blocks)
        except (InputError, UnknownNameError) as error:
            raise CheckpointError(f"{self.source}: the backbone of its header does not exist. {error}") from error
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.source}: its header must describe the backbone of {arch} by timm_name, blocks, channels, reductions, mean and std; "
                f"it says {facts!r}."
            ) from error
        if claimed != (entry.channels, entry.reductions) or len(mean) != 3 or len(std) != 3:
            raise CheckpointError(
                f"{self.source}: its header describes {name} as {facts!r}, but it has channels {entry.channels} and reductions "
                f"{entry.reductions}. Was it made with another version of timm?"
            )
        return name, replace(entry, normalization=(mean, std), img_size=self.img_size or entry.img_size)

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

    def fact(self, name: str) -> Any:
        """An entry of the header that holds JSON, None where there is none.

        Raises:
            CheckpointError: For anything but JSON.
        """
        text = self.checkpoint.metadata.get(name)
        try:
            return json.loads(text) if text is not None else None
        except ValueError as error:
            raise CheckpointError(f"{self.source}: the {name} of its header is not JSON: {text!r}.") from error


def load_trained(
    weights: str | os.PathLike[str], candidates: Sequence[str], cache_dir: str | os.PathLike[str] | None
) -> Trained:
    """Find, fetch if need be, and read a file of trained weights. Errors as of ``resolve`` and ``load_checkpoint``."""
    path = resolve(weights, candidates=candidates, cache_dir=cache_dir)
    return Trained(load_checkpoint(path), str(path))


def convert_checkpoint(source: str | os.PathLike[str], destination: str | os.PathLike[str], name: str) -> Checkpoint:
    """Turn a published checkpoint into a safetensors file that says what it is for; the tensors stay as they are.

    Args:
        source: A file as published by the authors, or any other that ``create_model`` reads.
        destination: File ending in .safetensors.
        name: The model that the weights belong to, with or without ``.tag``.

    Raises:
        UnknownNameError: For an unknown model or tag.
        CheckpointError: If the source is damaged or not a checkpoint of that model.
    """
    arch, tag = catalog.find_model(name)
    if catalog.MODELS[arch].scoring != "feature_norm":
        raise InputError(f"{arch} has no projector, so there is nothing to convert.")
    trained = Trained(load_checkpoint(source), str(source))
    trained.check_projector(trained.find_backbone(arch)[1].channels)
    return convert(
        source, destination, {"model": f"{arch}.{tag}" if tag else arch, "num_heads": str(trained.num_heads)}
    )


def catalog_files(name: str, cache_dir: str | os.PathLike[str] | None = None) -> tuple[list[Path], str]:
    """Find or fetch the weights of a model that the catalog names.

    Returns:
        The files, and what is missing: a message about weights that must be given by hand, or "".

    Raises:
        UnknownNameError: For an unknown model or tag.
        DownloadError: If weights cannot be fetched.
    """
    arch, tag = catalog.find_model(name)
    model = catalog.MODELS[arch]
    tag, files, missing = tag or model.default_tag, [], "" if model.tags else f"{catalog.must_be_given(arch)}."
    hub_file = model.tags[tag].hub_file if tag else None
    if hub_file is not None:
        files.append(resolve(_PLACE.format(*hub_file), cache_dir=cache_dir))
    try:
        if model.backbone:
            files.append(published_backbone(model.backbone, catalog.BACKBONES[model.backbone], cache_dir))
    except InputError as error:
        missing = str(error)
    return files, missing
