"""What the owner of the weights asks for, and says of them."""

from __future__ import annotations

from dataclasses import dataclass

from ..console import option


@dataclass(frozen=True)
class PublishConfig:
    """What to publish of a checkpoint, where, and what to say."""

    repo: str | None = option(None, "repository OWNER/NAME to publish to; without it nothing is sent")
    name: str | None = option(
        None, "model of the weights, where the file does not say; with tag for the authors' files"
    )
    whole_model: bool = option(False, "publish the backbone as well")
    backbone_weights: str | None = option(None, "weights of the backbone to publish, where not its published ones")
    license: str | None = option(None, "license that you give the weights, as the Hub calls it: apache-2.0, say")
    data: str | None = option(None, "what the weights were trained on, where that is not Real-IAD")
    data_license: str | None = option(None, "license of that data")
