"""Whole runs of the pretraining on a tiny tree: what they leave, how they resume, and what stops them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.full_disk import full_disk
from helpers.ranks import ROOT, run_ranks
from helpers.real_iad_tree import write_real_iad
from helpers.trees import write_manifest, write_mvtec
from PIL import Image

import adfeatures
from adfeatures.checkpoints import load_checkpoint
from adfeatures.errors import AdfeaturesError, CheckpointError, ImageError, InputError
from training.data import mvtec, real_iad
from training.data.fingerprint import Fingerprint
from training.data.items import Item
from training.evaluation.model import load_model
from training.evaluation.product_features import FeatureKind, projected_features
from training.evaluation.raw_features import RawFeatures
from training.pretrain import main, pretrain
from training.pretraining.config import PretrainConfig
from training.pretraining.curves import read_log
from training.pretraining.dataset import PretrainingDataset, StepSampler
from training.pretraining.run import TrainingRun
from training.pretraining.step import train_step

CPU = torch.device("cpu")
FAST: dict[str, Any] = {
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


def config(tree: Path, output: Path, **changes: Any) -> PretrainConfig:
    return PretrainConfig(root=str(tree), products=("bottle_cap",), output=str(output), **{**FAST, **changes})


def arguments(given: PretrainConfig) -> list[str]:
    options = []
    for name, value in vars(given).items():
        if value not in (None, (), False):
            options += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return options


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoint_last.safetensors").state_dict


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_log(folder / "log.jsonl") if line["kind"] == "step"]
    return [{key: value for key, value in line.items() if key not in ("seconds", "waiting")} for line in lines]


def test_a_run_leaves_checkpoints_log_and_curves(tree: Path, tmp_path: Path) -> None:
    folder = pretrain(config(tree, tmp_path / "run", validation="held_out", epochs=3, milestones=(1, 2)), CPU)
    per_epoch = StepSampler(len(list_train(tree)), 8, 42).steps_per_epoch
    assert [line["step"] for line in steps(folder)] == list(range(1, 3 * per_epoch + 1))
    assert [line["lr"] for line in steps(folder)[::per_epoch]] == pytest.approx([1e-4, 1e-5, 1e-6])
    validations = [line for line in read_log(folder / "log.jsonl") if line["kind"] == "validation"]
    assert len(validations) == 3
    criteria = (("img", "img_auc", "image AUROC"), ("pix", "pix_auc", "pixel AUROC"), ("pro", "pix_pro", "AUPRO"))
    for criterion, key, title in criteria:
        for method in ("norm", "angle"):
            kept = load_checkpoint(folder / f"checkpoints_{criterion}_{method}.safetensors")
            assert kept.metrics[key] == max(line[method][criterion] for line in validations)
            assert kept.metadata["selected_by"].startswith(f"{title} of ")
    assert (folder / "curves.png").stat().st_size > 10_000


def list_train(tree: Path) -> list[Item]:
    return real_iad.split_by_sample(real_iad.read(tree, ["bottle_cap"]), 0.3, 42)[0]


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


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_whatever_the_workers(tree: Path, tmp_path: Path) -> None:
    one, two, other = (
        pretrain(config(tree, tmp_path / name, max_steps=3, workers=workers, seed=seed), CPU)
        for name, workers, seed in (("a", 0, 1), ("b", 2, 1), ("c", 0, 2))
    )
    assert steps(one) == steps(two) != steps(other)
    assert all(torch.equal(value, weights(two)[key]) for key, value in weights(one).items())


def test_the_cache_changes_no_bit_of_a_run(tree: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"cache": str(tmp_path / "cache"), "max_steps": 3}
    plain, cached = (
        pretrain(config(tree, tmp_path / name, **changes), CPU)
        for name, changes in (("plain", {"max_steps": 3}), ("cached", given))
    )
    assert list((tmp_path / "cache").glob("*.rows"))
    assert steps(plain) == steps(cached)
    for path in plain.glob("*.safetensors"):
        one, other = load_checkpoint(path), load_checkpoint(cached / path.name)
        assert all(torch.equal(value, other.state_dict[key]) for key, value in one.state_dict.items())
    # A run may go on with or without it.
    plain, cached = (
        pretrain(config(tree, tmp_path / name, max_steps=5, **changes), CPU)
        for name, changes in (("plain", {"cache": given["cache"]}), ("cached", {}))
    )
    assert steps(plain) == steps(cached) and len(steps(plain)) == 5


def test_the_log_tells_waiting_from_computing(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reader and a step that take known times."""
    read, step = PretrainingDataset._read, train_step

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.02)
        return read(*arguments)

    def thoughtfully(*arguments: Any, **settings: Any) -> Any:
        time.sleep(0.1)
        return step(*arguments, **settings)

    monkeypatch.setattr(PretrainingDataset, "_read", slowly)
    monkeypatch.setattr("training.pretrain.train_step", thoughtfully)
    folder = pretrain(config(tree, tmp_path / "run", max_steps=3, shots=(1,)), CPU)
    for line in read_log(folder / "log.jsonl"):
        # 8 images and a reference of each are read.
        assert line["waiting"] >= 16 * 0.02 and line["seconds"] >= 0.1


def test_an_interrupted_run_ends_with_the_same_bits(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"validation": "held_out", "save_every": 2, "milestones": (1,)}
    whole = pretrain(config(tree, tmp_path / "whole", **changes), CPU)
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingRun, "log", _before(TrainingRun.log, fail))
    with pytest.raises(KeyboardInterrupt):
        pretrain(config(tree, tmp_path / "cut", **changes), CPU)
    # A torn last line, as a power cut leaves it.
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"kind": "st')
    cut = pretrain(config(tree, tmp_path / "cut", **changes), CPU)
    assert steps(cut) == steps(whole)
    assert all(torch.equal(value, weights(cut)[key]) for key, value in weights(whole).items())


def _before(function: Callable[..., object], hook: Callable[..., object]) -> Callable[..., object]:
    def wrapped(*arguments: object) -> object:
        hook(*arguments)
        return function(*arguments)

    return wrapped


DRIVER = """
import os, signal, sys
import training.methods  # imported once, for all the processes to come
from training.pretrain import main

output, arguments = sys.argv[1], sys.argv[2:]
for count in range(1, 1000):
    child = os.fork()
    if not child:
        left = count
        def hook(event, values):
            global left
            # Before a file of the run is opened to be written, or takes its place.
            writes = event == "os.rename" or (event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR))
            if writes and str(values[0]).startswith(output):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        os._exit(main(arguments))
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        print(count - 1)
        sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed as POSIX has it")
@pytest.mark.parametrize("pool", [pytest.param(None, marks=pytest.mark.release), 2])
def test_runs_killed_before_any_write_end_with_the_same_bits(tree: Path, tmp_path: Path, pool: int | None) -> None:
    """Killed (SIGKILL) at the first write, then at the second of what is left, and so on: in and between all files."""
    changes = {"pool": pool, "save_every": 1, "validation": "held_out"}
    whole = pretrain(config(tree, tmp_path / "whole", **changes), CPU)
    given = config(tree, tmp_path / "killed", device="cpu", **changes)
    command = [sys.executable, "-c", DRIVER, given.output, *arguments(given)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 8
    assert steps(tmp_path / "killed") == steps(whole)
    names = sorted(path.relative_to(whole) for path in whole.rglob("*"))
    assert sorted(path.relative_to(given.output) for path in Path(given.output).rglob("*")) == names
    for path in whole.rglob("*.safetensors"):
        one, other = (load_checkpoint(folder / path.relative_to(whole)) for folder in (whole, Path(given.output)))
        assert all(torch.equal(value, other.state_dict[key]) for key, value in one.state_dict.items()), path
        assert one.metrics == other.metrics


def test_a_validation_that_was_cut_short_costs_no_steps(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(tree, tmp_path / "run", validation="held_out", epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr("training.pretrain.validate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pretrain(given, CPU)
    before = steps(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("training.pretrain.train_step", lambda *_: pytest.fail("a step is done again"))
        pretrain(given, CPU)
        validations = [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["kind"] == "validation"]
        assert [line["epoch"] for line in validations] == [1]
        # A finished run does nothing again.
        patch.setattr("training.pretrain.validate", lambda *_, **__: pytest.fail("validated again"))
        pretrain(given, CPU)
    assert steps(tmp_path / "run") == before


def launch(given: PretrainConfig, processes: int) -> subprocess.CompletedProcess[str]:
    return run_ranks(processes, "-m", "training.pretrain", *arguments(given))


@pytest.mark.gpu
def test_one_process_under_nccl_trains_as_one_without(tree: Path, tmp_path: Path) -> None:
    one = pretrain(config(tree, tmp_path / "one", max_steps=3), torch.device("cuda"))
    centers = str(one / "centers.safetensors")
    done = launch(config(tree, tmp_path / "nccl", max_steps=3, centers=centers, device="cuda"), 1)
    assert done.returncode == 0, done.stderr
    for found, expected in zip(steps(tmp_path / "nccl"), steps(one), strict=True):
        assert found.pop("kind") == expected.pop("kind") == "step"
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_two_processes_train_as_one(tree: Path, tmp_path: Path) -> None:
    changes = {"validation": "held_out", "pool": 2, "device": "cpu"}
    one = pretrain(config(tree, tmp_path / "one", **changes), CPU)
    refused = launch(config(tree, tmp_path / "none", centers=str(tmp_path / "none.safetensors"), **changes), 2)
    assert refused.returncode and "none.safetensors: No such file or directory" in refused.stderr
    # In two goes, of which the first ends within an epoch.
    for stop in (3, None):
        # With the cache of images, which one process never had.
        cache = str(tmp_path / "cache")
        done = launch(config(tree, tmp_path / "two", max_steps=stop, cache=cache, **changes), 2)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("done:") == 1
    two = tmp_path / "two"
    assert len(steps(two)) == len(steps(one)) > 4
    for found, expected in zip(steps(two), steps(one), strict=True):
        assert found.pop("kind") == expected.pop("kind") == "step"
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert (two / "centers.safetensors").read_bytes() == (one / "centers.safetensors").read_bytes()
    for key, value in weights(one).items():
        difference = (weights(two)[key] - value).abs()
        if key.endswith("in_proj_bias"):
            # The softmax ignores what is added to all keys, so the gradient there is noise, which Adam makes as long as
            # any other.
            difference[len(difference) // 3 : 2 * len(difference) // 3] = 0
        assert difference.max() < 1e-5 * max(1.0, float(value.abs().max())), key
    found, expected = (read_log(folder / "log.jsonl")[-1] for folder in (two, one))
    assert found["kind"] == "validation"
    for method in ("norm", "angle"):
        assert found[method] == pytest.approx(expected[method], abs=1e-3)
    with pytest.raises(InputError, match="on 2 processes, now there are 1"):
        pretrain(config(tree, two, max_steps=100, epochs=2, **changes), CPU)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The angle loss was 0")
def test_ablations(tree: Path, tmp_path: Path) -> None:
    """One loss alone, and no residuals: such weights are evaluated as they were trained, and make no model."""
    ablations: dict[str, dict[str, Any]] = {
        "angle": {"losses": "angle"},
        "norm": {"losses": "norm"},
        "none": {"no_residual": True},
    }
    folders = {
        name: pretrain(config(tree, tmp_path / name, max_steps=2, validation="held_out", **changes), CPU)
        for name, changes in ablations.items()
    }
    for name, other in (("angle", "norm"), ("norm", "angle")):
        assert any(line.get(name) for line in steps(folders[name]))
        assert not any(line.get(other) for line in steps(folders[name]))
    last = folders["none"] / "checkpoint_last.safetensors"
    with pytest.raises(CheckpointError, match="trained without residuals, for an ablation"):
        adfeatures.create_model(weights=last)
    model = load_model(str(last), ("patchcore",))
    (weights,) = model.weights.values()
    assert not weights.takes_residuals and weights.projector is not None
    raw = RawFeatures(model, tmp_path / "cache")
    batch = {"image": torch.rand(2, 3, 32, 32), "path": [None, None]}
    found = projected_features(raw, FeatureKind("squash", "squash", "", 0)).extractor(batch)
    for level, expected in zip(found, weights.projector(model.backbone(batch["image"])), strict=True):
        torch.testing.assert_close(level, expected)
    with pytest.raises(InputError, match="leave out centers and pool"):
        config(tree, tmp_path, no_residual=True, pool=4)


@pytest.mark.parametrize("data", ["folder", "manifest"])
def test_own_data(tmp_path: Path, data: str) -> None:
    root = write_mvtec(tmp_path / "own", ("nut", "bolt"), good=5, test_good=3, bad=4, size=(40, 40))
    if data == "manifest":
        root = write_manifest(root)
    given = {**FAST, "data": data, "root": str(root), "output": str(tmp_path / "run"), "validation": "held_out"}
    folder = pretrain(PretrainConfig(**given), CPU)
    assert any("loss" in line for line in steps(folder))
    assert "training_data" not in load_checkpoint(folder / "checkpoint_last.safetensors").metadata
    validation = read_log(folder / "log.jsonl")[-1]
    assert 0 < validation["norm"]["pix"] < 1


@pytest.mark.slow
def test_validation_on_mvtec(tree: Path, tmp_path: Path) -> None:
    root = write_mvtec(tmp_path / "mvtec", mvtec.PRODUCTS, good=2, test_good=1, bad=1, size=(32, 32))
    changes = {"held_out": 0.0, "validation": "mvtec", "max_steps": 1}
    folder = pretrain(config(tree, tmp_path / "run", validation_root=str(root), **changes), CPU)
    kept = load_checkpoint(folder / "checkpoints_pix_norm.safetensors")
    assert "test set of MVTec AD, after step 1" in kept.metadata["selected_by"]
    with pytest.raises(InputError, match="no product of MVTec AD"):
        pretrain(config(tree, tmp_path / "other", validation_root=str(tree), **changes), CPU)
    # It is said before anything is computed.
    assert not (tmp_path / "other").exists()


def test_a_validation_on_images_of_the_training_is_refused(tree: Path, tmp_path: Path) -> None:
    """Copies under other names, in another layout."""
    root = write_mvtec(tmp_path / "parts", ("part",), good=2, test_good=2, bad=1, size=(32, 32))
    seen = list_train(tree)[0].image
    changes = {"validation": "folder", "validation_root": str(root), "max_steps": 2, "validation_shots": 1}
    folder = pretrain(config(tree, tmp_path / "run", **changes, epochs=1), CPU)
    found = load_checkpoint(folder / "checkpoint_last.safetensors").metadata["trained_on"]
    assert len(Fingerprint.from_text(found).known([item.image for item in list_train(tree)])) == len(list_train(tree))
    shutil.copy(seen, root / "part/test/good/000.png")
    given = config(tree, tmp_path / "other", **changes, epochs=1, cache=str(tmp_path / "cache"))
    with pytest.raises(InputError, match="1 of the 3 images to validate on are trained on: .*good/000.png"):
        pretrain(given, CPU)
    # It is said before the cache is filled.
    assert not (tmp_path / "cache").exists()


def test_the_validation_comes_every_so_many_epochs_and_at_the_end(tree: Path, tmp_path: Path) -> None:
    folder = pretrain(config(tree, tmp_path / "run", validation="held_out", epochs=5, eval_every=2), CPU)
    epochs = [line["epoch"] for line in read_log(folder / "log.jsonl") if line["kind"] == "validation"]
    assert epochs == [2, 4, 5]


def test_one_normal_image_of_each_view_is_enough(tmp_path: Path) -> None:
    tree = write_real_iad(tmp_path / "tree", ("bottle_cap",), ok=1, ng=6, views=3)
    folder = pretrain(config(tree, tmp_path / "run", max_steps=2, validation="held_out", pool=4), CPU)
    assert all(np.isfinite(line["loss"]) for line in steps(folder))


@pytest.mark.slow
def test_files_that_cannot_be_read_are_passed_over(tree: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(tree, tmp_path / "tree"))
    centers = str(pretrain(config(tree, tmp_path / "whole", max_steps=1), CPU) / "centers.safetensors")
    trained = {Path(item.image).name for item in list_train(tree)}
    broken, cut, *_ = (path for path in sorted(damaged.rglob("OK/*/*_C1_*.jpg")) if path.name in trained)
    broken.write_bytes(b"no image")
    cut.write_bytes(cut.read_bytes()[:300])
    with pytest.warns(UserWarning, match=f"{broken.name}.*Another image takes its place"):
        folder = pretrain(config(damaged, tmp_path / "run", centers=centers, validation="held_out"), CPU)
    assert len(steps(folder)) > 4 and (folder / "checkpoint_last.safetensors").exists()
    # A pool is encoded once and for all, so there it is an error.
    with pytest.raises(ImageError, match="belongs to the pool of references: restore it"):
        pretrain(config(damaged, tmp_path / "pool", centers=centers, pool=50), CPU)


@pytest.mark.slow
def test_a_mask_of_another_size_stops_the_run_and_keeps_it(tree: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(tree, tmp_path / "tree"))
    folder = pretrain(config(damaged, tmp_path / "run", max_steps=1), CPU)
    before = (folder / "state.pt").read_bytes()
    intact = {path: path.read_bytes() for path in damaged.rglob("NG/*/*/*.png")}
    for path in intact:
        Image.new("L", (9, 9), 255).save(path)
    with pytest.raises(ImageError, match="has 9 x 9 pixels, its image .* has 48 x 40. Make the mask again"):
        pretrain(config(damaged, tmp_path / "run"), CPU)
    assert (folder / "state.pt").read_bytes() == before
    for path, content in intact.items():
        path.write_bytes(content)
    whole = pretrain(config(tree, tmp_path / "whole", centers=str(folder / "centers.safetensors")), CPU)
    assert steps(pretrain(config(damaged, tmp_path / "run"), CPU)) == steps(whole)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_precision(tree: Path, tmp_path: Path, precision: str) -> None:
    folder = pretrain(config(tree, tmp_path / "run", max_steps=2, precision=precision), CPU)
    state = torch.load(folder / "state.pt", weights_only=True)
    moments = [value for entry in state["optimizer"]["state"].values() for key, value in entry.items() if key != "step"]
    expected = torch.bfloat16 if precision == "bfloat16" else torch.float32
    assert {value.dtype for value in (*state["projector"].values(), *moments)} == {expected}
    exact = pretrain(config(tree, tmp_path / "exact", max_steps=2), CPU)
    assert [line["loss"] for line in steps(folder)] == pytest.approx([line["loss"] for line in steps(exact)], rel=0.1)


@pytest.mark.release
def test_the_published_recipe_is_of_bfloat16_and_of_the_middle_of_images(tmp_path: Path) -> None:
    whole = write_real_iad(tmp_path / "whole", ("bottle_cap",), ok=1, ng=1, views=3, size=(300, 224))
    middle = shutil.copytree(whole, tmp_path / "middle")
    for path in [*middle.rglob("*.jpg"), *middle.rglob("*.png")]:
        with Image.open(path) as image:
            image.crop((38, 0, 262, 224)).save(
                path, **({"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {})
            )
    names = {"backbone": "resnet10t", "backbone_weights": "random", "levels": (3, 4), "shots": (1,), "max_steps": 1}
    given = {**names, "held_out": 0.0, "batch_size": 6, "img_size": (), "precision": None, "recipe": "published"}
    runs = [pretrain(config(root, tmp_path / f"run{root.name}", **given), CPU) for root in (whole, middle)]
    state = torch.load(runs[0] / "state.pt", weights_only=True)
    moments = [value for entry in state["optimizer"]["state"].values() for key, value in entry.items() if key != "step"]
    assert {value.dtype for value in (*state["projector"].values(), *moments)} == {torch.bfloat16}
    (step,), (same,) = (steps(folder) for folder in runs)
    assert step["norm"] == pytest.approx(same["norm"], rel=0.02)
    header = load_checkpoint(runs[0] / "checkpoint_last.safetensors").metadata
    assert json.loads(header["training"])["recipe"] == "published"
    with pytest.raises(InputError, match="recipe was 'published', is 'sound'"):
        pretrain(config(whole, runs[0], **{**given, "recipe": "sound", "precision": "bfloat16"}), CPU)


def test_accumulation_trains_on_micro_batches(tree: Path, tmp_path: Path) -> None:
    folder = pretrain(config(tree, tmp_path / "run", max_steps=3, accumulate=2), CPU)
    assert all(np.isfinite(line["loss"]) for line in steps(folder) if "loss" in line)
    with pytest.raises(InputError, match="equal micro-batches"):
        pretrain(config(tree, tmp_path / "odd", accumulate=3), CPU)


@pytest.mark.slow
def test_a_timm_backbone(tree: Path, tmp_path: Path) -> None:
    for number, (name, size) in enumerate({"resnet10t": 64, "vit_tiny_patch16_224": 32}.items()):
        given = config(
            tree, tmp_path / str(number), backbone=name, backbone_weights="random", img_size=(size,), max_steps=1
        )
        folder = pretrain(given, CPU)
        facts = json.loads(load_checkpoint(folder / "checkpoint_last.safetensors").metadata["backbone"])
        assert facts["timm_name"].startswith(name)
        model = adfeatures.create_model(weights=str(folder / "checkpoint_last.safetensors"), backbone_weights="random")
        assert model.name == "adpretrain_timm" and list(model.backbone.channels) == facts["channels"]


def test_another_config_is_refused(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(config(tree, tmp_path / "run", max_steps=1), CPU)
    with monkeypatch.context() as patch:
        # Before anything is computed for what is refused in the end.
        patch.setattr("training.pretrain.Inputs", lambda *_: pytest.fail("data are read"))
        for changes, message in (
            ({"lr": 0.1}, r"lr was 0\.0001, is 0\.1.*--output"),
            ({"img_size": (64,), "seed": 1}, "img_size.*; seed was"),
        ):
            with pytest.raises(InputError, match=message):
                pretrain(config(tree, tmp_path / "run", max_steps=2, **changes), CPU)
    pretrain(config(tree, tmp_path / "run", max_steps=2), CPU)
    assert len(steps(tmp_path / "run")) == 2


@pytest.mark.parametrize("place", ["log.jsonl", "references", "references/level1.f16", "tensorboard"])
def test_nothing_is_written_through_a_link(tmp_path: Path, place: str) -> None:
    link, elsewhere = tmp_path / "run" / place, tmp_path / "elsewhere"
    link.parent.mkdir(parents=True)
    elsewhere.write_text("mine")
    link.symlink_to(elsewhere)
    with pytest.raises(InputError, match=f"{link} is a link"):
        pretrain(config(tmp_path, tmp_path / "run"), CPU)
    assert elsewhere.read_text() == "mine"


def test_other_inputs_are_refused(tree: Path, tmp_path: Path) -> None:
    folder = pretrain(config(tree, tmp_path / "run", max_steps=1), CPU)
    moved = tmp_path / "moved"
    shutil.copytree(tree, moved)
    pretrain(config(moved, folder, max_steps=2), CPU)
    with pytest.raises(InputError, match="other backbone weights"):
        pretrain(config(moved, folder, max_steps=3, backbone_weights="random"), CPU)
    next(moved.rglob("OK/*/*.jpg")).unlink()
    with pytest.raises(InputError, match="other images"):
        pretrain(config(moved, folder, max_steps=3), CPU)


@pytest.mark.slow
def test_random_backbones_are_the_same_again(tree: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"backbone": "resnet10t", "backbone_weights": "random", "img_size": (64,)}
    for stop in (1, 2):
        folder = pretrain(config(tree, tmp_path / "run", max_steps=stop, **given), CPU)
    whole = pretrain(config(tree, tmp_path / "whole", max_steps=2, **given), CPU)
    assert steps(folder) == steps(whole) and len(steps(whole)) == 2


def test_centers_of_other_features_are_refused(tree: Path, tmp_path: Path) -> None:
    centers = str(pretrain(config(tree, tmp_path / "run", max_steps=1), CPU) / "centers.safetensors")
    # Those of other images of the same kind will do.
    pretrain(config(tree, tmp_path / "all", centers=centers, held_out=0.0, max_steps=1), CPU)
    for changes, message in (
        ({"img_size": (64,)}, r"img_size \[32, 32\], not \[64, 64\]"),
        ({"backbone_weights": "random"}, "other weights"),
    ):
        with pytest.raises(CheckpointError, match=message):
            pretrain(config(tree, tmp_path / "other", centers=centers, **changes), CPU)


def test_a_loss_that_is_not_finite_stops_the_run(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(config(tree, tmp_path / "run", max_steps=1), CPU)
    before = (tmp_path / "run" / "state.pt").read_bytes()
    monkeypatch.setattr(
        "training.pretraining.step.norm_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True)
    )
    with pytest.raises(AdfeaturesError, match="not finite.*--lr"):
        pretrain(config(tree, tmp_path / "run", max_steps=2), CPU)
    assert (tmp_path / "run" / "state.pt").read_bytes() == before


def test_a_full_disk_keeps_the_last_state(tree: Path, tmp_path: Path) -> None:
    folder = pretrain(config(tree, tmp_path / "run", max_steps=1), CPU)
    before = (folder / "state.pt").read_bytes()
    with (
        full_disk(len(before) // 2),
        pytest.raises(AdfeaturesError, match="Cannot write .*state.pt: .*File too large.*Free some space"),
    ):
        pretrain(config(tree, folder, max_steps=2), CPU)
    assert (folder / "state.pt").read_bytes() == before
    assert not list(folder.glob(".*"))
    pretrain(config(tree, folder, max_steps=2), CPU)
    assert [line["step"] for line in steps(folder)] == [1, 2]


def test_centers_of_another_backbone(tree: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "centers.npy", np.zeros((4, 768), np.float32))
    with pytest.raises(CheckpointError, match="channels"):
        pretrain(config(tree, tmp_path / "run", centers=str(tmp_path / "centers.npy")), CPU)


def test_data_without_anomalies(tmp_path: Path) -> None:
    tree = write_real_iad(tmp_path / "tree", ("bottle_cap",), ok=6, ng=0)
    with pytest.raises(InputError, match="nothing to contrast"):
        pretrain(config(tree, tmp_path / "run"), CPU)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder of gray images."""
    root = write_mvtec(tmp_path / "parts", ("nut",), good=6, test_good=2, bad=6, size=(40, 40))
    for path in root.glob("nut/t*/*/*.png"):
        Image.open(path).convert("L").save(path)
    return root


def of_folder(root: Path, output: Path, **changes: Any) -> PretrainConfig:
    given = {**FAST, "data": "folder", "root": str(root), "output": str(output), "max_steps": 2, **changes}
    return PretrainConfig(**given)


@pytest.mark.slow
def test_images_of_twelve_bits_are_read_as_they_are_meant(parts: Path, tmp_path: Path) -> None:
    expected = steps(pretrain(of_folder(parts, tmp_path / "eight"), CPU))
    for path in parts.glob("nut/t*/*/*.png"):
        samples = np.rint(np.asarray(Image.open(path)) * (4095 / 255)).astype(np.uint16)
        Image.fromarray(samples).save(path)
    with pytest.warns(UserWarning, match="16-bit images use .*--bit-depth"):
        dark = pretrain(of_folder(parts, tmp_path / "dark"), CPU)
    assert steps(dark) != expected
    folder = pretrain(of_folder(parts, tmp_path / "deep", bit_depth=12, max_steps=1), CPU)
    with pytest.raises(InputError, match="bit_depth was 12, is 16"):
        pretrain(of_folder(parts, folder), CPU)
    with pytest.raises(CheckpointError, match="bit_depth 16, not 12"):
        pretrain(of_folder(parts, tmp_path / "n", bit_depth=12, centers=str(dark / "centers.safetensors")), CPU)
    assert steps(pretrain(of_folder(parts, folder, bit_depth=12), CPU)) == expected
    header = load_checkpoint(folder / "checkpoint_last.safetensors").metadata
    assert json.loads(header["training"])["bit_depth"] == 12
    stores = []
    for bit_depth in (12, 16):
        pool = pretrain(of_folder(parts, tmp_path / f"pool{bit_depth}", bit_depth=bit_depth, pool=2), CPU)
        stores.append((pool / "references/level1.f16").read_bytes())
    assert stores[0] != stores[1]


def test_masks_that_show_no_defect_are_not_trained_on_in_silence(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = list(parts.glob("nut/ground_truth/*/*.png"))
    dot = np.zeros((40, 40), np.uint8)
    dot[5, 5] = 255
    for path in masks:
        Image.fromarray(dot).save(path)
    # One pixel makes no patch anomalous.
    with pytest.warns(UserWarning, match="angle loss was 0 in all [0-9]+ steps up to step [0-9]+: no patch"):
        pretrain(of_folder(parts, tmp_path / "dots"), CPU)
    for path in masks:
        Image.new("L", (40, 40)).save(path)
    assert main(arguments(of_folder(parts, tmp_path / "black", device="cpu"))) == 2
    assert "All masks are black everywhere" in capsys.readouterr().err
    assert not (tmp_path / "black").exists()


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The data come first: nobody waits for weights to hear of a wrong folder.
    assert main(["--root", str(tmp_path / "none"), "--output", str(tmp_path / "run")]) == 2
    assert "training.pretrain: error: There is no folder" in capsys.readouterr().err
    assert main(["--root", str(tmp_path), "--batch-size", "0"]) == 2
    assert "batch_size must be above 0" in capsys.readouterr().err
