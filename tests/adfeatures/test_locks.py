"""Locks between real processes, killed ones too, and what the next run clears away."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adfeatures import locks
from adfeatures.checkpoints import atomic_path
from adfeatures.errors import AdfeaturesError, InputError
from adfeatures.locks import LOCK, only_run_for, only_run_in, refuse_links, remove_leftovers

ROOT = Path(__file__).parents[2]
HOLD = "import os, sys, time; from adfeatures.locks import only_run_in, only_run_for; folder = sys.argv[1]"
Start = Callable[[str, Path], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start code in a process, in which ``folder`` is a path, and wait for the first line that it prints."""
    processes: list[subprocess.Popen[str]] = []

    def run(code: str, path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", f"{HOLD}\n{code}", str(path)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline()
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


WITH = "with only_run_in(folder): print(os.getpid(), flush=True); time.sleep(60)"


def test_the_second_run_is_told_of_the_first_and_a_killed_one_holds_nothing(tmp_path: Path, start: Start) -> None:
    first = start(WITH, tmp_path)
    says = rf"Another run writes to {tmp_path}: process {first.pid} on {socket.gethostname()}, since 20.*stop it"
    with pytest.raises(AdfeaturesError, match=says) as refused, only_run_in(tmp_path):
        pass
    assert "down" not in str(refused.value)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / LOCK).exists()
    with only_run_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked as POSIX has it")
def test_a_worker_that_outlives_a_killed_run_holds_nothing(tmp_path: Path, start: Start) -> None:
    worker = "if not os.fork(): os.close(1); time.sleep(5); os._exit(0)"
    first = start(f"with only_run_in(folder):\n    {worker}\n    print(1, flush=True); time.sleep(60)", tmp_path)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with only_run_in(tmp_path):
        pass


def test_a_run_of_another_computer_may_be_down(tmp_path: Path, start: Start) -> None:
    start(f"import socket; socket.gethostname = lambda: 'elsewhere'\n{WITH}", tmp_path)
    says = rf"process \d+ on elsewhere, since .* If that computer is down, remove {tmp_path / LOCK}\."
    with pytest.raises(AdfeaturesError, match=says), only_run_in(tmp_path):
        pass
    (tmp_path / LOCK).unlink()
    with only_run_in(tmp_path):
        assert (tmp_path / LOCK).exists()


def test_a_file_is_another_matter_than_its_folder(tmp_path: Path, start: Start) -> None:
    start(WITH.replace("only_run_in(folder)", "only_run_for(folder)"), tmp_path / "a.safetensors")
    with (
        pytest.raises(AdfeaturesError, match="Another run writes to .*a.safetensors"),
        only_run_for(tmp_path / "a.safetensors"),
    ):
        pass
    with only_run_in(tmp_path), only_run_for(tmp_path / "b.safetensors"):
        pass


@pytest.mark.parametrize("other", ["bank.safetensors", ""])
def test_what_a_living_run_for_a_file_writes_is_left_alone(tmp_path: Path, other: str) -> None:
    written = tmp_path / "bank.v2.safetensors"
    another = only_run_for(tmp_path / other) if other else only_run_in(tmp_path)
    with only_run_for(written), atomic_path(written) as temporary, another:
        temporary.write_text("whole")
    assert written.read_text() == "whole" and list(tmp_path.iterdir()) == [written]


def test_one_process_is_refused_as_well(tmp_path: Path) -> None:
    with only_run_in(tmp_path / "new"):
        link = tmp_path / "link"
        link.symlink_to("new")
        for folder in (tmp_path / "new", link):
            with pytest.raises(AdfeaturesError, match=f"process {os.getpid()} on"), only_run_in(folder):
                pass
    assert not (tmp_path / "new").exists(), "nothing was written to it"
    with pytest.raises(ZeroDivisionError), only_run_in(tmp_path / "new"):
        (tmp_path / "new" / "kept").touch()
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kept"]


@pytest.mark.slow
def test_never_two_at_a_time(tmp_path: Path, start: Start) -> None:
    """Six processes take turns, each of which removes the file that the next one locks."""
    code = """
from adfeatures.errors import AdfeaturesError
print(1, flush=True)
turns = 0
while turns < 60:
    try:
        with only_run_in(folder):
            alone = os.open(folder + "/alone", os.O_CREAT | os.O_EXCL)
            os.close(alone)
            os.unlink(folder + "/alone")
            turns += 1
    except AdfeaturesError:
        pass
"""
    processes = [start(code, tmp_path) for _ in range(6)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 6


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path: Path, start: Start) -> None:
    code = """
from adfeatures.checkpoints import atomic_path
from pathlib import Path
for name in ("state.pt", "deep/er/x" + "é" * 120 + ".png", "elsewhere/kept.csv"):
    writing = atomic_path(Path(folder, name))
    writing.__enter__().write_bytes(b"half")
    globals()[name] = writing
print(1, flush=True)
time.sleep(60)
"""
    first = start(code, tmp_path)
    first.send_signal(signal.SIGKILL)
    first.wait()
    for name in (".keep", ".state.0123abcd.pt", "state.adfeatures-01234567", "deep/.notes.adfeatures-0123"):
        (tmp_path / name).write_text("mine")
    others = {"elsewhere", "kept.csv", "er", "deep", ".keep", ".state.0123abcd.pt", "state.adfeatures-01234567"}
    assert len(list(tmp_path.rglob(".*.adfeatures-????????"))) == 3
    with only_run_in(tmp_path, "deep"):
        pass
    (left,) = tmp_path.rglob(".*.adfeatures-????????")
    assert {path.name for path in tmp_path.rglob("*")} == {*others, ".notes.adfeatures-0123", left.name}
    remove_leftovers(left.parent.iterdir(), older_than=60)
    assert left.exists()
    with only_run_for(tmp_path / "elsewhere" / "other.csv"):
        assert left.exists()
    with only_run_for(tmp_path / "elsewhere" / "kept.csv"):
        assert not left.exists()


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_file_has_a_name(name: str) -> None:
    with pytest.raises(InputError, match="is not the name of a file"), only_run_for(name):
        pass


def test_places_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file: it is a file. Choose a folder"), only_run_in(tmp_path / "file"):
        pass
    deeper = tmp_path / "file" / "deeper"
    with (
        pytest.raises(AdfeaturesError, match="Cannot write to .*deeper: .*Not a directory.*used: choose"),
        only_run_in(deeper),
    ):
        pass
    (tmp_path / LOCK).symlink_to("file")
    with pytest.raises(AdfeaturesError, match="Cannot write to"), only_run_in(tmp_path):
        pass
    assert (tmp_path / "file").read_text() == "mine"

    def none(_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks, "_acquire", none)
    with pytest.warns(UserWarning, match="is on a file system without locks"), only_run_in(tmp_path / "new"):
        pass


def test_links_are_refused_below_the_parts_alone(tmp_path: Path) -> None:
    (tmp_path / "out" / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "others").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    refuse_links(tmp_path / "link", "mine", "absent")
    for name in ("mine/deep/folder", "mine/file", "mine/dangling"):
        link = tmp_path / "out" / name
        link.symlink_to({"folder": tmp_path, "file": tmp_path / "file"}.get(link.name, tmp_path / "nothing"))
        with pytest.raises(InputError, match=f"{name} is a link"):
            refuse_links(tmp_path / "link", "mine", "absent")
        link.unlink()
    with pytest.raises(InputError, match="others is a link"):
        refuse_links(tmp_path / "out", "others")
