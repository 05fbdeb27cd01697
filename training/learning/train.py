"""Training of the head: defective pictures above good ones of the same product, at the place of the defect too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from adfeatures.factory import load_learned
from adfeatures.learned import Head, LearnedScorer

from ..assets.embed import serialize
from ..console import progress
from ..judging.products import Product
from ..workers import mapper
from .evidence import BACKBONE, MODEL, TAG, Evidence, collect, files_of, maps_of

# Draws of references in a step, and of each the share of its pictures.
BATCH, SHARE = 4, 2
RATE, DECAY, CLIP = 3e-3, 1e-2, 1.0
# By how much the logarithms of two scores differ before their order is taken for sure.
TEMPERATURE = 0.2
# Pictures of each draw that the mean and deviation of what the head sees are taken from.
SAMPLE = 5


def gathered(products: Mapping[str, Product], photographs: Path, folder: Path, processes: int) -> list[Path]:
    """The files of evidence of all products, made where they are not there yet."""
    files = {name: list(files_of(name, folder)) for name in products}
    missing = [name for name, own in files.items() if not all(file.exists() for file in own)]
    with mapper(min(processes, len(missing) or 1)) as over:
        done = over(
            partial(collect, photographs=photographs, folder=folder), [(name, products[name]) for name in missing]
        )
        for _ in progress(done, desc="products", total=len(missing)):
            pass
    return [file for own in files.values() for file in own]


def trained(files: Sequence[Path], *, epochs: int, seed: int) -> Head:
    """A head that was trained on evidence."""
    torch.manual_seed(seed)
    evidence = [Evidence.load(file) for file in files]
    scorer = load_learned(BACKBONE, None, None)
    head = scorer.head.requires_grad_(True).train()
    _standardize(head, evidence)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
    steps = epochs * (len(evidence) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.1)
    for epoch in range(epochs):
        order, total = torch.randperm(len(evidence)).tolist(), 0.0
        starts = range(0, len(order) - BATCH + 1, BATCH)
        for start in progress(starts, desc=f"epoch {epoch + 1} of {epochs}", leave=False):
            losses = [_loss(scorer, _half(evidence[number])) for number in order[start : start + BATCH]]
            loss = torch.stack(losses).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}: loss {total / len(starts):.4f}", flush=True)
    return head.eval()


def _half(evidence: Evidence) -> Evidence:
    """A random half of the good and of the defective pictures."""
    kinds = [(evidence.bad == bad).nonzero()[:, 0] for bad in (False, True)]
    return evidence.of(torch.cat([own[torch.randperm(len(own))[: len(own) // SHARE]] for own in kinds]))


def _loss(scorer: LearnedScorer, evidence: Evidence) -> Tensor:
    maps = maps_of(scorer, scorer.head(evidence.distances, evidence.scales, evidence.seen))
    logs = maps.clamp_min(1e-3).log()
    highest, bad = logs.amax(dim=(1, 2)), evidence.bad
    known = bad & evidence.located & evidence.masks.any(dim=2).any(dim=1)
    at_defects = logs.masked_fill(~evidence.masks, -torch.inf).amax(dim=(1, 2))
    return _ranking(highest[~bad], highest[bad]) + _ranking(highest[~bad], at_defects[known])


def _ranking(lower: Tensor, higher: Tensor) -> Tensor:
    """How far pairs are from the order that they should have, softly."""
    if not len(higher):
        return lower.new_zeros(())
    return TEMPERATURE * F.softplus((lower[:, None] - higher) / TEMPERATURE).mean()


def _standardize(head: Head, evidence: Sequence[Evidence]) -> None:
    """Let the head see channels of mean 0 and deviation 1."""
    shown = []
    for own in evidence:
        part = own.of(torch.arange(0, len(own.bad), SAMPLE))
        shown.append(head.shown(part.distances, part.scales, part.seen)[..., ::2, ::2])
    values = torch.cat(shown)
    head.mean.copy_(values.mean(dim=(0, 2, 3)))
    head.scale.copy_(values.std(dim=(0, 2, 3)) + 1e-3)


def serialized(head: Head, products: int, seed: int) -> bytes:
    """The bytes of the file of a head."""
    facts = {"format": "adfeatures", "model": MODEL, "tag": TAG, "products": str(products), "seed": str(seed)}
    return serialize(head.state_dict(), facts)
