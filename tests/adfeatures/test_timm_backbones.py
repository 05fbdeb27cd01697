"""Backbones of timm against timm's own models, hooked where their blocks and stages end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from helpers.golden_values import assert_near, fill, shapes, value
from torch import Tensor, nn

from adfeatures.backbones import StateDict, VisionTransformer
from adfeatures.errors import CheckpointError, InputError, UnknownNameError
from adfeatures.resolve import resolve_backbone
from adfeatures.timm_backbones import TimmBackbone, find_timm


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def images(height: int, width: int, batch: int = 1) -> Tensor:
    return value(f"images.{height}.{width}", (batch, 3, height, width))


def loaded(arch: str, levels: tuple[int, ...] | None, state: StateDict, source: str) -> TimmBackbone:
    backbone = TimmBackbone(arch, levels)
    backbone.load(state, source)
    return backbone.eval()


def _without(state: dict[str, Tensor], key: str) -> None:
    del state[key]


def _longer(state: dict[str, Tensor], key: str) -> None:
    state[key] = torch.cat([state[key], state[key]])


def _nan(state: dict[str, Tensor], key: str) -> None:
    state[key].view(-1)[3] = torch.nan


def _renamed(state: dict[str, Tensor], key: str) -> None:
    state["something.else"] = state[key]


def timm_whole(arch: str, **kwargs: Any) -> Any:
    """A timm model of random weights, with statistics of batch norms that show whether they are used."""
    torch.manual_seed(1)
    model = timm.create_model(arch, **kwargs).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return model


def hooked(model: nn.Module, modules: list[str], x: Tensor) -> list[Tensor]:
    """What these modules give when the whole model runs."""
    seen: list[Tensor] = []
    for name in modules:
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(x)
    return seen


@pytest.mark.parametrize(
    ("arch", "levels", "blocks", "prefix"),
    [
        ("test_vit", None, (0, 2, 3, 5), 1),
        ("test_vit4", (2, 5), (1, 4), 1),
        ("vit_little_patch16_reg4_gap_256", (1,), (0,), 4),
    ],
)
@pytest.mark.parametrize("grid", [None, (3, 5)])
def test_timm_transformers_give_raw_blocks_without_prefix_tokens(
    arch: str, levels: tuple[int, ...] | None, blocks: tuple[int, ...], prefix: int, grid: tuple[int, int] | None
) -> None:
    whole = timm_whole(arch, dynamic_img_size=True)
    height, width = grid or whole.patch_embed.grid_size
    x = images(16 * height, 16 * width, batch=2)
    backbone = loaded(arch, levels, whole.state_dict(), "timm")
    assert backbone.levels == tuple(block + 1 for block in blocks) and backbone.reductions == (16,) * len(blocks)
    tokens = hooked(whole, [f"blocks.{block}" for block in blocks], x)
    assert_near(backbone(x), [level[:, prefix:].transpose(1, 2).unflatten(2, (height, width)) for level in tokens])
    built = {key.split(".")[2] for key in backbone.state_dict() if key.startswith("model.blocks.")}
    assert built == {str(block) for block in range(max(blocks) + 1)}
    assert not any(key.startswith(("model.norm.", "model.fc_norm.", "model.head.")) for key in backbone.state_dict())


@pytest.mark.parametrize(
    ("arch", "levels", "modules", "reductions"),
    [
        ("test_resnet", None, ["layer1", "layer2", "layer3"], (4, 8, 16)),
        ("test_convnext", None, ["stages.0", "stages.1", "stages.2"], (4, 8, 16)),
        ("test_efficientnet", (3,), ["blocks.2"], (8,)),
    ],
)
def test_timm_pyramids_give_their_stages(
    arch: str, levels: tuple[int, ...] | None, modules: list[str], reductions: tuple[int, ...]
) -> None:
    whole, x = timm_whole(arch), images(64, 96, batch=2)
    backbone = loaded(arch, levels, whole.state_dict(), "timm")
    maps, expected = backbone(x), hooked(whole, modules, x)
    assert_near(maps, expected)
    assert [tuple(level.shape[1:]) for level in maps] == [
        (channels, 64 // reduction, 96 // reduction)
        for channels, reduction in zip(backbone.channels, reductions, strict=True)
    ]
    assert (backbone.reductions, backbone.patch_size) == (reductions, max(reductions))


def test_timm_backbones_read_what_they_write_and_what_timm_converts() -> None:
    state, x = timm_whole("test_vit").state_dict(), images(160, 160)
    backbone = loaded("test_vit", None, state, "timm")
    expected = backbone(x)
    assert_near(loaded("test_vit", None, backbone.state_dict(), "itself")(x), expected, 0)
    openclip = {f"visual.trunk.{key}": tensor for key, tensor in state.items()}
    openclip["text.x"] = torch.ones(1)
    assert_near(loaded("test_vit", None, openclip, "open_clip")(x), expected, 0)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch16_224.dino"])
def test_dino_resizes_its_positions_in_its_own_way(name: str) -> None:
    entry, backbone = find_timm(name, (1, 2), of_authors=True)
    backbone.load(None)
    patch, side = backbone.patch_size, backbone.model.patch_embed.grid_size[0]
    x = images(3 * patch, 5 * patch, batch=2)
    seen: list[Tensor] = []
    backbone.model.norm_pre.register_forward_hook(lambda module, inputs, output: seen.append(output))
    maps = backbone.eval()(x)
    # The interpolation of the authors' own prepare_tokens, patches in the order of rows.
    table = backbone.model.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    table = nn.functional.interpolate(table, scale_factor=(3.1 / side, 5.1 / side), mode="bicubic")
    patches = nn.functional.conv2d(
        x, backbone.model.patch_embed.proj.weight, backbone.model.patch_embed.proj.bias, patch
    )
    assert_near([seen[0][:, 1:]], [(patches + table).flatten(2).transpose(1, 2)])
    first = backbone.model.cls_token + backbone.model.pos_embed[:, :1]
    assert_near([seen[0][:, :1]], [first.expand(2, -1, -1)])
    timms = TimmBackbone(name.partition(".")[0], (1, 2)).eval()
    timms.load(backbone.state_dict())
    assert (maps[0] - timms(x)[0]).abs().max() > 1e-3 * maps[0].abs().max()
    assert "DINOv2" in entry.notes and "timm" in find_timm(name, (1,))[0].notes


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_224.augreg_in1k", "test_vit"])
def test_others_resize_their_positions_as_timm_does(name: str) -> None:
    entry, backbone = find_timm(name, (1,), of_authors=True)
    assert "_pos_embed" not in vars(backbone.model) and "the way timm does" in entry.notes


def test_dinov2_of_timm_is_dinov2_of_its_authors() -> None:
    entry, backbone = find_timm("vit_small_patch14_dinov2", (1, 2), of_authors=True)
    backbone.load(None)
    ours = VisionTransformer("dinov2", 14, 384, 6, (1, 2)).eval()
    ours.load_state_dict({key.removeprefix("model."): tensor for key, tensor in backbone.state_dict().items()})
    x = images(42, 70)
    assert_near(backbone.eval()(x), ours(x), 0)


def test_no_weights_leave_those_of_the_levels_as_they_were() -> None:
    backbone = TimmBackbone("test_vit", (1, 2))
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    backbone.load(None, "nothing")
    after = backbone.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in after.items())
    spare = ("model.blocks.2.", "model.blocks.3.", "model.blocks.4.", "model.blocks.5.", "model.norm.", "model.head.")
    assert before.keys() - after.keys() == {key for key in before if key.startswith(spare)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(_without, "missing"), (_longer, "has shape"), (_nan, "holds NaN"), (_renamed, r"unexpected something\.else")],
)
@pytest.mark.parametrize(
    ("arch", "key"), [("test_vit", "blocks.1.mlp.fc1.weight"), ("test_resnet", "layer2.0.conv1.weight")]
)
def test_timm_backbones_refuse_weights_that_do_not_fit(
    arch: str, key: str, spoil: Callable[[dict[str, Tensor], str], None], message: str
) -> None:
    state = dict(timm_whole(arch).state_dict())
    spoil(state, key)
    with pytest.raises(CheckpointError, match=rf"some\.file.*{message}"):
        loaded(arch, None, state, "some.file")
    with pytest.raises(CheckpointError, match="some.file"):
        loaded(arch, None, fill(shapes("backbone_clip"), "clip."), "some.file")


def test_find_timm_describes_what_timm_has() -> None:
    entry, backbone = find_timm("test_vit", (2, 4))
    cfg = timm.get_pretrained_cfg("test_vit")
    assert cfg is not None
    assert (entry.family, entry.timm_name, entry.tag) == ("timm", f"test_vit.{cfg.tag}", cfg.tag)
    assert (entry.blocks, entry.channels, entry.reductions) == ((2, 4), (64, 64), (16, 16))
    assert (backbone.levels, backbone.channels, backbone.reductions) == ((2, 4), (64, 64), (16, 16))
    assert entry.normalization == (cfg.mean, cfg.std) and entry.hub_file == (cfg.hf_hub_id, "model.safetensors")
    assert entry.img_size == cfg.input_size[1:]
    sized = resolve_backbone("test_vit", weights="random", levels=(2, 4), img_size=(32, 48)).entry
    assert sized == replace(entry, img_size=(32, 48))
    assert find_timm("tf_efficientnet_lite2")[0].img_size == (256, 256)  # timm's 260 cut to a multiple of 16


def test_trying_out_computes_nothing_and_changes_nothing() -> None:
    backbone, devices = TimmBackbone("test_vit"), list[str]()
    backbone.model.blocks[0].register_forward_pre_hook(lambda module, inputs: devices.append(inputs[0].device.type))
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    backbone.try_out((32, 48))
    assert devices == ["meta"]
    for key, tensor in backbone.state_dict().items():
        assert tensor.device.type == "cpu" and torch.equal(tensor, before[key])


@pytest.mark.parametrize(
    ("name", "levels", "size", "error", "message"),
    [
        ("rensnet18", None, None, UnknownNameError, "Did you mean 'resnet18'"),
        ("resnet18.nothing", None, None, UnknownNameError, r"tag of resnet18.*a1_in1k"),
        ("adpretrain_timm", None, None, UnknownNameError, "Unknown backbone"),
        ("hf-hub:owner/repo", None, None, UnknownNameError, "Unknown backbone"),
        ("test_vit", (0, 1), None, InputError, "1 to 6"),
        ("test_vit", (), None, InputError, "1 to 6"),
        ("test_resnet", (2, 6), None, InputError, "1 to 5"),
        ("test_vit", None, (100, 96), InputError, "nearest to 100 are 96 and 112"),
        ("vit_tiny_r_s16_p8_224", (1, 2), (225, 224), InputError, "multiples of 32"),
        ("cait_xxs24_224", None, (240, 224), InputError, r"takes no images of \(240, 224\)"),
    ],
)
def test_what_cannot_be_is_refused(
    name: str, levels: tuple[int, ...] | None, size: tuple[int, int] | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resolve_backbone(name, weights="random", levels=levels, img_size=size)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ((2, 2, 2, 32, 32, 32), r"no stages with 4, 8 or 16 .*: choose levels from 1 to 6\."),
        ((8, 8, 8, 8, 8, 8), "instead of"),
        ((), "has no feature maps for test_vit"),
    ],
)
def test_models_that_say_otherwise_than_they_do_are_refused(
    described: tuple[int, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(*args: Any, **kwargs: Any) -> Any:
        model = original(*args, **kwargs)
        pairs = zip(model.feature_info, described, strict=False)
        model.feature_info = [{**stage, "reduction": reduction} for stage, reduction in pairs]
        return model

    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(InputError, match=message):
        resolve_backbone("test_vit", weights="random")
