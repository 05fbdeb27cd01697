"""Pretrain the projectors: ``python -m training.pretrain --root DIR --output RUN``.

The backbone is frozen and only the projectors learn, from residuals of two augmented views of every image against
normal references of the same product and view (paper section 3). The same command resumes an interrupted run. For
several devices: ``torchrun --nproc-per-node=8 -m training.pretrain ...``; the batch is that of all devices together,
and so are the loss and its gradients.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from adfeatures.checkpoints import weights_fingerprint
from adfeatures.projector import ResidualProjector

from . import console
from .data.fingerprint import Fingerprint
from .data.images import ImageLoader
from .data.items import items_digest
from .data.transforms import two_views
from .distributed import only_command_in, processes, rank, world_size
from .pretraining.centers import find_centers
from .pretraining.checks import check_labels, check_masks, check_trials
from .pretraining.config import PretrainConfig
from .pretraining.curves import LOG
from .pretraining.dataset import PretrainingDataset, StepSampler, choose_pool, collate, view_statistics
from .pretraining.header import checkpoint_header
from .pretraining.inputs import Inputs
from .pretraining.loop import training_loop
from .pretraining.reference_store import ReferenceStore
from .pretraining.run import TrainingRun
from .pretraining.step import encode_images, prepared, train_step
from .pretraining.trials import validation_trials
from .pretraining.validation import validate

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
        run = TrainingRun(config)
        inputs = Inputs(config, device)
        train, pool, backbone = inputs.train, inputs.normal, inputs.backbone
        check_labels(train)
        if run.is_new and rank() == 0:
            check_masks(train, inputs.workers)
        trials = validation_trials(config, inputs)
        if config.pool is not None:
            pool = choose_pool(pool, config.pool, config.seed)
        run.depend_on("images", items_digest([*train, *pool]))
        run.depend_on("backbone weights", backbone.fingerprint[0])

        statistics = view_statistics(config.view_statistics, backbone.entry)
        sampler = StepSampler(len(train), config.batch_size, config.seed, config.shots, config.accumulate)
        no_residual, fly = config.no_residual, config.pool is None and not config.no_residual
        trained_on = Fingerprint(inputs.digests[item.image] for item in train if item.image in inputs.digests)
        if run.is_new:
            check_trials(trials, trained_on)
        dataset = PretrainingDataset(train, pool, two_views, backbone.transform, inputs.cache, fly, sampler.shots)

        torch.manual_seed(config.seed)
        projector = ResidualProjector(backbone.entry.channels, config.num_heads, config.num_keys)
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        adam = partial(torch.optim.Adam, lr=config.lr, weight_decay=config.weight_decay)
        # The published training had no fused one, which rounds less.
        optimizer = adam(projector.to(device, dtype).parameters(), fused=dtype == torch.float32)
        centers = [torch.zeros(count, device=device) for count in backbone.entry.channels]
        if not no_residual:
            centers = find_centers(config.centers, run.folder, inputs, config.seed)
        backbone.module.to(dtype)  # After the centers, which are of float32 features in the published training too.
        encode = partial(encode_images, backbone=backbone.module, device=device, precision=config.precision)
        encode_views = partial(encode, statistics=statistics)
        encode_references = partial(encode, statistics=backbone.entry.normalization)
        store = None
        if config.pool is not None:
            store = ReferenceStore(run.folder / REFERENCES, pool, json.dumps([*backbone.identity, config.precision]))
            store.encode(backbone.read, encode_references)
        digest = weights_fingerprint({f"center.{level}": center for level, center in enumerate(centers)})[0]
        run.depend_on("centers", digest)
        prepare = partial(prepared, store=store, pinned=device.type == "cuda")
        loader = ImageLoader(dataset, sampler, workers=inputs.workers, collate=collate, prepare=prepare)
        model = DistributedDataParallel(projector) if world_size() > 1 else projector
        encoders = (encode_views, encode_references)
        step = partial(train_step, model, optimizer, encoders=encoders, centers=centers, config=config)
        validated = partial(validate, projector, backbone, trials, no_residual=no_residual)
        score = partial(validated, workers=inputs.workers) if trials else None
        header = checkpoint_header(backbone, projector, inputs.title, trained_on, no_residual=no_residual)
        training_loop(run, projector, optimizer, header, step, score, loader, sampler, config)
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
