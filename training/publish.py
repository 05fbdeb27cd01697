"""Publish a trained projector to the Hub in timm's format: ``python -m training.publish CHECKPOINT --repo owner/name``.

The repository is private unless ``--public`` is said. It holds one model: config.json, model.safetensors and README.md,
the model card. The backbone is published with the projector where ``--whole-model`` or ``--backbone-weights`` asks for
it, or where the checkpoint holds it; otherwise a model loads the backbone's own published weights, whose terms and
whose host stay those of their authors. A backbone of timm without published weights must come along. ImageBind's
weights, which are not for commercial use, come along only when asked for.

``--folder DIR`` writes the same files to a folder, which ``local-dir:DIR`` loads; without ``--repo`` nothing is sent.
What breaks off is resumed by the same command: files that the repository has are not sent again, and where it has
them all there is no new commit.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from adfeatures.checkpoints import sha256
from adfeatures.errors import AdfeaturesError, InputError
from adfeatures.locks import only_run_in

from . import console
from .publishing.config import PublishConfig
from .publishing.hub import upload
from .publishing.repository import write_repository

PREFIX = "adfeatures-publish-"


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.publish",
        description="Publish a trained projector as a Hub repository in timm's format.",
    )
    parser.add_argument("checkpoint", help="path, local-dir:/folder or hf-hub:owner/repo[:path/in/repo]")
    console.add_options(parser, PublishConfig)
    parser.add_argument("--folder", type=Path, metavar="DIR", help="write the files to this folder")
    parser.add_argument(
        "--dry-run", action="store_true", help="write the files and show what would be uploaded, but upload nothing"
    )
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", help="make the repository private (the default)")
    visibility.add_argument("--public", action="store_true", help="make the repository public")
    options = parser.parse_args(arguments)
    return console.run("publish", lambda: _publish(options))


def _publish(options: argparse.Namespace) -> None:
    if not (options.repo or options.folder or options.dry_run):
        raise InputError(
            "Say where to: --repo OWNER/NAME, or --folder DIR, or --dry-run to see what would be published."
        )
    if options.repo:
        _check_name(options.repo)
    with _folder(options.folder) as folder:
        what = console.from_options(options, PublishConfig)
        files = write_repository(options.checkpoint, what, folder)
        for path in files:
            print(f"{path.name}: {path.stat().st_size} bytes, sha256 {sha256(path)}")
        if options.repo and options.dry_run:
            print(f"would be sent to {options.repo}, {'public' if options.public else 'private'}; nothing was sent")
        elif options.repo:
            print(upload(files, options.repo, public=options.public))
        if options.folder:
            print(f'written to {options.folder}: weights="local-dir:{options.folder}" loads it')


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """A folder that no other command writes to: the given one, or a temporary one. Those of killed commands go."""
    if given is not None:
        with only_run_in(given):
            yield given
        return
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, only_run_in(name):
        user = Path(name).lstat().st_uid
        for left in Path(name).parent.glob(f"{PREFIX}*"):
            if left != Path(name) and left.lstat().st_uid == user and not left.is_symlink():
                with suppress(AdfeaturesError, OSError), only_run_in(left):
                    shutil.rmtree(left)
        yield Path(name)


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise InputError(f"{repo!r} is not the name of a repository: {error}") from error
    if "/" not in repo:
        raise InputError(f"{repo!r} does not say whose repository it is: write OWNER/{repo}.")


if __name__ == "__main__":
    sys.exit(main())
