"""Backbones against the original implementations (goldens), and a plain transformer written out below."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.golden_values import assert_near, fill, golden, shapes, value
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from adfeatures import catalog
from adfeatures.backbones import EfficientNet, create_backbone
from adfeatures.errors import CheckpointError, InputError, UnknownNameError

ARCHS = {"dinov2": "dinov2_base", "clip": "clip_base", "imagebind": "imagebind_huge"}
DEPTHS = {"dinov2": 4, "clip": 12, "imagebind": 4}
PATCHES = {"dinov2": 14, "clip": 16, "imagebind": 14}
FAMILIES = list(ARCHS)
VITS = [name for name, entry in catalog.BACKBONES.items() if entry.family in FAMILIES]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def original(family: str) -> dict[str, Tensor]:
    """The tiny weights of the goldens, under the authors' keys."""
    return fill(shapes(f"backbone_{family}"), f"{family}.")


def tiny(family: str, weights: Any = None, **kwargs: Any) -> Any:
    settings = {"embed_dim": 64, "depth": DEPTHS[family], "num_heads": 2, **kwargs}
    return create_backbone(ARCHS[family], weights=weights, **settings)


def images(height: int, width: int, batch: int = 1) -> Tensor:
    return value(f"images.{height}.{width}", (batch, 3, height, width))


# The oracle: a vision transformer in the authors' keys, written out step by step.

KEYS: dict[str, dict[str, Any]] = {
    "dinov2": {
        "class": "cls_token",
        "position": "pos_embed",
        "stem": "patch_embed.proj",
        "block": "blocks.{}.",
        "norms": ("norm1", "norm2"),
        "attention": ("attn.qkv.", "attn.proj."),
        "mlp": ("mlp.fc1", "mlp.fc2"),
    },
    "clip": {
        "class": "class_embedding",
        "position": "positional_embedding",
        "stem": "conv1",
        "first": "ln_pre",
        "block": "transformer.resblocks.{}.",
        "norms": ("ln_1", "ln_2"),
        "attention": ("attn.in_proj_", "attn.out_proj."),
        "mlp": ("mlp.c_fc", "mlp.c_proj"),
    },
    "imagebind": {
        "class": "modality_preprocessors.vision.cls_token",
        "position": "modality_preprocessors.vision.pos_embedding_helper.pos_embed",
        "stem": "modality_preprocessors.vision.rgbt_stem.proj.1",
        "first": "modality_trunks.vision.pre_transformer_layer.0",
        "block": "modality_trunks.vision.blocks.{}.",
        "norms": ("norm_1", "norm_2"),
        "attention": ("attn.in_proj_", "attn.out_proj."),
        "mlp": ("mlp.fc1", "mlp.fc2"),
    },
}


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return (
        centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"]
        + state[f"{name}.bias"]
    )


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def cubic(side: int, grid: int, step: float) -> np.ndarray:
    """Bicubic interpolation of ``side`` samples at ``grid`` places, as a matrix: a = -0.75, borders repeated."""
    a, matrix = -0.75, np.zeros((grid, side))
    for place in range(grid):
        at = (place + 0.5) * step - 0.5
        for source in range(math.floor(at) - 1, math.floor(at) + 3):
            d = abs(at - source)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[place, min(max(source, 0), side - 1)] += near if d <= 1 else far
    return matrix


def resized_position(position: Tensor, grid: tuple[int, int], family: str) -> Tensor:
    """The position embedding for a grid: DINOv2's by the factor (grid + 0.1) / side, the others by size."""
    side = math.isqrt(len(position) - 1)
    if grid == (side, side):
        return position
    offset = 0.1 if family == "dinov2" else 0.0
    rows, columns = (cubic(side, cells, side / (cells + offset)) for cells in grid)
    patches = np.einsum("yi,xj,ijc->yxc", rows, columns, position[1:].double().reshape(side, side, -1).numpy())
    return torch.cat([position[:1], torch.from_numpy(patches).float().flatten(0, 1)])


def plain_transformer(family: str, state: dict[str, Tensor], x: Tensor, blocks: int, heads: int = 2) -> list[Tensor]:
    """Patch maps after each of the first blocks."""
    keys, patch, eps = KEYS[family], PATCHES[family], 1e-5 if family == "clip" else 1e-6
    width, grid = state[keys["class"]].numel(), (x.shape[2] // patch, x.shape[3] // patch)
    stem, bias = state[f"{keys['stem']}.weight"], state.get(f"{keys['stem']}.bias")
    if family == "imagebind":
        tokens = F.conv3d(torch.stack([x, x], dim=2), stem, stride=stem.shape[2:]).squeeze(2)
    else:
        tokens = F.conv2d(x, stem, bias, stride=patch)
    tokens = torch.cat(
        [state[keys["class"]].reshape(1, 1, width).expand(len(x), 1, width), tokens.flatten(2).transpose(1, 2)], dim=1
    )
    tokens = tokens + resized_position(state[keys["position"]].reshape(-1, width), grid, family)
    if "first" in keys:
        tokens = layer_norm(tokens, state, keys["first"], eps)
    maps = []
    for number in range(blocks):
        block = {key.removeprefix(keys["block"].format(number)): tensor for key, tensor in state.items()}
        attention = nn.MultiheadAttention(width, heads, batch_first=True)
        packed, out = keys["attention"]
        own = {f"in_proj_{part}": block[packed + part] for part in ("weight", "bias")}
        attention.load_state_dict({**own, **{f"out_proj.{part}": block[out + part] for part in ("weight", "bias")}})
        normed = layer_norm(tokens, block, keys["norms"][0], eps)
        tokens = tokens + attention(normed, normed, normed, need_weights=False)[0] * block.get(
            "ls1.gamma", torch.tensor(1.0)
        )
        hidden = linear(layer_norm(tokens, block, keys["norms"][1], eps), block, keys["mlp"][0])
        gate = torch.sigmoid(1.702 * hidden) if family == "clip" else 0.5 * (1 + torch.erf(hidden / 2**0.5))
        tokens = tokens + linear(hidden * gate, block, keys["mlp"][1]) * block.get("ls2.gamma", torch.tensor(1.0))
        maps.append(tokens[:, 1:].transpose(1, 2).reshape(len(x), width, *grid))
    return maps


# Equal to the originals


@pytest.mark.parametrize("family", FAMILIES)
def test_golden(family: str) -> None:
    maps = tiny(family, original(family))(value("backbone.image", (2, 3, 224, 224)))
    expected = golden(f"backbone_{family}")
    assert_near([level.flatten(2).transpose(1, 2) for level in maps], [expected[f"tokens.{i}"] for i in range(4)])


def test_golden_dinov2_at_280() -> None:
    last = tiny("dinov2", original("dinov2"))(value("backbone.image280", (1, 3, 280, 280)))[-1]
    assert_near(last.flatten(2).transpose(1, 2), golden("backbone_dinov2")["tokens_280.3"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cells", [(14, 14), (16, 16), (20, 20), (4, 7), (9, 3), (1, 1), (37, 2)])
def test_any_size(family: str, cells: tuple[int, int]) -> None:
    x, state = images(cells[0] * PATCHES[family], cells[1] * PATCHES[family]), original(family)
    maps = tiny(family, state, levels=(1, 2))(x)
    assert [tuple(level.shape) for level in maps] == [(1, 64, *cells)] * 2
    assert_near(maps, plain_transformer(family, state, x, blocks=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_tiny_variance(family: str) -> None:
    """Where the variance is near the LayerNorm's eps, a wrong eps shows."""
    state = original(family)
    for key in ("class", "position"):
        state[KEYS[family][key]] *= 0.02
    state[f"{KEYS[family]['stem']}.weight"] *= 0.001
    if family == "dinov2":
        state["patch_embed.proj.bias"] *= 0.02
    x = images(56, 56) if family != "clip" else images(64, 64)
    assert_near(tiny(family, state, levels=(1, 2))(x), plain_transformer(family, state, x, blocks=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_large_activations(family: str) -> None:
    """Where pre-activations are large, a wrong activation shows."""
    state = original(family)
    for number in range(2):
        state[f"{KEYS[family]['block'].format(number)}{KEYS[family]['mlp'][0]}.weight"] *= 10
    x = images(2 * PATCHES[family], 3 * PATCHES[family])
    assert_near(tiny(family, state, levels=(1, 2))(x), plain_transformer(family, state, x, blocks=2))


def test_equal_to_timm_at_native_size() -> None:
    """At 518 pixels, where timm does not resize either, DINOv2 is timm's own model."""
    model = timm.create_model("vit_base_patch14_dinov2", embed_dim=32, depth=2, num_heads=2, num_classes=0)
    weights = {key: value(f"timm.{key}", tensor.shape, 0.1) for key, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    x = images(518, 518)
    expected = model.eval().forward_intermediates(x, norm=False, intermediates_only=True)
    assert_near(
        create_backbone("dinov2_base", weights=weights, embed_dim=32, depth=2, num_heads=2, levels=(1, 2))(x), expected
    )


def test_clip_of_full_width_equal_to_timm() -> None:
    model = timm.create_model("vit_base_patch16_clip_quickgelu_224", depth=4).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    x = images(224, 224)
    backbone = create_backbone("clip_base", weights=model.state_dict(), depth=4, levels=(1, 2, 4))
    assert_near(backbone(x), model.forward_intermediates(x, indices=[0, 1, 3], norm=False, intermediates_only=True))


# Keys, files and formats


@pytest.mark.parametrize("arch", [name for name in VITS if catalog.BACKBONES[name].timm_name])
def test_full_size_keys_are_those_of_timm(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = catalog.BACKBONES[arch]
    # An older timm (1.0.20 still does) reads the values of a schedule.
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        backbone: Any = create_backbone(arch)
        model: Any = timm.create_model(str(entry.timm_name))
    trunk = {
        key: tensor.shape
        for key, tensor in model.state_dict().items()
        if not key.startswith(("norm.", "head.", "fc_norm."))
    }
    assert {key: tensor.shape for key, tensor in backbone.state_dict().items()} == trunk
    assert [block.attn.num_heads for block in backbone.blocks] == [block.attn.num_heads for block in model.blocks]


def test_full_size_imagebind_has_its_published_size() -> None:
    with torch.device("meta"):
        backbone: Any = create_backbone("imagebind_huge")
    width, depth = 1280, 32
    assert [block.attn.num_heads for block in backbone.blocks] == [16] * depth
    block = 12 * width**2 + 13 * width
    stem = 3 * 14 * 14 * width + width + 257 * width + 2 * width
    assert sum(parameter.numel() for parameter in backbone.parameters()) == depth * block + stem


@pytest.mark.parametrize("arch", VITS)
def test_levels_and_channels_of_the_catalog(arch: str) -> None:
    entry = catalog.BACKBONES[arch]
    with torch.device("meta"):
        backbone = create_backbone(arch)
    assert (backbone.levels, backbone.channels, backbone.reductions) == (entry.blocks, entry.channels, entry.reductions)
    assert backbone.patch_size == entry.patch_size
    assert [tuple(level.shape) for level in backbone.to("meta")(torch.empty(1, 3, 224, 224, device="meta"))] == [
        (1, channels, 224 // entry.patch_size, 224 // entry.patch_size) for channels in entry.channels
    ]


def timm_state(family: str) -> dict[str, Tensor]:
    """The golden weights in timm's keys, converted by timm, with its classifier and final norm."""
    name = str(catalog.BACKBONES[ARCHS[family]].timm_name)
    model = timm.create_model(
        name, embed_dim=64, depth=DEPTHS[family], num_heads=2, num_classes=32 if family == "clip" else 0
    )
    state = original(family)
    model.load_state_dict(
        checkpoint_filter_fn({f"visual.{k}": v for k, v in state.items()} if family == "clip" else state, model)
    )
    return model.state_dict()


@pytest.mark.parametrize("family", ["dinov2", "clip"])
def test_keys_of_timm_and_of_the_authors(family: str) -> None:
    x, state = images(2 * PATCHES[family], 2 * PATCHES[family]), timm_state(family)
    assert "norm.weight" in state
    for one, other in zip(tiny(family, state)(x), tiny(family, original(family))(x), strict=True):
        assert torch.equal(one, other)


def text_tower() -> dict[str, Tensor]:
    """Some of what stands beside the visual tower in OpenAI's files; two keys are the tower's without its prefix."""
    return {
        "positional_embedding": torch.randn(77, 48),
        "text_projection": torch.randn(48, 32),
        "logit_scale": torch.tensor(4.6),
        "input_resolution": torch.tensor(224),
        "transformer.resblocks.0.ln_1.weight": torch.ones(48),
        "token_embedding.weight": torch.randn(100, 48),
        "ln_final.weight": torch.ones(48),
    }


def test_clip_with_prefix_and_text_tower() -> None:
    state, x = original("clip"), images(64, 64)
    whole = {**text_tower(), **{f"visual.{key}": tensor for key, tensor in state.items()}}
    assert_near(tiny("clip", whole)(x), tiny("clip", state)(x), 0)


def test_imagebind_beside_other_modalities() -> None:
    state, x = original("imagebind"), images(28, 28)
    others = {
        "modality_preprocessors.text.pos_embed": torch.randn(1, 77, 48),
        "modality_trunks.audio.blocks.0.attn.bias_k": torch.randn(1, 1, 48),
        "modality_postprocessors.text.1.log_logit_scale": torch.tensor(4.6),
    }
    assert_near(tiny("imagebind", {**others, **state})(x), tiny("imagebind", state)(x), 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["pth", "half", "wrapped", "safetensors"])
def test_files(family: str, form: str, tmp_path: Path) -> None:
    state, x = original(family), images(2 * PATCHES[family], 2 * PATCHES[family])
    if form == "half":
        state = {key: tensor.half() for key, tensor in state.items()}
    path = tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state} if form == "wrapped" else state, path)
    backbone = tiny(family, path)
    maps = backbone(x)
    assert all(level.dtype == torch.float32 for level in maps)
    assert_near(maps, tiny(family, str(path))(x), 0)
    expected = plain_transformer(
        family, {key: tensor.float() for key, tensor in state.items()}, x, blocks=DEPTHS[family]
    )
    assert_near(maps, [expected[level - 1] for level in backbone.levels])


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = nn.MultiheadAttention(width, 2), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))


class _Tower(nn.Module):
    """OpenAI's visual tower: tokens first, then the batch."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 16, 16, bias=False)
        self.class_embedding, self.positional_embedding = (
            nn.Parameter(torch.randn(width)),
            nn.Parameter(torch.randn(197, width)),
        )
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*(_Block(width) for _ in range(depth)))})
        self.proj = nn.Parameter(torch.randn(width, 8))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv1(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(x), 1, -1), tokens], dim=1) + self.positional_embedding
        return self.transformer["resblocks"](self.ln_pre(tokens).transpose(0, 1)).transpose(0, 1)


class _Clip(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.visual = _Tower(32, depth)
        self.text_projection, self.logit_scale = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.tensor(4.6))
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x)


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, _Clip]:
    """A TorchScript archive in half precision, as OpenAI published its models, and the model in it."""
    torch.manual_seed(0)
    model = _Clip().eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(value(f"archive.{name}", parameter.shape, 0.2).half())
    path = tmp_path / "ViT-B-16.pt"
    torch.jit.trace(model, images(224, 224), check_trace=False).half().save(str(path))
    return path, model.float()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_archive_of_openai(archive: tuple[Path, _Clip]) -> None:
    path, model = archive
    x = images(224, 224, batch=2)
    (last,) = create_backbone("clip_base", weights=path, embed_dim=32, depth=2, num_heads=2, levels=(2,))(x)
    assert_near(last.flatten(2).transpose(1, 2), model(x)[:, 1:])
    with pytest.raises(CheckpointError, match=r"ViT-B-16\.pt does not fit.*missing cls_token"):
        tiny("dinov2", path)
    with pytest.raises(CheckpointError, match=r"ViT-B-16\.pt.*missing blocks\.2\."):
        create_backbone("clip_base", weights=path, embed_dim=32, depth=3, num_heads=2, levels=(3,))


# Nothing more than needed


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_past_the_last_level(family: str) -> None:
    backbone = tiny(family, original(family), levels=(1, 3))
    x = images(2 * PATCHES[family], 2 * PATCHES[family])
    keys = backbone.state_dict()
    assert {key.split(".")[1] for key in keys if key.startswith("blocks.")} == {"0", "1", "2"}
    first = {"norm_pre"} if family != "dinov2" else set()
    assert {key.split(".")[0] for key in keys} == {"cls_token", "pos_embed", "patch_embed", "blocks"} | first
    expected = plain_transformer(family, original(family), x, blocks=3)
    assert_near(backbone(x), [expected[0], expected[2]])


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_and_in_eval_mode(family: str) -> None:
    backbone = tiny(family)
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_images_do_not_depend_on_their_batch(family: str) -> None:
    backbone, x = tiny(family, original(family)), images(2 * PATCHES[family], 3 * PATCHES[family], batch=3)
    alone = [torch.cat(level) for level in zip(*(backbone(image[None]) for image in x), strict=True)]
    assert_near(backbone(x), alone)
    assert [level.shape[0] for level in backbone(x[:0])] == [0] * 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.half, 0.01), (torch.bfloat16, 0.08)])
def test_low_precision(family: str, dtype: torch.dtype, tolerance: float) -> None:
    x = images(3 * PATCHES[family], 2 * PATCHES[family])
    expected = tiny(family, original(family))(x)
    maps = tiny(family, original(family)).to(dtype)(x.to(dtype))
    assert all(level.dtype == dtype for level in maps)
    assert_near([level.float() for level in maps], expected, tolerance)


# EfficientNet


def lite() -> tuple[str, catalog.Backbone]:
    return next((name, entry) for name, entry in catalog.BACKBONES.items() if entry.family == "efficientnet")


def test_efficientnet_is_the_beginning_of_timms() -> None:
    name, entry = lite()
    model = timm.create_model(str(entry.timm_name)).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    backbone = create_backbone(name)
    own = backbone.state_dict()
    assert not any(key.startswith(("conv_head", "bn2", "classifier", f"blocks.{max(entry.blocks)}.")) for key in own)
    backbone = create_backbone(name, weights={key: tensor for key, tensor in model.state_dict().items() if key in own})
    seen: list[Tensor] = []
    for block in entry.blocks:
        model.blocks[block - 1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = images(96, 160, batch=2)
    model(x)
    maps = backbone(x)
    assert_near(maps, seen)
    expected = [
        (2, channels, 96 // reduction, 160 // reduction)
        for channels, reduction in zip(entry.channels, entry.reductions, strict=True)
    ]
    assert [tuple(level.shape) for level in maps] == expected
    assert isinstance(backbone, EfficientNet)
    assert (backbone.channels, backbone.reductions, backbone.patch_size) == (
        entry.channels,
        entry.reductions,
        max(entry.reductions),
    )
    assert not backbone.training and not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("setting", [{"levels": (1,)}, {"embed_dim": 8}, {"depth": 3}, {"num_heads": 2}])
def test_efficientnet_cannot_be_changed(setting: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="convolutional"):
        create_backbone(lite()[0], **setting)


# Refusals


def _without(state: dict[str, Tensor], key: str) -> None:
    del state[key]


def _longer(state: dict[str, Tensor], key: str) -> None:
    state[key] = torch.cat([state[key], state[key]])


def _nan(state: dict[str, Tensor], key: str) -> None:
    state[key].view(-1)[3] = torch.nan


def _infinite(state: dict[str, Tensor], key: str) -> None:
    state[key].view(-1)[3] = torch.inf


def _renamed(state: dict[str, Tensor], key: str) -> None:
    state["something.else"] = state[key]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without, r"missing blocks\.1\.mlp\.fc1\.weight"),
        (_longer, r"blocks\.1\.mlp\.fc1\.weight has shape \(512, 64\) instead of \(256, 64\)"),
        (_nan, r"blocks\.1\.mlp\.fc1\.weight holds NaN"),
        (_infinite, r"blocks\.1\.mlp\.fc1\.weight holds NaN or infinite"),
        (_renamed, r"unexpected something\.else"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_refuses_weights_that_do_not_fit(
    family: str, spoil: Callable[[dict[str, Tensor], str], None], message: str
) -> None:
    state = original(family)
    spoil(state, f"{KEYS[family]['block'].format(1)}{KEYS[family]['mlp'][0]}.weight")
    with pytest.raises(CheckpointError, match=f"the given state dict.*{message}"):
        tiny(family, state)


@pytest.mark.parametrize("family", FAMILIES)
def test_refuses_models_of_another_depth_or_width(family: str) -> None:
    depth = DEPTHS[family]
    with pytest.raises(CheckpointError, match=rf"unexpected blocks\.{depth - 1}\."):
        tiny(family, original(family), depth=depth - 1, levels=(1, 2))
    with pytest.raises(CheckpointError, match=rf"missing blocks\.{depth}\."):
        tiny(family, original(family), depth=depth + 1)
    with pytest.raises(CheckpointError, match=r"has shape"):
        tiny(family, original(family), embed_dim=128)


@pytest.mark.parametrize(
    ("arch", "other"), [("dinov2", "clip"), ("clip", "dinov2"), ("imagebind", "dinov2"), ("dinov2", "imagebind")]
)
def test_refuses_weights_of_another_family(arch: str, other: str) -> None:
    with pytest.raises(CheckpointError, match="another model"):
        tiny(arch, original(other))


def test_refuses_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth"):
        tiny("dinov2", tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("arch", "size", "nearest"),
    [
        ("dinov2_base", 225, "224 and 238"),
        ("dinov2_base", (224, 230), "224 and 238"),
        ("dinov2_base", (100, 224), "98 and 112"),
        ("clip_base", 230, "224 and 240"),
        ("clip_base", 7, "16 and 32"),
        ("clip_base", 0, "16 and 32"),
        ("imagebind_huge", (-14, 14), "14 and 28"),
        ("efficientnet_lite", 33, "32 and 48"),
    ],
)
def test_refuses_sizes_with_the_nearest_possible_ones(arch: str, size: int | tuple[int, int], nearest: str) -> None:
    with torch.device("meta"), pytest.raises(InputError, match=nearest):
        create_backbone(arch, img_size=size)


@pytest.mark.parametrize("family", FAMILIES)
def test_refuses_inputs(family: str) -> None:
    backbone, patch = tiny(family), PATCHES[family]
    with pytest.raises(InputError, match=f"{4 * patch} and {5 * patch}"):
        backbone(torch.zeros(1, 3, 2 * patch, 4 * patch + 1))
    for shape in [
        (3, 2 * patch, 2 * patch),
        (1, 1, 2 * patch, 2 * patch),
        (1, 4, 2 * patch, 2 * patch),
        (1, 1, 3, 2 * patch, 2 * patch),
    ]:
        with pytest.raises(InputError, match="shape"):
            backbone(torch.zeros(shape))


def test_refuses_inputs_of_the_efficientnet() -> None:
    backbone = create_backbone(lite()[0])
    with pytest.raises(InputError, match="multiples of"):
        backbone(torch.zeros(1, 3, 64, 65))
    with pytest.raises(InputError, match="shape"):
        backbone(torch.zeros(3, 64, 64))


@pytest.mark.parametrize("levels", [(0, 1), (2, 1), (1, 1), (1, 5), (-1,), (5,)])
def test_refuses_levels(levels: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="1 to 4"):
        tiny("dinov2", levels=levels)


def test_refuses_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(InputError, match="5 attention heads"):
        tiny("dinov2", num_heads=5)


def test_unknown_names_get_suggestions() -> None:
    with pytest.raises(UnknownNameError, match="dinov2_base"):
        create_backbone("dinov2-base")
