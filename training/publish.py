"""Publish a trained projector as a Hub repository in timm's format: ``python -m training.publish CHECKPOINT --repo owner/name``.

The repository is private unless ``--public`` is said. It holds one model: config.json, model.safetensors and README.md,
the model card. The backbone is published with the projector where ``--whole-model`` or ``--backbone-weights`` asks for
it, or where the checkpoint holds it; otherwise a model loads the backbone's own published weights, whose terms and
whose host stay those of their authors. A backbone of timm without published weights must come along. ImageBind's
weights, which are not for commercial use, come along only when asked for.

``--folder DIR`` writes the same files to a folder, which ``local-dir:DIR`` loads; without ``--repo`` nothing is sent.
Whatever breaks off is continued by the same command: files that the repository has are not sent again, and where it has
them all there is no new commit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from adfeatures import catalog
from adfeatures.backbones import check_size
from adfeatures.checkpoints import atomic_path, hash_file, save_checkpoint, sha256
from adfeatures.errors import AdfeaturesError, CheckpointError, InputError
from adfeatures.factory import timm_cfg
from adfeatures.hub import download
from adfeatures.loading import BACKBONE, PROJECTOR, RANDOM, Trained, load_backbone, load_trained

from . import console
from .publishing.model_card import Publication, model_card

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_OURS = {CONFIG, WEIGHTS, CARD, ".gitattributes"}
_REAL_IAD, _REAL_IAD_LICENSE = "Real-IAD", "CC-BY-NC-SA-4.0"
# Entries of a run's config that name files of the machine it ran on.
_LOCAL = ("output", "root", "validation_root", "filter_list", "centers", "backbone_weights")
# HfHubHTTPError derives from the error class of whichever HTTP library this version of huggingface_hub uses.
_FAILURES: tuple[type[BaseException], ...] = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)


class PublishError(AdfeaturesError):
    """A repository that cannot be published to: refused, taken, or out of reach."""


@dataclass(frozen=True)
class Wish:
    """What shall be published, and what its owner says of it.

    Attributes:
        checkpoint: The file, or where it is, as ``create_model`` takes weights.
        name: Model that the weights are for, with or without tag, where the file does not say.
        whole_model: Publish the backbone as well.
        backbone_weights: The weights of the backbone that it was trained with, where those are not the published ones.
        license: The Hub's identifier of the license that the owner gives the weights.
        data: Name of the training data, where it is not what the file says.
        data_license: Its license.
        repo: The repository, for the model card; None for a folder.
    """

    checkpoint: str
    name: str | None = None
    whole_model: bool = False
    backbone_weights: str | None = None
    license: str | None = None
    data: str | None = None
    data_license: str | None = None
    repo: str | None = None


def write_repository(wish: Wish, folder: Path) -> list[Path]:
    """Write the files of a repository: config.json, model.safetensors and README.md.

    The same wish always gives the same bytes.

    Raises:
        CheckpointError: If the checkpoint is not a trained projector.
        UnknownNameError: For an unknown model.
        InputError: If what is asked for contradicts the checkpoint, the rights of others, or what is in the folder.
        DownloadError: If weights of the backbone are asked for and cannot be fetched.
    """
    trained = load_trained(wish.checkpoint, (WEIGHTS,), None)
    arch, tag = _model(trained, wish.name)
    if tag and (wish.license or wish.data):
        raise InputError(f"{arch}.{tag} was trained by others: leave its license and its data as they are.")
    if wish.data_license and not wish.data:
        raise InputError("Say what data it is that has these terms: --data NAME.")
    name = f"{arch}.{tag}" if tag else arch
    _check_folder(folder, name)
    backbone, entry = trained.find_backbone(arch)
    check_size(entry.img_size, entry.patch_size)
    trained.check_projector(entry.channels)
    state = _backbone_state(trained, backbone, entry, wish)
    data, data_license = _training_data(trained, arch, tag, wish)
    published = Publication(
        arch=arch,
        tag=tag,
        backbone=backbone,
        entry=entry,
        metadata=_metadata(trained, name, tag, entry),
        metrics=trained.checkpoint.metrics,
        whole=bool(state),
        place=f"hf-hub:{wish.repo}" if wish.repo else "local-dir:/path/to/this/folder",
        title=wish.repo.partition("/")[2] if wish.repo else name,
        data=data,
        data_license=data_license,
        license=wish.license,
    )
    tensors = {f"{PROJECTOR}{key}": value for key, value in trained.projector.items()}
    tensors |= {f"{BACKBONE}{key}": value for key, value in state.items()}
    _write_text(folder / CONFIG, json.dumps(_config(published), indent=2) + "\n")
    save_checkpoint(folder / WEIGHTS, tensors, metrics=published.metrics, metadata=published.metadata)
    _write_text(folder / CARD, model_card(published))
    return [folder / name for name in (CONFIG, WEIGHTS, CARD)]


def _model(trained: Trained, name: str | None) -> tuple[str, str | None]:
    """The model and the tag of a checkpoint, as its header or else the user says."""
    found, asked = trained.model, catalog.find_model(name) if name else None
    if found is None and asked is None:
        raise CheckpointError(
            f"{trained.source} does not say which model it is for. Say it: --name adpretrain_dinov2_base for weights that you trained, "
            "--name adpretrain_dinov2_base.realiad_norm for a file of the authors of ADPretrain."
        )
    if found and asked and (found[0] != asked[0] or (found[1] and asked[1] and found[1] != asked[1])):
        raise CheckpointError(
            f"{trained.source} is a checkpoint of {trained.checkpoint.metadata['model']}, not of {name}."
        )
    arch, tag = asked or found  # type: ignore[misc]
    tag = tag or (found and found[1])
    if catalog.MODELS[arch].scoring != "feature_norm":
        raise InputError(f"{arch} has no projector, so there is nothing to publish.")
    if tag and _training(trained):
        raise InputError(
            f"{trained.source} was trained by python -m training.pretrain, so it is not {arch}.{tag}: leave out the tag."
        )
    return arch, tag


def _backbone_state(trained: Trained, name: str, entry: catalog.Backbone, wish: Wish) -> dict[str, Tensor]:
    """The weights of the backbone, empty where they are left to their own publisher."""
    given, used, published = wish.backbone_weights, _training(trained).get("backbone_weights"), (None, entry.tag)
    if given == RANDOM or (given is None and used == RANDOM):
        raise InputError(
            "A projector of a random backbone is of no use to others. Give the weights that it had: --backbone-weights PATH."
        )
    if given is None and trained.backbone:
        weights: Any = trained
    elif given not in published:
        weights = given
    # Any file may be called as timm's own are.
    elif given is None and used not in published and (entry.family == "timm" or Path(used).name != entry.original_file):
        raise InputError(
            f"{trained.source} was trained on the weights {used!r} of {name}. Publish them with it: --backbone-weights PATH. "
            f"Or say that they are the published ones: --backbone-weights {entry.tag}."
        )
    elif wish.whole_model:
        weights = None
    elif entry.family == "timm" and entry.hub_file is None:
        raise InputError(f"timm has no published weights of {name}, so they must come along: --backbone-weights PATH.")
    else:
        return {}
    if wish.license and "NC" in entry.license.upper() and "nc" not in wish.license.split("-"):
        raise InputError(f"The backbone is licensed {entry.license}, so the whole model cannot be {wish.license}.")
    backbone, _ = load_backbone(name, weights=weights, levels=entry.blocks, img_size=entry.img_size)
    return trained.backbone if weights is trained else backbone.state_dict()


def _training(trained: Trained) -> dict[str, Any]:
    """The config of the run that made a checkpoint, empty where it is not known."""
    facts = trained.fact("training")
    if facts is not None and not isinstance(facts, dict):
        raise CheckpointError(
            f"{trained.source}: the training of its header must be the config of a run, got {facts!r}."
        )
    return facts or {}


def _training_data(trained: Trained, arch: str, tag: str | None, wish: Wish) -> tuple[str, str]:
    """The name of the data and its license, both "" where nobody said."""
    if tag:
        return catalog.MODELS[arch].tags[tag].training_data, catalog.MODELS[arch].tags[tag].training_data_license
    data = wish.data or trained.checkpoint.metadata.get("training_data", "")
    return data, wish.data_license or (_REAL_IAD_LICENSE if data == _REAL_IAD else "")


def _metadata(trained: Trained, name: str, tag: str | None, entry: catalog.Backbone) -> dict[str, str]:
    """The header of the published file. Folders of the machine that it was trained on are left out."""
    facts = dict(trained.checkpoint.metadata)
    if tag:
        method = {"norm": "FeatureNorm", "angle": "PatchCore"}[tag.rpartition("_")[2]]
        origin = {"source": Path(trained.source).name, "source_sha256": sha256(trained.source)}
        facts = {
            **origin,
            "selected_by": f"AUPRO of {method} on the test set of MVTec AD, by the authors of ADPretrain",
            **facts,
        }
    if training := _training(trained):
        facts["training"] = json.dumps(
            {key: Path(value).name if key in _LOCAL and value else value for key, value in training.items()}
        )
    ours = {
        "format": "adfeatures",
        "model": name,
        "num_heads": str(trained.num_heads),
        "img_size": json.dumps(entry.img_size),
    }
    return {**facts, **ours}


def _config(published: Publication) -> dict[str, Any]:
    """The config.json of timm: its architecture is our entry point, and everything else is in the header of the weights."""
    cfg = timm_cfg(published.arch, published.tag, published.entry, published.entry.img_size)
    elsewhere = ("architecture", "hf_hub_id", "hf_hub_filename", "file")
    kept = {
        key: value
        for key, value in {"license": published.license, **cfg}.items()
        if value is not None and key not in elsewhere
    }
    return {
        "architecture": published.arch,
        "num_classes": 0,
        "num_features": published.entry.channels[-1],
        "pretrained_cfg": kept,
    }


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _check_folder(folder: Path, name: str) -> None:
    """Refuse to overwrite anything but the same model."""
    if (folder / CONFIG).is_file():
        _check_model((folder / CONFIG).read_bytes(), name, f"The folder {folder}")
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise InputError(f"The folder {folder} is not empty and holds no model. Choose an empty or a new one.")
    elif folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file. Choose a folder.")


def _check_model(config: bytes, name: str, where: str) -> None:
    if (found := _model_of(config)) != name:
        raise InputError(
            f"{where} holds {found}, which {name} would overwrite. Choose another name: one model a repository."
        )


def _model_of(config: bytes) -> str:
    """The model, with its tag, that a config.json is for."""
    try:
        facts = json.loads(config)
        tag = facts.get("pretrained_cfg", {}).get("tag")
        return f"{facts['architecture']}.{tag}" if tag else str(facts["architecture"])
    except (ValueError, LookupError, AttributeError):
        return "something else"


# The Hub


def upload(files: Sequence[Path], repo: str, *, public: bool = False) -> str:
    """Make a repository hold these files, in one commit; what it has already is not sent.

    Args:
        files: Files of ``write_repository``.
        repo: owner/name. It is made when there is none.
        public: Make it public; and the consent to publish to one that is public.

    Returns:
        What was done.

    Raises:
        PublishError: If the Hub refuses or cannot be reached, or the repository holds something else. Nothing is half
            published then.
    """
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    if get_token() is None:
        raise PublishError(
            f"Publishing to {endpoint} needs a token with write access. Run `hf auth login`, or set HF_TOKEN."
        )
    try:
        return _upload(HfApi(endpoint=endpoint), files, repo, public)
    except AdfeaturesError:
        raise
    except _FAILURES as error:
        reason, advice = _diagnose(error, repo)
        raise PublishError(f"Cannot publish to {repo} at {endpoint}: {reason}. {advice}.") from error


def _upload(api: HfApi, files: Sequence[Path], repo: str, public: bool) -> str:
    try:
        info = api.model_info(repo, files_metadata=True)
        _check_repository(info, repo, files, public)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=not public)
        info = api.model_info(repo, files_metadata=True)
    held = {sibling.rfilename: sibling for sibling in info.siblings or []}
    changed = [path for path in files if not _same(path, held.get(path.name))]
    kind = "private" if info.private else "public"
    if not changed:
        return f"{repo} ({kind}) has it all: nothing was sent"
    operations = [CommitOperationAdd(path.name, str(path)) for path in changed]
    api.create_commit(
        repo, operations, commit_message=f"Publish {', '.join(path.name for path in changed)}", parent_commit=info.sha
    )
    kept = ", private as it was: its settings page can make it public" if public and info.private else f", {kind}"
    return f"sent {', '.join(path.name for path in changed)} to {api.endpoint}/{repo}{kept}"


def _check_repository(info: ModelInfo, repo: str, files: Sequence[Path], public: bool) -> None:
    names = {sibling.rfilename for sibling in info.siblings or []}
    if CONFIG in names:
        ours = next(path for path in files if path.name == CONFIG).read_bytes()
        _check_model(
            download(repo, CONFIG, revision=info.sha or "main").read_bytes(), _model_of(ours), f"The repository {repo}"
        )
    elif names - _OURS:
        raise PublishError(
            f"The repository {repo} holds other things: {', '.join(sorted(names - _OURS)[:10])}. Choose another name."
        )
    if not (info.private or public):
        raise PublishError(
            f"The repository {repo} is public. Say --public if that is meant, or make it private on its settings page."
        )


def _same(path: Path, sibling: Any) -> bool:
    if sibling is None:
        return False
    if sibling.lfs is not None:
        return bool(sibling.lfs.sha256 == sha256(path))
    blob = hash_file(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))
    return bool(sibling.blob_id == blob)


def _diagnose(error: BaseException, repo: str) -> tuple[str, str]:
    """The reason and the next step for an error of huggingface_hub."""
    while getattr(error, "response", None) is None and error.__cause__ is not None:
        error = error.__cause__  # huggingface_hub wraps what happens to a large file, and what it hears of a model card
    status = getattr(getattr(error, "response", None), "status_code", 0)
    again = "What was sent is kept: run the same command again"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set", "Unset it, or give --folder to publish to a folder"
    if not status:
        detail = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        return f"the connection failed ({detail})", f"{again}. Where Xet storage is blocked, set HF_HUB_DISABLE_XET=1"
    reasons = {
        401: ("the token is not valid", "Run `hf auth login`, or set HF_TOKEN to one with write access"),
        403: (
            f"the token may not write to {repo.partition('/')[0]}",
            "Name an owner that it may write for, or make a token with write access",
        ),
        409: ("the name is taken by a repository that the token cannot see", "Choose another name"),
        412: ("somebody else has changed it meanwhile", "Look at what was changed, then run the same command again"),
        429: ("the Hub asks for fewer requests", f"Wait some minutes. {again}"),
    }
    reason, advice = reasons.get(
        status,
        ("the Hub refuses", "Mend that, and run the same command again") if status < 500 else ("the Hub failed", again),
    )
    said = " ".join(str(getattr(error, "server_message", None) or "").split())
    return f"{reason} (HTTP {status}{f': {said}' if said else ''})", advice


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.publish",
        description="Publish a trained projector as a Hub repository in timm's format.",
    )
    parser.add_argument("checkpoint", help="path, local-dir:/folder or hf-hub:owner/repo[:path/in/repo]")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="repository to publish to; without it nothing is sent")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="write the files to this folder (too)")
    parser.add_argument(
        "--dry-run", action="store_true", help="write the files and say what would be sent, but send nothing"
    )
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", help="make the repository private (the default)")
    visibility.add_argument("--public", action="store_true", help="make the repository public")
    parser.add_argument(
        "--name",
        metavar="MODEL",
        help="model of the weights, where the file does not say; with tag for the authors' files",
    )
    parser.add_argument("--whole-model", action="store_true", help="publish the backbone as well")
    parser.add_argument(
        "--backbone-weights", metavar="WEIGHTS", help="weights of the backbone to publish, where not its published ones"
    )
    parser.add_argument(
        "--license", metavar="ID", help="license that you give the weights, as the Hub calls it: apache-2.0, say"
    )
    parser.add_argument("--data", metavar="NAME", help="what the weights were trained on, where that is not Real-IAD")
    parser.add_argument("--data-license", metavar="TERMS", help="its license")
    options = parser.parse_args(arguments)
    return console.run("publish", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if not (options.repo or options.folder or options.dry_run):
        raise InputError(
            "Say where to: --repo OWNER/NAME, or --folder DIR, or --dry-run to see what would be published."
        )
    if options.repo:
        try:
            validate_repo_id(options.repo)
        except ValueError as error:
            raise InputError(f"{options.repo!r} is not the name of a repository: {error}") from error
        if "/" not in options.repo:
            raise InputError(f"{options.repo!r} does not say whose repository it is: write OWNER/{options.repo}.")
    wish = Wish(**{field: getattr(options, field) for field in Wish.__dataclass_fields__})
    with tempfile.TemporaryDirectory() as temporary:
        files = write_repository(wish, options.folder or Path(temporary))
        for path in files:
            print(f"{path.name}: {path.stat().st_size} bytes, sha256 {sha256(path)}")
        if options.repo and options.dry_run:
            print(f"would be sent to {options.repo}, {'public' if options.public else 'private'}; nothing was sent")
        elif options.repo:
            print(upload(files, options.repo, public=options.public))
        if options.folder:
            print(f'written to {options.folder}: weights="local-dir:{options.folder}" loads it')


if __name__ == "__main__":
    sys.exit(main())
