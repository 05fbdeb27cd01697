"""Engines: the rows of several processes are those of one, and one that dies costs no rows that are done."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.models import write_photos

from adfeatures import engines
from adfeatures.cli import _parser, main
from adfeatures.engines import over_ray, ranks
from adfeatures.errors import InputError
from adfeatures.inspection import Outcome, Terms
from adfeatures.results import ImageRow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank, photos one of which cannot be read, and the result of one process."""
    folder = tmp_path_factory.mktemp("engines")
    write_photos(folder / "good", range(3))
    write_photos(folder / "new", range(10, 29))
    (folder / "new" / "024.png").write_bytes(b"no image")
    assert main(["fit", "--references", str(folder / "good"), "--bank", str(folder / "part.safetensors")]) == 0
    assert main(words(folder, "whole")) == 1
    return folder


def words(folder: Path, output: str, *more: str) -> list[str]:
    """The command that scores them, in batches of two."""
    images = ["--bank", str(folder / "part.safetensors"), "--output", str(folder / output), str(folder / "new")]
    return ["score", "--batch-size", "2", "--device", "cpu", *images, *more]


def start(*command: str, **variables: str) -> subprocess.Popen[str]:
    # As many threads as here: the sums are the same then.
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"} | variables
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


def wait_for_rows(process: subprocess.Popen[str], folder: Path) -> bool:
    """Wait for the first rows of a process. Whether it came to that."""
    deadline = time.monotonic() + 240
    while not rows(folder):
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return True


def kill_one(process: subprocess.Popen[str], name: str, folder: Path) -> bool:
    """Kill a process below another once the first rows are there. Whether it came to that."""
    if not wait_for_rows(process, folder):
        return False
    os.kill(next(child for child, line in descendants(process.pid) if name in line), signal.SIGKILL)
    return True


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


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


@pytest.mark.parametrize(
    "files, deaths",
    [(["a"], 0), (["bad"], 3), (["a", "bad", "b"], 3), (["bad", "worse", "a"], 5), (["bad", "bad"], 3)],
    ids=str,
)
def test_what_ends_workers_is_told_and_the_rest_scored(
    files: list[str], deaths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of Ray without Ray, which begins the same files again where it has died."""

    class Dead(BaseException): ...

    def scored(_: object, files: list[str], terms: Terms) -> list[Outcome]:
        if {"bad", "worse"} & set(files):
            raise Dead
        return [Outcome(ImageRow(file, len(files))) for file in files]

    monkeypatch.setattr(engines, "_quiet_detector", lambda options: None)
    monkeypatch.setattr(engines, "answer", scored)
    begun, terms, died, told = engines._Begun(), Terms(None, None, (0.0, 1.0), 2, 1, False), 0, b""
    while not told:
        with suppress(Dead):
            died += 1
            asked = pickle.dumps((files, terms))
            told = engines._Worker(argparse.Namespace(), begun.add)({"asked": asked})["told"]
    found = [outcome.row for outcome in pickle.loads(told)]
    sound = [file for file in files if file in ("a", "b")]
    assert died - 1 == deaths and [row.file for row in found] == files
    for row in found:
        # Those that are left are scored together, as where the others cannot be read.
        assert row.score == (len(sound) if row.file in sound else None)
        assert ("processes died while reading it" in row.error) is (row.file not in sound)


@pytest.mark.slow
def test_two_ranks_give_the_same_result(folder: Path) -> None:
    done = two_ranks(folder, "ranks")
    _, errors = done.communicate(timeout=300)
    assert contents(folder / "ranks") == contents(folder / "whole"), errors
    assert errors.count("024.png") == 1, "one of them tells"


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


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.release), pytest.param(1, marks=pytest.mark.slow)])
def test_a_node_that_vanishes_ends_the_others(folder: Path, lost: int) -> None:
    """Two ranks as on two machines: no torchrun sees both of them."""
    output = f"vanished-{lost}"
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = ["-m", "adfeatures", *words(folder, output, "--resume")]
    nodes = [start(*command, RANK=rank, **place) for rank in ("0", "1")]
    wait_for_rows(nodes[0], folder / output)
    nodes[lost].kill()
    nodes[lost].communicate(timeout=100)
    _, errors = nodes[1 - lost].communicate(timeout=100)
    assert nodes[1 - lost].returncode == 2
    assert "A process of this run has ended or cannot be reached" in errors and "Finished rows are kept" in errors
    assert rows(folder / output) and not (folder / output / "summary.json").exists()
    assert main(words(folder, output, "--resume")) == 1
    assert contents(folder / output) == contents(folder / "whole")


# Ends every process that opens a photo, before Python runs what it was started for.
POISON = """
import os, signal, PIL.Image

def deadly(stream, *arguments, _open=PIL.Image.open, **options):
    if str(stream.name).endswith("024.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    return _open(stream, *arguments, **options)

PIL.Image.open = deadly
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize(
    "site",
    [pytest.param("", marks=pytest.mark.slow), pytest.param(POISON, marks=pytest.mark.release)],
    ids=["", "poison"],
)
def test_workers_of_ray_that_die_are_replaced_and_what_ends_all_of_them_is_told(folder: Path, site: str) -> None:
    """One is killed; and where the photo that cannot be read kills whoever tries, its row says so, the others stay."""
    pytest.importorskip("ray.data", reason='Ray is not installed: pip install "adfeatures[ray]"')
    sites = folder / f"site-{bool(site)}"
    sites.mkdir()
    (sites / "sitecustomize.py").write_text(site)
    path, output = f"{ROOT}{os.pathsep}{sites}", f"ray-{bool(site)}"
    code, errors, tries = 2, "Ray cannot be started", 0
    while "Ray cannot be started" in errors and tries < 3:  # On a busy machine, within the 30 s that Ray allows.
        process = start("-m", "adfeatures", *words(folder, output, "--engine", "ray"), PYTHONPATH=path)
        killed, tries = kill_one(process, "ray::MapWorker", folder / output), tries + 1
        _, errors = process.communicate(timeout=500)
        code = process.returncode
    assert code == 1 and killed, errors
    found, expected = contents(folder / output), contents(folder / "whole")
    if not site:
        assert found == expected
        return
    for name in ("scores.csv", "scores.parquet"):  # Of the same rows.
        found.pop(name, None), expected.pop(name, None)
    ours, theirs = ([json.loads(line) for line in of.pop("scores.jsonl").splitlines()] for of in (found, expected))
    assert found == expected
    assert "3 processes died while reading it" in ours[14].pop("error") and "it is not" in theirs[14].pop("error")
    assert ours == theirs
