"""Pretrain the projectors: ``python -m training.pretrain --root DIR --output RUN``.

The backbone is frozen and only the projectors learn, from residuals of two augmented views of every image against
normal references of the same product and view (paper section 3). The same command resumes an interrupted run. For
several devices: ``torchrun --nproc-per-node=8 -m training.pretrain ...``; the batch is that of all devices together,
and so are the loss and its gradients.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from adfeatures.checkpoints import weights_fingerprint
from adfeatures.projector import ResidualProjector

from . import console
from .data import DATASETS
from .data.fingerprint import Fingerprint
from .data.images import ImageLoader
from .data.items import items_digest
from .distributed import gather_objects, only_command_in, processes, rank, world_size
from .pretraining.centers import find_centers
from .pretraining.checks import check_labels, check_masks, check_trials
from .pretraining.config import PretrainConfig
from .pretraining.curves import LOG, draw_curves
from .pretraining.dataset import PretrainingDataset, StepSampler, augmentation, choose_pool
from .pretraining.header import checkpoint_header
from .pretraining.inputs import Inputs
from .pretraining.reference_store import ReferenceStore
from .pretraining.run import TrainingRun
from .pretraining.step import encode_images, train_step
from .pretraining.trials import Trial, data_set_trials, held_out_trials
from .pretraining.validation import Validation

REFERENCES = "references"


def pretrain(config: PretrainConfig, device: torch.device) -> Path:
    """Pretrain as the config says, or resume.

    Returns:
        The folder of the run: the best checkpoints (``checkpoints_pro_norm.safetensors`` and so on), the last one, log
            and curves.

    Raises:
        InputError: For a config, data or a run in the folder that do not fit together.
        ImageError: If the data set cannot be read.
        CheckpointError: For centers or a state that cannot be used.
        AdfeaturesError: If the loss is not finite, the disk is full, or another run writes to the folder. What was
            saved before is kept.
    """
    with only_command_in(config.output, LOG, REFERENCES, "tensorboard"):
        return _pretrain(config, device)


def _pretrain(config: PretrainConfig, device: torch.device) -> Path:
    run = TrainingRun(config)
    inputs = Inputs(config, device)
    train, pool, backbone = inputs.train, inputs.normal, inputs.backbone
    check_labels(train)
    if run.is_new and rank() == 0:
        check_masks(train)
    if config.pool is not None:
        pool = choose_pool(pool, config.pool, config.seed)
    run.depend_on("images", items_digest([*train, *pool]))
    run.depend_on("backbone weights", backbone.fingerprint[0])

    dataset = PretrainingDataset(
        train,
        pool,
        augmentation(config.view_statistics, backbone.entry),
        backbone.transform,
        load_references=config.pool is None,
        shots=config.shots,
    )
    sampler = StepSampler(len(train), config.batch_size, config.seed, config.shots, config.accumulate)
    pinned = device.type == "cuda"
    loader = ImageLoader(dataset, batch_sampler=sampler, num_workers=config.workers, pin_memory=pinned)
    trials = _trials(config, inputs)
    share = Fingerprint.of((item.image for item in train[rank() :: world_size()]), config.workers)
    trained_on = Fingerprint.union(gather_objects(share))
    if run.is_new:
        check_trials(trials, trained_on)
    validation = Validation(backbone, trials, workers=config.workers) if trials else None

    torch.manual_seed(config.seed)
    projector = ResidualProjector(backbone.entry.channels, config.num_heads, config.num_keys)
    projector.to(device, torch.bfloat16 if config.precision == "bfloat16" else torch.float32)
    optimizer = torch.optim.Adam(projector.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    centers = find_centers(config.centers, run.folder, backbone, train, config.seed, config.workers)
    encode = partial(encode_images, backbone=backbone.module, device=device, precision=config.precision)
    store = None
    if config.pool is not None:
        store = ReferenceStore(run.folder / REFERENCES, pool, json.dumps([*backbone.identity, config.precision]))
        store.encode(backbone.read, encode)
    digest = weights_fingerprint({f"center.{level}": center for level, center in enumerate(centers)})[0]
    run.depend_on("centers", digest)
    run.resume(projector, optimizer, checkpoint_header(backbone, projector, inputs.title, trained_on))

    model = DistributedDataParallel(projector) if world_size() > 1 else projector
    step = partial(train_step, model, optimizer, encode=encode, store=store, centers=centers, config=config)
    rates = config.learning_rates
    total = config.epochs * sampler.steps_per_epoch
    total = total if config.max_steps is None else min(total, config.max_steps)
    progress = tqdm(total=total, initial=run.step, desc="pretraining", unit="step", disable=True if rank() else None)
    while run.validated < total:
        contrasted = False
        for group in optimizer.param_groups:
            group["lr"] = rates[run.epoch]
        sampler.epoch, sampler.step = run.epoch, run.step_of_epoch
        left = min(len(sampler), total - run.step)
        for batch in islice(loader, max(left, 0)):
            started = time.perf_counter()
            values = step(batch)
            run.advance()
            run.log("step", {**values, "lr": rates[run.epoch], "seconds": round(time.perf_counter() - started, 4)})
            contrasted = contrasted or bool(values.get("angle"))
            progress.update()
            progress.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
            if run.step % config.save_every == 0:
                run.save()
        if left > 0 and not contrasted and rank() == 0:
            warnings.warn(
                f"The angle loss was 0 in all {left} steps up to step {run.step}: no patch was anomalous. Are the "
                "masks black, or the defects too small for this --img-size?",
                stacklevel=2,
            )
        epoch_ends = run.step_of_epoch == sampler.steps_per_epoch
        due = run.step == total or (epoch_ends and (run.epoch + 1) % config.eval_every == 0)
        if validation is not None and due:
            # Validating takes long: a run that is interrupted in it resumes from here.
            run.save()
        if epoch_ends:
            run.epoch, run.step_of_epoch = run.epoch + 1, 0
        if validation is not None and due:
            scores = validation.run(projector)
            run.log("validation", scores)
            run.keep_best(scores)
        if rank() == 0:
            draw_curves(run.folder)
        run.validated = run.step
        run.save()
    progress.close()
    run.keep_last()
    return run.folder


def _trials(config: PretrainConfig, inputs: Inputs) -> list[Trial]:
    """What the validation evaluates on."""
    shots, folder = config.validation_shots, config.validation_references
    if config.validation in DATASETS:
        size = inputs.backbone.entry.img_size
        return data_set_trials(config.validation, str(config.validation_root), size, shots, folder)
    if config.validation == "none":
        return []
    limit, seed = config.validation_images, config.seed
    return held_out_trials(inputs.normal, inputs.held_out, limit, seed, shots, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""

    def run(config: PretrainConfig) -> None:
        with processes(config.device) as device:
            folder = pretrain(config, device)
            if rank() == 0:
                print(f"done: {folder}")

    description = "Pretrain projectors on Real-IAD or on your own data."
    return console.run_config("pretrain", description, PretrainConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
