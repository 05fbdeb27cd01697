"""How everything here is timed: ours and the naive form alternately in one process, so that whatever else the machine does slows both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

# Seconds before each measurement. NumPy's and torch's idle threads spin for a while, and would take the cores from the
# other's.
REST = 0.2


@dataclass(frozen=True)
class Row:
    """One line of the table: medians in seconds, and the median of the ratios naive / ours."""

    what: str
    ours: float
    naive: float | None = None
    ratio: float | None = None
    note: str = ""

    def __str__(self) -> str:
        naive = "-" if self.naive is None else f"{self.naive:.3f}"
        ratio = "-" if self.ratio is None else f"{self.ratio:.1f}"
        return f"{self.what:<56}{self.ours:>9.3f}{naive:>10}{ratio:>8}  {self.note}".rstrip()


HEADER = f"{'what (seconds)':<56}{'ours':>9}{'naive':>10}{'ratio':>8}"


def compare(
    what: str, ours: Callable[[], object], naive: Callable[[], object], *, repeats: int = 3, note: str = ""
) -> Row:
    """Time two functions alternately, ``repeats`` pairs after one run of ours that warms up."""
    ours()
    pairs = [(seconds(ours), seconds(naive)) for _ in range(repeats)]
    return Row(what, median(a for a, _ in pairs), median(b for _, b in pairs), median(b / a for a, b in pairs), note)


def seconds(function: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    time.sleep(REST)
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
