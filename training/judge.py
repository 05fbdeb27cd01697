"""Judge the embedded default: ``python -m training.judge --photographs DIR --output DIR``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Container, Sequence
from pathlib import Path

from adfeatures import list_models
from adfeatures.catalog import unknown
from adfeatures.checkpoints import atomic_path, regular_file
from adfeatures.errors import InputError, UnknownNameError

from .console import run
from .judging.contenders import Contender, Coreset, Model, Plain, Remembered
from .judging.packages import JUDGED, Photographs, fetch, ready
from .judging.products import SETS, pictures
from .judging.protocol import FULL, QUICK, THRESHOLDS, Result, Size, judged
from .judging.tables import as_csv, as_markdown, of_csv


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    models = list_models("residual_lite*", pretrained=True)
    parser = argparse.ArgumentParser(
        prog="python -m training.judge",
        description="Judge models of the catalog on photographs and rendered parts with drawn defects, beside raw "
        "residuals, cosine matching and PatchCore on the features of the first model.",
    )
    parser.add_argument("--photographs", type=Path, required=True, help="folder for the downloaded packages")
    parser.add_argument("--output", type=Path, required=True, help="folder for results.md and results.csv")
    parser.add_argument("--model", nargs="+", default=models, metavar="NAME", help=f"(default: {' '.join(models)})")
    parser.add_argument(
        "--set", choices=SETS, default="development", help="products for development, or those of the final judgment"
    )
    parser.add_argument("--products", nargs="+", metavar="NAME", help="some products of the set (default: all)")
    parser.add_argument(
        "--rotations", type=int, metavar="N", help="also judge each model with references rotated N ways; 1 for none"
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="few pictures, one draw of 8 references")
    sizes.add_argument(
        "--thresholds",
        action="store_true",
        help="how many good pictures the models flag with the threshold of 4, 8, 16 and 64 references",
    )
    options = parser.parse_args(arguments)
    return run("judge", lambda: _judge(options))


def _judge(options: argparse.Namespace) -> None:
    table = SETS[options.set]
    for name in options.products or ():
        if name not in table:
            raise UnknownNameError(unknown(f"{options.set} product", name, table))
    memory: dict[str, Remembered] = {}
    models = [
        Model(name, memory, turns) for turns in dict.fromkeys([None, options.rotations]) for name in options.model
    ]
    ready(options.output)
    fetch(options.photographs, JUDGED)
    for name, package in JUDGED.items():
        print(f"{name} {package.version}: {package.license}")
    plain: list[Contender] = [] if options.thresholds else [Plain(models[0]), Coreset(models[0])]
    contenders: list[Contender] = [*models, *plain]
    size = THRESHOLDS if options.thresholds else QUICK if options.quick else FULL
    results = _before(options.output / "results.csv", table, contenders, size)
    done = {result.product for result in results}
    for name in options.products or table:
        if name in done:
            print(f"{name}: judged before")
            continue
        start = time.perf_counter()
        photographs = Photographs(options.photographs)
        shown = pictures(name, photographs, references=size.references, good=size.good, bad=size.bad)
        results += judged(name, shown, contenders, size)
        for backbone in memory.values():
            backbone.forget()
        # What is done stays, whatever stops the rest.
        _write(options.output, results, models[0].name)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(_write(options.output, results, models[0].name), end="")


def _write(folder: Path, results: Sequence[Result], baseline: str) -> str:
    tables = as_markdown(results, baseline)
    for file, text in (("results.csv", as_csv(results)), ("results.md", tables)):
        with atomic_path(folder / file) as path:
            path.write_text(text, encoding="utf-8")
    return tables


def _before(path: Path, products: Container[str], contenders: Sequence[Contender], size: Size) -> list[Result]:
    """What a run like this one has written, of products that are not judged again."""
    if not path.exists():
        return []
    file = regular_file(path, InputError)
    try:
        results = of_csv(file.read_text(encoding="utf-8"))
    except (InputError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    names = [name for contender in contenders for name in contender.names]
    asked = {(name, shots, draw) for name in names for shots, draws in size.draws.items() for draw in range(draws)}
    for product in {result.product for result in results}:
        if (
            product not in products
            or {(r.contender, r.shots, r.draw) for r in results if r.product == product} != asked
        ):
            raise InputError(f"{path} is of other products, models or draws. Give another folder as --output.")
    return results


if __name__ == "__main__":
    sys.exit(main())
