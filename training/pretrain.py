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
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from adfeatures.checkpoints import weights_fingerprint
from adfeatures.errors import InputError
from adfeatures.images import read_image
from adfeatures.projector import ResidualProjector

from . import console
from .data.items import ANOMALOUS, items_digest
from .data.real_iad import reference_pool
from .distributed import processes, rank, world_size
from .pretraining.centers import find_centers
from .pretraining.config import PretrainConfig
from .pretraining.dataset import training_batches
from .pretraining.header import checkpoint_header
from .pretraining.inputs import load_frozen_backbone, read_split
from .pretraining.reference_store import ReferenceStore, choose_pool
from .pretraining.run import TrainingRun
from .pretraining.step import encode_images, on_device, train_step
from .pretraining.validation import create_validation


def pretrain(config: PretrainConfig, device: torch.device) -> Path:
    """Pretrain as the config says, or resume.

    Returns:
        The folder of the run: the best checkpoints (``checkpoints_pro_norm.safetensors`` and so on), the last one, log
            and curves.

    Raises:
        InputError: For a config, data or a run in the folder that do not fit together.
        ImageError: If the data set cannot be read.
        CheckpointError: For centers or a state that cannot be used.
        AdfeaturesError: If the loss is not finite, or the disk is full. What was saved before is kept.
    """
    run = TrainingRun(config)
    train, held_out = read_split(config)
    if not any(item.label == ANOMALOUS for item in train):
        raise InputError(
            f"None of the {len(train)} training images in {config.root} is anomalous, so there is nothing to contrast."
        )
    pool = reference_pool(train)
    if config.pool is not None:
        pool = choose_pool(pool, config.pool, config.seed)
    run.depend_on("images", items_digest([*train, *pool]))

    backbone = load_frozen_backbone(config, device)
    run.depend_on("backbone weights", backbone.fingerprint[0])
    sampler, loader = training_batches(config, backbone, train, pool)
    validation = create_validation(config, backbone, train, held_out)
    header = checkpoint_header(config, backbone, train)

    torch.manual_seed(config.seed)
    projector = ResidualProjector(backbone.entry.channels, config.num_heads, config.num_keys)
    projector.to(device, torch.bfloat16 if config.precision == "bfloat16" else torch.float32)
    optimizer = torch.optim.Adam(projector.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    centers = find_centers(config, backbone, train)
    run.depend_on("centers", weights_fingerprint({f"center.{i}": center for i, center in enumerate(centers)})[0])
    run.resume(projector=projector, optimizer=optimizer)
    model = DistributedDataParallel(projector) if world_size() > 1 else projector

    encode = partial(encode_images, backbone=backbone.module, device=device, precision=config.precision)
    store = None
    if config.pool is not None:
        facts = [backbone.name, backbone.fingerprint, backbone.entry.blocks, backbone.entry.img_size, config.precision]
        store, transform = ReferenceStore(run.folder / "references", pool, json.dumps(facts)), backbone.transform
        store.encode(lambda path: transform(read_image(path)), encode)

    total = config.epochs * sampler.steps_per_epoch
    total = total if config.max_steps is None else min(total, config.max_steps)
    progress = tqdm(total=total, initial=run.step, desc="pretraining", unit="step", disable=True if rank() else None)
    while run.validated < total:
        lr = config.learning_rate(run.epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sampler.set_position(run.epoch, run.step_of_epoch)
        left = min(len(sampler), total - run.step)
        for batch in islice(loader, max(left, 0)):
            started = time.perf_counter()
            values = train_step(model, optimizer, on_device(batch, device), encode, store, centers, config)
            run.advance()
            run.log("step", {**values, "lr": lr, "seconds": round(time.perf_counter() - started, 4)})
            progress.update()
            progress.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
            if run.step % config.save_every == 0:
                run.save()
        if validation is not None:
            # Validating takes long: a run that is interrupted in it resumes from here.
            run.save()
        if run.step_of_epoch == sampler.steps_per_epoch:
            run.epoch, run.step_of_epoch = run.epoch + 1, 0
        if validation is not None:
            scores = validation.run(projector)
            run.log("validation", scores)
            run.keep_best(scores, projector, header)
        run.validated = run.step
        run.save()
        run.draw()
    progress.close()
    run.keep_last(projector, header)
    return run.folder


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
