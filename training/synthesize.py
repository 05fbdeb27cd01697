"""Render a data set in the layout of Real-IAD: ``python -m training.synthesize --output DIR``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from adfeatures.errors import InputError

from .console import run
from .data.synthetic import DEFECTS, PRODUCTS, VIEWS, synthesize


def main(arguments: list[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.synthesize",
        description=f"Render up to {len(PRODUCTS)} products with {len(DEFECTS)} kinds of defects, {VIEWS} views of "
        "each part and exact masks, in the layout of Real-IAD. An interrupted run resumes where it was.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--products",
        nargs="+",
        metavar="NAME",
        help="names of products, or a number to take the first ones (default: all): " + ", ".join(PRODUCTS),
    )
    parser.add_argument(
        "--images-per-product",
        type=int,
        nargs=2,
        default=(100, 80),
        metavar=("GOOD", "BAD"),
        help=f"images of good and of bad parts, multiples of {VIEWS} (default: 100 80)",
    )
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels (default: 256)")
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed gives other parts of the same products (default: 0)"
    )
    parser.add_argument("--workers", type=int, default=1, help="parallel processes (default: 1)")
    options = parser.parse_args(arguments)
    return run("synthesize", lambda: _synthesize(options))


def _synthesize(options: argparse.Namespace) -> None:
    if any(count % VIEWS for count in options.images_per_product):
        raise InputError(
            f"--images-per-product takes multiples of {VIEWS}, as each part has {VIEWS} views; "
            f"got {options.images_per_product}."
        )
    good, bad = (count // VIEWS for count in options.images_per_product)
    products = options.products
    if products and len(products) == 1 and products[0].isdigit():
        products = int(products[0])
    torch.set_num_threads(1)
    start = time.perf_counter()
    settings = {"size": options.size, "seed": options.seed, "workers": options.workers}
    count = synthesize(options.output, products=products, good=good, bad=bad, **settings)
    seconds = time.perf_counter() - start
    rate = f" in {seconds:.1f} s, {count / seconds / options.workers:.1f} images/s per worker"
    print(f"{options.output}: wrote {count} images{rate if count else '; everything was there'}.")


if __name__ == "__main__":
    sys.exit(main())
