"""From a name and the places of weights to a description of what to build, and from which files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, ulp
from pathlib import Path
from typing import Annotated, TypeAlias

from . import catalog, hub
from .backbones import StateDict, check_levels, check_size, with_levels
from .checkpoints import AnyPath, Checkpoint, convert
from .errors import InputError, UnknownNameError
from .timm_backbones import TimmBackbone, find_timm
from .trained import TrainedWeights

# A tag of the catalog, a path, "hf-hub:owner/repo[@revision][:path/in/repo]" or "local-dir:/path".
Weights: TypeAlias = "AnyPath | None"

RANDOM = "random"
_WEIGHTS = "model.safetensors"
_Positive: TypeAlias = Annotated[float, (ulp(0), inf)]


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone before it is built.

    Attributes:
        name: In ``catalog.BACKBONES``, or in timm.
        entry: Its description, with the levels and the input size that are meant.
        encoder: The module itself where timm has it, without trained weights: nothing else describes it.
        weights: Where its weights are, None for random ones.
    """

    name: str
    entry: catalog.Backbone
    encoder: TimmBackbone | None = None
    weights: Path | TrainedWeights | StateDict | None = None


@dataclass(frozen=True)
class _BackboneFacts:
    """What a header says of a backbone that the catalog does not describe."""

    timm_name: str
    blocks: list[int]
    channels: list[int]
    reductions: list[int]
    mean: tuple[float, float, float]
    std: tuple[_Positive, _Positive, _Positive]


@dataclass(frozen=True)
class ModelSpec:
    """A model before it is built.

    Attributes:
        arch: Name in ``catalog.MODELS``.
        tag: Tag of the weights, None where they have none.
        backbone: Its backbone.
        trained: The file of the trained projector, None for a random one or for none.
    """

    arch: str
    tag: str | None
    backbone: BackboneSpec
    trained: TrainedWeights | None

    @property
    def name(self) -> str:
        """The name with the tag."""
        return f"{self.arch}.{self.tag}" if self.tag else self.arch


def resolve_model(
    name: str | None = None,
    *,
    weights: Weights = None,
    backbone_weights: Weights = None,
    backbone: str | None = None,
    pretrained: bool = True,
    img_size: int | tuple[int, int] | None = None,
    cache_dir: AnyPath | None = None,
) -> ModelSpec:
    """Find out what a model is made of, fetching what is not there. Arguments and errors as in ``create_model``."""
    arch, tag, weights = _asked(name if backbone is None else catalog.with_backbone(name, backbone), weights)
    if arch and weights is None and not catalog.MODELS[arch].any_backbone:
        # Nothing is fetched before it is known that all can be had.
        model = catalog.MODELS[arch]
        if not model.tags and (pretrained or not model.backbone):
            raise InputError(f"{catalog.must_be_given(arch)}.")
        if pretrained and backbone_weights is None:
            _check_fetchable(model.backbone, catalog.BACKBONES[model.backbone])
        tag = tag or model.default_tag if pretrained else None
    trained = find_trained(weights, arch, tag, cache_dir)
    if trained is not None:
        arch, tag = trained.identify(arch, tag)
        if catalog.MODELS[arch].scoring == "residual":
            # All weights of such a model are those of its backbone.
            if backbone_weights is not None:
                raise InputError(f"{arch} has no weights but its backbone's: leave out weights or backbone_weights.")
            backbone_weights = trained.source
            trained = None
    assert arch is not None
    if catalog.MODELS[arch].any_backbone:
        tag, found = chosen_backbone(tag, img_size)
    else:
        found = describe_backbone(arch, trained, img_size)
    source = _backbone_source(trained, backbone_weights, pretrained)
    return ModelSpec(arch, tag, replace(found, weights=_find_weights(found, source, cache_dir)), trained)


def resolve_backbone(
    name: str,
    *,
    weights: Weights | StateDict = None,
    img_size: int | tuple[int, int] | None = None,
    levels: Sequence[int] | None = None,
    cache_dir: AnyPath | None = None,
) -> BackboneSpec:
    """Find a backbone and its weights. Arguments and errors as in ``load_backbone``."""
    found = _find_backbone(name, levels)
    backbone = _sized(found, img_size)
    return replace(backbone, weights=_find_weights(backbone, weights, cache_dir))


def find_trained(
    weights: Weights = None, arch: str | None = None, tag: str | None = None, cache_dir: AnyPath | None = None
) -> TrainedWeights | None:
    """The trained weights in a place, or else the published ones of a tag; None where there is neither.

    Raises:
        DownloadError: If they cannot be found or fetched.
        CheckpointError: If the file is damaged.
    """
    published = _hub_file(arch, tag)
    if weights is None:
        if tag is None or published is None:
            return None
        weights = catalog.place(*published)
    candidates = (published[1], _WEIGHTS) if published else (_WEIGHTS,)
    return TrainedWeights.read(hub.resolve(weights, candidates=candidates, cache_dir=cache_dir))


def chosen_backbone(tag: str | None, img_size: int | tuple[int, int] | None = None) -> tuple[str, BackboneSpec]:
    """The full tag of a tag that names a backbone, and that backbone without its weights.

    Raises:
        UnknownNameError: For an unknown backbone.
        InputError: For none, or levels or an input size that it cannot have.
    """
    if not tag:
        example = f'create_model("{catalog.OF_ANY_BACKBONE}", backbone="vit_small_patch14_dinov2.lvd142m")'
        raise InputError(f"{catalog.OF_ANY_BACKBONE} needs a backbone: {example}, or --backbone in the command.")
    name, at, chosen = tag.partition("@")
    try:
        levels = tuple(map(int, chosen.split(","))) if at else None
    except ValueError:
        raise InputError(f"The levels of {tag!r} must be whole numbers from 1, such as {name}@3,6.") from None
    backbone = _find_backbone(name, levels, of_authors=True)
    full = name if backbone.encoder is None else str(backbone.entry.timm_name)
    return full + at + ",".join(map(str, levels or ())), _sized(backbone, img_size)


def describe_backbone(
    arch: str, trained: TrainedWeights | None, img_size: int | tuple[int, int] | None = None
) -> BackboneSpec:
    """The backbone of a model without its weights, as the header of its file or else the catalog describes it.

    A header must describe a backbone of timm. It may describe one of the catalog, where the levels are not the usual
    ones.

    Raises:
        CheckpointError: If the header says nothing that it must, or something that the backbone does not bear out.
        InputError: For an input size that the backbone cannot have.
    """
    name = catalog.MODELS[arch].backbone
    facts: _BackboneFacts | None = trained.fact("backbone", _BackboneFacts) if trained else None
    if trained is None or (name and facts is None):
        backbone = _find_backbone(name, None)
        return _sized(backbone, img_size, trained)
    if facts is None:
        raise trained.header_error(f"its header must describe the backbone of {arch}.")
    try:
        name = name or facts.timm_name
        backbone = _find_backbone(name, tuple(facts.blocks))
    except (InputError, UnknownNameError) as error:
        raise trained.header_error(f"the backbone of its header does not exist. {error}") from error
    entry = backbone.entry
    if (tuple(facts.channels), tuple(facts.reductions)) != (entry.channels, entry.reductions):
        problem = f"has channels {entry.channels} and reductions {entry.reductions}"
        advice = "Was it made with another version of timm?"
        raise trained.header_error(f"its header describes {name} as {facts!r}, but it {problem}. {advice}")
    backbone = replace(backbone, entry=replace(entry, normalization=(facts.mean, facts.std)))
    return _sized(backbone, img_size, trained)


def published_files(name: str, cache_dir: AnyPath | None = None) -> tuple[list[Path], str]:
    """Find or fetch the weights of a model that the catalog names.

    Returns:
        The files, and what is missing: a message about weights that must be given by hand, or "".

    Raises:
        UnknownNameError: For an unknown model or tag.
        DownloadError: If weights cannot be fetched.
    """
    arch, tag = catalog.find_model(name)
    model = catalog.MODELS[arch]
    trained = _hub_file(arch, tag)
    files = [hub.resolve(catalog.place(*trained), cache_dir=cache_dir)] if trained else []
    if model.any_backbone:
        _, backbone = chosen_backbone(tag)
        return [_published(backbone.name, backbone.entry, cache_dir)], ""
    missing = "" if model.tags else f"{catalog.must_be_given(arch)}."
    try:
        if model.backbone:
            files.append(_published(model.backbone, catalog.BACKBONES[model.backbone], cache_dir))
    except InputError as error:
        missing = str(error)
    return files, missing


def convert_checkpoint(source: AnyPath, destination: AnyPath, name: str) -> Checkpoint:
    """Turn a published checkpoint into a safetensors file that says what it is for; the tensors stay as they are.

    Args:
        source: A file as published by the authors, or any other that ``create_model`` reads.
        destination: File ending in .safetensors.
        name: The model that the weights belong to, with or without ``.tag``.

    Raises:
        UnknownNameError: For an unknown model or tag.
        CheckpointError: If the source is damaged or not a checkpoint of that model.
    """
    arch, tag = catalog.find_model(name)
    if catalog.MODELS[arch].scoring != "feature_norm":
        raise InputError(f"{arch} has no projector, so there is nothing to convert.")
    trained = TrainedWeights.read(Path(source))
    arch, tag = trained.identify(arch, tag)
    trained.check_projector(describe_backbone(arch, trained).entry.channels)
    model = f"{arch}.{tag}" if tag else arch
    return convert(source, destination, {"model": model, "num_heads": str(trained.num_heads)})


def _asked(name: str | None, weights: Weights) -> tuple[str | None, str | None, Weights]:
    """The model and the tag that were named, and the place of weights where one was given."""
    tagged = isinstance(weights, str) and weights.isidentifier() and not Path(weights).exists()
    if name is None and (weights is None or tagged):
        name = catalog.DEFAULT_MODEL if weights is None else catalog.DEFAULT_MODEL.partition(".")[0]
    if name is None:
        return None, None, weights
    arch, tag = catalog.find_model(name)
    if not tagged:
        return arch, tag, weights
    if weights not in catalog.MODELS[arch].tags:
        raise UnknownNameError(catalog.unknown_tag(arch, str(weights)))
    if tag not in (None, weights):
        raise InputError(f"The name asks for {arch}.{tag} and weights for {weights!r}: leave out one of them.")
    return arch, str(weights), None


def _hub_file(arch: str | None, tag: str | None) -> tuple[str, str] | None:
    """Where the trained weights of a tag, or of the default one, are published."""
    model = catalog.MODELS[arch] if arch else None
    return None if model is None or not model.tags else model.tags[tag or str(model.default_tag)].hub_file


def _backbone_source(trained: TrainedWeights | None, weights: Weights, pretrained: bool) -> Weights | TrainedWeights:
    """Where the weights of a model's backbone are: given, beside the projector, published, or nowhere."""
    if weights is not None:
        return weights
    if trained is not None and trained.backbone:
        return trained
    if trained is not None and not pretrained:
        raise InputError(
            "A trained projector on a random backbone gives meaningless features. Give backbone_weights, or "
            'pretrained=True, or backbone_weights="random" if this is really meant.'
        )
    return None if pretrained else RANDOM


def _find_backbone(name: str, levels: Sequence[int] | None, of_authors: bool = False) -> BackboneSpec:
    if name not in catalog.BACKBONES:
        return BackboneSpec(name, *find_timm(name, levels, of_authors))
    entry = catalog.BACKBONES[name]
    if levels is not None and tuple(levels) != entry.blocks:
        if entry.family == "efficientnet":
            raise InputError(f"{name} is convolutional: its levels cannot be changed.")
        entry = with_levels(entry, check_levels(levels, max(entry.blocks)), entry.channels[0])
    return BackboneSpec(name, entry)


def _sized(
    backbone: BackboneSpec, img_size: int | tuple[int, int] | None, trained: TrainedWeights | None = None
) -> BackboneSpec:
    """The backbone with the input size asked for, else that of a header, which must be possible."""
    entry = backbone.entry
    of_header = trained.img_size if trained and img_size is None else None
    try:
        size = check_size(of_header or (entry.img_size if img_size is None else img_size), entry.patch_size)
        if backbone.encoder is not None:
            backbone.encoder.try_out(size)
    except InputError as error:
        if trained is None or of_header is None:
            raise
        raise trained.header_error(f"the img_size of its header cannot be used. {error}") from error
    return replace(backbone, entry=replace(entry, img_size=size))


def _find_weights(
    backbone: BackboneSpec, weights: Weights | TrainedWeights | StateDict, cache_dir: AnyPath | None
) -> Path | TrainedWeights | StateDict | None:
    entry = backbone.entry
    if isinstance(weights, (TrainedWeights, Mapping)):
        return weights
    if weights == RANDOM:
        return None
    if weights is None or (weights == entry.tag and entry.tag):
        return _published(backbone.name, entry, cache_dir)
    return hub.resolve(weights, candidates=(_WEIGHTS, entry.original_file), cache_dir=cache_dir)


def _published(name: str, entry: catalog.Backbone, cache_dir: AnyPath | None) -> Path:
    """The file of a backbone's published weights, from the package, the cache or the Hub."""
    if entry.asset is not None:
        return catalog.ASSETS / entry.asset
    _check_fetchable(name, entry)
    assert entry.hub_file is not None
    return hub.resolve(catalog.place(*entry.hub_file), cache_dir=cache_dir)


def _check_fetchable(name: str, entry: catalog.Backbone) -> None:
    """Make sure that the weights of a backbone can be had without the user's help."""
    if entry.family == "timm" and entry.hub_file is None:
        raise InputError(f'timm names no published weights of {name}. Give their path, or "random" if that is meant.')
    if entry.asset is None and entry.hub_file is None:
        raise InputError(
            f"The weights of {name} (license: {entry.license}) are never fetched by themselves. If the license allows "
            f"your use, get {entry.original_file} from {entry.origin} and give its path as the weights of the "
            f'backbone: backbone_weights="/path/to/{entry.original_file}" of create_model.'
        )
