"""Real commands in processes of their own, which are ended as users and systems end them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# Imports everything once, and forks for every command: most of the time of a command is importing torch.
SERVER = """
import importlib, json, os, resource, sys
import adfeatures.cli, adfeatures.factory, adfeatures.inspection
import training.evaluate, training.methods, training.pretrain, training.publish, training.synthesize, training.tutorial
import matplotlib.figure

for line in sys.stdin:
    entry, arguments, output, limit = json.loads(line)
    child = os.fork()
    if not child:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = importlib.import_module(entry).main(arguments)
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Done(NamedTuple):
    """What came of a command."""

    code: int
    seconds: float
    output: str
    error: str


class Commands:
    """Starts commands, one at a time. All that they put into the temporary folder comes to ``temporary``."""

    def __init__(self, folder: Path) -> None:
        self.temporary, self._output = folder / "temporary", folder / "output"
        self.temporary.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary)}
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=ROOT,
            env=environment | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the server."""
        self._server.communicate()

    def run(
        self,
        entry: str,
        *arguments: object,
        signals: Sequence[tuple[float, signal.Signals]] = (),
        limit: int = 0,
    ) -> Done:
        """Run an entry point to its end, and wait until all processes that it has started have ended too.

        Args:
            entry: The module whose main is called.
            arguments: Its arguments.
            signals: What to send to it, each so many seconds after the one before.
            limit: Bytes beyond which no file can grow.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        request = [entry, list(map(str, arguments)), str(self._output), limit]
        print(json.dumps(request), file=self._server.stdin, flush=True)
        process, started = int(self._server.stdout.readline()), time.monotonic()
        for seconds, kind in signals:
            time.sleep(seconds)
            try:
                os.kill(process, kind)
            except ProcessLookupError:
                break
        code, taken = int(self._server.stdout.readline()), time.monotonic() - started
        while _is_group(process):
            assert time.monotonic() - started - taken < 60, "workers did not end with their parent"
            time.sleep(0.01)
        return Done(code, taken, *(Path(f"{self._output}.{n}").read_text(errors="replace") for n in (1, 2)))


def _is_group(process: int) -> bool:
    try:
        os.killpg(process, 0)
    except ProcessLookupError:
        return False
    return True
