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
from .distributed import only_command_in, processes, rank, world_size
from .pretraining.centers import find_centers
from .pretraining.checks import check_labels, check_masks, check_trials
from .pretraining.config import PretrainConfig
from .pretraining.curves import LOG
from .pretraining.dataset import PretrainingDataset, StepSampler, augmentation, choose_pool, collate
from .pretraining.header import checkpoint_header
from .pretraining.inputs import Inputs, files_digests, filled_cache
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
            check_masks(train, config.workers)
        if config.pool is not None:
            pool = choose_pool(pool, config.pool, config.seed)
        run.depend_on("images", items_digest([*train, *pool]))
        run.depend_on("backbone weights", backbone.fingerprint[0])

        sampler = StepSampler(len(train), config.batch_size, config.seed, config.shots, config.accumulate)
        trials = validation_trials(config, inputs)
        found = files_digests(train, config.workers, masks=config.cache is not None)
        trained_on = Fingerprint(found[item.image] for item in train if item.image in found)
        if run.is_new:
            check_trials(trials, trained_on)
        cache = filled_cache(config.cache, backbone.transform, train, found, config.workers)
        views, fly = augmentation(config.view_statistics, backbone.entry), config.pool is None
        dataset = PretrainingDataset(train, pool, views, backbone.transform, cache, fly, config.shots)

        torch.manual_seed(config.seed)
        projector = ResidualProjector(backbone.entry.channels, config.num_heads, config.num_keys)
        projector.to(device, torch.bfloat16 if config.precision == "bfloat16" else torch.float32)
        optimizer = torch.optim.Adam(projector.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        centers = find_centers(config.centers, run.folder, backbone, train, config.seed, config.workers, cache)
        encode = partial(encode_images, backbone=backbone.module, device=device, precision=config.precision)
        encode_views = partial(encode, statistics=(views.mean, views.std))
        encode_references = partial(encode, statistics=backbone.entry.normalization)
        store = None
        if config.pool is not None:
            store = ReferenceStore(run.folder / REFERENCES, pool, json.dumps([*backbone.identity, config.precision]))
            store.encode(backbone.read, encode_references)
        digest = weights_fingerprint({f"center.{level}": center for level, center in enumerate(centers)})[0]
        run.depend_on("centers", digest)
        prepare = partial(prepared, store=store, pinned=device.type == "cuda")
        loader = ImageLoader(dataset, sampler, workers=config.workers, collate=collate, prepare=prepare)
        model = DistributedDataParallel(projector) if world_size() > 1 else projector
        encoders = (encode_views, encode_references)
        step = partial(train_step, model, optimizer, encoders=encoders, centers=centers, config=config)
        score = partial(validate, projector, backbone, trials, workers=config.workers) if trials else None
        header = checkpoint_header(backbone, projector, inputs.title, trained_on)
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
