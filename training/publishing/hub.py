"""Sending the files of a repository to the Hub, in one commit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling

from adfeatures.checkpoints import git_blob_id, sha256
from adfeatures.errors import AdfeaturesError
from adfeatures.hub import download, first_line, hub_endpoint, hub_failures, is_offline

from .repository import CARD, CONFIG, WEIGHTS, check_overwrite, model_in

_OURS = {CONFIG, WEIGHTS, CARD, ".gitattributes"}
_AGAIN = "What was sent is kept: run the same command again"
# The reason and the next step for each status of the Hub.
_REFUSALS = {
    401: ("the token is not valid", "Run `hf auth login`, or set HF_TOKEN to one with write access"),
    403: (
        "the token may not write to {owner}",
        "Name an owner that it may write for, or make a token with write access",
    ),
    409: ("the name is taken by a repository that the token cannot see", "Choose another name"),
    412: ("somebody else has changed it meanwhile", "Look at what was changed, then run the same command again"),
    429: ("the Hub asks for fewer requests", f"Wait some minutes. {_AGAIN}"),
}


def upload(files: Sequence[Path], repo: str, *, public: bool = False) -> str:
    """Make a repository hold these files, in one commit; what it has already is not sent.

    Args:
        files: Files of ``write_repository``.
        repo: owner/name. It is made when there is none.
        public: Make it public; and the consent to publish to one that is public.

    Returns:
        What was done.

    Raises:
        AdfeaturesError: If the Hub refuses or cannot be reached, or the repository holds something else. Nothing is
            half published then.
    """
    endpoint = hub_endpoint()
    if is_offline():
        raise AdfeaturesError(
            f"Cannot publish to {repo}: HF_HUB_OFFLINE is set. Unset it, or give --folder to publish to a folder."
        )
    if get_token() is None:
        raise AdfeaturesError(
            f"Publishing to {endpoint} needs a token with write access. Run `hf auth login`, or set HF_TOKEN."
        )
    try:
        return _upload(HfApi(endpoint=endpoint), files, repo, public)
    except AdfeaturesError:
        raise
    except hub_failures() as error:
        reason, advice = _explain_refusal(error, repo.partition("/")[0])
        raise AdfeaturesError(f"Cannot publish to {repo} at {endpoint}: {reason}. {advice}.") from error


def _upload(api: HfApi, files: Sequence[Path], repo: str, public: bool) -> str:
    try:
        info = api.model_info(repo, files_metadata=True)
        _check_repository(info, repo, files, public)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=not public)
        info = api.model_info(repo, files_metadata=True)
    held = {sibling.rfilename: sibling for sibling in info.siblings or []}
    changed = [path for path in files if path.name not in held or not _is_held(path, held[path.name])]
    kind, names = "private" if info.private else "public", ", ".join(path.name for path in changed)
    if not changed:
        return f"{repo} ({kind}) has it all: nothing was sent"
    operations = [CommitOperationAdd(path.name, str(path)) for path in changed]
    api.create_commit(repo, operations, commit_message=f"Publish {names}", parent_commit=info.sha)
    if public and info.private:
        kind = "private as it was: its settings page can make it public"
    return f"sent {names} to {api.endpoint}/{repo}, {kind}"


def _check_repository(info: ModelInfo, repo: str, files: Sequence[Path], public: bool) -> None:
    names = {sibling.rfilename for sibling in info.siblings or []}
    if CONFIG in names:
        ours = next(path for path in files if path.name == CONFIG).read_bytes()
        theirs = download(repo, CONFIG, revision=info.sha or "main").read_bytes()
        check_overwrite(theirs, model_in(ours), f"The repository {repo}")
    elif names - _OURS:
        raise AdfeaturesError(
            f"The repository {repo} holds other things: {', '.join(sorted(names - _OURS)[:10])}. Choose another name."
        )
    if not (info.private or public):
        raise AdfeaturesError(
            f"The repository {repo} is public. Say --public if that is meant, or make it private on its settings page."
        )


def _is_held(path: Path, sibling: RepoSibling) -> bool:
    """Whether the Hub has the content of a file: it knows sha256 of LFS files, the git blob id of others."""
    if sibling.lfs is not None:
        return bool(sibling.lfs.sha256 == sha256(path))
    return sibling.blob_id == git_blob_id(path)


def _explain_refusal(error: BaseException, owner: str) -> tuple[str, str]:
    while getattr(error, "response", None) is None and error.__cause__ is not None:
        error = error.__cause__  # huggingface_hub wraps what happens to a large file, and what it hears of a model card
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if not status:
        reason = f"the connection failed ({first_line(error)})"
        return reason, f"{_AGAIN}. Where Xet storage is blocked, set HF_HUB_DISABLE_XET=1"
    other = ("the Hub refuses", "Mend that, and run the same command again")
    reason, advice = _REFUSALS.get(status, other if status < 500 else ("the Hub failed", _AGAIN))
    said = " ".join(str(getattr(error, "server_message", None) or "").split())
    return f"{reason.format(owner=owner)} (HTTP {status}{f': {said}' if said else ''})", advice
