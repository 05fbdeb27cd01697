"""Whole runs of the pretraining on a tiny tree: what they leave, how they go on, and what stops them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from real_iad_tree import write_real_iad

import adfeatures
from adfeatures.checkpoints import load_checkpoint
from adfeatures.errors import AdfeaturesError, CheckpointError, InputError
from training import run as run_module
from training.config import PretrainConfig
from training.curves import read_log
from training.data.pretraining import StepSampler
from training.pretrain import main, pretrain

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FAST = {
    "backbone": "efficientnet_lite",
    "img_size": (32,),
    "num_heads": 4,
    "num_keys": 8,
    "batch_size": 8,
    "epochs": 2,
    "held_out": 0.3,
    "workers": 0,
    "precision": "float32",
    "validation": "none",
}
pytestmark = pytest.mark.filterwarnings("ignore:Fewer normal images")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_real_iad(tmp_path_factory.mktemp("tree"), ("bottle_cap",), ok=4, ng=4, views=3)


def config(tree: Path, output: Path, **changes: object) -> PretrainConfig:
    return PretrainConfig(root=str(tree), products=("bottle_cap",), output=str(output), **{**FAST, **changes})  # type: ignore[arg-type]


def arguments(given: PretrainConfig) -> list[str]:
    options = []
    for name, value in vars(given).items():
        if value not in (None, ()):
            options += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return options


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoint_last.safetensors").state_dict


def steps(folder: Path) -> list[dict[str, object]]:
    lines = [line for line in read_log(folder / "log.jsonl") if line["kind"] == "step"]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_run_leaves_checkpoints_log_and_curves(tree: Path, tmp_path: Path) -> None:
    folder = pretrain(config(tree, tmp_path / "run", validation="held_out", epochs=3, milestones=(1, 2)), CPU)
    per_epoch = StepSampler(len(list_train(tree)), 8, 42).steps_per_epoch
    assert [line["step"] for line in steps(folder)] == list(range(1, 3 * per_epoch + 1))
    assert [line["lr"] for line in steps(folder)[::per_epoch]] == pytest.approx([1e-4, 1e-5, 1e-6])
    validations = [line for line in read_log(folder / "log.jsonl") if line["kind"] == "validation"]
    assert len(validations) == 3
    for criterion, key in (("img", "img_auc"), ("pix", "pix_auc"), ("pro", "pix_pro")):
        for method in ("norm", "angle"):
            kept = load_checkpoint(folder / f"checkpoints_{criterion}_{method}.safetensors")
            assert kept.metrics[key] == max(line[method][criterion] for line in validations)
            assert {"img": "image_auroc", "pix": "pixel_auroc", "pro": "aupro"}[criterion] in kept.metadata["selected_by"]
    assert (folder / "curves.png").stat().st_size > 10_000


def list_train(tree: Path) -> list[object]:
    from training.data.real_iad import read, split_by_sample

    return list(split_by_sample(read(tree, ["bottle_cap"]), 0.3, 42)[0])


def test_the_checkpoint_is_a_model(tree: Path, tmp_path: Path) -> None:
    folder = pretrain(config(tree, tmp_path / "run", max_steps=2), CPU)
    model = adfeatures.create_model(weights=str(folder / "checkpoint_last.safetensors"))
    assert model.name == "adpretrain_efficientnet_lite" and model.img_size == (32, 32)
    model.set_references(torch.randn(2, 3, 32, 32))
    x = torch.randn(1, 3, 32, 32)
    stored = {key.removeprefix("projector."): value for key, value in weights(folder).items()}
    projector = adfeatures.projector.ResidualProjector([40, 80, 112], num_heads=4, num_keys=8)
    projector.load_state_dict(stored)
    for found, expected in zip(model(x), projector(model.residuals(x)), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_same_seed_gives_the_same_run_whatever_the_workers(tree: Path, tmp_path: Path) -> None:
    one, two, other = (
        pretrain(config(tree, tmp_path / name, max_steps=3, workers=workers, seed=seed), CPU)
        for name, workers, seed in (("a", 0, 1), ("b", 2, 1), ("c", 0, 2))
    )
    assert steps(one) == steps(two) != steps(other)
    assert all(torch.equal(value, weights(two)[key]) for key, value in weights(one).items())


def test_an_interrupted_run_ends_with_the_same_bits(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pretrain(config(tree, tmp_path / "whole", validation="held_out"), CPU)
    changes = {"validation": "held_out", "save_every": 2}
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Run, "log", _before(run_module.Run.log, fail))
    with pytest.raises(KeyboardInterrupt):
        pretrain(config(tree, tmp_path / "cut", **changes), CPU)
    # A torn last line, as a power cut leaves it.
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"kind": "st')
    cut = pretrain(config(tree, tmp_path / "cut", **changes), CPU)
    assert steps(cut) == steps(whole)
    assert all(torch.equal(value, weights(cut)[key]) for key, value in weights(whole).items())


def _before(function, hook):  # type: ignore[no-untyped-def]
    def wrapped(*arguments, **keywords):  # type: ignore[no-untyped-def]
        hook(*arguments)
        return function(*arguments, **keywords)

    return wrapped


@pytest.mark.slow
@pytest.mark.parametrize("pool", [None, 2])
def test_killed_runs_end_with_the_same_bits(tree: Path, tmp_path: Path, pool: int | None) -> None:
    whole = pretrain(config(tree, tmp_path / "whole", epochs=4, pool=pool), CPU)
    given = config(tree, tmp_path / "killed", epochs=4, save_every=1, device="cpu", pool=pool)
    command = [sys.executable, "-m", "training.pretrain", *arguments(given)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    total = steps(whole)[-1]["step"]
    kills = 0
    while True:
        before = len(steps(tmp_path / "killed"))
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and len(steps(tmp_path / "killed")) < min(before + 3, total):
            time.sleep(0.01)
        if process.poll() is None and kills < 3:
            process.send_signal(signal.SIGKILL)
            kills += 1
            process.wait()
            continue
        assert process.wait(timeout=120) == 0, process.stderr.read()
        break
    assert kills == 3
    assert steps(tmp_path / "killed") == steps(whole)
    assert all(torch.equal(value, weights(tmp_path / "killed")[key]) for key, value in weights(whole).items())


def test_references_of_a_pool_are_those_encoded_in_half_precision(tree: Path, tmp_path: Path) -> None:
    # With a pool that holds all images, the draws are those of references read from disk.
    changes = {"max_steps": 2, "held_out": 0.3}
    fly = pretrain(config(tree, tmp_path / "fly", **changes), CPU)
    pool = pretrain(config(tree, tmp_path / "pool", pool=1000, **changes), CPU)
    for one, other in zip(steps(fly), steps(pool), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-2)
        assert one["loss"] != other["loss"]
    files = list((tmp_path / "pool" / "references").glob("*.f16"))
    assert len(files) == 3
    small = pretrain(config(tree, tmp_path / "small", pool=1, **changes), CPU)
    sizes = [sum(file.stat().st_size for file in (folder / "references").glob("*.f16")) for folder in (pool, small)]
    assert sizes[0] > sizes[1] > 0


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_precision(tree: Path, tmp_path: Path, precision: str) -> None:
    folder = pretrain(config(tree, tmp_path / "run", max_steps=2, precision=precision), CPU)
    state = torch.load(folder / "state.pt", weights_only=True)
    moments = [value for entry in state["optimizer"]["state"].values() for key, value in entry.items() if key != "step"]
    expected = torch.bfloat16 if precision == "bfloat16" else torch.float32
    assert {value.dtype for value in (*state["projector"].values(), *moments)} == {expected}
    exact = pretrain(config(tree, tmp_path / "exact", max_steps=2), CPU)
    assert [line["loss"] for line in steps(folder)] == pytest.approx([line["loss"] for line in steps(exact)], rel=0.1)


def test_accumulation_trains_on_parts(tree: Path, tmp_path: Path) -> None:
    folder = pretrain(config(tree, tmp_path / "run", max_steps=3, accumulate=2), CPU)
    assert all(np.isfinite(line["loss"]) for line in steps(folder) if "loss" in line)
    with pytest.raises(InputError, match="equal parts"):
        pretrain(config(tree, tmp_path / "odd", accumulate=3), CPU)


def test_a_timm_backbone(tree: Path, tmp_path: Path) -> None:
    for number, (name, size) in enumerate({"resnet10t": 64, "vit_tiny_patch16_224": 32}.items()):
        given = config(tree, tmp_path / str(number), backbone=name, backbone_weights="random", img_size=(size,), max_steps=1)
        folder = pretrain(given, CPU)
        facts = json.loads(load_checkpoint(folder / "checkpoint_last.safetensors").metadata["backbone"])
        assert facts["timm_name"].startswith(name)
        model = adfeatures.create_model(weights=str(folder / "checkpoint_last.safetensors"), backbone_weights="random")
        assert model.name == "adpretrain_timm" and list(model.backbone.channels) == facts["channels"]


def test_another_config_is_refused(tree: Path, tmp_path: Path) -> None:
    pretrain(config(tree, tmp_path / "run", max_steps=1), CPU)
    with pytest.raises(InputError, match=r"lr was 0\.0001, is 0\.1.*--output"):
        pretrain(config(tree, tmp_path / "run", max_steps=2, lr=0.1), CPU)
    pretrain(config(tree, tmp_path / "run", max_steps=2), CPU)
    assert len(steps(tmp_path / "run")) == 2


def test_other_inputs_are_refused(tree: Path, tmp_path: Path) -> None:
    folder = pretrain(config(tree, tmp_path / "run", max_steps=1), CPU)
    moved = tmp_path / "moved"
    shutil.copytree(tree, moved)
    pretrain(config(moved, folder, max_steps=2), CPU)
    next(moved.rglob("OK/*/*.jpg")).unlink()
    with pytest.raises(InputError, match="other images"):
        pretrain(config(moved, folder, max_steps=3, centers=str(folder / "centers.safetensors")), CPU)


def test_another_number_of_processes_is_refused(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(config(tree, tmp_path / "run", max_steps=1), CPU)
    monkeypatch.setattr(run_module, "world_size", lambda: 2)
    with pytest.raises(InputError, match="on 1 processes, now there are 2"):
        pretrain(config(tree, tmp_path / "run", max_steps=2), CPU)


def test_a_damaged_state_is_refused(tree: Path, tmp_path: Path) -> None:
    folder = pretrain(config(tree, tmp_path / "run", max_steps=1), CPU)
    state = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(state[: len(state) // 2])
    with pytest.raises(CheckpointError, match="cannot be resumed from"):
        pretrain(config(tree, tmp_path / "run", max_steps=2), CPU)


def test_a_loss_that_is_not_finite_stops_the_run(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(config(tree, tmp_path / "run", max_steps=1), CPU)
    before = (tmp_path / "run" / "state.pt").read_bytes()
    monkeypatch.setattr("training.step.norm_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(AdfeaturesError, match="not finite.*--lr"):
        pretrain(config(tree, tmp_path / "run", max_steps=2), CPU)
    assert (tmp_path / "run" / "state.pt").read_bytes() == before


def test_a_full_disk_keeps_the_last_state(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(config(tree, tmp_path / "run", max_steps=1), CPU)
    before = (tmp_path / "run" / "state.pt").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(AdfeaturesError, match="No space left.*Free some space"):
        pretrain(config(tree, tmp_path / "run", max_steps=2), CPU)
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*"))


def test_centers_of_another_backbone(tree: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "centers.npy", np.zeros((4, 768), np.float32))
    with pytest.raises(CheckpointError, match="channels"):
        pretrain(config(tree, tmp_path / "run", centers=str(tmp_path / "centers.npy")), CPU)


def test_data_without_anomalies(tmp_path: Path) -> None:
    tree = write_real_iad(tmp_path / "tree", ("bottle_cap",), ok=6, ng=0)
    with pytest.raises(InputError, match="nothing to contrast"):
        pretrain(config(tree, tmp_path / "run"), CPU)


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path / "none"), "--output", str(tmp_path / "run"), "--backbone", "efficientnet_lite"]) == 2
    assert "training.pretrain: error: There is no folder" in capsys.readouterr().err
    assert main(["--root", str(tmp_path), "--batch-size", "0"]) == 2
    assert "batch_size must be above 0" in capsys.readouterr().err
