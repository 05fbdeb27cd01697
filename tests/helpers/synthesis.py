"""The command that renders the synthetic data set, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_entry(*arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "training.synthesize", *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]
