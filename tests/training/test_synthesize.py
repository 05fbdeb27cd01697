"""The command that renders the synthetic data set: what it prints, what stops it."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.synthesis import run_entry

from training.data.synthetic import synthesize
from training.synthesize import main


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None) -> None:
    arguments = [
        "--output",
        str(tmp_path / "set"),
        "--products",
        "gear",
        "label",
        "--images-per-product",
        "5",
        "10",
        "--size",
        "48",
    ]
    assert main(arguments) == 0
    assert re.search(r"wrote 30 images in [\d.]+ s, [\d.]+ images/s per worker", capsys.readouterr().out)
    assert {path.name for path in (tmp_path / "set/realiad_512").iterdir()} == {"gear", "label"}
    assert main(arguments) == 0
    assert "wrote 0 images; everything was there" in capsys.readouterr().out


def test_entry_explains_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str], threads: None) -> None:
    (tmp_path / "file").write_text("in the way")
    for arguments, message in (
        (["--output", str(tmp_path / "a"), "--products", "geer"], "Did you mean 'gear'"),
        (["--output", str(tmp_path / "a"), "--images-per-product", "7", "5"], "multiples of 5"),
        (["--output", str(tmp_path / "file" / "a"), "--products", "1"], "cannot be used"),
        (["--output", "/proc/nowhere/a", "--products", "1"], "Cannot write"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error and error.count("training.synthesize: error:") == 1


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.release)])
def test_a_full_disk_stops_it_and_loses_nothing(tmp_path: Path, workers: str) -> None:
    arguments = (
        "--output",
        str(tmp_path),
        "--products",
        "linen",
        "--images-per-product",
        "5",
        "10",
        "--size",
        "96",
        "--workers",
        workers,
    )
    # Files larger than this cannot be written, as on a disk with that much left.
    process = run_entry(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)))
    output, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    assert "Cannot write" in error and "Free some space" in error and "Traceback" not in error
    assert not [path for path in tmp_path.rglob(".*") if path.suffix in (".jpg", ".png")]
    assert synthesize(tmp_path, products=("linen",), good=1, bad=2, size=96) == 15


@pytest.mark.slow
def test_a_killed_worker_is_reported(tmp_path: Path) -> None:
    process = run_entry("--output", str(tmp_path / "set"), "--workers", "2")
    workers: list[int] = []
    deadline = time.monotonic() + 60
    while not (workers and any(tmp_path.glob("set/realiad_512/*/*/*/*/*.jpg"))) and time.monotonic() < deadline:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
        time.sleep(0.05)
    os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and "A worker was killed" in error and "Traceback" not in error
