"""The synthetic data set: its command in a process of its own, and what holds for every product."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from training.data.synthetic.canvas import Part

ROOT = Path(__file__).parents[2]


def run_entry(*arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "training.synthesize", *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]


def check_possible(part: Part) -> None:
    """Heights, colors and materials that something real could have."""
    assert np.isfinite(part.maps).all() and part.height.min() > -0.3 and part.height.max() < 0.6
    assert part.color.min() >= 0 and part.color.max() < 1.6
    for share in (part.gloss, part.metal, part.body):
        assert share.min() > -1e-3 and share.max() < 1 + 1e-3
