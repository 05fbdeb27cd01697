"""The model under evaluation: one frozen backbone, and one projector for each set of weights that the methods take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from adfeatures import catalog
from adfeatures.checkpoints import weights_fingerprint
from adfeatures.errors import InputError
from adfeatures.factory import build_backbone, create_scorer
from adfeatures.images import ImageTransform, build_transform
from adfeatures.resolve import find_trained, resolve_model
from adfeatures.scoring import Scorer
from adfeatures.trained import TrainedWeights

from ..data.fingerprint import TRAINED_ON, Fingerprint
from ..methods import title_of
from ..metrics import SELECTED_BY


class ProjectorWeights(NamedTuple):
    """One set of trained weights: the name of its model with tag, its projector on the device, and its file.

    Without a projector there is None, and the fingerprint and the file are "". ``stored`` are metrics in the file, and
    ``selected_by`` says by which method on which data they were measured, "" where that is not known. ``trained_on``
    are the images that the projector was trained on, or the title of the data set of which it was trained on all; None
    where that is not known. ``takes_residuals`` is False where it projects features as they are.
    """

    name: str
    projector: nn.Module | None
    fingerprint: str
    source: str
    stored: dict[str, float]
    selected_by: str = ""
    trained_on: Fingerprint | str | None = None
    takes_residuals: bool = True


@dataclass(frozen=True)
class EvaluatedModel:
    """A model as it is evaluated.

    Attributes:
        name: Name of the model; without the tag where each method takes its own.
        backbone: Frozen encoder of images (B, 3, H, W) to maps, on the device.
        img_size: Height and width of the input.
        mean, std: Statistics of the input's channels.
        scorer: Says which features its residuals are taken of.
        fingerprint: Hash of the backbone's weights.
        weights: The trained weights by tag, "" where the weights have no tag.
        tags: The tag that each method takes.
        device: Where the model is.
        bit_depth: Bits in use of 16-bit images.
    """

    name: str
    backbone: nn.Module
    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scorer: Scorer
    fingerprint: str
    weights: dict[str, ProjectorWeights]
    tags: dict[str, str]
    device: torch.device
    bit_depth: int = 16

    def transform(self, preset: str) -> ImageTransform:
        """The way from an image to the input, in one of the geometries of `adfeatures.images.PRESETS`."""
        return build_transform(self.img_size, self.mean, self.std, preset=preset, bit_depth=self.bit_depth)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the backbone's weights, and of the projector that each method takes."""
        of_methods = {method: self.weights[tag].fingerprint for method, tag in self.tags.items()}
        return {"backbone": self.fingerprint, **of_methods}


def load_model(
    model: str,
    methods: Sequence[str],
    *,
    weights: str | None = None,
    backbone_weights: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    bit_depth: int = 16,
) -> EvaluatedModel:
    """Load a model with the weights that each method takes; the backbone once, however many these are.

    Args:
        model: A name of ``adfeatures.list_models`` with or without tag, or where trained weights are: a path,
            "local-dir:/folder" or "hf-hub:owner/repo". Without a tag each method takes that which the paper uses.
        methods: Names of methods.
        weights: Place of the trained weights of a named model, or their tag; all methods take these.
        backbone_weights: Place of the backbone's weights, or "random".
        img_size: Input size in pixels. The default is the model's.
        device: Where the model shall be.
        bit_depth: Bits in use of 16-bit images, see `adfeatures.images.read_image`.

    Raises:
        InputError: For weights given twice.
        UnknownNameError, DownloadError, CheckpointError: As ``adfeatures.create_model``.
    """
    is_place = any(sign in model for sign in "/\\:") or os.path.isfile(model)
    if is_place and weights is not None:
        raise InputError(f"{model} is the place of trained weights already: name the model, or leave out --weights.")
    resolve = partial(resolve_model, backbone_weights=backbone_weights, img_size=img_size)
    if not is_place and weights is None:
        arch, tag = catalog.find_model(model)
        tags = {method: tag or serving_tag(arch, method) for method in methods}
        chosen = next(iter(tags.values()))
        spec = resolve(f"{arch}.{chosen}" if chosen else arch)
    else:
        spec = resolve(None if is_place else model, weights=model if is_place else weights)
        tags = dict.fromkeys(methods, spec.tag or "")
    channels, found = spec.backbone.entry.channels, {}
    for tag in dict.fromkeys(tags.values()):
        trained = spec.trained if tag == (spec.tag or "") else find_trained(arch=spec.arch, tag=tag)
        found[tag] = _weights(f"{spec.arch}.{tag}" if tag else spec.arch, trained, channels, device)
    backbone = build_backbone(spec.backbone).to(device)
    mean, std = spec.backbone.entry.normalization
    return EvaluatedModel(
        name=spec.name if len(found) == 1 else model,
        backbone=backbone,
        img_size=spec.backbone.entry.img_size,
        mean=mean,
        std=std,
        scorer=create_scorer(spec.arch, spec.tag),
        fingerprint=weights_fingerprint(backbone.state_dict())[0],
        weights=found,
        tags=tags,
        device=torch.device(device),
        bit_depth=bit_depth,
    )


def serving_tag(arch: str, method: str) -> str:
    """The tag that the paper uses for a method: whose entry in the catalog names it, else the default, or ""."""
    model = catalog.MODELS[arch]
    serving = [tag for tag, entry in model.tags.items() if title_of(method) in entry.serves.split(", ")]
    return serving[0] if serving else model.default_tag or ""


def _weights(
    name: str, trained: TrainedWeights | None, channels: Sequence[int], device: torch.device | str
) -> ProjectorWeights:
    if trained is None:
        return ProjectorWeights(name, None, "", "", {})
    projector = trained.create_projector(channels).float().requires_grad_(False).eval().to(device)
    fingerprint = weights_fingerprint(projector.state_dict())[0]
    metadata, (arch, tag) = trained.checkpoint.metadata, catalog.find_model(name)
    selected_by, trained_on = metadata.get("selected_by", ""), _trained_on(trained)
    selected_by = selected_by.replace("the training data", metadata.get("training_data", "the training data"))
    if tag is not None and trained_on is None:
        # The authors' files do not say it.
        selected_by = f"AUPRO of {SELECTED_BY[tag.rpartition('_')[2]]} on the test set of MVTec AD"
        trained_on = catalog.MODELS[arch].tags[tag].training_data
    facts = (trained.source, trained.checkpoint.metrics, selected_by, trained_on, trained.takes_residuals)
    return ProjectorWeights(name, projector, fingerprint, *facts)


def _trained_on(trained: TrainedWeights) -> Fingerprint | str | None:
    text = trained.checkpoint.metadata.get(TRAINED_ON)
    try:
        return None if text is None else Fingerprint.from_text(text)
    except (ValueError, RecursionError) as error:
        raise trained.header_error(f"the {TRAINED_ON} of its header cannot be read: {error}.") from error
