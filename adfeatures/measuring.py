"""How benchmarks measure: ours and a naive form alternately in one process, so that whatever slows one slows both."""

from __future__ import annotations

import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median, quantiles
from typing import TypeVar

import torch

T = TypeVar("T")
# Seconds before each measurement. NumPy's and torch's idle threads spin for a while, and take cores from the other's.
REST = 0.2
NOT_MEASURED = "not measured: " + ("Windows counts no peak" if sys.platform == "win32" else "process died")
_PER_SECOND = {"s": 1, "ms": 1000}
_CPU = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Measurement:
    """One line of a table: the ratio is naive over ours, above 1 where ours is better; None was not measured.

    ``spread`` holds the quartiles between which the middle half lies: of the ratios, or of ours where it runs alone.
    """

    what: str
    unit: str
    ours: float | None
    naive: float | None = None
    ratio: float | None = None
    note: str = ""
    spread: tuple[float, float] | None = None

    @classmethod
    def of_runs(
        cls, what: str, ours: Sequence[float], naive: Sequence[float] = (), *, unit: str = "s", note: str = ""
    ) -> Measurement:
        """Medians of the seconds of runs, in ``unit`` ("s" or "ms"), and the median of the ratios of paired runs."""
        scale = _PER_SECOND[unit]
        if not naive:
            runs = [scale * own for own in ours]
            return cls(what, unit, median(runs), note=note, spread=_quartiles(runs))
        ratios = [theirs / own for own, theirs in zip(ours, naive, strict=True)]
        medians = scale * median(ours), scale * median(naive), median(ratios)
        return cls(what, unit, *medians, note, _quartiles(ratios))

    def __str__(self) -> str:
        decimals = 3 if self.unit == "s" else 1
        ours, naive = ("-" if value is None else f"{value:,.{decimals}f}" for value in (self.ours, self.naive))
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}"
        of = decimals if self.ratio is None else 2
        spread = "-" if self.spread is None else " to ".join(f"{value:,.{of}f}" for value in self.spread)
        return _line(f"{self.what}, {self.unit}", ours, naive, ratio, spread, self.note)


def _quartiles(values: Sequence[float]) -> tuple[float, float] | None:
    """The first and the third, None of a single value."""
    if len(values) < 2:
        return None
    first, _, third = quantiles(values, method="inclusive")
    return first, third


def _line(what: str, ours: str, naive: str, ratio: str, spread: str, note: str) -> str:
    return f"| {what:<62} | {ours:>9} | {naive:>9} | {ratio:>6} | {spread:>16} | {note} |"


HEADER = _line("what", "ours", "naive", "ratio", "middle half", "ratio: naive / ours; MB: 10^6 bytes")
# What Markdown has between the header and the rows.
RULE = f"|{'-' * 64}|{'-' * 10}:|{'-' * 10}:|{'-' * 7}:|{'-' * 17}:|---|"


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


def timed(function: Callable[[], T], *, rested: bool = True) -> tuple[float, T]:
    """Seconds that one call takes, and what it returns."""
    if rested:
        time.sleep(REST)
    _finish()
    start = time.perf_counter()
    result = function()
    _finish()
    return time.perf_counter() - start, result


def _finish() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


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


def machine(device: str = "cpu") -> dict[str, str | int | float | None]:
    """What the figures depend on. ``bfloat16`` says whether the device computes in it by instructions of its own."""
    threads, processors = torch.get_num_threads(), os.cpu_count()
    load = {"load": round(os.getloadavg()[0], 1)} if hasattr(os, "getloadavg") else {}
    if device == "cpu":
        lines = _CPU.read_text().splitlines() if _CPU.exists() else []
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        hardware = facts.get("model name") or platform.processor() or platform.machine()
        fast = bool({"avx512_bf16", "amx_bf16"} & set(facts.get("flags", "").split()))
    else:
        hardware, fast = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
    return {
        "torch": torch.__version__,
        "device": device,
        "threads": threads,
        "processors": processors,
        "hardware": hardware,
        "bfloat16": "yes" if fast else "no",
        **load,
    }
