"""A run on disk: what is kept, how it resumes, what it refuses, and that nothing that fails spoils what is there."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers.full_disk import full_disk

from adfeatures.checkpoints import load_checkpoint
from adfeatures.errors import AdfeaturesError, CheckpointError, InputError
from adfeatures.projector import ResidualProjector
from training.pretraining import run as module
from training.pretraining.config import FREE, PretrainConfig
from training.pretraining.curves import read_log
from training.pretraining.run import TrainingRun


def make_projector(seed: int = 0) -> ResidualProjector:
    torch.manual_seed(seed)
    return ResidualProjector([8], num_heads=2, num_keys=4)


def train(run: TrainingRun, projector: ResidualProjector, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps whose gradients come from torch's generator, each of them logged, and saved at the end."""
    for _ in range(steps):
        for parameter in projector.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        run.advance()
        run.log("step", {"norm": float(run.step)})
    run.save()


def begin(folder: Path, seed: int = 0, **settings: Any) -> tuple[TrainingRun, ResidualProjector, torch.optim.Adam]:
    run, projector = TrainingRun(PretrainConfig(output=str(folder), **settings)), make_projector(seed)
    optimizer = torch.optim.Adam(projector.parameters(), lr=0.1)
    run.depend_on("images", "abc")
    run.resume(projector, optimizer, {"model": "tiny"})
    return run, projector, optimizer


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_log(folder / "log.jsonl")]


def test_it_resumes_with_the_same_bits(tmp_path: Path) -> None:
    whole = begin(tmp_path / "whole")
    train(*whole, steps=5)
    first = begin(tmp_path / "cut")
    train(*first, steps=2)
    first[0].best["checkpoints_pro_norm"] = 0.5
    first[0].epoch, first[0].step_of_epoch, first[0].validated = 1, 0, 2
    first[0].save()
    torch.manual_seed(7)
    # Other weights, and another state of torch's generator: all of them come from the file.
    second = begin(tmp_path / "cut", seed=3)
    run = second[0]
    assert (run.epoch, run.step, run.step_of_epoch, run.validated) == (1, 2, 0, 2)
    assert run.best == {"checkpoints_pro_norm": 0.5}
    train(*second, steps=3)
    for key, value in whole[1].state_dict().items():
        assert torch.equal(second[1].state_dict()[key], value)
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole") == [1, 2, 3, 4, 5]


def test_what_was_logged_after_the_last_state_is_forgotten(tmp_path: Path) -> None:
    run, projector, optimizer = begin(tmp_path)
    train(run, projector, optimizer, steps=2)
    run.advance()
    run.log("step", {"norm": 3.0})
    # As a power cut leaves it.
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "st')
    begin(tmp_path)
    assert steps(tmp_path) == [1, 2]
    assert (tmp_path / "log.jsonl").read_text().endswith("}\n")


def test_another_config_is_refused(tmp_path: Path) -> None:
    train(*begin(tmp_path), steps=1)
    with pytest.raises(
        InputError, match=r"another config: shots was \[1, 4, 8\], is \[2\]; lr was 0\.0001, is 0\.1\. "
    ):
        begin(tmp_path, lr=0.1, shots=(2,))
    free: dict[str, Any] = {"workers": 0, "save_every": 1, "max_steps": 9, "device": "cpu", "root": "moved"}
    assert set(free) < set(FREE)
    assert begin(tmp_path, **free)[0].step == 1


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    train(*begin(tmp_path), steps=1)
    run = TrainingRun(PretrainConfig(output=str(tmp_path)))
    run.depend_on("images", "abc")
    with pytest.raises(InputError, match="a run with other images. Give the same again"):
        run.depend_on("images", "abd")
    with pytest.raises(InputError, match="a run with other centers"):
        run.depend_on("centers", "abc")


def test_centers_may_be_spelled_as_in_the_states_of_an_earlier_version(tmp_path: Path) -> None:
    train(*begin(tmp_path), steps=1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["inputs"]["centres"] = "123"
    torch.save(state, tmp_path / "state.pt")
    run = TrainingRun(PretrainConfig(output=str(tmp_path)))
    run.depend_on("centers", "123")
    with pytest.raises(InputError, match="other centers"):
        run.depend_on("centers", "124")


def test_states_of_an_earlier_version_are_of_the_defaults(tmp_path: Path) -> None:
    train(*begin(tmp_path), steps=1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    config = json.loads(state["config"])
    added = ("bit_depth", "validation_shots", "validation_references", "eval_every")
    assert [config.pop(name) for name in added] == [16, 8, None, 1]
    torch.save({**state, "config": json.dumps(config)}, tmp_path / "state.pt")
    for change, text in (({"bit_depth": 12}, "bit_depth was 16, is 12"), ({"eval_every": 2}, "eval_every was 1, is 2")):
        with pytest.raises(InputError, match=text):
            begin(tmp_path, **change)
    assert begin(tmp_path)[0].step == 1


def test_another_number_of_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(*begin(tmp_path), steps=1)
    monkeypatch.setattr(module, "world_size", lambda: 2)
    with pytest.raises(InputError, match="on 1 processes, now there are 2"):
        begin(tmp_path)


@pytest.mark.parametrize(
    "change",
    ["cut", "no inputs", "no optimizer", "other weights", "pipe", {"position": [1, 2]}, {"position": [0, 0, 0, -1]},
     {"config": "[" * 100_000}, {"config": "[1]"}, {"world_size": "1"}, {"best": {"x": float("nan")}}, {"rng": [1]},
     {"rng": [torch.ones(3)]},
     {"optimizer": {"state": 5}}, {"projector": {"a": 1}}, {"log_bytes": None}, {"inputs": []}],
)  # fmt: skip
def test_states_that_cannot_be_resumed_from(tmp_path: Path, change: str | dict[str, Any]) -> None:
    train(*begin(tmp_path), steps=1)
    path = tmp_path / "state.pt"
    state = torch.load(path, weights_only=True)
    if change == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif change == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif isinstance(change, dict):
        state.update(change)
    elif change == "other weights":
        state["projector"].popitem()
    else:
        state.pop(change.removeprefix("no "))
    if change not in ("cut", "pipe"):
        torch.save(state, path)
    with pytest.raises(CheckpointError, match="(?s)state.pt cannot be resumed from .* remove the file to begin again"):
        begin(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("step", torch.tensor(-1e38), "step of the optimizer"),
        ("step", torch.tensor(torch.nan), "step of the optimizer"),
        ("exp_avg", torch.ones(1), "exp_avg 0 of the optimizer is not of the shape"),
        ("exp_avg_sq", torch.nan, "exp_avg_sq 0 of the optimizer holds NaN"),
        ("exp_avg_sq", -1e-3, "averages 0 of the optimizer are of no gradients"),
        ("exp_avg", 1e38, "averages 0 of the optimizer are of no gradients"),
        ("exp_avg_sq", None, "values 0 of the optimizer are not those of Adam"),
        ("max_exp_avg_sq", torch.ones(1), "values 0 of the optimizer are not those of Adam"),
        ("projector", torch.nan, "holds NaN"),
    ],
)
def test_states_that_would_fail_later(tmp_path: Path, name: str, value: Any, says: str) -> None:
    train(*begin(tmp_path), steps=1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    if name == "projector":
        next(iter(state["projector"].values())).fill_(value)
    elif value is None:
        del state["optimizer"]["state"][0][name]
    elif isinstance(value, torch.Tensor):
        state["optimizer"]["state"][0][name] = value
    else:
        state["optimizer"]["state"][0][name].fill_(value)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=rf"state\.pt cannot be resumed from.*{says}"):
        begin(tmp_path)


def test_a_damaged_state_makes_no_long_message(tmp_path: Path) -> None:
    train(*begin(tmp_path), steps=1)
    path = tmp_path / "state.pt"
    content = path.read_bytes()
    # The length of the name of a part, in the header of that part: the name then holds all that follows.
    at = content.rindex(b"PK\x03\x04", 0, content.index(b"/data/0")) + 26
    path.write_bytes(content[:at] + b"\xff\x7f" + content[at + 2 :])
    state = torch.load(io.BytesIO(content), weights_only=True)
    with pytest.raises(CheckpointError, match="cannot be resumed from") as refused:
        begin(tmp_path)
    assert len(str(refused.value)) < 1000
    state["config"] = json.dumps({**json.loads(state["config"]), "precision": "x" * 9000})
    torch.save(state, path)
    with pytest.raises(InputError, match="another config: precision was 'xxx") as changed:
        begin(tmp_path)
    assert len(str(changed.value)) < 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("growth", [0.2, 0.9, 1.0, 1.11, 1.3, 3.0, -1.0])
def test_averages_of_any_gradients_are_taken(dtype: torch.dtype, growth: float) -> None:
    layer = torch.nn.Linear(4, 4).to(dtype)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-4)
    scales = torch.logspace(-30, 3, 4)
    for step in range(80):
        for parameter in layer.parameters():
            parameter.grad = (scales * min(growth**step, 1e12)).expand_as(parameter).to(dtype)
        optimizer.step()
        module._check_values(cast(ResidualProjector, layer), optimizer)


def test_settings_of_the_optimizer_are_those_of_the_config(tmp_path: Path) -> None:
    train(*begin(tmp_path), steps=1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["optimizer"]["param_groups"][0] |= {"betas": (1e300, -5), "maximize": True}
    torch.save(state, tmp_path / "state.pt")
    (settings,) = begin(tmp_path)[2].param_groups
    assert (settings["betas"], settings["maximize"]) == ((0.9, 0.999), False)


def test_a_full_disk_keeps_the_last_state(tmp_path: Path) -> None:
    run, projector, optimizer = begin(tmp_path)
    train(run, projector, optimizer, steps=1)
    before = (tmp_path / "state.pt").read_bytes()
    with (
        full_disk(len(before) // 2),
        pytest.raises(AdfeaturesError, match="Cannot write .*state.pt: .*File too large.*Free some space"),
    ):
        train(run, projector, optimizer, steps=1)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    run = begin(tmp_path / "full")[0]
    with full_disk(10), pytest.raises(AdfeaturesError, match="Cannot write the log in .*full: .*File too large"):
        run.log("step", {"loss": 1.0})
    train(*begin(tmp_path / "folder"), steps=1)
    (tmp_path / "folder" / "log.jsonl").unlink()
    (tmp_path / "folder" / "log.jsonl").mkdir()
    with pytest.raises(AdfeaturesError, match="Cannot write to .*Make it writable"):
        begin(tmp_path / "folder")


SCORES = {"norm": {"img": 0.7, "pix": 0.8, "pro": 0.4}, "angle": {"img": 0.6, "pix": float("nan"), "pro": 0.3}}


def test_the_best_are_kept_by_each_criterion(tmp_path: Path) -> None:
    run, projector, _ = begin(tmp_path)
    run.advance()
    run.keep_best(SCORES)
    names = {f"checkpoints_{key}" for key in ("img_norm", "pix_norm", "pro_norm", "img_angle", "pro_angle")}
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == names
    first = load_checkpoint(tmp_path / "checkpoints_img_norm.safetensors")
    # Under the names of the authors' files.
    assert first.metrics == {"img_auc": 0.7, "pix_auc": 0.8, "pix_pro": 0.4}
    expected = "image AUROC of FeatureNorm on held-out samples of the training data, after step 1"
    assert (first.metadata["model"], first.metadata["selected_by"]) == ("tiny", expected)
    assert json.loads(first.metadata["training"])["lr"] == PretrainConfig().lr
    for key, value in projector.state_dict().items():
        assert torch.equal(first.state_dict[f"projector.{key}"], value)
    angle = load_checkpoint(tmp_path / "checkpoints_pro_angle.safetensors")
    assert angle.metrics == {"img_auc": 0.6, "pix_pro": 0.3}
    assert angle.metadata["selected_by"].startswith("AUPRO of PatchCore on held-out")

    before = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    run.advance()
    # Equal is no better; of FeatureNorm only the pixel AUROC is.
    run.keep_best({"norm": {"img": 0.7, "pix": 0.9, "pro": 0.1}})
    changed = [path.stem for path, content in before.items() if path.read_bytes() != content]
    assert changed == ["checkpoints_pix_norm"]
    assert run.best["checkpoints_pix_norm"] == 0.9 and run.best["checkpoints_pro_norm"] == 0.4
    second = load_checkpoint(tmp_path / "checkpoints_pix_norm.safetensors").metadata["selected_by"]
    assert second == "pixel AUROC of FeatureNorm on held-out samples of the training data, after step 2"


def test_the_test_set_that_selects_is_named(tmp_path: Path) -> None:
    run = begin(tmp_path, validation="mvtec", validation_root="mvtec")[0]
    run.keep_best(SCORES)
    selected = load_checkpoint(tmp_path / "checkpoints_pro_norm.safetensors").metadata["selected_by"]
    assert selected == "AUPRO of FeatureNorm on the test set of MVTec AD, after step 0"


def test_the_last_is_kept_beside_the_best(tmp_path: Path) -> None:
    run, projector, _ = begin(tmp_path)
    run.advance()
    run.keep_last()
    last = load_checkpoint(tmp_path / "checkpoint_last.safetensors")
    assert last.metadata["selected_by"] == "nothing: the last one, after step 1" and last.metrics == {}
    assert len(last.state_dict) == len(projector.state_dict())


def test_only_the_first_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "rank", lambda: 1)
    run, projector, optimizer = begin(tmp_path / "run")
    train(run, projector, optimizer, steps=1)
    run.keep_best(SCORES)
    run.keep_last()
    assert not (tmp_path / "run").exists()
    # But every rank knows what was the best.
    assert run.best["checkpoints_pix_norm"] == 0.8


class Board:
    """Stands for TensorBoard's writer, which is no requirement."""

    made: list[Board] = []

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.flushed = folder, purge_step, 0
        self.scalars: list[tuple[str, float, int]] = []
        Board.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        self.flushed = len(self.scalars)


def test_tensorboard_is_written_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Board, "made", [])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Board))
    train(*begin(tmp_path), steps=2)
    second = begin(tmp_path)
    train(*second, steps=1)
    second[0].log("validation", {"angle": {"pro": 0.25}})
    second[0].save()
    # What a process logged after the state that the next one resumes from is hidden.
    assert [board.purge_step for board in Board.made] == [1, 3]
    assert Board.made[1].scalars == [("step/norm", 3.0, 3), ("validation/angle/pro", 0.25, 3)]
    assert [board.flushed for board in Board.made] == [2, 2]
    with pytest.raises(InputError, match="another config"):
        begin(tmp_path, lr=0.5)
    assert len(Board.made) == 2


def test_a_line_says_where_it_was_logged(tmp_path: Path) -> None:
    run = begin(tmp_path)[0]
    run.log("step", {"angle": 1.0, "norm": 2.0})
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {
        "kind": "step",
        "epoch": 0,
        "step": 0,
        "angle": 1.0,
        "norm": 2.0,
    }
