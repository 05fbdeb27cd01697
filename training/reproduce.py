"""Reproduce the paper's tables: ``python -m training.reproduce --data DIR --output RUN``.

Evaluates every method on every data set below DIR with the published weights of every backbone, or with projectors that
are pretrained here, and writes the paper's tables, own numbers beside published ones. The same command resumes. For
several devices, which share the products: ``torchrun --nproc-per-node=8 -m training.reproduce ...``.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from adfeatures.errors import CheckpointError, DownloadError, InputError, UnknownNameError

from . import console
from .distributed import barrier, only_command_in, processes, rank
from .evaluate import evaluate_model
from .evaluation.config import EvaluationConfig
from .pretrain import pretrain
from .reproduction.plan import PUBLISHED, Plan, ReproduceConfig
from .reproduction.smoke import smoke_plan
from .reproduction.tables import write_tables

# What one evaluation lacks does not stop the others. A full disk does. All processes learn of them.
FAILURES = (CheckpointError, DownloadError, InputError, UnknownNameError)


def reproduce(config: ReproduceConfig) -> int:
    """Run the plan of a config, or what is left of it, and write the tables.

    Returns:
        DONE; SOME_FAILED if something failed; NOTHING_DONE if all did.

    Raises:
        InputError: If the data sets are not there.
        AdfeaturesError: As ``pretrain`` raises it, or ``evaluate_model`` where it concerns more than one evaluation.
    """
    output = Path(config.output)
    if config.tables:
        print(write_tables(output))
        return console.DONE
    with processes(config.device) as device, only_command_in(output):
        plan = smoke_plan(config) if config.smoke else Plan.of(config)
        data_sets, codes = plan.data_sets, set()
        for backbone, trainings in plan.backbones.items():
            for training in trainings:
                if training != PUBLISHED:
                    pretrain(plan.training(backbone, training), device)
            for name, root in data_sets.items():
                own = {_attempt(evaluation) for evaluation in plan.evaluations(backbone, name, root)}
                codes |= own
                barrier()
                if rank() == 0 and own == {console.DONE}:
                    # The features of all data sets and backbones together are too many to be kept.
                    shutil.rmtree(plan.cache, ignore_errors=True)
                barrier()
        if rank() == 0:
            print(write_tables(output))
            print(f"Tables: {output / 'tables.md'}")
    return codes.pop() if len(codes) == 1 else console.SOME_FAILED


def _attempt(config: EvaluationConfig) -> int:
    try:
        return evaluate_model(config)
    except FAILURES as error:
        if rank() == 0:
            print(f"training.reproduce: {config.output}: {error}", file=sys.stderr)
        return console.NOTHING_DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    description = "Reproduce the tables of the ADPretrain paper beside its published numbers."
    return console.run_config("reproduce", description, ReproduceConfig, reproduce, arguments)


if __name__ == "__main__":
    sys.exit(main())
