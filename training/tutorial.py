"""Everything once, small: ``python -m training.tutorial [--output runs/tutorial]``.

Makes synthetic products, pretrains projectors on the embedded backbone with three seeds, and evaluates them by
FeatureNorm on products that they have not seen, beside the untrained projectors and the residuals themselves. The
projector of the first seed is published to a folder. The same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch

from adfeatures.checkpoints import atomic_path, load_checkpoint
from adfeatures.documents import dumps
from adfeatures.locks import only_run_in
from adfeatures.projector import ResidualProjector
from adfeatures.trained import PROJECTOR

from . import console
from .data import real_iad, synthetic
from .metrics import CRITERIA
from .pretrain import pretrain
from .pretraining.centers import centers_of
from .pretraining.config import CentersConfig, PretrainConfig
from .pretraining.frozen_backbone import load_frozen_backbone
from .pretraining.trials import Trial, held_out_trials
from .pretraining.validation import validate
from .publishing.config import PublishConfig
from .publishing.repository import write_repository

BACKBONE, SIDE, NUM_HEADS, NUM_KEYS = "efficientnet_lite", 160, 8, 256
PRODUCTS = synthetic.PRODUCTS
# Every fourth product is kept from the training.
UNSEEN = PRODUCTS[::4]
SEEN = tuple(product for product in PRODUCTS if product not in UNSEEN)
GOOD, BAD = 20, 12
LAST = "checkpoint_last.safetensors"
CPU = torch.device("cpu")


def recipe(output: Path, seed: int, steps: int) -> PretrainConfig:
    """The paper's recipe at the size of the tutorial: smaller batch and projector, larger learning rate, few steps."""
    return PretrainConfig(
        output=str(output / f"seed{seed}"),
        root=str(output / "data"),
        products=SEEN,
        held_out=0.0,
        backbone=BACKBONE,
        img_size=(SIDE,),
        num_heads=NUM_HEADS,
        num_keys=NUM_KEYS,
        batch_size=16,
        epochs=1000,
        max_steps=steps,
        lr=1e-3,
        centers=str(output / "centers.safetensors"),
        precision="float32",
        seed=seed,
        pool=16,
        validation="none",
        workers=1,
        save_every=100,
        device="cpu",
    )


def tutorial(output: Path, steps: int, seeds: Sequence[int]) -> str:
    """Run everything; the table is returned, and written to ``results.json`` and ``results.md``."""
    recipes = [recipe(output, seed, steps) for seed in seeds]
    with only_run_in(output, "data", "published", *(Path(config.output).name for config in recipes)):
        return _tutorial(output, recipes, steps)


def _tutorial(output: Path, recipes: Sequence[PretrainConfig], steps: int) -> str:
    _say(f"Rendering {len(PRODUCTS)} products to {output / 'data'}")
    synthetic.synthesize(output / "data", products=list(PRODUCTS), good=GOOD, bad=BAD, workers=2)
    _say("Computing the centers of the angle loss")
    _compute_centers(recipes[0])
    backbone = load_frozen_backbone(recipes[0], CPU)
    trials = unseen_trials(output / "data")

    def evaluate(projector: ResidualProjector | None) -> dict[str, float]:
        return validate(projector, backbone, trials, methods=("norm",))["norm"]

    _say(f"Evaluating the residuals themselves on {len(UNSEEN)} unseen products")
    results = {"residual": [evaluate(None)], "untrained": [], "trained": []}
    for config in recipes:
        _say(f"Pretraining with seed {config.seed}, {steps} steps, to {config.output}")
        trained = pretrain(config, CPU) / LAST
        # The projector as it was at the beginning of the run, and at its end.
        torch.manual_seed(config.seed)
        projector = ResidualProjector(backbone.entry.channels, NUM_HEADS, NUM_KEYS)
        _say(f"Evaluating the projector of seed {config.seed}, untrained and trained")
        results["untrained"].append(evaluate(projector))
        state = load_checkpoint(trained).state_dict
        projector.load_state_dict({key.removeprefix(PROJECTOR): value for key, value in state.items()})
        results["trained"].append(evaluate(projector))
    lines = _table(results, steps)
    facts = {"steps": steps, "seeds": [config.seed for config in recipes], "unseen": UNSEEN, "results": results}
    for name, text in (("results.json", dumps(facts, indent=1)), ("results.md", lines)):
        with atomic_path(output / name) as temporary:
            temporary.write_text(text)
    checkpoint = str(Path(recipes[0].output) / LAST)
    _say(f"Publishing the projector of seed {recipes[0].seed} to {output / 'published'}")
    terms = PublishConfig(license="mit", data="images of training.synthesize", data_license="MIT")
    write_repository(checkpoint, terms, output / "published")
    return lines


def unseen_trials(root: Path) -> list[Trial]:
    """Of the products that were kept from the training: references from half of the samples, tests from the others."""
    references, test = real_iad.split_by_sample(real_iad.read(root, UNSEEN), 0.5)
    return held_out_trials(real_iad.reference_pool(references), test, limit=1000, seed=0)


def _compute_centers(config: PretrainConfig) -> None:
    names = ("root", "products", "held_out", "backbone", "img_size", "workers", "device")
    values = {name: getattr(config, name) for name in names}
    centers_of(CentersConfig(output=str(config.centers), images=500, **values), CPU)


def _say(what: str) -> None:
    # At once, also into a pipe.
    print(f"{what} ...", flush=True)


def _table(results: dict[str, list[dict[str, float]]], steps: int) -> str:
    names = {
        "residual": "residuals of unit length, no projector",
        "untrained": "untrained projector",
        "trained": f"trained projector, {steps} steps",
    }
    titles = " | ".join(criterion.title for criterion in CRITERIA)
    lines = [f"| FeatureNorm on {len(UNSEEN)} unseen products | {titles} |", "|---|---|---|---|"]
    for key, scores in results.items():
        cells = [_mean_and_spread([100 * score[criterion.key] for score in scores]) for criterion in CRITERIA]
        lines.append(f"| {names[key]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean_and_spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.tutorial", description="Synthesize, pretrain, evaluate, publish."
    )
    parser.add_argument("--output", type=Path, default=Path("runs/tutorial"), help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (default: 0 1 2)")
    options = parser.parse_args(arguments)

    def run() -> None:
        started = time.perf_counter()
        print(tutorial(options.output, options.steps, options.seeds))
        print(f"It took {(time.perf_counter() - started) / 60:.0f} minutes on {torch.get_num_threads()} threads.")

    return console.run("tutorial", run)


if __name__ == "__main__":
    sys.exit(main())
