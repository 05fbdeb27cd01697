"""Train the head of the embedded default: ``python -m training.learn --photographs DIR --work DIR``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adfeatures.catalog import ASSETS, MODELS
from adfeatures.checkpoints import atomic_path

from .console import run
from .judging.packages import PACKAGES, fetch, ready
from .learning.evidence import MODEL, TAG
from .learning.products import learning_products
from .learning.train import gathered, serialized, trained

HEAD = ASSETS / str(MODELS[MODEL].tags[TAG].head)


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.learn",
        description=f"Train the head of {MODEL}.{TAG}, on photographs that training.judge does not judge.",
    )
    parser.add_argument("--photographs", type=Path, required=True, help="folder for the downloaded packages")
    parser.add_argument("--work", type=Path, required=True, help="folder for what the head sees; a later run resumes")
    parser.add_argument("--output", type=Path, default=HEAD, help="file of the head (default: %(default)s)")
    parser.add_argument("--products", type=int, metavar="N", help="the first N products alone (default: all)")
    parser.add_argument("--epochs", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    return run("learn", lambda: _learn(options))


def _learn(options: argparse.Namespace) -> None:
    ready(options.work)
    fetch(options.photographs, PACKAGES)
    products = dict(list(learning_products(options.photographs).items())[: options.products])
    files = gathered(products, options.photographs, options.work, options.processes)
    head = trained(files, epochs=options.epochs, seed=options.seed)
    with atomic_path(options.output) as path:
        path.write_bytes(serialized(head, len(products), options.seed))
    print(f"{options.output}: {sum(own.numel() for own in head.parameters())} parameters, {len(products)} products")


if __name__ == "__main__":
    sys.exit(main())
