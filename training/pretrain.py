"""Pretrain the projectors: ``python -m training.pretrain --root DIR --output RUN``.

The backbone is frozen and only the projectors learn, from residuals of two augmented views of every image against
normal references of the same product and view (paper section 3). The same command resumes an interrupted run. For
several devices: ``torchrun --nproc-per-node=8 -m training.pretrain ...``; the batch is that of all devices together,
and so are the loss and its gradients.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from adfeatures import catalog
from adfeatures.errors import InputError
from adfeatures.images import ImageTransform, build_transform, read_image
from adfeatures.loading import Encoder, load_backbone
from adfeatures.projector import ResidualProjector
from adfeatures.references import weights_fingerprint

from . import console
from .centers import compute_centers, load_centers, origin
from .console import add_options, from_options
from .data import real_iad
from .data.images import ImageLoader
from .data.items import ANOMALOUS, Item, items_digest
from .data.real_iad import reference_pool, split_by_sample
from .data.transforms import MaskTransform, TwoViews
from .distributed import barrier, processes, rank, world_size
from .pretraining.config import PretrainConfig
from .pretraining.dataset import PretrainingDataset, StepSampler, read_items
from .pretraining.reference_store import ReferenceStore, choose_pool
from .pretraining.run import Run
from .pretraining.step import encode_images, train_step
from .pretraining.validation import Validation, held_out_trials, mvtec_trials


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
    run = Run(config)
    items = read_items(config.data, config.root, config.products or None, config.filter_list)
    train, held_out = split_by_sample(items, config.held_out, config.seed)
    if not any(item.label == ANOMALOUS for item in train):
        raise InputError(
            f"None of the {len(train)} training images in {config.root} is anomalous, so there is nothing to contrast."
        )
    pool = reference_pool(train)
    if config.pool is not None:
        pool = choose_pool(pool, config.pool, config.seed)
    run.depend_on("images", items_digest([*train, *pool]))

    # Random weights of a backbone, where they are asked for, are the same when the run resumes.
    torch.manual_seed(config.seed)
    size = (config.img_size[0], config.img_size[-1]) if config.img_size else None
    backbone, entry = load_backbone(
        config.backbone, weights=config.backbone_weights, img_size=size, levels=config.levels or None
    )
    backbone.to(device)
    fingerprint = weights_fingerprint(backbone.state_dict())
    run.depend_on("backbone weights", fingerprint[0])

    views = TwoViews(entry.img_size, *_view_statistics(config, entry))
    reference_transform = build_transform(entry.img_size, *entry.normalization)
    mask_transform = MaskTransform(entry.img_size, reference_transform.preset)
    dataset = PretrainingDataset(
        train, pool, views, reference_transform, mask_transform, load_references=config.pool is None, shots=config.shots
    )
    sampler = StepSampler(
        len(dataset), config.batch_size, config.seed, shots=config.shots, rank=rank(), world=world_size()
    )
    if config.batch_size // world_size() % config.accumulate:
        raise InputError(
            f"{config.batch_size // world_size()} images a device cannot be divided into {config.accumulate} equal parts."
        )
    loader = ImageLoader(dataset, batch_sampler=sampler, num_workers=config.workers, pin_memory=device.type == "cuda")
    validation = _validation(config, backbone, entry, train, held_out)

    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    torch.manual_seed(config.seed)
    projector = ResidualProjector(entry.channels, config.num_heads, config.num_keys).to(device, dtype)
    optimizer = torch.optim.Adam(projector.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    centers = [center.to(device) for center in _centers(config, backbone, entry, train, reference_transform)]
    run.depend_on(
        "centers", weights_fingerprint({f"center.{level}": center for level, center in enumerate(centers)})[0]
    )
    run.resume(projector=projector, optimizer=optimizer)
    model = DistributedDataParallel(projector) if world_size() > 1 else projector

    encoder = partial(encode_images, backbone=backbone, device=device, precision=config.precision)
    store = None
    if config.pool is not None:
        identity = json.dumps([config.backbone, fingerprint, entry.blocks, entry.img_size, config.precision])
        store = ReferenceStore(run.folder / "references", pool, identity)
        if rank() == 0:
            store.encode(lambda path: reference_transform(read_image(path)), encoder)
        barrier()
        store.open()

    metadata = _metadata(config, entry, train)
    total = config.epochs * sampler.steps_per_epoch
    total = total if config.max_steps is None else min(total, config.max_steps)
    with tqdm(
        total=total, initial=run.step, desc="pretraining", unit="step", disable=True if rank() else None
    ) as progress:
        while run.validated < total:
            lr = _learning_rate(config, run.epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sampler.set_position(run.epoch, run.step_of_epoch)
            left = min(sampler.steps_per_epoch - run.step_of_epoch, total - run.step)
            for batch in islice(loader, max(left, 0)):
                started = time.perf_counter()
                batch = _on_device(batch, device)
                values = train_step(model, optimizer, batch, encoder, store, centers, config)
                run.step, run.step_of_epoch = run.step + 1, run.step_of_epoch + 1
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
                run.keep_best(scores, _tensors(projector), metadata)
            run.validated = run.step
            run.save()
            run.draw()
    if rank() == 0:
        run.save_last(_tensors(projector), metadata)
    return run.folder


def _learning_rate(config: PretrainConfig, epoch: int) -> float:
    """A tenth from each milestone on; of the epoch alone, so that a resumed run has nothing to catch up with."""
    return config.lr * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)


def _view_statistics(config: PretrainConfig, entry: catalog.Backbone) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for the augmented views.

    The published weights were made with CLIP's, for DINOv2 too.
    """
    quirk = config.view_statistics == "original" and entry.family == "dinov2"
    return catalog.OPENAI_CLIP if quirk else entry.normalization


def _centers(
    config: PretrainConfig,
    backbone: Encoder,
    entry: catalog.Backbone,
    train: Sequence[Item],
    transform: ImageTransform,
) -> list[Tensor]:
    """The centers of the angle loss: from a file or, in a single process, computed now."""
    path = config.centers or str(Path(config.output) / "centers.safetensors")
    if config.centers is None and world_size() == 1:
        pool = reference_pool(train)
        return compute_centers(
            path, backbone, train, pool, transform, name=config.backbone, seed=config.seed, workers=config.workers
        )
    if not Path(path).exists():
        raise InputError(
            f"There are no centers {path}. Run python -m training.centers in one process first, then give --centers FILE."
        )
    return load_centers(path, entry.channels, origin(backbone, transform, name=config.backbone))


def _validation(
    config: PretrainConfig, backbone: Encoder, entry: catalog.Backbone, train: Sequence[Item], held_out: Sequence[Item]
) -> Validation | None:
    if config.validation == "none":
        return None
    presets = {}
    if config.validation == "mvtec":
        trials = mvtec_trials(str(config.validation_root))
        if entry.img_size == (224, 224):
            presets = {"preset": "resize256_crop224", "reference_preset": "resize224_crop224"}
    else:
        trials = held_out_trials(reference_pool(train), held_out, config.validation_images, config.seed)
    if not trials:
        raise InputError(
            "No product has held-out images of both labels to validate on. Raise --held-out, or say --validation none."
        )
    return Validation(
        backbone, trials, img_size=entry.img_size, statistics=entry.normalization, workers=config.workers, **presets
    )


def _on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a batch; the indices of references stay where their store is."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    return {
        key: value if key == "reference_indices" else value.to(device, non_blocking=True)
        for key, value in tensors.items()
    }


def _tensors(projector: ResidualProjector) -> dict[str, Tensor]:
    return {f"projector.{key}": value for key, value in projector.state_dict().items()}


def _metadata(config: PretrainConfig, entry: catalog.Backbone, train: Sequence[Item]) -> dict[str, str]:
    """The header of the checkpoints, by which ``adfeatures.create_model(weights=...)`` knows what they are."""
    name = f"adpretrain_{config.backbone}"
    metadata = {
        "format": "adfeatures",
        "model": name if name in catalog.MODELS else "adpretrain_timm",
        "num_heads": str(config.num_heads),
        "img_size": json.dumps(entry.img_size),
        "training": json.dumps(dataclasses.asdict(config)),
    }
    if name not in catalog.MODELS or config.levels:
        mean, std = entry.normalization
        facts = {
            "blocks": entry.blocks,
            "channels": entry.channels,
            "reductions": entry.reductions,
            "mean": mean,
            "std": std,
        }
        metadata["backbone"] = json.dumps({"timm_name": entry.timm_name, **facts})
    # Other data may come in the same layout.
    if config.data == "real_iad" and {item.product for item in train} <= set(real_iad.PRODUCTS):
        metadata["training_data"] = "Real-IAD"
    return metadata


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.pretrain", description="Pretrain projectors on Real-IAD or on your own data."
    )
    add_options(parser, PretrainConfig)
    options = parser.parse_args(arguments)

    def run() -> None:
        config = from_options(options, PretrainConfig)
        with processes(config.device) as device:
            folder = pretrain(config, device)
            if rank() == 0:
                print(f"done: {folder}")

    return console.run("pretrain", run)


if __name__ == "__main__":
    sys.exit(main())
