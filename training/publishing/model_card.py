"""The README.md of a published model: front matter for the Hub, and what a user must know before using it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub import ModelCardData

from adfeatures import catalog

PAPER = "https://arxiv.org/abs/2511.05245"
# Data sets that the Hub has, by the name that they go by here.
_HUB_DATASETS = {"Real-IAD": "Real-IAD/Real-IAD"}
_METRICS = {"img_auc": "image AUROC", "pix_auc": "pixel AUROC", "pix_pro": "AUPRO"}
_LEVELS = {"timm": "blocks or stages", "efficientnet": "stages"}


@dataclass(frozen=True)
class Publication:
    """What is published.

    Attributes:
        arch: Name in ``catalog.MODELS``.
        tag: Tag of the catalog, for weights that others trained; None for one's own.
        backbone: Name of the backbone in the catalog or in timm.
        entry: Its description, with the input size of the model.
        metadata: Header of the weights file.
        metrics: Numbers stored in the weights file.
        whole: Whether the weights of the backbone are published as well.
        place: Where the repository is, as ``weights=`` takes it.
        title: Name of the repository.
        data: Name of the training data, "" where nobody said.
        data_license: Its license.
        license: The Hub's identifier of the license of the weights, None where none was stated.
    """

    arch: str
    tag: str | None
    backbone: str
    entry: catalog.Backbone
    metadata: Mapping[str, str]
    metrics: Mapping[str, float]
    whole: bool
    place: str
    title: str
    data: str
    data_license: str
    license: str | None


def model_card(published: Publication) -> str:
    """The whole file, the same text for the same publication."""
    parts = (_what, _use, _terms, _metrics, _limits, _training)
    return (
        f"---\n{_front_matter(published)}\n---\n\n"
        + "\n\n".join(filter(None, (part(published) for part in parts)))
        + "\n"
    )


def _front_matter(published: Publication) -> str:
    hub_file = published.entry.hub_file
    return ModelCardData(
        license=published.license or "other",
        license_name=None if published.license else "unstated",
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=["adfeatures", "timm", "anomaly-detection", "industrial-inspection", "adpretrain", "arxiv:2511.05245"],
        datasets=[_HUB_DATASETS[published.data]] if published.data in _HUB_DATASETS else None,
        base_model=hub_file[0] if hub_file else None,
    ).to_yaml()


def _what(published: Publication) -> str:
    entry = published.entry
    levels = f"{_LEVELS.get(entry.family, 'blocks')} {', '.join(map(str, entry.blocks))}"
    by = "its authors" if published.tag else "the owner of this repository"
    return f"""# {published.title}

Features for industrial anomaly detection: an [ADPretrain]({PAPER}) projector on a frozen backbone,
trained by {by}. An image is compared with a few normal images of the same product, and the projector turns
the difference into features in which defects stand out.

- Model: `{published.arch}{f".{published.tag}" if published.tag else ""}`
- Backbone: `{published.backbone}`, {levels}, with {", ".join(map(str, entry.channels))} channels
- Input: {entry.img_size[0]} x {entry.img_size[1]} pixels (height x width)
- Weights here: {"the projector and the backbone" if published.whole else "the projector alone"}. {_backbone_place(published)}"""


def _backbone_place(published: Publication) -> str:
    entry = published.entry
    if published.whole:
        return "Nothing else is downloaded."
    if entry.asset:
        return "The backbone is in the package."
    if entry.hub_file:
        return f"The backbone is fetched from [{entry.hub_file[0]}](https://huggingface.co/{entry.hub_file[0]})."
    return f"The backbone, {entry.original_file}, must be got from {entry.origin} and given as `backbone_weights`."


def _use(published: Publication) -> str:
    by_hand = not (published.whole or published.entry.asset or published.entry.hub_file)
    more = f', backbone_weights="/path/to/{published.entry.original_file}"' if by_hand else ""
    return f"""## How to load it

`good/` is a folder of normal images of your product; eight are a good start.

```python
import adfeatures

model = adfeatures.create_model(weights="{published.place}"{more}, references="good/")
```

```python
import adfeatures
import timm

adfeatures.register_with_timm()
model = timm.create_model("{published.place}", pretrained=True{more}, references="good/")
```

```python
import torch

model = torch.hub.load("/path/to/adfeatures", "{published.arch}", source="local", weights="{published.place}"{more}, references="good/")
```

All three give the same module. `model(x)` is a list of feature maps, one per level; `model.score("new/")` gives scores and heat maps."""


def _terms(published: Publication) -> str:
    entry = published.entry
    if published.tag:
        own = catalog.MODELS[published.arch].tags[published.tag].license
    else:
        own = published.license or "its owner has not stated any terms"
    data = f"{published.data}: {published.data_license or 'terms not stated'}" if published.data else "not stated"
    return f"""## Terms

| | |
|---|---|
| projector | {own} |
| training data | {data} |
| backbone | {entry.license}, {entry.origin} |

The terms of the training data may bind what was trained on them. Ask your lawyer before commercial use."""


def _metrics(published: Publication) -> str:
    selected = published.metadata.get("selected_by")
    about = (
        f"Selected by: {selected}."
        if selected
        else "The file does not say what selected it, nor what its metrics were measured on."
    )
    if not published.metrics:
        return f"## Metrics\n\nThe file holds none. {about}"
    if selected:
        about += " The metrics were measured on the data that selected it, and flatter it."
    rows = "\n".join(f"| {_METRICS.get(name, name)} | {value:.4f} |" for name, value in published.metrics.items())
    return f"""## Metrics

As stored in the file of the weights, where 1 is perfect; publishing measured nothing.

| metric | value |
|---|---|
{rows}

{about}"""


def _limits(published: Publication) -> str:
    tags = catalog.MODELS[published.arch].tags
    serves = f"\n- These weights serve {tags[published.tag].serves}." if published.tag else ""
    return f"""## Limits

- Without normal references of the same product, taken as the images are taken, the model gives nothing.
- Images are squashed to the input size: defects of a few pixels in a large photo are lost. Crop first.
- A threshold from a handful of normal images cannot promise a rate of false alarms: test on your own parts.{serves}"""


def _training(published: Publication) -> str:
    facts = published.metadata
    if "training" in facts:
        return f"## Training\n\n```json\n{json.dumps(json.loads(facts['training']), indent=1)}\n```"
    if "source" in facts:
        return f"## Origin\n\nRewritten from `{facts['source']}`, sha256 `{facts.get('source_sha256')}`, its tensors bit for bit."
    return ""
