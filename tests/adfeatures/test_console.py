"""Consoles that cannot show every name, and readers that leave."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adfeatures.console import PIPE_CLOSED, console

SHOW = """
import os, sys
from adfeatures.console import console
with console():
    for line in range(int(sys.argv[1])):
        print("\u00df \u4e2d", os.fsdecode(b"caf\\xe9"))
print("after", file=sys.stderr)
"""


def show(lines: int, **options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SHOW, str(lines)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **options},
    )


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("cp1252", b"\xdf \\u4e2d caf\\udce9"),
        ("ascii", b"\\xdf \\u4e2d caf\\udce9"),
        ("utf-8", "ß 中 caf\\udce9".encode()),
    ],
)
def test_what_cannot_be_shown_is_escaped(encoding: str, shown: bytes) -> None:
    out, err = show(1, PYTHONIOENCODING=encoding).communicate()
    assert out.splitlines() == [shown] and b"after" in err and b"Traceback" not in err


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    process = show(100_000)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == PIPE_CLOSED


def test_a_program_without_a_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with console():
        print("nobody reads this")


def test_streams_of_other_kinds_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with console():
        print("text")
    assert stream.getvalue() == "text\n"


DELETE = """
import os, signal, time
from adfeatures.console import console

signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background processes ignore it.

class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

with console():
    try:
        slow = Slow()
        del slow
        time.sleep(40)
    except KeyboardInterrupt:
        print("interrupted")
"""


# The second signal comes while the first one is still being looked at, as on a busy machine.
BUSY = """
import threading, time
start, delays = threading.Timer.start, iter([0.3])
threading.Timer.start = lambda timer: (start(timer), time.sleep(next(delays, 0)))[0]
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as POSIX has it")
@pytest.mark.parametrize("before", ["", BUSY], ids=["idle", "busy"])
def test_an_interrupt_while_an_object_is_deleted_is_not_lost(before: str) -> None:
    done = subprocess.run([sys.executable, "-c", before + DELETE], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
