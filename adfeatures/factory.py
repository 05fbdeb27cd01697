"""Building models from names: create_model, create_transform, registration with timm, and the entry points of torch.hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from . import catalog
from .catalog import DEFAULT_MODEL, find_model
from .errors import CheckpointError, InputError, UnknownNameError
from .extractor import FeatureExtractor, Images
from .images import build_transform
from .loading import (
    ASSETS,
    RANDOM,
    Trained,
    Weights,
    catalog_files,
    check_fetchable,
    convert_checkpoint,
    load_backbone,
    load_trained,
)
from .projector import ResidualProjector

__all__ = [
    "catalog_files",
    "convert_checkpoint",
    "create_model",
    "create_transform",
    "load_backbone",
    "register_with_timm",
]


def create_model(
    name: str = DEFAULT_MODEL,
    *,
    pretrained: bool = True,
    weights: Weights = None,
    backbone_weights: Weights = None,
    references: Images | None = None,
    img_size: int | tuple[int, int] | None = None,
    out_indices: Sequence[int] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> FeatureExtractor:
    """Create a feature extractor: in eval mode, with frozen parameters, on the CPU.

    Args:
        name: A name of ``list_models``, with or without ``.tag``. Without a name, the header of the weights says which
            model it is.
        pretrained: Take from the catalog what is not given here. False leaves random what is not given.
        weights: Trained weights: a tag, a path, "hf-hub:owner/repo[@revision][:path/in/repo]" or "local-dir:/path".
        backbone_weights: Weights of the backbone in the same forms, or "random".
        references: Normal images, a folder of them, or a file made by ``save_references``.
        img_size: Input size in pixels, one side or (H, W), in multiples of the patch. The default is that of the
            weights' header, else the catalog's.
        out_indices: Levels that the model returns, counted from 0. The default is all.
        cache_dir: Folder of downloaded weights. The default is that of huggingface_hub.

    Raises:
        UnknownNameError: For an unknown model or tag.
        InputError: For arguments that contradict each other or the model.
        DownloadError: If weights cannot be found or fetched.
        CheckpointError: If weights are damaged or those of another model.
    """
    register_with_timm()
    arch, tag = find_model(name)
    tag, weights = _choose_tag(arch, tag, weights, pretrained)
    if pretrained and weights is None and backbone_weights is None:
        _check_fetchable(arch)
    trained = _load_trained(arch, tag, weights, cache_dir)
    if trained is not None:
        arch, tag = _model_of(trained, None if name == DEFAULT_MODEL else (arch, tag))
    elif not catalog.MODELS[arch].tags and (pretrained or not catalog.MODELS[arch].backbone):
        raise InputError(f"{catalog.must_be_given(arch)}.")
    backbone_name = catalog.MODELS[arch].backbone
    backbone_name, entry = (
        trained.find_backbone(arch) if trained is not None else (backbone_name, catalog.BACKBONES[backbone_name])
    )
    backbone, built = load_backbone(
        backbone_name,
        weights=_backbone_source(trained, backbone_weights, pretrained),
        img_size=entry.img_size if img_size is None else img_size,
        levels=entry.blocks,
        cache_dir=cache_dir,
    )
    extractor = FeatureExtractor(
        backbone,
        _create_projector(arch, entry.channels, trained),
        name=f"{arch}.{tag}" if tag else arch,
        img_size=built.img_size,
        pretrained_cfg=timm_cfg(arch, tag, entry, built.img_size),
        out_indices=out_indices,
        residual_scales=catalog.MODELS[arch].residual_scales,
    )
    if references is not None:
        _set_references(extractor, references)
    return extractor


def create_transform(model: str | FeatureExtractor, *, preset: str = "squash") -> Callable[[Image.Image], Tensor]:
    """The preprocessing of a model: PIL image to a normalized float tensor (3, H, W).

    Args:
        model: A model or its name.
        preset: "squash" resizes the whole image to the model's size; "resize224_crop224" and "resize256_crop224" are
            the two geometries of the original, which lose the borders of images that are not square.

    Raises:
        UnknownNameError: For an unknown model or preset.
    """
    if isinstance(model, str):
        arch, _ = find_model(model)
        if not catalog.MODELS[arch].backbone:
            raise InputError(
                f"The preprocessing of {arch} stands in the header of its weights: give the created model, not its name."
            )
        entry = catalog.BACKBONES[catalog.MODELS[arch].backbone]
        size, (mean, std) = entry.img_size, entry.normalization
    else:
        size, mean, std = model.img_size, model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    return build_transform(size, mean, std, preset=preset)


def _choose_tag(arch: str, tag: str | None, weights: Weights, pretrained: bool) -> tuple[str | None, Weights]:
    """Settle which tag is meant, and where its weights come from: None for the catalog's place, or nothing where both are None."""
    tags = catalog.MODELS[arch].tags
    if isinstance(weights, str) and weights in tags:
        if tag not in (None, weights):
            raise InputError(f"The name asks for {arch}.{tag} and weights for {weights!r}: leave out one of them.")
        return weights, None
    if isinstance(weights, str) and weights.isidentifier() and not Path(weights).exists():
        raise UnknownNameError(catalog.unknown_tag(arch, weights))
    if weights is None and pretrained:
        return tag or catalog.MODELS[arch].default_tag, None
    return (tag if weights is not None else None), weights


def _check_fetchable(arch: str) -> None:
    """Refuse before anything is fetched."""
    if catalog.MODELS[arch].backbone:
        check_fetchable(catalog.MODELS[arch].backbone, catalog.BACKBONES[catalog.MODELS[arch].backbone])


def _load_trained(
    arch: str, tag: str | None, weights: Weights, cache_dir: str | os.PathLike[str] | None
) -> Trained | None:
    """The trained weights of a model, None where they shall be random or lie in the catalog's backbone."""
    tags = catalog.MODELS[arch].tags
    tag = tag or (catalog.MODELS[arch].default_tag if weights is not None else None)
    hub_file = tags[tag].hub_file if tag else None
    if weights is None:
        return load_trained("hf-hub:{}:{}".format(*hub_file), (), cache_dir) if hub_file else None
    return load_trained(weights, (hub_file[1], "model.safetensors") if hub_file else ("model.safetensors",), cache_dir)


def _model_of(trained: Trained, asked: tuple[str, str | None] | None) -> tuple[str, str | None]:
    """The model and the tag that weights are for: those asked for, else those that the header names.

    Raises:
        CheckpointError: If the two contradict each other, or there is neither.
    """
    found = trained.model
    if asked is None:
        if found is None:
            raise CheckpointError(
                f"{trained.source} does not say which model it is for. Name it: create_model(NAME, weights=...)."
            )
        return found
    if found is not None and found[0] != asked[0]:
        made_for = trained.checkpoint.metadata["model"]
        raise CheckpointError(
            f"{trained.source} is a checkpoint of {made_for}, not of {asked[0]}. Create that model instead."
        )
    return asked[0], asked[1] or (found and found[1])


def _backbone_source(trained: Trained | None, weights: Weights, pretrained: bool) -> Any:
    """What ``load_backbone`` shall take: what is given, else what stands beside the projector, else the published weights."""
    if weights is not None:
        return weights
    if trained is not None and trained.backbone:
        return trained
    if pretrained:
        return None
    if trained is not None:
        raise InputError(
            "A trained projector on a random backbone gives meaningless features. Give backbone_weights, or pretrained=True, "
            'or backbone_weights="random" if this is really meant.'
        )
    return RANDOM


def _create_projector(arch: str, channels: Sequence[int], trained: Trained | None) -> ResidualProjector | None:
    if trained is not None:
        return trained.create_projector(channels)
    return ResidualProjector(channels) if catalog.MODELS[arch].scoring == "feature_norm" else None


def _set_references(extractor: FeatureExtractor, references: Images) -> None:
    is_bank = isinstance(references, (str, os.PathLike)) and Path(references).suffix == ".safetensors"
    if is_bank:
        extractor.load_references(references)  # type: ignore[arg-type]
    else:
        extractor.set_references(references)


def timm_cfg(arch: str, tag: str | None, entry: catalog.Backbone, size: tuple[int, int]) -> dict[str, Any]:
    """timm's description of a model: its preprocessing, and where weights of a tag come from."""
    mean, std = entry.normalization
    return {
        "architecture": arch,
        "tag": tag,
        "input_size": (3, *size),
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": mean,
        "std": std,
        "num_classes": 0,
        **(_weights_cfg(catalog.MODELS[arch].tags[tag], entry.asset) if tag else {}),
    }


def _weights_cfg(tag: catalog.Tag, asset: str | None) -> dict[str, Any]:
    place = (
        dict(zip(("hf_hub_id", "hf_hub_filename"), tag.hub_file, strict=True))
        if tag.hub_file
        else {"file": str(ASSETS / str(asset))}
    )
    return {"license": tag.license, "origin_url": tag.origin, **place}


# timm

_TIMM_DEFAULTS = {"num_classes": 0, "in_chans": 3}


def register_with_timm() -> None:
    """Make every model known to timm: ``timm.create_model(name, ...)`` then returns the same extractor.

    Doing it twice does no harm.
    """
    for entry_point in ENTRY_POINTS:
        if not timm.is_model(entry_point.__name__):
            register_model(entry_point)


def _entry_point(
    arch: str,
    *,
    pretrained: bool = True,
    weights: Weights = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    features_only: bool = False,
    **kwargs: Any,
) -> FeatureExtractor:
    """Translate the arguments that timm passes; with or without ``features_only`` the result is the same."""
    for argument, only in _TIMM_DEFAULTS.items():
        if kwargs.pop(argument, None) not in (None, only):
            raise InputError(
                f"{arch} takes {argument}={only} only: it extracts features of RGB images and has no classifier."
            )
    name = arch
    if isinstance(pretrained_cfg, str):
        name = f"{arch}.{pretrained_cfg}"
    elif pretrained_cfg is not None and pretrained and weights is None:
        weights = _timm_source(pretrained_cfg if isinstance(pretrained_cfg, Mapping) else pretrained_cfg.to_dict())
    if pretrained and weights is None and pretrained_cfg_overlay:
        weights = _timm_source(pretrained_cfg_overlay)
    return create_model(
        name, pretrained=pretrained, weights=weights, **{k: v for k, v in kwargs.items() if v is not None}
    )


def _timm_source(cfg: Mapping[str, Any]) -> Weights:
    if cfg.get("source") == "local-dir":
        return f"local-dir:{cfg['file']}"
    if cfg.get("file"):
        return cfg["file"]
    if not cfg.get("hf_hub_id"):
        return None
    return ":".join(filter(None, ("hf-hub", cfg["hf_hub_id"], cfg.get("hf_hub_filename"))))


def adpretrain_dinov2_base(**kwargs: Any) -> FeatureExtractor:
    """ADPretrain on DINOv2 ViT-B/14: 4 levels of 768 channels. Arguments as for ``create_model``."""
    return _entry_point("adpretrain_dinov2_base", **kwargs)


def adpretrain_dinov2_large(**kwargs: Any) -> FeatureExtractor:
    """ADPretrain on DINOv2 ViT-L/14: 4 levels of 1024 channels. Arguments as for ``create_model``."""
    return _entry_point("adpretrain_dinov2_large", **kwargs)


def adpretrain_clip_base(**kwargs: Any) -> FeatureExtractor:
    """ADPretrain on OpenAI CLIP ViT-B/16: 4 levels of 768 channels. Arguments as for ``create_model``."""
    return _entry_point("adpretrain_clip_base", **kwargs)


def adpretrain_clip_large(**kwargs: Any) -> FeatureExtractor:
    """ADPretrain on OpenAI CLIP ViT-L/14: 4 levels of 1024 channels. Arguments as for ``create_model``."""
    return _entry_point("adpretrain_clip_large", **kwargs)


def adpretrain_imagebind_huge(**kwargs: Any) -> FeatureExtractor:
    """ADPretrain on ImageBind ViT-H/14, non-commercial: 4 levels of 1280 channels.

    Arguments as for ``create_model``.
    """
    return _entry_point("adpretrain_imagebind_huge", **kwargs)


def adpretrain_efficientnet_lite(**kwargs: Any) -> FeatureExtractor:
    """A projector that you trained on the embedded backbone: ``weights`` must be given.

    Arguments as for ``create_model``.
    """
    return _entry_point("adpretrain_efficientnet_lite", **kwargs)


def adpretrain_timm(**kwargs: Any) -> FeatureExtractor:
    """A projector that you trained on a backbone of timm, which the header of ``weights`` names.

    Arguments as for ``create_model``.
    """
    return _entry_point("adpretrain_timm", **kwargs)


def residual_lite(**kwargs: Any) -> FeatureExtractor:
    """The embedded default: cosine residuals of EfficientNet-Lite, no projector, no download.

    Arguments as for ``create_model``.
    """
    return _entry_point("residual_lite", **kwargs)


ENTRY_POINTS = (
    adpretrain_dinov2_base,
    adpretrain_dinov2_large,
    adpretrain_clip_base,
    adpretrain_clip_large,
    adpretrain_imagebind_huge,
    adpretrain_efficientnet_lite,
    adpretrain_timm,
    residual_lite,
)


def _default_cfg(arch: str, tag: str) -> dict[str, Any]:
    entry = catalog.BACKBONES[catalog.MODELS[arch].backbone]
    return {
        key: value
        for key, value in timm_cfg(arch, tag, entry, entry.img_size).items()
        if key not in ("architecture", "tag")
    }


default_cfgs = generate_default_cfgs(
    {f"{arch}.{tag}": _default_cfg(arch, tag) for arch, model in catalog.MODELS.items() for tag in model.tags}
)
