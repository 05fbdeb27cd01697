"""Commands as several processes, as ``torchrun`` starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def run_ranks(count: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script, or ``-m`` and a module, as this many ranks.

    Each has as many threads as this process: the sums are then its own.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        *map(str, arguments),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
