"""Engines: the rows of several processes are those of one, and one that dies costs no rows that are done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.models import write_photos

from adfeatures.cli import _parser, main
from adfeatures.engines import over_ray, ranks
from adfeatures.errors import InputError
from adfeatures.inspection import Terms

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank, photos one of which cannot be read, and the result of one process."""
    folder = tmp_path_factory.mktemp("engines")
    write_photos(folder / "good", range(3))
    write_photos(folder / "new", range(10, 29))
    (folder / "new" / "012.png").write_bytes(b"no image")
    assert main(["fit", "--references", str(folder / "good"), "--bank", str(folder / "part.safetensors")]) == 0
    assert main(words(folder, "whole")) == 1
    return folder


def words(folder: Path, output: str, *more: str) -> list[str]:
    """The command that scores them, in batches of two."""
    images = ["--bank", str(folder / "part.safetensors"), "--output", str(folder / output), str(folder / "new")]
    return ["score", "--batch-size", "2", "--device", "cpu", *images, *more]


def start(*command: str) -> subprocess.Popen[str]:
    # As many threads as here: the sums are the same then.
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def two_ranks(folder: Path, output: str, *more: str) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "adfeatures"]
    return start(*torchrun, *words(folder, output, *more))


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "summary.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def rows(folder: Path) -> int:
    lines = folder / "scores.jsonl"
    return lines.read_text().count("\n") if lines.exists() else 0


def descendants(process: int) -> Iterator[tuple[int, str]]:
    """Processes that a process has started, and they, with their command lines."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # It has ended.
            continue
    for child in parents:
        ancestor = child
        while ancestor in parents and ancestor != process:
            ancestor = parents[ancestor]
        if ancestor == process != child:
            yield child, Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def kill_one(process: subprocess.Popen[str], name: str, folder: Path) -> bool:
    """Kill a process below another once the first rows are there. Whether it came to that."""
    deadline = time.monotonic() + 240
    while not rows(folder):
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(next(child for child, line in descendants(process.pid) if name in line), signal.SIGKILL)
    return True


def test_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with ranks() as rank:
        assert rank == 0 and not torch.distributed.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="There are 2 GPUs, too few for local rank 2"), ranks():
        pass


@pytest.mark.parametrize("missing", ["ray", "pyarrow"])
def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    given = _parser().parse_args(["score", "--references", "good", "--output", "out", "--engine", "ray", "new"])
    with pytest.raises(InputError, match=r'is not installed.*pip install "adfeatures\[ray\]"'):
        next(over_ray(given, ["a.png"], Terms(None, None, (0.0, 1.0), 2, 1, False)))


@pytest.mark.slow
def test_two_ranks_give_the_same_result(folder: Path) -> None:
    done = two_ranks(folder, "ranks")
    _, errors = done.communicate(timeout=300)
    assert contents(folder / "ranks") == contents(folder / "whole"), errors
    assert errors.count("012.png") == 1, "one of them tells"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
def test_a_rank_that_dies_costs_no_rows_that_are_done(folder: Path) -> None:
    process = two_ranks(folder, "killed", "--resume")
    assert kill_one(process, "-m adfeatures score", folder / "killed"), process.communicate()
    _, errors = process.communicate(timeout=300)
    kept = rows(folder / "killed")
    assert process.returncode and kept and not (folder / "killed" / "summary.json").exists(), errors
    assert main(words(folder, "killed", "--resume")) == 1
    assert contents(folder / "killed") == contents(folder / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
def test_a_worker_of_ray_that_dies_is_replaced(folder: Path) -> None:
    pytest.importorskip("ray.data", reason='Ray is not installed: pip install "adfeatures[ray]"')
    code, errors, tries = 2, "Ray cannot be started", 0
    while "Ray cannot be started" in errors and tries < 3:  # On a busy machine, within the 30 s that Ray allows.
        process, tries = start("-m", "adfeatures", *words(folder, "ray", "--engine", "ray")), tries + 1
        killed = kill_one(process, "ray::MapWorker", folder / "ray")
        _, errors = process.communicate(timeout=500)
        code = process.returncode
    assert code == 1 and killed and contents(folder / "ray") == contents(folder / "whole"), errors
