"""Print the table: ``python -m training.bench [NAME ...] [--quick]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

from adfeatures.catalog import unknown
from adfeatures.errors import InputError, UnknownNameError
from adfeatures.measuring import HEADER, RULE, machine

from ..console import run
from ..distributed import processes

BENCHMARKS = ("aupro", "patchcore", "padim", "pretrain")


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.bench",
        description="Compares speed with naive implementations; the ratios are what counts.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, for a first look")
    parser.add_argument("--device", help="pretrain: device of the steps (cpu, cuda), with and without the image cache")
    options = parser.parse_args(arguments)
    return run("bench", partial(_print, options.names or BENCHMARKS, options.quick, options.device))


def _print(names: Sequence[str], quick: bool, device: str | None) -> None:
    for name in names:
        if name not in BENCHMARKS:
            raise UnknownNameError(unknown("benchmark", name, BENCHMARKS))
    if device is None:
        _print_rows(names, quick=quick)
    elif list(names) == ["pretrain"]:
        with processes(device) as own:
            _print_rows(names, quick=quick, device=own)
    else:
        raise InputError("--device is for the benchmark pretrain only: leave out the others.")


def _print_rows(names: Sequence[str], **settings: Any) -> None:
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"\n{HEADER}\n{RULE}", flush=True)
    for name in names:
        for row in import_module(f"training.bench.{name}").rows(**settings):
            print(row, flush=True)


if __name__ == "__main__":
    sys.exit(main())
