"""Print the table: ``python -m training.bench [NAME ...] [--quick]``."""

from __future__ import annotations

import argparse
import os
from importlib import import_module

import torch

from .timing import HEADER

BENCHMARKS = ("aupro", "patchcore", "padim", "pretrain")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.bench", description="Speed against naive forms; judge by the ratios.")
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, for a first look")
    options = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} processors")
    print(HEADER)
    for name in options.names or BENCHMARKS:
        for row in import_module(f"training.bench.{name}").rows(quick=options.quick):
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
