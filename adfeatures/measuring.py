"""How benchmarks measure: ours and a naive form alternately in one process, so that whatever slows one slows both."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

T = TypeVar("T")
# Seconds before each measurement. NumPy's and torch's idle threads spin for a while, and take cores from the other's.
REST = 0.2
NOT_MEASURED = "not measured: " + ("Windows counts no peak" if sys.platform == "win32" else "process died")
_PER_SECOND = {"s": 1, "ms": 1000}


@dataclass(frozen=True)
class Measurement:
    """One line of a table: the ratio is naive over ours, above 1 where ours is better; None was not measured."""

    what: str
    unit: str
    ours: float | None
    naive: float | None = None
    ratio: float | None = None
    note: str = ""

    @classmethod
    def of_runs(
        cls, what: str, ours: Sequence[float], naive: Sequence[float] = (), *, unit: str = "s", note: str = ""
    ) -> Measurement:
        """Medians of the seconds of runs, in ``unit`` ("s" or "ms"), and the median of the ratios of paired runs."""
        scale = _PER_SECOND[unit]
        if not naive:
            return cls(what, unit, scale * median(ours), note=note)
        ratio = median(theirs / own for own, theirs in zip(ours, naive, strict=True))
        return cls(what, unit, scale * median(ours), scale * median(naive), ratio, note)

    def __str__(self) -> str:
        decimals = 3 if self.unit == "s" else 1
        ours, naive = ("-" if value is None else f"{value:,.{decimals}f}" for value in (self.ours, self.naive))
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}"
        return _line(f"{self.what}, {self.unit}", ours, naive, ratio, self.note)


def _line(what: str, ours: str, naive: str, ratio: str, note: str) -> str:
    return f"{what:<62}{ours:>9}{naive:>10}{ratio:>7}  {note}".rstrip()


HEADER = _line("what", "ours", "naive", "ratio", "(ratio: naive / ours; MB: 10^6 bytes)")


def compare(
    what: str,
    ours: Callable[[], object],
    naive: Callable[[], object],
    *,
    repeats: int = 3,
    limit: float = inf,
    unit: str = "s",
    note: str = "",
) -> Measurement:
    """Time two functions alternately, ours once before to warm up; after ``limit`` seconds no other pair is begun."""
    ours()
    pairs, end = list[tuple[float, float]](), time.perf_counter() + limit
    while not pairs or (len(pairs) < repeats and time.perf_counter() < end):
        pairs.append((seconds(ours), seconds(naive)))
    note = f"pairs {len(pairs)}; {note}".removesuffix("; ")
    return Measurement.of_runs(what, *zip(*pairs, strict=True), unit=unit, note=note)


def seconds(function: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    return timed(function)[0]


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Seconds that one call takes, and what it returns."""
    time.sleep(REST)
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def in_child(function: Callable[..., T], *arguments: object) -> T | None:
    """What a function returns in a fresh process, None where that process died, as of too little memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return None


def peak_megabytes() -> float | None:
    """The most memory that this process ever held, None on Windows."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux that of a spawned process begins with its parent's.
        (kibibytes,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kibibytes) * 1024 / 1e6
    if sys.platform == "win32":
        return None
    import resource

    # macOS counts bytes, others kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def machine() -> dict[str, str | int | float | None]:
    """What the figures depend on."""
    threads, processors = torch.get_num_threads(), os.cpu_count()
    load = {"load": round(os.getloadavg()[0], 1)} if hasattr(os, "getloadavg") else {}
    return {"torch": torch.__version__, "device": "cpu", "threads": threads, "processors": processors, **load}
