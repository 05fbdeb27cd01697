"""Every command is killed, interrupted, started twice and given a full disk: nothing is lost and nothing left behind.

What the Hub does to downloads is in ``tests/adfeatures/test_hub.py``, to uploads in ``tests/training/publishing``.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import ROOT, Commands, Done
from helpers.models import write_photos
from helpers.real_iad_tree import write_real_iad
from helpers.trees import write_mvtec

from adfeatures.checkpoints import load_checkpoint, save_checkpoint
from adfeatures.locks import LOCK, only_run_for, only_run_in
from adfeatures.projector import ResidualProjector

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked and killed as POSIX has it"),
    pytest.mark.filterwarnings("ignore:.*cannot pin down"),
]
KILL = signal.SIGKILL


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read."""
    data = tmp_path_factory.mktemp("data")
    write_photos(data / "good", range(3))
    write_photos(data / "new", range(10, 13))
    write_photos(data / "one", range(20, 21))
    write_real_iad(data / "real_iad", ("bottle_cap",), ok=4, ng=4, views=3)
    write_mvtec(data / "mvtec", good=4, test_good=2, bad=2)
    torch.manual_seed(0)
    projector = ResidualProjector((40, 80, 112), num_heads=4, num_keys=16)
    header = {
        "format": "adfeatures",
        "model": "adpretrain_efficientnet_lite",
        "num_heads": "4",
        "img_size": "[64, 64]",
        "training_data": "Real-IAD",
    }
    tensors = {f"projector.{key}": value for key, value in projector.state_dict().items()}
    save_checkpoint(data / "projector.safetensors", tensors, metrics={"img_auc": 0.9}, metadata=header)
    return data


def words(command: str, data: Path, output: Path) -> list[object]:
    """A small task for each command that fills ``output``."""
    pretraining: list[object] = ["--root", data / "real_iad", "--products", "bottle_cap", "--held-out", "0.3"]
    pretraining += ["--backbone", "efficientnet_lite", "--img-size", "32", "--device", "cpu"]
    return {
        "score": ["adfeatures.cli", "score", "--references", data / "good", "--output", output, data / "new"],
        "fit": ["adfeatures.cli", "fit", "--references", data / "good", "--bank", output / "bank.safetensors"],
        "pretrain": [
            *("training.pretrain", *pretraining, "--output", output, "--num-heads", "4", "--num-keys", "8"),
            *("--batch-size", "8", "--epochs", "2", "--workers", "2", "--precision", "float32", "--pool", "2"),
            *("--validation", "none", "--save-every", "1"),
        ],
        "centers": [
            *("training.centers", *pretraining, "--output", output / "centers.safetensors", "--workers", "1"),
        ],
        "evaluate": [
            *("training.evaluate", "--model", data / "projector.safetensors", "--dataset", "mvtec"),
            *("--root", data / "mvtec", "--output", output, "--method", "feature_norm", "patchcore", "--shots", "2"),
            *("--workers", "1", "--device", "cpu"),
        ],
        "synthesize": [
            *("training.synthesize", "--output", output, "--products", "2", "--images-per-product", "5", "10"),
            *("--size", "48", "--workers", "2"),
        ],
        "publish": ["training.publish", data / "projector.safetensors", "--folder", output, "--whole-model"],
    }[command]


ALL = ("score", "fit", "pretrain", "centers", "evaluate", "synthesize", "publish")


def contents(folder: Path) -> dict[str, Any]:
    """What a command has written, without what says how long it took."""
    return {str(path.relative_to(folder)): _content(path) for path in folder.rglob("*") if path.is_file()}


def _content(path: Path) -> Any:
    if path.name == "state.pt":
        return None  # Pickles of equal values differ.
    if path.suffix == ".safetensors":
        found = load_checkpoint(path) if "bank" not in path.name else None
        return path.read_bytes() if found is None else {key: value.tolist() for key, value in found.state_dict.items()}
    if path.suffix in (".json", ".jsonl", ".md") and path.name != "store.json":
        text = path.read_text().replace(str(path.parents[len(path.parents) - 3]), "")
        return re.sub(r'"(seconds|waiting|seconds_per_image|fit|predict)": ?[-\d.e]+', "", text)
    return path.read_bytes()


def check_killed(command: str, output: Path) -> None:
    """What holds at any moment."""
    if command == "score" and (output / "summary.json").exists():
        images = json.loads((output / "summary.json").read_text())["images"]
        assert len(rows(output)) == images == len((output / "scores.jsonl").read_text().splitlines())
    for path in output.rglob("[!.]*.safetensors"):
        if ".adfeatures-" not in str(path):
            assert load_checkpoint(path).state_dict if command != "fit" else path.stat().st_size
    for path in output.rglob("[!.]*.json"):
        if ".adfeatures-" not in str(path):
            json.loads(path.read_text())


def rows(output: Path) -> list[dict[str, str]]:
    with open(output / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def undisturbed(commands: Commands, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Output and time of commands that nothing has happened to, by name, filled when it is asked for."""
    found: dict[str, Any] = {}

    class Undisturbed(dict[str, Any]):
        def __missing__(self, command: str) -> tuple[Path, Done]:
            output = tmp_path_factory.mktemp("undisturbed") / "run"
            done = commands.run(*map(str, words(command, data, output)))
            assert done.code == 0, done.error
            self[command] = output, done
            return output, done

    return Undisturbed(found)


def check_tidy(commands: Commands, output: Path) -> None:
    assert not list(output.rglob(".*"))
    assert not [path for path in commands.temporary.iterdir() if not is_of_another(path)]


def is_of_another(temporary: Path) -> bool:
    """Whether Python left it, of workers that torch ends, or torch 2.6 as it was imported."""
    return temporary.name.startswith("pymp-") or (temporary / "_remote_module_non_scriptable.py").exists()


def kill_and_resume(
    commands: Commands, data: Path, undisturbed: dict[str, Any], output: Path, command: str, seed: int, kills: int
) -> None:
    whole, done = undisturbed[command]
    task, moments = list(map(str, words(command, data, output))), random.Random(f"{command} {seed}")
    limit = done.seconds
    for _ in range(kills):
        while commands.run(*task, signals=[(moments.uniform(0, limit), KILL)]).code != -KILL:
            # It was done by then: from the beginning, and earlier.
            shutil.rmtree(output)
            limit *= 0.8
        check_killed(command, output)
    end = commands.run(*task)
    assert end.code == 0 and "Traceback" not in end.error, end.error
    found, expected = contents(output), contents(whole)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    check_tidy(commands, output)


# That of the renderer's processes takes minutes; test_layout kills it too.
@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.release] if name == "synthesize" else []) for name in ALL]
)
def test_killed_at_random(
    commands: Commands, data: Path, undisturbed: dict[str, Any], tmp_path: Path, command: str
) -> None:
    kill_and_resume(commands, data, undisturbed, tmp_path / "run", command, seed=0, kills=2)


@pytest.mark.release
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("command", ALL)
def test_killed_at_random_again_and_again(
    commands: Commands, data: Path, undisturbed: dict[str, Any], tmp_path: Path, command: str, seed: int
) -> None:
    kill_and_resume(commands, data, undisturbed, tmp_path / "run", command, seed, kills=8)


@pytest.mark.parametrize("command", ALL)
def test_a_second_run_is_refused(commands: Commands, data: Path, tmp_path: Path, command: str) -> None:
    target = tmp_path / "run"
    held = {"fit": target / "bank.safetensors", "centers": target / "centers.safetensors"}.get(command)
    with only_run_for(held) if held else only_run_in(target):
        done = commands.run(*map(str, words(command, data, target)))
        written = [path for path in target.rglob("*") if path.is_file() and not path.name.endswith(LOCK)]
    assert done.code == 2 and not written
    assert re.search(rf"Another run writes to {held or target}: process {os.getpid()} on .*, since", done.error)
    assert "Traceback" not in done.error and not target.exists()


def test_four_at_once_make_one_result(data: Path, tmp_path: Path) -> None:
    _, *arguments = map(str, words("score", data, tmp_path / "run"))
    command = [sys.executable, "-m", "adfeatures", *arguments]
    four = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [process.communicate(timeout=300)[1] for process in four]
    codes = [process.returncode for process in four]
    assert 0 in codes and set(codes) <= {0, 2}
    assert all(("Another run writes to" in error) == (code == 2) for code, error in zip(codes, errors, strict=True))
    assert len(rows(tmp_path / "run")) == len(list((data / "new").iterdir()))
    check_killed("score", tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*"))


POINTS = """
import os, shutil, signal, sys
from pathlib import Path
from adfeatures.inspection import inspect
from helpers.models import tiny_extractor, write_photos

root = Path(sys.argv[1])
model = tiny_extractor()
model.set_references(write_photos(root / "good", range(3)))
files = [str(path) for path in write_photos(root / "new", range(10, 15))]
EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def run(files, output, count=0):
    child = os.fork()
    if not child:
        left = count

        def hook(event, values):
            nonlocal left
            path = str(values[0]) if event in EVENTS else ""
            # Of what waits in folders of its own only the moves matter.
            if path.startswith(str(output)) and (event == "os.rename" or "/.adfeatures-" not in path):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            inspect(model, files, output)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


run(files[:4], root / "former")
run(files[3:], root / "fresh")
for count in range(1, 1000, int(sys.argv[2])):
    output = root / "runs" / str(count)
    shutil.copytree(root / "former", output)
    if not run(files[3:], output, count):
        break
    shutil.copytree(output, root / "killed" / str(count))
    if count % 4 == 3:
        run(files[3:], output, count // 2)
    run(files[3:], output)
"""


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.release), 3])
def test_a_result_is_replaced_whole_wherever_the_run_is_killed(tmp_path: Path, step: int) -> None:
    """Killed before any change of a file, or every third: four rows are replaced by two, with one overlay in common."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", POINTS, tmp_path, str(step)], env=environment, check=True, timeout=300
    )
    seen = set()
    for killed in (tmp_path / "killed").iterdir():
        tables = [rows(killed)]
        if (killed / "scores.jsonl").exists():
            tables.append([json.loads(line) for line in (killed / "scores.jsonl").read_text().splitlines()])
        (names,) = {tuple(Path(row["file"]).name for row in table) for table in tables}
        told = json.loads((killed / "summary.json").read_text())["images"] if (killed / "summary.json").exists() else 0
        assert len(names) in (2, 4) and told in (0, len(names))
        seen.add((len(names), told))
    assert seen == {(4, 4), (4, 0), (2, 0), (2, 2)}
    expected = contents(tmp_path / "fresh")
    for recovered in (tmp_path / "runs").iterdir():
        assert contents(recovered).keys() == expected.keys()
        assert all(value == expected[name] for name, value in contents(recovered).items() if name != "summary.json")
        assert not list(recovered.rglob(".*"))


@pytest.mark.parametrize("command", ["score", "evaluate", "pretrain", "synthesize"])
@pytest.mark.parametrize("times", [1, 2])
def test_interrupted(
    commands: Commands, data: Path, undisturbed: dict[str, Any], tmp_path: Path, command: str, times: int
) -> None:
    task = list(map(str, words(command, data, tmp_path / "run")))
    _, whole = undisturbed[command]
    # Not so early that it is still importing.
    signals = [(0.75 * whole.seconds, signal.SIGINT), (0.02, signal.SIGINT)][:times]
    done = commands.run(*task, signals=signals)
    assert "Traceback" not in done.error and "Exception" not in done.error
    if done.code:  # Else it was done by then.
        assert done.code == 130 and "nterrupted" in done.error
    check_killed(command, tmp_path / "run")
    end = commands.run(*task)
    assert end.code == 0, end.error
    assert contents(tmp_path / "run").keys() == contents(undisturbed[command][0]).keys()
    check_tidy(commands, tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 200 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("command", ALL)
def test_a_full_disk(commands: Commands, data: Path, small_disk: Path, command: str) -> None:
    """What is there stays as it is, and the error says what to do."""
    output = small_disk / "run"
    output.mkdir()
    task = list(map(str, words(command, data, output)))
    if command == "score":
        assert commands.run(*task[:-1], str(data / "one")).code == 0
    (small_disk / "mine").write_bytes(b"0" * (small_disk_left(small_disk) - 4096))
    before = contents(small_disk)
    done = commands.run(*task)
    assert done.code == 2 and "Traceback" not in done.error, done.error
    assert re.search("No space left on device|full", done.error) and re.search("[Ff]ree", done.error)
    after = contents(small_disk)
    assert {name: after[name] for name in before} == before
    check_tidy(commands, output)


def small_disk_left(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize
