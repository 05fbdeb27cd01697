"""The files of a repository: config.json of timm's format, model.safetensors with its header, and the model card."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from adfeatures import catalog, hub
from adfeatures.checkpoints import BACKBONE, Checkpoint, atomic_path, save_checkpoint, sha256
from adfeatures.documents import parse
from adfeatures.errors import CheckpointError, InputError
from adfeatures.factory import build_backbone, timm_cfg
from adfeatures.resolve import RANDOM, BackboneSpec, describe_backbone, resolve_backbone
from adfeatures.trained import PROJECTOR, TrainedWeights

from ..metrics import SELECTED_BY
from .config import PublishConfig
from .model_card import model_card

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
# Entries of a run's config that name files of the machine it ran on.
_LOCAL = ("output", "root", "validation_root", "validation_references", "filter_list", "centers", "backbone_weights")
# Of timm's description, what the header of the weights says.
_IN_HEADER = ("architecture", "hf_hub_id", "hf_hub_filename", "file")


def write_repository(checkpoint: str, config: PublishConfig, folder: Path) -> list[Path]:
    """Write the files of a repository; the same arguments always give the same bytes.

    Args:
        checkpoint: The file, or where it is, as ``create_model`` takes weights.
        config: What to publish of it, and what to say.
        folder: Empty, new, or one that holds the same model.

    Returns:
        Paths of config.json, model.safetensors and README.md.

    Raises:
        CheckpointError: If the checkpoint is not a trained projector.
        UnknownNameError: For an unknown model.
        InputError: If what is asked for contradicts the checkpoint, the rights of others, or what is in the folder.
        DownloadError: If weights of the backbone are asked for and cannot be fetched.
    """
    trained = TrainedWeights.read(hub.resolve(checkpoint, candidates=(WEIGHTS,)))
    arch, tag = _identify(trained, config.name)
    name = f"{arch}.{tag}" if tag else arch
    if tag and (config.license or config.data):
        raise InputError(f"{name} was trained by others: leave its license and its data as they are.")
    if config.data_license and not config.data:
        raise InputError("Say what data it is that has these terms: --data NAME.")
    _check_folder(folder, name)
    backbone = describe_backbone(arch, trained)
    trained.check_projector(backbone.entry.channels)
    tensors = {f"{BACKBONE}{key}": value for key, value in _backbone_state(trained, backbone, config).items()}
    tensors |= {f"{PROJECTOR}{key}": value for key, value in trained.projector.items()}
    published = Checkpoint(tensors, trained.checkpoint.metrics, _header(trained, name, tag, backbone.entry))
    _write_text(folder / CONFIG, json.dumps(_timm_config(arch, tag, backbone.entry, config.license), indent=2) + "\n")
    save_checkpoint(folder / WEIGHTS, tensors, metrics=published.metrics, metadata=published.metadata)
    _write_text(folder / CARD, model_card(config, backbone, published))
    return [folder / file for file in (CONFIG, WEIGHTS, CARD)]


def check_overwrite(config: bytes, name: str, where: str) -> None:
    """Raise InputError for a config.json of another model than that which shall take its place."""
    if (found := model_in(config)) != name:
        raise InputError(
            f"{where} holds {found}, which {name} would overwrite. Choose another name: one model a repository."
        )


def model_in(config: bytes) -> str:
    """The model, with its tag, that a config.json is for."""
    try:
        facts = parse(config, Any)
        tag = facts.get("pretrained_cfg", {}).get("tag")
        return f"{facts['architecture']}.{tag}" if tag else str(facts["architecture"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return "something else"


def _identify(trained: TrainedWeights, name: str | None) -> tuple[str, str | None]:
    """The model and the tag of a checkpoint, as its header or else the user says."""
    if name is None and "model" not in trained.checkpoint.metadata:
        raise CheckpointError(
            f"{trained.source} does not say which model it is for. Say it: --name adpretrain_dinov2_base for weights "
            "that you trained, --name adpretrain_dinov2_base.realiad_norm for a file of the authors of ADPretrain."
        )
    arch, tag = trained.identify(*(catalog.find_model(name) if name else (None, None)))
    if catalog.MODELS[arch].scoring != "feature_norm":
        raise InputError(f"{arch} has no projector, so there is nothing to publish.")
    if tag and _run_config(trained):
        raise InputError(
            f"{trained.source} was trained by python -m training.pretrain, so it is not {arch}.{tag}: "
            "leave out the tag."
        )
    return arch, tag


def _backbone_state(trained: TrainedWeights, backbone: BackboneSpec, config: PublishConfig) -> dict[str, Tensor]:
    """The weights of the backbone, empty where they are left to their own publisher."""
    entry, given, used = backbone.entry, config.backbone_weights, _run_config(trained).get("backbone_weights")
    if (given or used) == RANDOM:
        raise InputError(
            "A projector of a random backbone is of no use to others. Give the weights that it had: "
            "--backbone-weights PATH."
        )
    inside = given is None and bool(trained.backbone)
    elsewhere = not inside and given in (None, entry.tag)
    # Of timm's published weights any file may have the name.
    is_published = used in (None, entry.tag) or (entry.family != "timm" and Path(used).name == entry.original_file)
    if elsewhere and given is None and not is_published:
        raise InputError(
            f"{trained.source} was trained on the weights {used!r} of {backbone.name}. Publish them with it: "
            f"--backbone-weights PATH. Or say that they are the published ones: --backbone-weights {entry.tag}."
        )
    if elsewhere and not config.whole_model:
        if entry.family == "timm" and entry.hub_file is None:
            raise InputError(
                f"timm has no published weights of {backbone.name}, so they must come along: --backbone-weights PATH."
            )
        return {}
    if config.license and "NC" in entry.license.upper() and "nc" not in config.license.split("-"):
        raise InputError(f"The backbone is licensed {entry.license}, so the whole model cannot be {config.license}.")
    if inside:
        build_backbone(replace(backbone, weights=trained))
        return trained.backbone
    resolved = resolve_backbone(backbone.name, weights=given, levels=entry.blocks, img_size=entry.img_size)
    return build_backbone(resolved).state_dict()


def _run_config(trained: TrainedWeights) -> dict[str, Any]:
    """The config of the run that made a checkpoint, empty where it is not known."""
    return trained.fact("training", Annotated[dict[str, Any], "the config of a run"]) or {}


def _header(trained: TrainedWeights, name: str, tag: str | None, entry: catalog.Backbone) -> dict[str, str]:
    """The header of the published file. Folders of the machine that it was trained on are left out."""
    facts = dict(trained.checkpoint.metadata)
    if tag:
        method = SELECTED_BY[tag.rpartition("_")[2]]
        origin = {
            "source": Path(trained.source).name,
            "source_sha256": sha256(trained.source),
            "selected_by": f"AUPRO of {method} on the test set of MVTec AD, by the authors of ADPretrain",
        }
        facts = {**origin, **facts}
    if config := _run_config(trained):
        shown = {key: Path(str(value)).name if key in _LOCAL and value else value for key, value in config.items()}
        facts["training"] = json.dumps(shown)
    heads, size = str(trained.num_heads), json.dumps(entry.img_size)
    return {**facts, "format": "adfeatures", "model": name, "num_heads": heads, "img_size": size}


def _timm_config(arch: str, tag: str | None, entry: catalog.Backbone, license: str | None) -> dict[str, Any]:
    """The config.json: its architecture is our entry point, and everything else is in the header of the weights."""
    facts = {"license": license, **timm_cfg(arch, tag, entry)}
    kept = {key: value for key, value in facts.items() if value is not None and key not in _IN_HEADER}
    return {"architecture": arch, "num_classes": 0, "num_features": entry.channels[-1], "pretrained_cfg": kept}


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _check_folder(folder: Path, name: str) -> None:
    """Refuse to overwrite anything but the same model."""
    if (folder / CONFIG).is_file():
        check_overwrite((folder / CONFIG).read_bytes(), name, f"The folder {folder}")
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise InputError(f"The folder {folder} is not empty and holds no model. Choose an empty or a new one.")
