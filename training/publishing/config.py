"""What the owner of the weights asks for, and says of them."""

from __future__ import annotations

from dataclasses import dataclass

from ..console import option


@dataclass(frozen=True)
class PublishConfig:
    """What to publish of a checkpoint, where, and what to say."""

    repo: str | None = option(None, "repository OWNER/NAME to publish to; without it nothing is uploaded")
    name: str | None = option(None, "model of the weights, if the file does not say; with a tag for the authors' files")
    whole_model: bool = option(False, "also publish the backbone")
    backbone_weights: str | None = option(None, "weights of the backbone to publish, if not its published ones")
    license: str | None = option(None, "license of the weights, as the Hub spells it, such as apache-2.0")
    data: str | None = option(None, "what the weights were trained on, if not Real-IAD")
    data_license: str | None = option(None, "license of that data")
