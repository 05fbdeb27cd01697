"""Frozen encoders: images in, a list of maps of patch features out, equal to the authors' original implementations.

Three vision-transformer families (DINOv2, OpenAI CLIP, ImageBind) are built from timm's blocks, with timm's state-dict
keys, and read timm's weights as well as the authors' own files. The convolutional backbone is timm's EfficientNet-Lite,
cut after the last stage used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, PatchEmbed, QuickGELU, pad_same
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from . import catalog
from .checkpoints import AnyPath, is_finite, of_prefix, read_state
from .errors import CheckpointError, InputError, UnknownNameError

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Family:
    """What distinguishes the transformer families, besides their width and depth."""

    heads_width: int
    norm_eps: float
    native_size: int
    layer_scale: bool = False
    patch_bias: bool = False
    pre_norm: bool = False
    act_layer: type[nn.Module] = nn.GELU


_FAMILIES = {
    "dinov2": _Family(heads_width=64, norm_eps=1e-6, native_size=518, layer_scale=True, patch_bias=True),
    "clip": _Family(heads_width=64, norm_eps=1e-5, native_size=224, pre_norm=True, act_layer=QuickGELU),
    "imagebind": _Family(heads_width=80, norm_eps=1e-6, native_size=224, pre_norm=True),
}


class Encoder(nn.Module):
    """A frozen encoder: images (B, 3, H, W) to one (B, C_l, h_l, w_l) map per level.

    Attributes:
        levels: Blocks or stages, counted from 1, whose outputs are the maps.
        channels: Channels of each map.
        reductions: Input pixels per cell of each map.
        patch_size: Pixels that the sides of images must be a multiple of.
    """

    levels: tuple[int, ...]
    channels: tuple[int, ...]
    reductions: tuple[int, ...]
    patch_size: int


class VisionTransformer(Encoder):
    """The trunk of a vision transformer: raw outputs of chosen blocks, class token dropped, no final LayerNorm.

    Args:
        family: dinov2, clip or imagebind.
        patch_size: Side of a patch in pixels.
        embed_dim: Channels of every level.
        num_heads: Attention heads of every block.
        levels: Blocks, counted from 1, whose outputs are returned. No block past the last one is built.
    """

    def __init__(self, family: str, patch_size: int, embed_dim: int, num_heads: int, levels: Sequence[int]) -> None:
        super().__init__()
        spec = _FAMILIES[family]
        norm_layer = partial(nn.LayerNorm, eps=spec.norm_eps)
        self.family, self.patch_size, self.levels = family, patch_size, tuple(levels)
        self.channels, self.reductions = (embed_dim,) * len(levels), (patch_size,) * len(levels)
        self.patch_embed = PatchEmbed(img_size=None, patch_size=patch_size, embed_dim=embed_dim, bias=spec.patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (spec.native_size // patch_size) ** 2, embed_dim))
        self.norm_pre = norm_layer(embed_dim) if spec.pre_norm else nn.Identity()
        layers = {"norm_layer": norm_layer, "act_layer": spec.act_layer}
        scale = 1e-5 if spec.layer_scale else None
        block = partial(Block, embed_dim, num_heads, qkv_bias=True, init_values=scale, **layers)
        self.blocks = nn.ModuleList(block() for _ in range(max(levels)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (B, 3, H, W), H and W multiples of the patch, to one (B, C, H / patch, W / patch) map per level.

        Raises:
            InputError: If a side is not a multiple of the patch size.
        """
        grid = check_images(x, self.patch_size)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), self.patch_embed(x)], dim=1)
        tokens, maps = self.norm_pre(tokens + resized_positions(self.pos_embed, grid, self.family == "dinov2")), []
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if number in self.levels:
                maps.append(tokens[:, 1:].transpose(1, 2).unflatten(2, grid).contiguous())
        return maps


def resized_positions(positions: Tensor, grid: tuple[int, int], of_dino: bool) -> Tensor:
    """Position embeddings (1, 1 + h * w, C), class token first, for a grid; features depend on how this is done.

    DINO and DINOv2 add 0.1 to the grid, so that the sampling positions differ from those of a resize by size.
    """
    side = int((positions.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return positions
    patches = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    factors = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
    target: dict[str, Any] = {"scale_factor": factors} if of_dino else {"size": grid}
    patches = F.interpolate(patches, **target, mode="bicubic", antialias=False)
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


class EfficientNet(Encoder):
    """The first stages of a timm EfficientNet, none past the last level."""

    def __init__(self, entry: catalog.Backbone) -> None:
        super().__init__()
        whole = timm.create_model(str(entry.timm_name), pretrained=False)
        self.conv_stem, self.bn1, self.blocks = whole.conv_stem, whole.bn1, whole.blocks[: max(entry.blocks)]
        self.levels, self.channels, self.reductions = entry.blocks, entry.channels, entry.reductions
        self.patch_size = entry.patch_size

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (B, 3, H, W) to one (B, C_l, H / reduction_l, W / reduction_l) map per level.

        Raises:
            InputError: If a side is not a multiple of the coarsest reduction.
        """
        check_images(x, self.patch_size)
        if x.device.type == "cpu":
            # Convolutions are quicker in this layout there.
            x = x.contiguous(memory_format=torch.channels_last)
        x, maps = _convolved(x, self.conv_stem, self.bn1), []
        for number, stage in enumerate(self.blocks, start=1):
            for block in stage:
                x = _through(block, x)
            if number in self.levels:
                maps.append(x)
        return maps


def _through(block: nn.Module, x: Tensor) -> Tensor:
    """What a block of convolutions, each followed by its norm, makes of maps."""
    convolutions = [child for child in block.children() if isinstance(child, nn.Conv2d)]
    norms = [child for child in block.children() if isinstance(child, BatchNormAct2d)]
    y = x
    for convolution, norm in zip(convolutions, norms, strict=True):
        y = _convolved(y, convolution, norm)
    return y + x if block.has_skip else y


def _convolved(x: Tensor, convolution: nn.Conv2d, norm: BatchNormAct2d) -> Tensor:
    """A convolution, its norm and its activation. The norm goes into the weights, which saves a pass over the maps."""
    # What torch has for this makes parameters, which torch.compile refuses.
    exact = torch.promote_types(x.dtype, torch.float32)
    scale = norm.weight * (norm.get_buffer("running_var").to(exact) + norm.eps).rsqrt()
    weight = (convolution.weight * scale[:, None, None, None]).to(x.dtype)
    bias = (norm.bias - norm.get_buffer("running_mean") * scale).to(x.dtype)
    if isinstance(convolution, Conv2dSame):
        x = pad_same(x, convolution.kernel_size, convolution.stride)
    y = F.conv2d(x, weight, bias, convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    return norm.act(y)


def create_backbone(
    arch: str,
    *,
    weights: AnyPath | StateDict | None = None,
    img_size: int | tuple[int, int] = 224,
    levels: Sequence[int] | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
) -> Encoder:
    """Build a frozen encoder in eval mode.

    Args:
        arch: A name of ``catalog.BACKBONES``, such as "dinov2_base".
        weights: File or state dict, with the keys of timm or of the authors' original files. None leaves random
            weights.
        img_size: Input size in pixels that must be possible; inputs of other sizes, square or not, are taken as well.
        levels: Blocks counted from 1. The default divides the depth in quarters.
        embed_dim: Width, where it differs from that of the architecture.
        depth: Number of blocks of the architecture the weights come from, where it differs.
        num_heads: Attention heads, where they differ.

    Returns:
        A module that maps (B, 3, H, W) to a list of (B, C_l, h_l, w_l).

    Raises:
        UnknownNameError: For an unknown architecture.
        InputError: For levels or an image size that the architecture cannot have.
        CheckpointError: For weights that are not exactly those of the architecture.
    """
    if arch not in catalog.BACKBONES:
        raise UnknownNameError(catalog.unknown("backbone", arch, catalog.BACKBONES))
    entry = catalog.BACKBONES[arch]
    check_size(img_size, entry.patch_size)
    if entry.family == "efficientnet":
        if tuple(levels or entry.blocks) != entry.blocks or (embed_dim or depth or num_heads) is not None:
            raise InputError(f"{arch} is convolutional: levels, embed_dim, depth and num_heads cannot be changed.")
    else:
        depth = depth or max(entry.blocks)
        levels = check_levels(levels or tuple(depth * i // 4 for i in (1, 2, 3, 4)), depth)
        entry = with_levels(entry, levels, embed_dim or entry.channels[0])
    return build_encoder(entry, *read_state(weights), depth=depth or max(entry.blocks), num_heads=num_heads)


def build_encoder(
    entry: catalog.Backbone, state: StateDict | None, source: str, *, depth: int, num_heads: int | None = None
) -> Encoder:
    """Build the frozen encoder of a description, in eval mode.

    Args:
        entry: The description, with levels that were checked.
        state: Weights as of ``create_backbone``.
        source: What error messages call the weights.
        depth: Number of blocks of the architecture that the weights come from.
        num_heads: Attention heads, where they are not those of the family.

    Raises:
        InputError: For heads that do not divide the width.
        CheckpointError: For weights that are not exactly those of the architecture.
    """
    if entry.family == "efficientnet":
        backbone: Encoder = EfficientNet(entry)
    else:
        width = entry.channels[0]
        num_heads = num_heads or max(width // _FAMILIES[entry.family].heads_width, 1)
        if width % num_heads:
            raise InputError(f"{num_heads} attention heads do not divide a width of {width}.")
        backbone = VisionTransformer(entry.family, entry.patch_size, width, num_heads, entry.blocks)
    if state is not None:
        # Blocks that the architecture has but the levels do not need are left out, not those of a deeper model.
        spare = tuple(f"blocks.{i}." for i in range(max(entry.blocks), depth))
        own = {key: value for key, value in _to_timm_keys(state, entry.family).items() if not key.startswith(spare)}
        load_strictly(backbone, own, source)
    return backbone.requires_grad_(False).eval()


def with_levels(entry: catalog.Backbone, levels: tuple[int, ...], width: int) -> catalog.Backbone:
    """The description of a transformer with other levels, and the width that they have."""
    count = len(levels)
    return replace(entry, blocks=levels, channels=(width,) * count, reductions=(entry.patch_size,) * count)


def check_size(size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return an image size as (H, W), both sides positive multiples of the patch size.

    Raises:
        InputError: Otherwise, with the nearest sizes that are possible.
    """
    try:
        # Whole numbers of any kind, those of numpy too.
        height, width = map(index, size if isinstance(size, Sequence) else (size, size))
    except (TypeError, ValueError):
        raise InputError(f"The image size {size!r} must be one whole number of pixels, or height and width.") from None
    for side in (height, width):
        if side < patch_size or side % patch_size:
            below = max(side // patch_size, 1) * patch_size
            raise InputError(
                f"Image size {height} x {width} does not fit: both sides must be multiples of {patch_size} pixels. "
                f"The nearest to {side} are {below} and {below + patch_size}."
            )
    return height, width


def check_images(x: Tensor, patch_size: int) -> tuple[int, int]:
    """Return the grid of patches, (H / patch, W / patch), of images (B, 3, H, W).

    Raises:
        InputError: For another shape, or a side that is not a multiple of the patch size.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise InputError(f"Expected images of shape (B, 3, H, W), got {tuple(x.shape)}.")
    height, width = check_size(x.shape[2:], patch_size)
    return height // patch_size, width // patch_size


def check_levels(levels: Sequence[int], depth: int) -> tuple[int, ...]:
    """Return levels as a tuple, increasing numbers from 1 to the depth.

    Raises:
        InputError: Otherwise.
    """
    if not levels or sorted(set(levels)) != list(levels) or levels[0] < 1 or levels[-1] > depth:
        raise InputError(f"Levels {tuple(levels)} must be increasing numbers of blocks or stages from 1 to {depth}.")
    return tuple(levels)


# Keys of the authors' files, and what timm calls them: nothing where the entry plays no part in the feature maps.
_OPENAI_KEYS = (
    (r"class_embedding", "cls_token"),
    (r"positional_embedding", "pos_embed"),
    (r"conv1\.weight", "patch_embed.proj.weight"),
    (r"ln_pre\.(.*)", r"norm_pre.\1"),
    (r"transformer\.resblocks\.(.*)", r"blocks.\1"),
    (r"proj|ln_post\..*", ""),
)
_IMAGEBIND_KEYS = (
    (r"modality_preprocessors\.vision\.cls_token", "cls_token"),
    (r"modality_preprocessors\.vision\.pos_embedding_helper\.pos_embed", "pos_embed"),
    (r"modality_preprocessors\.vision\.rgbt_stem\.proj\.1\.weight", "patch_embed.proj.weight"),
    (r"modality_trunks\.vision\.pre_transformer_layer\.0\.(.*)", r"norm_pre.\1"),
    (r"modality_trunks\.vision\.blocks\.(.*)", r"blocks.\1"),
    (r"modality_.*", ""),
)
_BLOCK_KEYS = (
    (r"\.(ln|norm)_([12])\.", r".norm\2."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
UNUSED = re.compile(r"(norm|fc_norm|head|head_drop)\..*|mask_token")


def _to_timm_keys(state: StateDict, family: str) -> dict[str, Tensor]:
    if family == "clip":
        state = of_prefix(state, "visual.") or state
    renamed, rules = {}, {"clip": _OPENAI_KEYS, "imagebind": _IMAGEBIND_KEYS}.get(family, ())
    for key, value in state.items():
        name = _rename(key, rules)
        if name == "cls_token":
            value = value.reshape(1, 1, -1)
        elif name == "pos_embed":
            value = value.reshape(1, -1, value.shape[-1])
        elif name == "patch_embed.proj.weight" and value.ndim == 5:
            # A still image is a clip of one frame repeated: its frames see the sum of the kernel over time.
            value = value.sum(dim=2, dtype=torch.float32)
        if name and not UNUSED.fullmatch(name):
            renamed[name] = value
    return renamed


def _rename(key: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, name in rules:
        if match := re.fullmatch(pattern, key):
            key = match.expand(name)
            break
    for pattern, name in _BLOCK_KEYS:
        key = re.sub(pattern, name, key)
    return key


def load_strictly(module: nn.Module, state: StateDict, source: str) -> None:
    """Load a state dict that fits, see ``check_fit``; values are converted to the module's dtype."""
    check_fit(module, state, source)
    module.load_state_dict(state)


def check_fit(module: nn.Module, state: StateDict, source: str) -> None:
    """Make sure that a state dict has exactly the keys and shapes of a module, and finite values.

    Raises:
        CheckpointError: Otherwise, naming the source and the first differences.
    """
    own = module.state_dict()
    # Batch counters serve training alone, and torch itself makes up for missing ones.
    problems = [f"missing {key}" for key in own if key not in state and not key.endswith("num_batches_tracked")]
    problems += [f"unexpected {key}" for key in state if key not in own]
    for key, value in state.items():
        if key in own and value.shape != own[key].shape:
            problems.append(f"{key} has shape {tuple(value.shape)} instead of {tuple(own[key].shape)}")
        if not is_finite(value):
            problems.append(f"{key} holds NaN or infinite values")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{source} does not fit {type(module).__name__}: {'; '.join(problems[:5])}{more}. "
            "Is it the checkpoint of another model?"
        )
