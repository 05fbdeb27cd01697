"""Configs and the command line: every field can be given, and arrives with its own type."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import pytest
import torch

from adfeatures.errors import InputError, UnknownNameError
from training.console import add_options, from_options
from training.pretraining.config import FREE, CentersConfig, PretrainConfig

# A value of each type of a field, that is no default and that every field of the type accepts.
VALUES = {
    "str": "other",
    "str | None": "other",
    "int": 3,
    "int | None": 5,
    "float": 0.25,
    "tuple[str, ...]": ("one", "two"),
    "tuple[int, ...]": (2, 7),
}


def parse(config: type, arguments: list[str]) -> Any:
    parser = argparse.ArgumentParser()
    add_options(parser, config)
    return from_options(parser.parse_args(arguments), config)


def other_value(field: dataclasses.Field[Any], default: Any) -> Any:
    if field.metadata["choices"]:
        return next(choice for choice in field.metadata["choices"] if choice not in (default, "mvtec"))
    return {"output": "other.safetensors", "bit_depth": 12}.get(field.name, VALUES[str(field.type)])


@pytest.mark.parametrize("config", [PretrainConfig, CentersConfig])
def test_every_field_can_be_given(config: type) -> None:
    assert parse(config, []) == config()
    # These contradict some of the others, and are tried by themselves.
    fields = [field for field in dataclasses.fields(config) if field.name not in ("recipe", "preset", "no_residual")]
    wanted = {field.name: other_value(field, getattr(config(), field.name)) for field in fields}
    assert all(value != getattr(config(), name) for name, value in wanted.items())
    arguments = []
    for name, value in wanted.items():
        arguments += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    found = parse(config, arguments)
    assert found == config(**wanted)
    assert {name: type(getattr(found, name)) for name in wanted} == {
        name: type(value) for name, value in wanted.items()
    }


@pytest.mark.parametrize("config", [PretrainConfig, CentersConfig])
def test_the_published_recipe_has_a_precision_and_a_geometry(config: type) -> None:
    found = parse(config, ["--recipe", "published"])
    assert found == config(recipe="published") != config()
    assert config(recipe="published", img_size=(224,)).size == (224, 224)
    assert (found.size, found.preset) == ((224, 224), "resize224_crop224")
    assert (config().size, config().preset) == (None, "squash")
    with pytest.raises(InputError, match=r"224 x 224 pixels, not \(224, 280\): leave out --img-size, or --recipe"):
        config(recipe="published", img_size=(224, 280))


@pytest.mark.parametrize("config", [PretrainConfig, CentersConfig])
def test_images_can_be_cropped_in_any_recipe(config: type) -> None:
    found = parse(config, ["--preset", "resize256_crop224"])
    assert (found.size, found.preset, found.recipe) == ((224, 224), "resize256_crop224", "sound")
    message = r"preset resize256_crop224 cuts out 224 x 224 pixels, not \(448,\): leave out --img-size, or --preset"
    with pytest.raises(InputError, match=message):
        config(preset="resize256_crop224", img_size=(448,))


def test_the_published_recipe_is_of_bfloat16() -> None:
    assert [PretrainConfig(recipe=name).precision for name in ("sound", "published")] == ["autocast", "bfloat16"]
    assert PretrainConfig(recipe="published", precision="bfloat16", batch_size=4) == PretrainConfig(
        recipe="published", batch_size=4
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "squash"}, "has resize224_crop224 preset, not squash: leave out --preset, or --recipe"),
        ({"precision": "float32"}, "has bfloat16 precision, not float32: leave out --precision, or --recipe"),
        ({"precision": "autocast"}, "has bfloat16 precision, not autocast"),
        ({"anchors": "first"}, "has both anchors, not first"),
        ({"pseudo_huber": "paper"}, "has code pseudo_huber, not paper: leave out --pseudo-huber"),
        ({"view_statistics": "backbone"}, "has original view_statistics, not backbone"),
        ({"losses": "norm"}, "has both losses, not norm"),
        ({"no_residual": True}, "has no no_residual, not True: leave out --no-residual"),
        ({"pool": 4}, "has no pool, not 4: leave out --pool"),
    ],
)
def test_what_contradicts_the_published_recipe_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"The recipe published {message}"):
        PretrainConfig(recipe="published", **values)


def test_a_run_of_another_recipe_is_another_run() -> None:
    sound, published = PretrainConfig(precision="bfloat16"), PretrainConfig(recipe="published")
    changes = ["recipe was 'sound', is 'published'", "preset was 'squash', is 'resize224_crop224'"]
    assert published.changed_since(json.loads(sound.to_text())) == changes
    assert published.changed_since(json.loads(published.to_text())) == []
    # Runs of earlier versions say nothing of a recipe, or of a preset, which was that of the recipe.
    for run, missing in ((sound, ("recipe", "preset")), (sound, ("preset",)), (published, ("preset",))):
        earlier = {name: value for name, value in json.loads(run.to_text()).items() if name not in missing}
        assert run.changed_since(earlier) == []
        assert (published if run == sound else sound).changed_since(earlier) != []


def test_an_ablation_is_asked_for_by_a_flag() -> None:
    assert parse(PretrainConfig, ["--no-residual"]) == PretrainConfig(no_residual=True) != PretrainConfig()


def test_whole_numbers_are_numbers_where_a_float_is_meant() -> None:
    found = parse(PretrainConfig, ["--held-out", "0", "--lr", "1e-3", "--milestones"])
    assert (found.held_out, found.lr, found.milestones) == (0.0, 1e-3, ()) and isinstance(found.held_out, float)


def test_the_help_names_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(PretrainConfig, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(PretrainConfig):
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        assert f"--{field.name.replace('_', '-')}" in text
        # A flag is off by default, and argparse says nothing of it.
        assert field.type == "bool" or f"(default: {'-' if default in (None, '') else default})" in text


def test_the_learning_rate_is_that_of_torch() -> None:
    given = PretrainConfig(milestones=(2, 3, 6))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=given.lr)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, given.milestones)
    for epoch in range(8):
        assert given.learning_rates[epoch] == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("given", "size"), [((), None), ((64,), (64, 64)), ((32, 48), (32, 48))])
def test_one_side_stands_for_both(given: tuple[int, ...], size: tuple[int, int] | None) -> None:
    assert PretrainConfig(img_size=given).size == CentersConfig(img_size=given).size == size


def test_what_may_differ_on_resumption_are_fields() -> None:
    assert set(FREE) < {field.name for field in dataclasses.fields(PretrainConfig)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size must be above 0, got 0"),
        ({"temperature": -0.1}, "temperature must be above 0"),
        ({"lr": float("nan")}, "lr must not be below 0, got nan"),
        ({"max_steps": 0}, "max_steps must be above 0, got 0"),
        ({"workers": -1}, "workers must not be below 0"),
        ({"seed": -1}, "seed must not be below 0"),
        ({"held_out": 1.0}, r"held_out must lie in \[0, 1\)"),
        ({"shots": ()}, "shots and pool"),
        ({"pool": 0}, "shots and pool"),
        ({"bit_depth": 8}, "bit_depth must be 9 to 16, got 8"),
        ({"img_size": (1, 2, 3)}, "img_size is one side or height and width"),
        ({"validation": "mvtec"}, "validation_root, the folder of MVTec AD"),
    ],
)
def test_senseless_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PretrainConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output": "centers.npy"}, "Centers are written as .safetensors, not centers.npy"),
        ({"images": 0}, "images must be above 0, got 0"),
        ({"shots": 0}, "shots must be above 0"),
        ({"batch_size": 0}, "batch_size must be above 0"),
        ({"seed": -1}, "seed must not be below 0"),
        ({"held_out": -0.1}, r"held_out must lie in \[0, 1\)"),
        ({"img_size": (1, 2, 3)}, "img_size is one side or height and width"),
    ],
)
def test_senseless_values_of_centers_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CentersConfig(**values)


@pytest.mark.parametrize(
    "name", ["data", "anchors", "pseudo_huber", "view_statistics", "precision", "validation", "recipe"]
)
def test_values_that_are_no_choice_are_refused_in_python_too(name: str) -> None:
    values: dict[str, Any] = {name: "none at all"}
    with pytest.raises(UnknownNameError, match=f"{name} 'none at all'"):
        PretrainConfig(**values)
