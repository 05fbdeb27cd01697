"""Building models from names: create_model, create_transform, and the entry points of timm and torch.hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor

from . import catalog, predictor
from .backbones import Encoder, StateDict, build_encoder, load_strictly
from .bank_files import load_banks, maker
from .catalog import find_model
from .checkpoints import AnyPath, load_checkpoint, read_state
from .errors import InputError
from .extractor import FeatureExtractor
from .image_files import IMAGE_SUFFIXES
from .images import build_transform
from .learned import LearnedScorer
from .predictor import Images
from .projector import ResidualProjector
from .references import ReferenceBank
from .resolve import BackboneSpec, ModelSpec, Weights, resolve_backbone, resolve_model
from .scoring import CosineRingScorer, FeatureNormScorer, LocalCosineScorer, Scorer
from .trained import TrainedWeights

_logger = logging.getLogger(__name__)


def create_model(
    name: str | None = None,
    *,
    pretrained: bool = True,
    weights: Weights = None,
    backbone_weights: Weights = None,
    backbone: str | None = None,
    references: Images | None = None,
    img_size: int | tuple[int, int] | None = None,
    out_indices: Sequence[int] | None = None,
    cache_dir: AnyPath | None = None,
) -> FeatureExtractor:
    """Create a feature extractor: in eval mode, with frozen parameters, on the CPU.

    Args:
        name: A name of ``list_models``, with or without ``.tag``. The default is the model that the header of
            ``weights`` names, and without weights DEFAULT_MODEL.
        pretrained: Take from the catalog what is not given here. False leaves random what is not given.
        weights: Trained weights: a tag, a path, "hf-hub:owner/repo[@revision][:path/in/repo]" or "local-dir:/path". Of
            a model without projector they are the weights of its backbone.
        backbone_weights: Weights of the backbone in the same forms, or "random".
        backbone: Backbone of ``residual_timm``, the default with it: any vision transformer or convolutional pyramid of
            timm, such as "vit_small_patch14_dinov2.lvd142m", or one of ``catalog.BACKBONES``. "NAME@3,6" chooses
            levels, blocks or stages counted from 1.
        references: Normal images, a folder of them, or a file made by ``save_references``.
        img_size: Input size in pixels, one side or (H, W), in multiples of the patch. The default is that of the
            weights' header, else the catalog's.
        out_indices: Indices of the levels that the model returns, from 0. The default is all.
        cache_dir: Folder of downloaded weights. The default is that of huggingface_hub.

    Raises:
        UnknownNameError: For an unknown model or tag.
        InputError: For arguments that contradict each other or the model.
        DownloadError: If weights cannot be found or fetched.
        CheckpointError: If weights or a bank are damaged or those of another model.
        ReferencesError: If a bank was made by another model.
    """
    register_with_timm()
    banks = _banks(references)
    for bank in banks.values():
        made_by = maker(bank, name, str(references))
        name = made_by if weights is None else name
    spec = resolve_model(
        name,
        weights=weights,
        backbone_weights=backbone_weights,
        backbone=backbone,
        pretrained=pretrained,
        img_size=img_size,
        cache_dir=cache_dir,
    )
    entry = spec.backbone.entry
    extractor = FeatureExtractor(
        build_backbone(spec.backbone),
        build_projector(spec),
        name=spec.name,
        img_size=entry.img_size,
        pretrained_cfg=timm_cfg(spec.arch, spec.tag, entry),
        scorer=create_scorer(spec.arch, spec.tag),
        out_indices=out_indices,
    )
    if banks:
        extractor.hold_references(banks, str(references))
    elif references is not None:
        extractor.set_references(references)
    return extractor


def load_backbone(
    name: str,
    *,
    weights: Weights | StateDict = None,
    img_size: int | tuple[int, int] | None = None,
    levels: Sequence[int] | None = None,
    cache_dir: AnyPath | None = None,
) -> tuple[Encoder, catalog.Backbone]:
    """Create a frozen encoder, in eval mode, on the CPU.

    Args:
        name: A name of ``catalog.BACKBONES``, or that of a vision transformer or convolutional pyramid in timm, with or
            without ``.tag``.
        weights: None for the published ones, "random", a path, "hf-hub:owner/repo[@revision][:path/in/repo]",
            "local-dir:/path", or a state dict.
        img_size: Input size in pixels that must be possible, one side or (H, W). The default is that of the backbone.
        levels: Blocks or stages, counted from 1, whose outputs are returned. The default is that of the backbone.
        cache_dir: Folder of downloaded weights. The default is that of huggingface_hub.

    Returns:
        The module, which maps (B, 3, H, W) to a list of (B, C_l, h_l, w_l), and its description, with the levels and
        the size asked for.

    Raises:
        UnknownNameError: For an unknown backbone.
        InputError: For levels or a size that it cannot have, or weights that must be given by hand.
        DownloadError: If weights cannot be found or fetched.
        CheckpointError: If weights are damaged or those of another backbone.
    """
    spec = resolve_backbone(name, weights=weights, img_size=img_size, levels=levels, cache_dir=cache_dir)
    return build_backbone(spec), spec.entry


def build_backbone(spec: BackboneSpec) -> Encoder:
    """The frozen encoder that a description is of. Its own module, of timm, is used up by that."""
    weights = spec.weights
    if weights is not None and "NC" in spec.entry.license.upper():
        _logger.warning("The weights of %s are licensed %s: not for commercial use.", spec.name, spec.entry.license)
    state, source = (weights.backbone, weights.source) if isinstance(weights, TrainedWeights) else read_state(weights)
    if spec.encoder is None:
        return build_encoder(spec.entry, state, source, depth=max(catalog.BACKBONES[spec.name].blocks))
    spec.encoder.load(state, source)
    return spec.encoder.requires_grad_(False).eval()


def build_projector(spec: ModelSpec) -> ResidualProjector | None:
    """The projector of a model, trained or random; None where it has none."""
    channels = spec.backbone.entry.channels
    if spec.trained is not None and not spec.trained.takes_residuals:
        raise spec.trained.header_error(
            "it was trained without residuals, for an ablation that only training.evaluate can evaluate. "
            "Take weights that were trained without --no-residual."
        )
    if spec.trained is not None:
        return spec.trained.create_projector(channels)
    return ResidualProjector(channels) if catalog.MODELS[spec.arch].scoring == "feature_norm" else None


def create_transform(
    model: str | FeatureExtractor, *, preset: str = predictor.PRESET, product: str | None = None
) -> Callable[[Image.Image], Tensor]:
    """The preprocessing of a model: PIL image to a normalized float tensor (3, H, W).

    16-bit images are read as the references of the model were, see ``FeatureExtractor.bit_depth``.

    Args:
        model: A model or its name.
        preset: "squash" resizes the whole image to the model's size; "resize224_crop224" and "resize256_crop224" are
            the two geometries of the original, which lose the borders of images that are not square.
        product: Whose references, where a model holds several that were read with different bit depths.

    Raises:
        UnknownNameError: For an unknown model, preset or product.
        InputError: For a name that does not tell, several bit depths, or references that were cut.
    """
    if not isinstance(model, str):
        for bank in [model.bank(product)] if product is not None else model.references.values():
            if not bank.record.geometry.is_plain:
                raise InputError(
                    f"The references are of {bank.record.geometry}, which no transform reproduces: call score."
                )
        return predictor.transform_for(model, predictor.bit_depth_of(model, product), preset)
    arch, _ = find_model(model)
    if not catalog.MODELS[arch].backbone:
        raise InputError(f"The preprocessing of {arch} depends on its backbone: give the created model, not its name.")
    entry = catalog.BACKBONES[catalog.MODELS[arch].backbone]
    return build_transform(entry.img_size, *entry.normalization, preset=preset)


def create_scorer(arch: str, tag: str | None) -> Scorer:
    """How a model of the catalog scores; one without a tag as its default tag, any backbone as the embedded default."""
    model = catalog.MODELS[arch]
    if model.scoring == "feature_norm":
        return FeatureNormScorer()
    if model.any_backbone:
        return LocalCosineScorer()
    facts = model.tags[tag or str(model.default_tag)]
    if facts.head is not None:
        return load_learned(catalog.BACKBONES[model.backbone], facts.typical_distances, catalog.ASSETS / facts.head)
    return (LocalCosineScorer if facts.local else CosineRingScorer)(facts.typical_distances)


def load_learned(
    backbone: catalog.Backbone, typical: Sequence[Sequence[float]] | None, head: Path | None
) -> LearnedScorer:
    """The scorer of a model with this backbone, with a trained head, or one that changes nothing yet.

    Args:
        backbone: The backbone.
        typical: As of the scorer.
        head: File of the head.

    Raises:
        CheckpointError: If the file is damaged.
    """
    scorer = LearnedScorer(typical, backbone.normalization, len(backbone.blocks))
    if head is not None:
        load_strictly(scorer.head, load_checkpoint(head).state_dict, str(head))
    return scorer.requires_grad_(False).eval()


def _banks(references: Images | None) -> dict[str, ReferenceBank]:
    """The banks by product, where the references are the file of a bank; none where they are images."""
    if not isinstance(references, (str, os.PathLike)):
        return {}
    path = Path(references)
    suffix = path.suffix.lower()
    is_bank = suffix == ".safetensors" or (os.path.isfile(path) and suffix not in IMAGE_SUFFIXES)
    return load_banks(path) if is_bank else {}


def timm_cfg(arch: str, tag: str | None, entry: catalog.Backbone) -> dict[str, Any]:
    """Timm's description of a model: its preprocessing, and where weights of a tag come from."""
    mean, std = entry.normalization
    cfg: dict[str, Any] = {
        "architecture": arch,
        "tag": tag,
        "input_size": (3, *entry.img_size),
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": mean,
        "std": std,
        "num_classes": 0,
    }
    if tag:
        weights = catalog.MODELS[arch].tags.get(tag, entry)
        cfg |= {"license": weights.license, "origin_url": weights.origin}
        if weights.hub_file:
            cfg["hf_hub_id"], cfg["hf_hub_filename"] = weights.hub_file
        elif entry.asset:
            cfg["file"] = str(catalog.ASSETS / entry.asset)
    return cfg


# timm


def register_with_timm() -> None:
    """Make every model known to timm: ``timm.create_model(name, ...)`` then returns the same extractor.

    ``timm.models.create_feature_extractor`` then takes an extractor within a user's model as one node. Doing it twice
    does no harm.
    """
    register_notrace_module(FeatureExtractor)
    for arch in catalog.MODELS:
        if not timm.is_model(arch):
            register_model(globals()[arch])


def _create_for_timm(
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
    for argument, only in (("num_classes", 0), ("in_chans", 3)):
        if kwargs.pop(argument, None) not in (None, only):
            reason = "it extracts features of RGB images and has no classifier"
            raise InputError(f"{arch} takes {argument}={only} only: {reason}.")
    name = arch
    if isinstance(pretrained_cfg, str):
        name = f"{arch}.{pretrained_cfg}"
    elif pretrained_cfg is not None and pretrained and weights is None:
        weights = _timm_source(pretrained_cfg if isinstance(pretrained_cfg, Mapping) else pretrained_cfg.to_dict())
    if pretrained and weights is None and pretrained_cfg_overlay:
        weights = _timm_source(pretrained_cfg_overlay)
    # timm's copy of the arguments that a repository was made with, which come as arguments too.
    kwargs.pop("pretrained_model_args", None)
    given = {key: value for key, value in kwargs.items() if value is not None}
    return create_model(name, pretrained=pretrained, weights=weights, **given)


def _timm_source(cfg: Mapping[str, Any]) -> Weights:
    if cfg.get("source") == "local-dir":
        return f"local-dir:{cfg['file']}"
    if cfg.get("file"):
        return cfg["file"]
    if not cfg.get("hf_hub_id"):
        return None
    return ":".join(filter(None, ("hf-hub", cfg["hf_hub_id"], cfg.get("hf_hub_filename"))))


def _entry_point(arch: str, summary: str) -> Callable[..., FeatureExtractor]:
    def create(pretrained: bool = True, **kwargs: Any) -> FeatureExtractor:
        return _create_for_timm(arch, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = arch
    create.__doc__ = f"{summary} Arguments as for ``create_model``."
    return create


# What timm and hubconf.py call, one for each model of the catalog.
adpretrain_dinov2_base = _entry_point("adpretrain_dinov2_base", "ADPretrain on DINOv2 ViT-B/14: 4 x 768 channels.")
adpretrain_dinov2_large = _entry_point("adpretrain_dinov2_large", "ADPretrain on DINOv2 ViT-L/14: 4 x 1024 channels.")
adpretrain_clip_base = _entry_point("adpretrain_clip_base", "ADPretrain on OpenAI CLIP ViT-B/16: 4 x 768 channels.")
adpretrain_clip_large = _entry_point("adpretrain_clip_large", "ADPretrain on OpenAI CLIP ViT-L/14: 4 x 1024 channels.")
adpretrain_imagebind_huge = _entry_point(
    "adpretrain_imagebind_huge", "ADPretrain on ImageBind ViT-H/14, non-commercial: 4 x 1280 channels."
)
adpretrain_efficientnet_lite = _entry_point(
    "adpretrain_efficientnet_lite", "A projector that you trained on the embedded backbone: ``weights`` must be given."
)
adpretrain_timm = _entry_point(
    "adpretrain_timm", "A projector that you trained on a backbone of timm, which the header of ``weights`` names."
)
residual_timm = _entry_point(
    "residual_timm", "Cosine residuals of any backbone of timm, no projector: ``backbone`` names it."
)
residual_lite = _entry_point(
    "residual_lite", "The embedded default: cosine residuals of EfficientNet-Lite, no projector, no download."
)
default_cfgs = generate_default_cfgs(
    {
        f"{arch}.{tag}": timm_cfg(arch, tag, catalog.BACKBONES[model.backbone])
        for arch, model in catalog.MODELS.items()
        for tag in model.tags
    }
)
