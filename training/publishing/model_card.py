"""The README.md of a published model: front matter for the Hub, and what a user must know before using it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

from adfeatures import catalog
from adfeatures.checkpoints import BACKBONE, Checkpoint
from adfeatures.resolve import BackboneSpec

from ..metrics import CRITERIA
from .config import PublishConfig

PAPER = "https://arxiv.org/abs/2511.05245"
TEMPLATE = Path(__file__).with_name("card.md")
_REAL_IAD, _REAL_IAD_LICENSE = "Real-IAD", "CC-BY-NC-SA-4.0"
# Data sets that the Hub has, by the name that they go by here.
_HUB_DATASETS = {_REAL_IAD: "Real-IAD/Real-IAD"}
_LEVELS = {"timm": "blocks or stages", "efficientnet": "stages"}


def model_card(config: PublishConfig, backbone: BackboneSpec, weights: Checkpoint) -> str:
    """The whole file, the same text for the same arguments.

    Args:
        config: Where it is published, and what the owner says.
        backbone: The backbone, with the input size of the model.
        weights: What the file of the weights holds.
    """
    entry, name = backbone.entry, weights.metadata["model"]
    whole = any(key.startswith(BACKBONE) for key in weights.state_dict)
    arch, tag_name = catalog.find_model(name)
    tag = catalog.MODELS[arch].tags[tag_name] if tag_name else None
    data = tag.training_data if tag else config.data or weights.metadata.get("training_data", "")
    known_terms = tag.training_data_license if tag else _REAL_IAD_LICENSE if data == _REAL_IAD else "terms not stated"
    by_hand = not (whole or entry.asset or entry.hub_file)
    return TEMPLATE.read_text(encoding="utf-8").format(
        front_matter=_front_matter(config.license, data, entry),
        title=config.repo.partition("/")[2] if config.repo else name,
        paper=PAPER,
        trained_by="its authors" if tag else "the owner of this repository",
        name=name,
        arch=arch,
        backbone=backbone.name,
        levels=f"{_LEVELS.get(entry.family, 'blocks')} {', '.join(map(str, entry.blocks))}",
        channels=", ".join(map(str, entry.channels)),
        size=f"{entry.img_size[0]} x {entry.img_size[1]}",
        weights=_whereabouts(entry, whole),
        place=f"hf-hub:{config.repo}" if config.repo else "local-dir:/path/to/this/folder",
        more=f', backbone_weights="/path/to/{entry.original_file}"' if by_hand else "",
        license=tag.license if tag else config.license or "its owner has not stated any terms",
        data=f"{data}: {config.data_license or known_terms}" if data else "not stated",
        backbone_terms=f"{entry.license}, {entry.origin}",
        metrics=_metrics(weights),
        serves=f"\n- These weights serve {tag.serves}." if tag else "",
        history=_history(weights.metadata),
    )


def _front_matter(license: str | None, data: str, entry: catalog.Backbone) -> str:
    return ModelCardData(
        license=license or "other",
        license_name=None if license else "unstated",
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=["adfeatures", "timm", "anomaly-detection", "industrial-inspection", "adpretrain", "arxiv:2511.05245"],
        datasets=[_HUB_DATASETS[data]] if data in _HUB_DATASETS else None,
        base_model=entry.hub_file[0] if entry.hub_file else None,
    ).to_yaml()


def _whereabouts(entry: catalog.Backbone, whole: bool) -> str:
    """What is in the repository, and where the rest is."""
    if whole:
        return "the projector and the backbone. Nothing else is downloaded."
    by_hand = f", {entry.original_file}, must be got from {entry.origin} and given as `backbone_weights`."
    place = (
        f" is fetched from [{entry.hub_file[0]}](https://huggingface.co/{entry.hub_file[0]})." if entry.hub_file else ""
    )
    return f"the projector alone. The backbone{' is in the package.' if entry.asset else place or by_hand}"


def _metrics(weights: Checkpoint) -> str:
    selected = weights.metadata.get("selected_by")
    about = "The file does not say what selected it, nor what its metrics were measured on."
    if selected:
        about = f"Selected by: {selected}."
    if not weights.metrics:
        return f"The file holds none. {about}"
    if selected:
        about += " The metrics were measured on the data that selected it, and flatter it."
    titles = {criterion.stored: criterion.title for criterion in CRITERIA}
    rows = "\n".join(f"| {titles.get(name, name)} | {value:.4f} |" for name, value in weights.metrics.items())
    head = "As stored in the file of the weights, where 1 is perfect; publishing measured nothing."
    return f"{head}\n\n| metric | value |\n|---|---|\n{rows}\n\n{about}"


def _history(header: Mapping[str, str]) -> str:
    """The last section: the run that trained the weights, or the file that they were rewritten from."""
    if "training" in header:
        return f"\n\n## Training\n\n```json\n{json.dumps(json.loads(header['training']), indent=1)}\n```"
    if "source" in header:
        origin = f"`{header['source']}`, sha256 `{header.get('source_sha256')}`"
        return f"\n\n## Origin\n\nRewritten from {origin}, its tensors bit for bit."
    return ""
