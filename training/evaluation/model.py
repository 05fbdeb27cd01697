"""The model under evaluation: one frozen backbone, and one projector for each set of weights that the methods take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from adfeatures import catalog
from adfeatures.errors import InputError
from adfeatures.extractor import FeatureExtractor
from adfeatures.factory import create_model
from adfeatures.images import ImageTransform, build_transform
from adfeatures.loading import Trained, load_trained
from adfeatures.references import weights_fingerprint

from ..methods import title_of

Size = int | tuple[int, int]


class ProjectorWeights(NamedTuple):
    """One set of trained weights.

    Attributes:
        name: Name of the model with tag.
        projector: None for a model that has none.
        fingerprint: Hash of the projector's weights, "" where there is none.
        source: File that they were read from, "" where there is none.
        stored: Metrics that the file holds.
    """

    name: str
    projector: nn.Module | None
    fingerprint: str
    source: str
    stored: dict[str, float]


@dataclass(frozen=True)
class EvaluatedModel:
    """A model as it is evaluated.

    Attributes:
        name: Name of the model; without the tag where each method takes its own.
        backbone: Frozen encoder of images (B, 3, H, W) to maps, on its device.
        img_size: Height and width of the input.
        mean, std: Statistics of the input's channels.
        unit_length: Whether its residuals are between features of unit length.
        fingerprint: Hash of the backbone's weights.
        weights: The trained weights by tag, "" where the weights have no tag.
        tags: The tag that each method takes.
        device: Where the model is.
    """

    name: str
    backbone: nn.Module
    img_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unit_length: bool
    fingerprint: str
    weights: dict[str, ProjectorWeights]
    tags: dict[str, str]
    device: torch.device

    def transform(self, preset: str) -> ImageTransform:
        """The way from an image to the input, in one of the geometries of `adfeatures.images.PRESETS`."""
        return build_transform(self.img_size, self.mean, self.std, preset=preset)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the backbone's weights, and of the projector that each method takes."""
        return {
            "backbone": self.fingerprint,
            **{method: self.weights[tag].fingerprint for method, tag in self.tags.items()},
        }


def load_model(
    model: str,
    methods: Sequence[str],
    *,
    weights: str | None = None,
    backbone_weights: str | None = None,
    img_size: Size | None = None,
    device: torch.device | str = "cpu",
) -> EvaluatedModel:
    """Load a model with the weights that each method takes; the backbone once, however many these are.

    Args:
        model: A name of ``adfeatures.list_models`` with or without tag, or where trained weights are: a path,
            "local-dir:/folder" or "hf-hub:owner/repo". Without a tag each method takes that which the paper uses for
            it.
        methods: Names of methods.
        weights: Place of the trained weights of a named model, or their tag; all methods take these.
        backbone_weights: Place of the backbone's weights, or "random".
        img_size: Input size in pixels. The default is the model's.
        device: Where the model shall be.

    Raises:
        InputError: For weights given twice.
        UnknownNameError, DownloadError, CheckpointError: As ``adfeatures.create_model``.
    """
    is_place = any(sign in model for sign in "/\\:") or os.path.isfile(model)
    if is_place and weights is not None:
        raise InputError(f"{model} is the place of trained weights already: name the model, or leave out --weights.")
    if not is_place and weights in catalog.MODELS[catalog.find_model(model)[0]].tags:
        model, weights = f"{catalog.find_model(model)[0]}.{weights}", None
    named, place = (None, model) if is_place else (model, weights)
    if place is None:
        arch, tag = catalog.find_model(model)
        tags = {method: tag or serving_tag(arch, method) for method in methods}
        names = {tag: f"{arch}.{tag}" if tag else arch for tag in dict.fromkeys(tags.values())}
        extractor = create_model(next(iter(names.values())), backbone_weights=backbone_weights, img_size=img_size)
    else:
        options = {"weights": place, "backbone_weights": backbone_weights, "img_size": img_size}
        extractor = create_model(**options) if named is None else create_model(named, **options)  # type: ignore[arg-type]
        tags = dict.fromkeys(methods, catalog.find_model(extractor.name)[1] or "")
        names = {tag: extractor.name for tag in tags.values()}
    found = {tag: _weights(extractor, name, named, place) for tag, name in names.items()}
    return EvaluatedModel(
        name=extractor.name if len(found) == 1 else model,
        backbone=extractor.backbone.to(device),
        img_size=extractor.img_size,
        mean=tuple(extractor.pretrained_cfg["mean"]),
        std=tuple(extractor.pretrained_cfg["std"]),
        unit_length=extractor.projector is None,
        fingerprint=weights_fingerprint(extractor.backbone.state_dict())[0],
        weights={
            tag: entry._replace(projector=entry.projector and entry.projector.to(device))
            for tag, entry in found.items()
        },
        tags=tags,
        device=torch.device(device),
    )


def serving_tag(arch: str, method: str) -> str:
    """The tag that the paper uses for a method: whose entry in the catalog names it, else the default, or ""."""
    tags = catalog.MODELS[arch].tags
    return next(
        (tag for tag, entry in tags.items() if title_of(method) in entry.serves.split(", ")),
        catalog.MODELS[arch].default_tag or "",
    )


def _weights(extractor: FeatureExtractor, name: str, named: str | None, place: str | None) -> ProjectorWeights:
    """The weights of a name: those of the extractor where it has that name, and the metrics of their file."""
    if extractor.projector is None:
        return ProjectorWeights(name, None, "", "", {})
    trained = _trained(name, named, place)
    projector = extractor.projector if name == extractor.name else trained.create_projector(extractor.backbone.channels)
    projector = projector.float().requires_grad_(False).eval()
    return ProjectorWeights(
        name, projector, weights_fingerprint(projector.state_dict())[0], trained.source, trained.checkpoint.metrics
    )


def _trained(name: str, named: str | None, place: str | None) -> Trained:
    """The file that ``create_model`` reads the projector from."""
    arch, tag = catalog.find_model(name)
    tag = tag or (catalog.MODELS[arch].default_tag if named else None)
    hub_file = catalog.MODELS[arch].tags[tag].hub_file if tag else None
    if place is None:
        return load_trained("hf-hub:{}:{}".format(*hub_file), (), None)  # type: ignore[misc]
    return load_trained(
        place, (hub_file[1], "model.safetensors") if hub_file and named else ("model.safetensors",), None
    )
