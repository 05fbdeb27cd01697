"""The projector against the original's numbers (goldens) and its published form, rebuilt below from torch's parts."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.golden_values import FOLDER, assert_near, fill, golden, shapes, value
from helpers.models import tiny_extractor
from torch import Tensor, nn
from torch.func import functional_call

from adfeatures.backbones import load_strictly
from adfeatures.checkpoints import load_checkpoint
from adfeatures.errors import CheckpointError, InputError
from adfeatures.extractor import FeatureExtractor
from adfeatures.projector import ResidualProjector, linear

CHANNELS = (16, 20, 24)
KEYS = 24


def projector(channels: tuple[int, ...] = CHANNELS, **kwargs: int) -> ResidualProjector:
    """One with weights large enough to matter."""
    made = ResidualProjector(channels, **{"num_keys": KEYS, **kwargs})
    made.load_state_dict({key: value(f"weights.{key}", tensor.shape, 0.2) for key, tensor in made.state_dict().items()})
    return made


def residuals(batch: int = 2, channels: tuple[int, ...] = CHANNELS) -> list[Tensor]:
    return [value(f"residuals.{batch}.{level}", (batch, c, 3, 2 + level)) for level, c in enumerate(channels)]


def golden_inputs() -> list[Tensor]:
    return [value(f"projector.input.{level}", (2, 32, 16, 16)) for level in range(4)]


def published(state: dict[str, Tensor], x: Tensor, level: int, heads: int) -> Tensor:
    """Method section 2, image by image, keys and values computed for each, attention weights and all."""
    own = {
        key.removeprefix(f"l{level}_proj."): tensor
        for key, tensor in state.items()
        if key.startswith(f"l{level}_proj.")
    }
    layer = {key.removeprefix("layers.0."): tensor for key, tensor in own.items()}
    attention = nn.MultiheadAttention(x.shape[1], heads, batch_first=True)
    attention_state = {
        key.removeprefix("cross_attn."): tensor for key, tensor in layer.items() if key.startswith("cross_attn.")
    }

    def linear(t: Tensor, name: str) -> Tensor:
        return F.linear(t, layer[f"mlp.{name}.weight"], layer[f"mlp.{name}.bias"])

    images = []
    for image in x:
        tokens = image.flatten(1).T[None]
        ref = F.conv1d(
            own["x_ref"].transpose(1, 2), own["ref_proj.project.weight"], own["ref_proj.project.bias"]
        ).transpose(1, 2)
        y = tokens - functional_call(attention, attention_state, (tokens, ref, ref), strict=True)[0]
        hidden = linear(y, "fc1")
        gate = torch.sigmoid(linear(F.relu(linear(hidden.mean(dim=1, keepdim=True), "se.fc1")), "se.fc2"))
        out = y + linear(F.gelu(hidden * gate), "fc2")
        images.append(out[0].T.reshape(image.shape))
    return torch.stack(images)


def expected(model: ResidualProjector, x: list[Tensor]) -> list[Tensor]:
    state = model.state_dict()
    with torch.no_grad():
        return [
            published(state, level, number, heads)
            for number, (level, heads) in enumerate(zip(x, model.num_heads, strict=True), start=1)
        ]


def gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def counted(model: ResidualProjector) -> list[str]:
    """Grows by one entry for each time that a level's learnable references are projected."""
    calls: list[str] = []
    for name, level in model.named_children():
        level.get_submodule("ref_proj").register_forward_hook(
            lambda module, inputs, output, name=name: calls.append(name)
        )
    return calls


# Equal to the original


def test_golden() -> None:
    model = ResidualProjector([32] * 4)
    load_strictly(model, fill(shapes("projector"), "projector."), "golden")
    found = golden("projector")
    with torch.no_grad():
        assert_near(model(golden_inputs()), [found[f"output.{level}"] for level in range(4)])
    assert_near(model(golden_inputs()), [found[f"output.{level}"] for level in range(4)])


def test_golden_gradients() -> None:
    model = ResidualProjector([32] * 4)
    load_strictly(model, fill(shapes("projector"), "projector."), "golden")
    loss = torch.stack([level.square().mean() for level in model(golden_inputs())]).sum()
    loss.backward()
    wanted = golden("projector_grad")
    gradients = {key: gradient_of(parameter) for key, parameter in model.named_parameters()}
    assert_near(loss.detach(), wanted.pop("loss"))
    assert_near(gradients["l1_proj.x_ref"].norm(), wanted.pop("l1_proj.x_ref.norm"))
    assert len(wanted) == 3
    for key, gradient in wanted.items():
        assert_near(gradients[key], gradient)


def test_published_checkpoint() -> None:
    """A file in the format of the published ones: bfloat16 weights."""
    checkpoint = load_checkpoint(FOLDER / "upstream_checkpoint.pth")
    model = ResidualProjector([32] * 4)
    load_strictly(model, checkpoint.state_dict, "upstream_checkpoint.pth")
    x = golden_inputs()
    with torch.no_grad():
        assert_near(model(x), expected(model, x))
        assert_near(model(x), [golden("projector")[f"output.{level}"] for level in range(4)], 0.02)


@pytest.mark.parametrize("batch", [1, 5])
def test_forms_are_equal(batch: int) -> None:
    model, x = projector(), residuals(batch)
    wanted = expected(model, x)
    assert_near(model(x), wanted)
    assert_near(model.eval()(x), wanted)
    with torch.no_grad():
        assert_near(model(x), wanted)
        assert_near(model(x), wanted)
    assert_near(model.requires_grad_(False)(x), wanted)
    assert [level.shape for level in model(x)] == [level.shape for level in x]


def test_gradients_of_the_published_form() -> None:
    model = projector()
    inputs, others = ([level.requires_grad_() for level in residuals()] for _ in range(2))
    state = {key: parameter.detach().clone().requires_grad_() for key, parameter in model.named_parameters()}
    forms = (
        published(state, level, i, heads)
        for i, (level, heads) in enumerate(zip(others, model.num_heads, strict=True), start=1)
    )
    for maps in (model(inputs), forms):
        torch.stack([level.square().mean() for level in maps]).sum().backward()
    assert_near([gradient_of(level) for level in inputs], [gradient_of(level) for level in others])
    for key, parameter in model.named_parameters():
        assert_near(gradient_of(parameter), gradient_of(state[key]), 1e-4)


def test_images_do_not_depend_on_their_batch() -> None:
    model, x = projector().requires_grad_(False), residuals(batch=4)
    alone = [
        torch.cat(level) for level in zip(*(model([level[i : i + 1] for level in x]) for i in range(4)), strict=True)
    ]
    assert_near(model(x), alone)


# State dict, heads, sizes


def test_published_keys() -> None:
    own = {key: list(tensor.shape) for key, tensor in ResidualProjector([32] * 4).state_dict().items()}
    assert own == shapes("projector")


@pytest.mark.parametrize(("channels", "millions"), [(768, 41.7), (1024, 71.4), (1280, 108.9)])
def test_full_size(channels: int, millions: float) -> None:
    with torch.device("meta"):
        model = ResidualProjector([channels] * 4)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions
    state = model.state_dict()
    assert state["l4_proj.layers.0.mlp.se.fc1.weight"].shape == (channels // 4, 4 * channels)
    assert state["l1_proj.x_ref"].shape == (1, 2048, channels)
    assert model.num_heads == (16,) * 4


@pytest.mark.parametrize(
    "key", ["l1_proj.x_ref", "l2_proj.layers.0.mlp.se.fc2.bias", "l3_proj.ref_proj.project.weight"]
)
def test_loads_strictly(key: str) -> None:
    state = projector().state_dict()
    for spoiled in (
        {other: tensor for other, tensor in state.items() if other != key},
        {**state, f"{key}.more": state[key]},
        {**state, key: torch.zeros(3)},
        {**state, key: torch.full_like(state[key], torch.nan)},
    ):
        with pytest.raises(CheckpointError, match=rf"some\.pth does not fit.*{key}"):
            load_strictly(projector(), spoiled, "some.pth")
    with pytest.raises(CheckpointError, match="unexpected l3_proj"):
        load_strictly(projector(CHANNELS[:2]), state, "some.pth")


@pytest.mark.parametrize(
    ("channels", "heads"),
    [(32, 16), (40, 10), (48, 16), (112, 16), (80, 16), (34, 2), (7, 7), (12, 12), (1, 1), (17, 1)],
)
def test_heads(channels: int, heads: int) -> None:
    model, x = projector((channels,)), [value("heads", (1, channels, 2, 2))]
    assert model.num_heads == (heads,) == (max(d for d in range(1, 17) if channels % d == 0),)
    assert_near(model(x), expected(model, x))


@pytest.mark.parametrize(("channels", "width"), [(16, 8), (20, 8), (40, 16), (48, 16), (72, 24), (80, 24), (112, 32)])
def test_squeeze_width(channels: int, width: int) -> None:
    """A quarter of the channels as a multiple of 8: the nearest, or the next where that is under nine tenths."""
    assert ResidualProjector([channels], num_keys=1).state_dict()["l1_proj.layers.0.mlp.se.fc1.weight"].shape == (
        width,
        4 * channels,
    )


def test_heads_can_be_given() -> None:
    model, x = projector(num_heads=4), residuals()
    assert model.num_heads == (4, 4, 4)
    assert_near(model(x), expected(model, x))


def test_initial_values() -> None:
    torch.manual_seed(0)
    state = ResidualProjector([256]).state_dict()
    assert abs(state["l1_proj.x_ref"].std() - 1) < 0.01
    assert abs(state["l1_proj.ref_proj.project.weight"].std() * 256**0.5 - 2**0.5) < 0.03


def test_indices() -> None:
    model, x = projector().requires_grad_(False), residuals()
    whole, calls = model(x), counted(model)
    for indices in ([1], [2, 0], []):
        assert_near(model(x, indices), [whole[index] for index in indices], 0)
    assert calls == []


@pytest.mark.parametrize("channels", [(16, 20), (16, 20, 20), (20, 16, 24), (16, 20, 24, 24)])
def test_refuses_other_levels(channels: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\(16, 20, 24\).*got"):
        projector()([torch.zeros(1, c, 2, 2) for c in channels])


# Keys and values once


def test_once_for_each_forward_pass_in_training() -> None:
    model = projector().train()
    calls = counted(model)
    for batch in (1, 5):
        calls.clear()
        model(residuals(batch))
        assert calls == ["l1_proj", "l2_proj", "l3_proj"]


@pytest.mark.parametrize("frozen", [True, False])
def test_once_at_all_outside_of_training(frozen: bool) -> None:
    model = projector().requires_grad_(not frozen)
    calls = counted(model)
    for batch in (1, 5, 2):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                model(residuals(batch))
        if frozen:
            model(residuals(batch))
    assert calls == ["l1_proj", "l2_proj", "l3_proj"]


def test_trained_around_frozen_references() -> None:
    """Keys and values are kept where their own weights are frozen, though others train."""
    model, x = projector(), residuals()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in key)
    calls = counted(model)
    for _ in range(2):
        sum(level.sum() for level in model(x)).backward()
    assert len(calls) == 3
    assert all((parameter.grad is not None) == ("mlp" in key) for key, parameter in model.named_parameters())


SOURCES = [
    "x_ref",
    "ref_proj.project.weight",
    "ref_proj.project.bias",
    "layers.0.cross_attn.in_proj_weight",
    "layers.0.cross_attn.in_proj_bias",
]


def _level(model: ResidualProjector) -> Any:
    return model.get_submodule("l2_proj")


def _other_state(model: ResidualProjector) -> dict[str, Tensor]:
    return {key: value(f"other.{key}", tensor.shape, 0.2) for key, tensor in model.state_dict().items()}


def _load(model: ResidualProjector) -> None:
    model.load_state_dict(_other_state(model))


def _assign(model: ResidualProjector) -> None:
    model.load_state_dict(_other_state(model), assign=True)


def _round_trip(model: ResidualProjector) -> None:
    model.half().float()


def _inference_mode(model: ResidualProjector) -> None:
    with torch.inference_mode():
        _level(model).x_ref.mul_(1.5)


def _detached(model: ResidualProjector) -> None:
    _level(model).x_ref.detach().mul_(1.5)


def _replaced(model: ResidualProjector) -> None:
    level = _level(model)
    level.x_ref = nn.Parameter(level.x_ref.detach() * 1.5)


def _data(model: ResidualProjector) -> None:
    _level(model).x_ref.data = _level(model).x_ref.data * 1.5


def _same_memory(model: ResidualProjector) -> None:
    """A new parameter counts its changes anew, so the count of changes may come to equal that of the old one."""
    level = _level(model)
    changes = level.x_ref._version
    level.x_ref = nn.Parameter(level.x_ref.data, level.x_ref.requires_grad)
    with torch.no_grad():
        while level.x_ref._version < changes:
            level.x_ref.mul_(1.5)


def _swapped_module(model: ResidualProjector) -> None:
    _level(model).ref_proj = copy.deepcopy(model.get_submodule("l2_proj.ref_proj"))
    with torch.no_grad():
        _level(model).ref_proj.project.weight.mul_(1.5)


CHANGES: dict[str, Callable[[ResidualProjector], None]] = {
    "load_state_dict": _load,
    "load_state_dict(assign=True)": _assign,
    "half and back": _round_trip,
    "in place in inference mode": _inference_mode,
    "in place by detach": _detached,
    "another parameter": _replaced,
    "other data": _data,
    "another parameter on the same memory": _same_memory,
    "another module": _swapped_module,
}


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_frozen_form_follows(change: Callable[[ResidualProjector], None], trainable: bool) -> None:
    model, x = projector().requires_grad_(trainable), residuals()
    with torch.no_grad():
        before = model(x)
    change(model)
    with torch.no_grad():
        after = model(x)
    assert_near(after, expected(model, x))
    assert not torch.equal(before[1], after[1])


def test_frozen_form_follows_data_at_the_old_address() -> None:
    """Freed memory is given out again: twice other values, and they may lie where the first ones did."""
    model, x = projector(), residuals()
    for _ in range(10):
        with torch.no_grad():
            model(x)
        for _ in range(2):
            _data(model)
        with torch.no_grad():
            assert_near(model(x), expected(model, x))
        _load(model)


def test_a_move_lets_go_of_the_old_memory() -> None:
    model = projector()
    memory = weakref.ref(_level(model).x_ref.untyped_storage())
    with torch.no_grad():
        model(residuals())
    assert memory() is not None
    model.double()
    assert memory() is None


@pytest.mark.parametrize("source", SOURCES)
def test_frozen_form_follows_each_of_its_weights(source: str) -> None:
    model, x = projector(), residuals()
    with torch.no_grad():
        before = model(x)
        _level(model).get_parameter(source).add_(0.3)
        after = model(x)
    assert_near(after, expected(model, x))
    assert not torch.equal(before[1], after[1])
    assert torch.equal(before[0], after[0])


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.3),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "Adam, foreach": lambda parameters: torch.optim.Adam(parameters, lr=0.1, foreach=True),
    "Adam, fused": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("look", ["before forward", "before backward", "before step"])
def test_frozen_form_follows_an_optimizer(
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], look: str
) -> None:
    """Wherever the frozen form was last used before a step: validation after it sees the new weights."""
    model, x = projector(), residuals()
    steps = optimizer(list(model.parameters()))

    def frozen() -> list[Tensor]:
        with torch.no_grad():
            return model(x)

    for _ in range(2):
        before = frozen() if look == "before forward" else None
        loss = torch.stack([level.square().mean() for level in model(x)]).sum()
        before = frozen() if look == "before backward" else before
        loss.backward()
        before = frozen() if look == "before step" else before
        steps.step()
        steps.zero_grad()
        after = frozen()
        assert_near(after, expected(model, x))
        assert before is not None and not any(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = projector()
        x = residuals()
        before = model(x)
        assert_near(before, expected(model, x))
        _level(model).x_ref.mul_(1.5)
        assert_near(model(x), expected(model, x))
        assert not torch.equal(before[1], model(x)[1])


@pytest.mark.parametrize("move", [lambda model: model, lambda model: model.double().float()], ids=["made", "moved"])
@pytest.mark.parametrize("trainable", [True, False])
def test_frozen_in_inference_mode(move: Callable[[ResidualProjector], ResidualProjector], trainable: bool) -> None:
    """What is made or moved in inference mode keeps its keys and values, there and outside."""
    with torch.inference_mode():
        model, x = move(projector()).requires_grad_(trainable), residuals()
        calls = counted(model)
        found = [model(x), model(x)]
    with torch.no_grad():
        found += [model(x), model(residuals())]
    for maps in found:
        assert_near(maps, expected(model, x))
    assert calls == ["l1_proj", "l2_proj", "l3_proj"]


def test_an_extractor_made_in_inference_mode_is_frozen() -> None:
    x = torch.rand(2, 3, 56, 56)

    def made() -> FeatureExtractor:
        torch.manual_seed(0)
        model = tiny_extractor()
        model.set_references(torch.rand(3, 3, 56, 56))
        return model

    wanted = made()(x)
    with torch.inference_mode():
        model = made()
        assert model.projector is not None
        calls = counted(model.projector)
        found = [model(x), model(x)]
    found.append(model(x))
    for maps in found:
        assert_near(maps, wanted, 0)
    assert len(calls) == len(model.levels)


def test_inference_mode_then_gradients() -> None:
    model, x = projector().requires_grad_(False), residuals()
    with torch.inference_mode():
        model(x)
    inputs = [level.clone().requires_grad_() for level in x]
    found = model(inputs)
    assert_near([level.detach() for level in found], expected(model, x))
    torch.stack([level.square().mean() for level in found]).sum().backward()
    assert all(gradient_of(level).abs().sum() > 0 for level in inputs)
    model.requires_grad_(True)
    torch.stack([level.square().mean() for level in model(x)]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("trainable", [True, False])
def test_copies_go_their_own_way(duplicate: Callable[[ResidualProjector], ResidualProjector], trainable: bool) -> None:
    model, x = projector().requires_grad_(trainable), residuals()
    with torch.no_grad():
        before = model(x)
        twin = duplicate(model)
        assert_near(twin(x), before, 0)
        _level(twin).x_ref.mul_(1.5)
        assert_near(twin(x), expected(twin, x))
        assert not torch.equal(twin(x)[1], before[1])
        assert_near(model(x), before, 0)


def test_files_hold_the_weights_alone() -> None:
    model = projector()

    def size() -> int:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        return len(buffer.getvalue())

    before = size()
    with torch.no_grad():
        model(residuals())
    assert size() == before
    assert set(model.state_dict()) == {key for key, _ in model.named_parameters()}


# Precision


def test_autocast_leaves_no_trace() -> None:
    model, x = projector().requires_grad_(False), residuals()
    with torch.autocast("cpu", torch.bfloat16):
        assert_near([level.float() for level in model(x)], expected(model, x), 0.05)
    assert_near(model(x), projector().requires_grad_(False)(x), 0)


def test_autocast_in_training() -> None:
    model, x = projector(), residuals()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        loss = torch.stack([level.float().square().mean() for level in found]).sum()
    loss.backward()
    assert_near([level.detach().float() for level in found], expected(model, x), 0.05)
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.half, 0.01), (torch.bfloat16, 0.08)])
@pytest.mark.parametrize("used", [True, False])
def test_other_dtypes(dtype: torch.dtype, tolerance: float, used: bool) -> None:
    model, x = projector().requires_grad_(False), residuals()
    wanted = expected(model, x)
    if used:
        model(x)
    found = model.to(dtype)([level.to(dtype) for level in x])
    assert all(level.dtype == dtype for level in found)
    assert_near([level.float() for level in found], wanted, tolerance)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, x = projector().requires_grad_(False), residuals()
    torch.save(model.state_dict(), tmp_path / "projector.pth")
    other = ResidualProjector(CHANNELS, num_keys=KEYS).requires_grad_(False)
    other(x)
    load_strictly(other, load_checkpoint(tmp_path / "projector.pth").state_dict, "projector.pth")
    assert_near(other(x), model(x), 0)


@pytest.mark.parametrize("convolves", [True, False])
def test_both_ways_of_a_linear_map_are_torchs_own(convolves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: convolves)
    torch.manual_seed(0)
    layer, tokens = torch.nn.Linear(12, 20), torch.randn(3, 7, 12)
    ours, theirs = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    found, expected = linear(ours, layer.weight, layer.bias), layer(theirs)
    assert_near(found, expected, 1e-6)
    gradients = torch.autograd.grad(found.square().sum(), [ours, *layer.parameters()])
    assert_near(gradients, torch.autograd.grad(expected.square().sum(), [theirs, *layer.parameters()]), 1e-5)
