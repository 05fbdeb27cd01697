"""The loop of the pretraining: steps, ends of epochs, validations, and when the run is saved."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from adfeatures.projector import ResidualProjector

from ..console import progress
from ..data.images import ImageLoader
from ..distributed import rank
from .config import PretrainConfig
from .curves import draw_curves
from .dataset import StepSampler
from .run import TrainingRun
from .validation import Scores


def training_loop(
    run: TrainingRun,
    projector: ResidualProjector,
    optimizer: torch.optim.Optimizer,
    header: Mapping[str, str],
    step: Callable[[dict[str, Any]], dict[str, float]],
    validate: Callable[[], Scores] | None,
    loader: ImageLoader,
    sampler: StepSampler,
    config: PretrainConfig,
) -> None:
    """Go on from where the run is, to its end.

    Each turn does one thing, steps or the end of an epoch, and saves: an interruption costs no more than that.
    """
    run.resume(projector, optimizer, header)
    total = config.epochs * sampler.steps_per_epoch
    total = total if config.max_steps is None else min(total, config.max_steps)
    bar = progress(total=total, initial=run.step, desc="pretraining", unit="steps", disable=rank() > 0)
    batches: Iterator[dict[str, Any]] | None = None
    contrasts: list[bool] = []
    while run.validated < total:
        epoch_left, left = sampler.steps_per_epoch - run.step_of_epoch, total - run.step
        if epoch_left == 0 or left <= 0:
            if contrasts and not any(contrasts) and rank() == 0:
                warnings.warn(
                    f"The angle loss was 0 in all {len(contrasts)} steps up to step {run.step}: no patch was "
                    "anomalous. Are the masks black, or the defects too small for this --img-size?",
                    stacklevel=2,
                )
            batches, contrasts = None, []
            due = left == 0 or (epoch_left == 0 and (run.epoch + 1) % config.eval_every == 0)
            scores = validate() if validate is not None and due else None
            if epoch_left == 0:
                run.epoch, run.step_of_epoch = run.epoch + 1, 0
            if scores is not None:
                run.log("validation", scores)
                run.keep_best(scores)
            if rank() == 0:
                draw_curves(run.folder)
            run.validated = run.step
        else:
            asked = time.perf_counter()
            if batches is None:
                sampler.epoch, sampler.step = run.epoch, run.step_of_epoch
                batches = iter(loader)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rates[run.epoch]
            for batch in islice(batches, min(epoch_left, left, config.save_every - run.step % config.save_every)):
                started = time.perf_counter()
                values = step(batch)
                computing, waiting = round(time.perf_counter() - started, 4), round(started - asked, 4)
                run.advance()
                rate = config.learning_rates[run.epoch]
                run.log("step", {**values, "lr": rate, "seconds": computing, "waiting": waiting})
                contrasts.append(bool(values.get("angle")))
                bar.update()
                shown = {name: f"{value:.3f}" for name, value in values.items()}
                bar.set_postfix(
                    {**shown, "computing": f"{computing:.2f}s", "waiting": f"{waiting:.2f}s"}, refresh=False
                )
                asked = time.perf_counter()
        run.save()
    bar.close()
    run.keep_last()
