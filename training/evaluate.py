"""Evaluate a model on a data set: ``python -m training.evaluate --model M --dataset mvtec --root DIR --output RUN``.

Writes results.json, results.csv and results.md, and pictures in figures/. The same command resumes an interrupted run,
and adds products, methods or draws that are asked for later. For several devices, which share the products: ``torchrun
--nproc-per-node=8 -m training.evaluate ...``. With ``--check DIR`` it only says what is missing or misnamed in a data
set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from adfeatures import __version__

from . import console
from .data import DATASETS
from .data.checks import report
from .data.fingerprint import Fingerprint
from .distributed import agreed, barrier, only_command_in, processes, rank, world_size
from .evaluation.config import EvaluationConfig
from .evaluation.model import EvaluatedModel, ProjectorWeights, load_model
from .evaluation.overlap import UNKNOWN, find_overlaps
from .evaluation.report import write_report
from .evaluation.results import FOLDER, Results
from .evaluation.runner import CACHE, FIGURES, Evaluation

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "scikit-image", "pillow")
DESCRIPTION = "Evaluate a model on an anomaly detection data set."


def evaluate_model(config: EvaluationConfig) -> int:
    """Evaluate as the config says, or resume, and print the means.

    Returns:
        DONE; SOME_FAILED if a product or a method failed or could not be judged; NOTHING_DONE if nothing came out.

    Raises:
        AdfeaturesError: For an unknown model or product, a root without products, weights that cannot be had, or that
            were trained on test images without ``allow_overlap``; for a folder that holds results of other settings or
            images, cannot be written or is another command's; for a full disk. What was finished is kept.
    """
    products = config.tree.choose(config.root, config.products)
    with processes(config.device) as device, only_command_in(config.output, FOLDER, FIGURES, CACHE):
        model = agreed(
            lambda: load_model(
                config.model,
                config.methods,
                weights=config.weights,
                backbone_weights=config.backbone_weights,
                img_size=config.size,
                device=device,
                bit_depth=config.bit_depth,
            )
        )
        overlaps = find_overlaps(config, model, products)
        settings = {**config.settings(), "img_size": model.img_size, "weights": model.fingerprints}
        results = Results(config.output, settings)
        evaluation = Evaluation(config, model, results, overlaps)
        if rank() == 0:
            evaluation.remove_leftovers()
        barrier()
        for product in console.progress(products[rank() :: world_size()], desc="products"):
            evaluation.evaluate_product(product)
        barrier()
        for combination in evaluation.jointly[rank() :: world_size()]:
            evaluation.evaluate_jointly(combination, products)
        barrier()
        if rank():
            return console.DONE
        print(write_report(results, about(config, model, products)))
        print(f"Tables and pictures: {results.folder}")
        return status(evaluation, products)


def about(config: EvaluationConfig, model: EvaluatedModel, products: Sequence[str]) -> dict[str, Any]:
    """What the report says of program, model and data set."""
    tree = config.tree
    # A tree of other products in the layout of a known data set lacks none.
    complete = config.products or not set(tree.products) & set(products)
    missing = [] if complete else [product for product in tree.products if product not in products]
    projected = any(weights.projector is not None for weights in model.weights.values())
    left_out = [product for product in config.products if product not in products]
    unknown = [w.name for w in model.weights.values() if w.projector is not None and w.trained_on is None]
    lacks = {"products not found": missing, "folders left out": left_out}
    return {
        "title": f"{model.name} on {tree.title}",
        "versions": {"adfeatures": __version__, **{library: version(library) for library in LIBRARIES}},
        "device": str(model.device),
        "pretrained": "projected residuals" if projected else "residuals of features of unit length, no projector",
        **({} if all(weights.takes_residuals for weights in model.weights.values()) else {"residuals": "none"}),
        "weights": [_facts(weights, config) for weights in model.weights.values()],
        **{fact: ", ".join(names) for fact, names in lacks.items() if names},
        "selected by": {weights.name: weights.selected_by for weights in model.weights.values()},
        **({"overlap with the test images": f"{', '.join(unknown)}: {UNKNOWN}"} if unknown else {}),
    }


def _facts(weights: ProjectorWeights, config: EvaluationConfig) -> dict[str, Any]:
    """What the report says of weights; metrics in their file only where this data set selected them."""
    title, by = config.tree.title, weights.selected_by
    own_split = config.dataset == "real_iad" and config.split is None
    here = f" on the test set of {title}" in by or (own_split and f" on held-out samples of {title}" in by)
    seen = weights.trained_on
    return {
        "name": weights.name,
        "source": weights.source,
        "selected_by": by,
        "stored": weights.stored if here and config.tree.products else {},
        "trained_on": f"{len(seen)} images" if isinstance(seen, Fingerprint) else seen,
    }


def status(evaluation: Evaluation, products: Sequence[str]) -> int:
    """The exit code: whether all that was asked for is there, and says how well images are told apart."""
    read = evaluation.results.read
    records = [read(product, combination) for product in products for combination in evaluation.combinations]
    judged = [record is not None and record["metrics"]["image_auroc"] is not None for record in records]
    return console.DONE if all(judged) else console.SOME_FAILED if any(judged) else console.NOTHING_DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    checker = argparse.ArgumentParser(prog="python -m training.evaluate", add_help=False, allow_abbrev=False)
    checker.add_argument("--check", metavar="DIR", help="only report what is missing or misnamed in a data set")
    parser = argparse.ArgumentParser(prog=checker.prog, description=DESCRIPTION, parents=[checker])
    console.add_options(parser, EvaluationConfig)
    # Nothing else is required to check a data set.
    checker.add_argument("--dataset", choices=tuple(DATASETS))
    options, others = checker.parse_known_args(arguments)
    if options.check is None:
        options = parser.parse_args(arguments)
        return console.run("evaluate", lambda: evaluate_model(console.from_options(options, EvaluationConfig)))
    if others:
        checker.error(f"--check takes --dataset alone, not {' '.join(others)}")
    return console.run("evaluate", lambda: _check(options.check, options.dataset))


def _check(root: str, name: str | None) -> int:
    text, code = report(root, name)
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
