"""Any vision transformer or convolutional pyramid of timm as a backbone, under timm's state-dict keys."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn

from . import catalog
from .backbones import UNUSED, Encoder, StateDict, check_images, check_levels, load_strictly, resized_positions
from .checkpoints import of_prefix
from .errors import CheckpointError, InputError, UnknownNameError

_PYRAMID = (4, 8, 16)
# Those with registers were made with a resize like timm's.
_OF_DINO = re.compile(r"vit_[a-z]+_patch14_dinov2\..*|vit_\w+_224\.dino")
_TIMM = "https://github.com/huggingface/pytorch-image-models"


class TimmBackbone(Encoder):
    """The trunk of a timm model: raw outputs of chosen blocks or stages, prefix tokens dropped, no final norm, no head.

    Args:
        arch: Architecture in timm, without tag.
        levels: Blocks or stages, counted from 1, whose outputs are returned. The default divides the depth of a
            transformer in quarters, and takes the stages of a pyramid that have 4, 8 and 16 input pixels per
            cell.

    Raises:
        InputError: For a model without feature maps, or levels that it does not have.
    """

    def __init__(self, arch: str, levels: Sequence[int] | None = None) -> None:
        super().__init__()
        self.arch, self.model = arch, _build(arch)
        stages = self.model.feature_info
        self.levels = check_levels(_default_levels(arch, stages) if levels is None else levels, len(stages))
        self._indices = [level - 1 for level in self.levels]
        self.channels = tuple(int(stages[index]["num_chs"]) for index in self._indices)
        self.reductions = tuple(int(stages[index]["reduction"]) for index in self._indices)
        self.patch_size = max(self.reductions)

    def resize_as_dino(self) -> None:
        """Resize position embeddings as DINO and DINOv2 do it, where timm has a way of its own."""
        self.model._pos_embed = partial(_add_positions, self.model)

    def load(self, state: StateDict | None, source: str = "the given state dict") -> None:
        """Take weights, and let go of what the levels do not need.

        Args:
            state: Weights with timm's keys, or with others that timm converts. None leaves random weights.
            source: What error messages call the weights.

        Raises:
            CheckpointError: For weights that are not exactly those of the architecture.
        """
        native = None if state is None else _native(state, self.model, self.arch, source)
        whole = self.model.state_dict().keys()
        self.model.prune_intermediate_layers(self._indices, prune_norm=True, prune_head=True)
        if native is not None:
            spare = whole - self.model.state_dict().keys()
            load_strictly(self.model, {key: value for key, value in native.items() if key not in spare}, source)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (B, 3, H, W) to one (B, C_l, H / reduction_l, W / reduction_l) map per level.

        Raises:
            InputError: If a side is not a multiple of the coarsest reduction.
        """
        check_images(x, self.patch_size)
        return self.model.forward_intermediates(
            x, indices=self._indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )

    def try_out(self, size: Sequence[int]) -> None:
        """Make sure that images of a size give maps of the described shapes: timm's own description is not always so.

        Raises:
            InputError: Otherwise.
        """
        height, width = size
        for device in ("meta", "cpu"):  # without computing first; but some models look at values
            tensors = {name: tensor.to(device) for name, tensor in self.state_dict(keep_vars=True).items()}
            try:
                with torch.no_grad():
                    images = torch.zeros(1, 3, height, width, device=device)
                    maps = torch.func.functional_call(self.eval(), tensors, (images,))
                break
            except InputError:
                raise
            except Exception as error:  # models fail in many ways
                failure = error
        else:
            reason = str(failure).strip().partition("\n")[0].rstrip(".")
            problem = f"{self.arch} takes no images of {(height, width)} pixels ({reason})"
            raise InputError(f"{problem}. Choose another size or backbone.") from failure
        shapes = zip(self.channels, self.reductions, strict=True)
        expected = [(1, channels, height // reduction, width // reduction) for channels, reduction in shapes]
        found = [tuple(level.shape) for level in maps]
        if found != expected:
            problem = f"{self.arch} gives maps of shape {found} instead of {expected}, so it cannot be used"
            raise InputError(f"{problem}. Choose another backbone.")


def find_timm(
    name: str, levels: Sequence[int] | None = None, of_authors: bool = False
) -> tuple[catalog.Backbone, TimmBackbone]:
    """Describe a timm model as a backbone, which only the model itself can do; it is returned without trained weights.

    Args:
        name: Name of a timm model, with or without ``.tag``.
        levels: Blocks or stages, counted from 1. For the default see ``TimmBackbone``.
        of_authors: Resize position embeddings as the authors of the weights do it, where that is not timm's way.

    Raises:
        UnknownNameError: For an unknown model or tag, with the closest known ones.
        InputError: For a model that has no feature maps, or not these levels.
    """
    arch, _, tag = name.partition(".")
    if arch in catalog.MODELS or not timm.is_model(arch):
        close = get_close_matches(arch, [known for known in timm.list_models() if known not in catalog.MODELS])
        message = catalog.unknown("backbone", name, (*catalog.BACKBONES, *close))
        raise UnknownNameError(f"{message} Besides those there are timm.list_models().")
    tags = tuple(known.partition(".")[2] for known in get_arch_pretrained_cfgs(arch))
    if tag and tag not in tags:
        raise UnknownNameError(catalog.unknown(f"tag of {arch}", tag, tags))
    cfg, backbone = get_pretrained_cfg(name), TimmBackbone(arch, levels)
    as_dino = of_authors and _OF_DINO.fullmatch(f"{arch}.{cfg.tag}") is not None
    if as_dino:
        backbone.resize_as_dino()
    page = f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else _TIMM
    entry = catalog.Backbone(
        family="timm",
        timm_name=f"{arch}.{cfg.tag}" if cfg.tag else arch,
        blocks=backbone.levels,
        channels=backbone.channels,
        reductions=backbone.reductions,
        normalization=(tuple(cfg.mean), tuple(cfg.std)),
        tag=cfg.tag or "",
        hub_file=(cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors") if cfg.hf_hub_id else None,
        original_file="pytorch_model.bin",
        license=cfg.license or "see the model's page",
        origin=cfg.origin_url or page,
        notes=f"Position embeddings are resized the way {'DINOv2' if as_dino else 'timm'} does.",
        img_size=tuple(side // backbone.patch_size * backbone.patch_size for side in cfg.input_size[1:]),
    )
    return entry, backbone


def _add_positions(model: Any, patches: Tensor) -> Tensor:
    """Class token and patches (B, h, w, C) with their positions."""
    tokens = torch.cat([model.cls_token.expand(len(patches), -1, -1), patches.flatten(1, 2)], dim=1)
    return tokens + resized_positions(model.pos_embed, (patches.shape[1], patches.shape[2]), of_dino=True)


def _build(arch: str) -> Any:
    try:
        model = timm.create_model(arch, pretrained=False, dynamic_img_size=True)
    except TypeError:  # most convolutional networks take any size and know no such argument
        model = timm.create_model(arch, pretrained=False)
    if not (hasattr(model, "forward_intermediates") and getattr(model, "feature_info", None)):
        problem = f"timm {timm.__version__} has no feature maps for {arch}"
        raise InputError(f"{problem}. Choose a vision transformer or a convolutional pyramid.")
    return model


def _default_levels(arch: str, stages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    reductions, depth = [stage["reduction"] for stage in stages], len(stages)
    if len(set(reductions)) == 1:
        return tuple(sorted({max(1, depth * i // 4) for i in (1, 2, 3, 4)}))
    levels = tuple(number for number, reduction in enumerate(reductions, start=1) if reduction in _PYRAMID)
    if not levels:
        problem = f"{arch} has no stages with 4, 8 or 16 pixels per cell, but {reductions}"
        raise InputError(f"{problem}: choose levels from 1 to {depth}.")
    return levels


def _native(state: StateDict, model: nn.Module, arch: str, source: str) -> StateDict:
    """The weights under the keys of timm's model."""
    if all(key.startswith("model.") for key in state):
        state = of_prefix(state, "model.")
    own = model.state_dict().keys()
    convert = getattr(sys.modules[model_entrypoint(arch).__module__], "checkpoint_filter_fn", None)
    if convert is not None and any(key not in own and not UNUSED.fullmatch(key) for key in state):
        try:
            state = convert(dict(state), model)
        except Exception as error:
            raise CheckpointError(f"{source} does not hold the weights of {arch}: {error}") from error
    return {key: value for key, value in state.items() if key in own or not UNUSED.fullmatch(key)}
