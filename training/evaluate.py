"""Evaluate a model on a data set: ``python -m training.evaluate --model M --method all --dataset mvtec --root DIR --output RUN``.

Writes results.json, results.csv and results.md, and pictures in figures/. The same command resumes an interrupted run,
and adds products, methods or draws that are asked for later. For several devices, which share the products: ``torchrun
--nproc-per-node=8 -m training.evaluate ...``. With ``--check DIR`` it only says what is missing or misnamed in a data
set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

from tqdm.auto import tqdm

from adfeatures import __version__
from adfeatures.catalog import unknown
from adfeatures.errors import InputError, UnknownNameError

from . import console
from .console import add_options, from_options
from .data import dataset
from .data.checks import report
from .distributed import barrier, processes, rank, world_size
from .evaluation.config import EvaluationConfig
from .evaluation.report import write_report
from .evaluation.results import Results
from .evaluation.runner import Evaluation
from .evaluation.subject import Subject, load_subject

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "scikit-image", "pillow")


def evaluate(config: EvaluationConfig) -> int:
    """Evaluate as the config says, or resume, and print the means.

    Returns:
        DONE; SOME_FAILED if a product or a method failed or could not be judged; NOTHING_DONE if nothing came out.

    Raises:
        InputError: For a folder that holds results of other settings, or a root that holds no products.
        UnknownNameError: For an unknown model or product.
        DownloadError, CheckpointError: If weights cannot be had.
        AdfeaturesError: If a product has results of other images, the disk is full, or a folder cannot be written. What
            was finished is kept.
    """
    products = find_products(str(config.dataset), str(config.root), config.products)
    with processes(config.device) as device:
        subject = load_subject(
            str(config.model),
            config.methods,
            weights=config.weights,
            backbone_weights=config.backbone_weights,
            img_size=config.size,
            device=device,
        )
        results = Results(
            config.output, {**config.settings(), "img_size": subject.img_size, "weights": subject.fingerprints}
        )
        evaluation = Evaluation(config, subject, results)
        for product in tqdm(products[rank() :: world_size()], desc="products", disable=None):
            evaluation.evaluate_product(product)
        barrier()
        for run in evaluation.joint_runs[rank() :: world_size()]:
            evaluation.evaluate_jointly(run, products)
        barrier()
        if rank():
            return console.DONE
        print(write_report(results, about(config, subject, products)))
        print(f"Tables and pictures: {results.folder}")
        return status(evaluation, products)


def find_products(name: str, root: str, asked: Sequence[str]) -> list[str]:
    """The products to evaluate: those asked for, else all that are there.

    Raises:
        UnknownNameError: For a product that the data set does not have.
        InputError: If the root holds none.
    """
    tree = dataset(name)
    present = list(tree.find_products(root))
    if not present:
        raise InputError(tree.wrong_root(root))
    known = tree.products or tuple(present)
    for product in asked:
        if product not in (*known, *present):
            raise UnknownNameError(unknown(f"product of {tree.title}", product, known))
    return list(dict.fromkeys(asked)) or present


def about(config: EvaluationConfig, subject: Subject, products: Sequence[str]) -> dict[str, Any]:
    """What the report says of program, model and data set."""
    tree = dataset(str(config.dataset))
    known = tree.products
    # A tree of other products in the layout of a known data set lacks none.
    missing = (
        [product for product in known if product not in products]
        if set(known) & set(products) and not config.products
        else []
    )
    weights = [
        {"name": entry.name, "source": entry.source, "stored": entry.stored} for entry in subject.weights.values()
    ]
    return {
        "title": f"{subject.name} on {tree.title}",
        "versions": {"adfeatures": __version__, **{library: version(library) for library in LIBRARIES}},
        "device": str(subject.device),
        "pretrained": "residuals of features of unit length, no projector"
        if subject.unit_length
        else "projected residuals",
        "weights": weights,
        **({"products not found": ", ".join(missing)} if missing else {}),
    }


def status(evaluation: Evaluation, products: Sequence[str]) -> int:
    """The exit code: whether all that was asked for is there, and says how well images are told apart."""
    runs = [*evaluation.runs, *evaluation.joint_runs]
    records = [evaluation.results.read(product, run) for product in products for run in runs]
    judged = [record is not None and record["metrics"]["image_auroc"] is not None for record in records]
    return console.DONE if all(judged) else console.SOME_FAILED if any(judged) else console.NOTHING_DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description="Evaluate a model on an anomaly detection data set."
    )
    parser.add_argument("--check", metavar="DIR", help="only say what is missing or misnamed in a data set")
    add_options(parser, EvaluationConfig)
    options = parser.parse_args(arguments)
    if options.check is not None:
        return console.run("evaluate", partial(_check, options.check, options.dataset))
    return console.run("evaluate", lambda: evaluate(from_options(options, EvaluationConfig)))


def _check(root: str, name: str | None) -> int:
    text, code = report(root, name)
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
