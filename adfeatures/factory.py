"""Building models from names: create_model, create_transform, registration with timm, and the entry points of torch.hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import timm
import torch
from PIL import Image
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from . import catalog
from .backbones import EfficientNet, VisionTransformer, check_fit, check_size, create_backbone, load_strictly
from .catalog import DEFAULT_MODEL, find_model
from .checkpoints import Checkpoint, convert, load_checkpoint
from .errors import CheckpointError, InputError, UnknownNameError
from .extractor import FeatureExtractor, Images
from .hub import resolve
from .images import build_transform
from .projector import ResidualProjector

_logger = logging.getLogger(__name__)

Weights: TypeAlias = "str | os.PathLike[str] | None"
ASSETS = Path(__file__).parent / "assets"
RANDOM = "random"
PROJECTOR, BACKBONE = "projector.", "backbone."


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
        name: A name of ``list_models``, with or without ``.tag``.
        pretrained: Take from the catalog what is not given here. False leaves random what is not given.
        weights: Trained weights: a tag, a path, "hf-hub:owner/repo[@revision][:path/in/repo]" or "local-dir:/path".
        backbone_weights: Weights of the backbone in the same forms, or "random".
        references: Normal images, a folder of them, or a file made by ``save_references``.
        img_size: Input size in pixels, one side or (H, W), in multiples of the patch. The default is the catalog's.
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
    model = catalog.MODELS[arch]
    tag, weights = _choose_tag(arch, tag, weights, pretrained)
    if pretrained and weights is None and backbone_weights is None:
        _check_fetchable(model.backbone)
    loaded = _load_weights(arch, tag, weights, cache_dir)
    size = check_size(model.img_size if img_size is None else img_size, catalog.BACKBONES[model.backbone].patch_size)
    backbone = _create_backbone(arch, size, loaded, backbone_weights, pretrained, cache_dir)
    extractor = FeatureExtractor(
        backbone,
        _create_projector(arch, backbone, loaded),
        name=f"{arch}.{tag}" if tag else arch,
        img_size=size,
        pretrained_cfg=_pretrained_cfg(arch, tag, size),
        out_indices=out_indices,
        residual_scales=model.residual_scales,
    )
    if references is not None:
        _set_references(extractor, references)
    return extractor


def create_transform(model: str | FeatureExtractor, *, preset: str = "squash") -> Callable[[Image.Image], Tensor]:
    """The preprocessing of a model: PIL image to a normalised float tensor (3, H, W).

    Args:
        model: A model or its name.
        preset: "squash" resizes the whole image to the model's size; "resize224_crop224" and "resize256_crop224" are the two
            geometries of the original, which lose the borders of images that are not square.

    Raises:
        UnknownNameError: For an unknown model or preset.
    """
    if isinstance(model, str):
        arch, _ = find_model(model)
        size, (mean, std) = catalog.MODELS[arch].img_size, catalog.BACKBONES[catalog.MODELS[arch].backbone].normalization
    else:
        size, mean, std = model.img_size, model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    return build_transform(size, mean, std, preset=preset)


def catalog_files(name: str, cache_dir: str | os.PathLike[str] | None = None) -> tuple[list[Path], str]:
    """Find or fetch the weights of a model that the catalog names.

    Returns:
        The files, and what is missing: a message about weights that must be given by hand, or "".

    Raises:
        UnknownNameError: For an unknown model or tag.
        DownloadError: If weights cannot be fetched.
    """
    arch, tag = find_model(name)
    tag = tag or catalog.MODELS[arch].default_tag
    hub_file, files = catalog.MODELS[arch].tags[tag].hub_file, []
    if hub_file is not None:
        files.append(resolve("hf-hub:{}:{}".format(*hub_file), cache_dir=cache_dir))
    try:
        return [*files, _catalog_backbone(arch, cache_dir)], ""
    except InputError as error:
        return files, str(error)


def convert_checkpoint(source: str | os.PathLike[str], destination: str | os.PathLike[str], name: str) -> Checkpoint:
    """Turn a published checkpoint into a safetensors file that says what it is for; the tensors stay as they are.

    Args:
        source: A file as published by the authors, or any other that ``create_model`` reads.
        destination: File ending in .safetensors.
        name: The model that the weights belong to, with or without ``.tag``.

    Raises:
        UnknownNameError: For an unknown model or tag.
        CheckpointError: If the source is damaged or not a checkpoint of that model.
    """
    arch, tag = find_model(name)
    entry = catalog.MODELS[arch]
    if entry.scoring != "feature_norm":
        raise InputError(f"{arch} has no projector, so there is nothing to convert.")
    loaded = _Loaded(load_checkpoint(source), str(source))
    with torch.device("meta"):
        projector = ResidualProjector(catalog.BACKBONES[entry.backbone].channels, loaded.num_heads, loaded.num_keys)
    check_fit(projector, loaded.projector, loaded.source)
    return convert(source, destination, {"model": f"{arch}.{tag}" if tag else arch, "num_heads": str(loaded.num_heads)})


@dataclass(frozen=True)
class _Loaded:
    """A checkpoint and where it came from, for error messages."""

    checkpoint: Checkpoint
    source: str

    def part(self, prefix: str) -> dict[str, Tensor]:
        state = self.checkpoint.state_dict
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    @property
    def projector(self) -> dict[str, Tensor]:
        return self.part(PROJECTOR) or self.checkpoint.state_dict

    @property
    def num_heads(self) -> int:
        # A state dict cannot tell, so it stands in the metadata of every file that is not the authors'.
        return int(self.checkpoint.metadata.get("num_heads", 16))

    @property
    def num_keys(self) -> int:
        return self.projector["l1_proj.x_ref"].shape[1] if "l1_proj.x_ref" in self.projector else 2048


def _choose_tag(arch: str, tag: str | None, weights: Weights, pretrained: bool) -> tuple[str | None, Weights]:
    """Settle which tag is meant, and where its weights come from: None for the catalog's place, or nothing where both are None."""
    tags = catalog.MODELS[arch].tags
    if isinstance(weights, str) and weights in tags:
        if tag not in (None, weights):
            raise InputError(f"The name asks for {arch}.{tag} and weights for {weights!r}: leave out one of them.")
        return weights, None
    if isinstance(weights, str) and weights.isidentifier() and not Path(weights).exists():
        raise UnknownNameError(catalog.unknown(f"tag of {arch}", weights, tags))
    if weights is None and pretrained:
        return tag or catalog.MODELS[arch].default_tag, None
    return (tag if weights is not None else None), weights


def _load_weights(arch: str, tag: str | None, weights: Weights, cache_dir: str | os.PathLike[str] | None) -> _Loaded | None:
    """The trained weights of a model, None where they shall be random or lie in the catalog's backbone."""
    entry = catalog.MODELS[arch].tags[tag or catalog.MODELS[arch].default_tag]
    if weights is None and (tag is None or entry.hub_file is None):
        return None
    candidates = (entry.hub_file[1], "model.safetensors") if entry.hub_file else ("model.safetensors",)
    source = weights if weights is not None else "hf-hub:{}:{}".format(*entry.hub_file)  # type: ignore[misc]
    path = resolve(source, candidates=candidates, cache_dir=cache_dir)
    loaded = _Loaded(load_checkpoint(path), str(path))
    made_for = loaded.checkpoint.metadata.get("model", arch)
    if made_for.partition(".")[0] != arch:
        raise CheckpointError(f"{path} is a checkpoint of {made_for}, not of {arch}. Create that model instead.")
    return loaded


def _create_backbone(
    arch: str,
    size: tuple[int, int],
    loaded: _Loaded | None,
    weights: Weights,
    pretrained: bool,
    cache_dir: str | os.PathLike[str] | None,
) -> VisionTransformer | EfficientNet:
    name = catalog.MODELS[arch].backbone
    entry = catalog.BACKBONES[name]
    source: Any = None
    if weights is None and loaded is not None and loaded.part(BACKBONE):
        source = loaded.part(BACKBONE)
    elif weights is None and pretrained:
        source = _catalog_backbone(arch, cache_dir)
    elif weights is None and loaded is not None:
        raise InputError(
            "A trained projector on a random backbone gives meaningless features. Give backbone_weights, or pretrained=True, "
            'or backbone_weights="random" if this is really meant.'
        )
    elif weights is not None and weights != RANDOM:
        source = _given_backbone(entry, weights, cache_dir)
    if source is not None and "NC" in entry.license:
        _logger.warning("The weights of %s are licensed %s: not for commercial use.", name, entry.license)
    return create_backbone(name, weights=source, img_size=size)


def _catalog_backbone(arch: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    name = catalog.MODELS[arch].backbone
    entry = catalog.BACKBONES[name]
    if entry.asset is not None:
        return ASSETS / entry.asset
    _check_fetchable(name)
    return resolve("hf-hub:{}:{}".format(*entry.hub_file), cache_dir=cache_dir)  # type: ignore[misc]


def _check_fetchable(backbone: str) -> None:
    entry = catalog.BACKBONES[backbone]
    if entry.asset is None and entry.hub_file is None:
        raise InputError(
            f"The weights of {backbone} are licensed {entry.license} and are never fetched by themselves. If the licence allows your use, "
            f'get {entry.original_file} from {entry.origin} and give its path as backbone_weights="/path/to/{entry.original_file}".'
        )


def _given_backbone(entry: catalog.Backbone, weights: Weights, cache_dir: str | os.PathLike[str] | None) -> Any:
    if weights == entry.tag and entry.hub_file is not None:
        weights = "hf-hub:{}:{}".format(*entry.hub_file)
    assert weights is not None
    path = resolve(weights, candidates=("model.safetensors", entry.original_file), cache_dir=cache_dir)
    if path.suffix != ".safetensors":
        return path
    loaded = _Loaded(load_checkpoint(path), str(path))
    return loaded.part(BACKBONE) or path


def _create_projector(arch: str, backbone: VisionTransformer | EfficientNet, loaded: _Loaded | None) -> ResidualProjector | None:
    if loaded is None:
        return ResidualProjector(backbone.channels) if catalog.MODELS[arch].scoring == "feature_norm" else None
    projector = ResidualProjector(backbone.channels, loaded.num_heads, loaded.num_keys)
    load_strictly(projector, loaded.projector, loaded.source)
    return projector


def _set_references(extractor: FeatureExtractor, references: Images) -> None:
    is_bank = isinstance(references, (str, os.PathLike)) and Path(references).suffix == ".safetensors"
    if is_bank:
        extractor.load_references(references)  # type: ignore[arg-type]
    else:
        extractor.set_references(references)


def _pretrained_cfg(arch: str, tag: str | None, size: tuple[int, int]) -> dict[str, Any]:
    model = catalog.MODELS[arch]
    mean, std = catalog.BACKBONES[model.backbone].normalization
    entry = model.tags[tag or model.default_tag]
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
        "license": entry.license,
        "origin_url": entry.origin,
        **_timm_place(entry.hub_file, catalog.BACKBONES[model.backbone].asset),
    }


def _timm_place(hub_file: tuple[str, str] | None, asset: str | None) -> dict[str, str]:
    return {"hf_hub_id": hub_file[0], "hf_hub_filename": hub_file[1]} if hub_file else {"file": str(ASSETS / str(asset))}


# timm

_TIMM_DEFAULTS = {"num_classes": 0, "in_chans": 3}


def register_with_timm() -> None:
    """Make every model known to timm: ``timm.create_model(name, ...)`` then returns the same extractor. Doing it twice does no harm."""
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
            raise InputError(f"{arch} takes {argument}={only} only: it extracts features of RGB images and has no classifier.")
    name = arch
    if isinstance(pretrained_cfg, str):
        name = f"{arch}.{pretrained_cfg}"
    elif pretrained_cfg is not None and pretrained and weights is None:
        weights = _timm_source(pretrained_cfg if isinstance(pretrained_cfg, Mapping) else pretrained_cfg.to_dict())
    if pretrained and weights is None and pretrained_cfg_overlay:
        weights = _timm_source(pretrained_cfg_overlay)
    return create_model(name, pretrained=pretrained, weights=weights, **{k: v for k, v in kwargs.items() if v is not None})


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
    """ADPretrain on ImageBind ViT-H/14, non-commercial: 4 levels of 1280 channels. Arguments as for ``create_model``."""
    return _entry_point("adpretrain_imagebind_huge", **kwargs)


def residual_lite(**kwargs: Any) -> FeatureExtractor:
    """The embedded default: cosine residuals of EfficientNet-Lite, no projector, no download. Arguments as for ``create_model``."""
    return _entry_point("residual_lite", **kwargs)


ENTRY_POINTS = (
    adpretrain_dinov2_base,
    adpretrain_dinov2_large,
    adpretrain_clip_base,
    adpretrain_clip_large,
    adpretrain_imagebind_huge,
    residual_lite,
)
default_cfgs = generate_default_cfgs(
    {
        f"{arch}.{tag}": {
            key: value for key, value in _pretrained_cfg(arch, tag, model.img_size).items() if key not in ("architecture", "tag")
        }
        for arch, model in catalog.MODELS.items()
        for tag in model.tags
    }
)
