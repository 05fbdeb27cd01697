"""Finding weights: a path, a folder, the local cache or the Hub; downloaded once, verified always.

No file that is half-written or has the wrong hash is ever handed out, and no call waits for a network without end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from time import monotonic
from typing import Any

from .checkpoints import AnyPath, git_blob_id, sha256
from .errors import DownloadError, InputError
from .transfer import DIGEST, UNVERIFIED, Transfer, UnansweredError, UnhashedError, await_result, hub_failures, start

_PATIENCE = 20.0
_ELSEWHERE = (
    "on a machine with a network run `adfeatures download NAME` (or `hf download {repo} {filename}`) and copy its "
    "cache folder here (where HF_HOME or cache_dir points), or copy the file alone and pass local-dir:/its/folder; "
    "where there is a mirror, set HF_ENDPOINT to it"
)


def resolve(spec: AnyPath, *, candidates: Sequence[str] = (), cache_dir: AnyPath | None = None) -> Path:
    """Turn a weights specification into a file on disk, downloading it only when it is not in the local cache.

    Args:
        spec: The path of a file, ``local-dir:/folder/or/file``, or ``hf-hub:owner/repo[@revision][:path/in/repo]``.
        candidates: Files to look for, in this order, where the specification names none. In a local folder each is
            looked for under its path and then under its bare name. On the Hub one that is already in the cache comes
            first.
        cache_dir: Hub cache to use instead of the one that HF_HUB_CACHE or HF_HOME says.

    Raises:
        DownloadError: When there is no such file, or it cannot be fetched or verified.
        InputError: For an ``hf-hub:`` specification of another form.
    """
    text, names = os.fspath(spec), tuple(candidates) or ("model.safetensors",)
    if text.startswith("local-dir:"):
        return _from_folder(Path(text.removeprefix("local-dir:")).expanduser(), names)
    if text.startswith("hf-hub:"):
        return _from_hub(text, names, cache_dir)
    path = os.path.expanduser(text)
    if os.path.isfile(path):
        return Path(path)
    if os.path.isdir(path):
        raise DownloadError(f"{text} is a folder. To look for weights in it, write local-dir:{text}")
    repo = text if re.fullmatch(r"[\w.-]+/[\w.-]+", text) else "owner/repo"
    raise DownloadError(
        f"There is no file {text!r} (looked in {os.getcwd()}). Give the path of an existing file; or write "
        f"local-dir:/path/to/it for a folder or a file, hf-hub:{repo} for a Hub repository "
        "(in full: hf-hub:owner/repo[@revision][:path/in/repo])."
    )


def download(repo: str, filename: str, revision: str = "main", cache_dir: AnyPath | None = None) -> Path:
    """Path of a Hub file in the local cache, fetched only when it is not there, with its hash verified.

    HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_ETAG_TIMEOUT (seconds to wait for the Hub, 10), HF_HUB_DOWNLOAD_TIMEOUT (10; a
    download is given up after six times as long without a new byte) and the cache variables are those of the moment of
    the call. A server that names no hash of the file is refused, unless ADFEATURES_UNVERIFIED is 1. No more is written
    than the size that it announces, and it must announce one.

    Raises:
        DownloadError: When the file cannot be found, fetched, verified or stored; with the reason and the next step.
        InputError: For a repository, file or revision name that cannot exist.
    """
    from huggingface_hub.errors import EntryNotFoundError

    wanted = _Wanted.of(repo, filename, revision, cache_dir)
    if cached := wanted.cached():
        return wanted.verified(cached)
    if is_offline():
        raise wanted.error("HF_HUB_OFFLINE is set and the file is not in the cache", _ELSEWHERE)
    transfer = Transfer()
    try:
        path = transfer.run(
            wanted.repo,
            wanted.filename,
            _patience(wanted),
            revision=wanted.revision,
            cache_dir=wanted.cache,
            endpoint=wanted.endpoint,
            etag_timeout=_seconds("HF_HUB_ETAG_TIMEOUT"),
        )
    except hub_failures() as error:
        cause = error.__cause__ if isinstance(error, UnansweredError) and error.__cause__ else error
        if isinstance(cause, EntryNotFoundError):
            raise wanted.error("the repository has no such file", _listing(wanted), _FileMissing) from error
        raise wanted.error(*_explain_failure(cause, transfer.reached)) from error
    return wanted.verified(path, transfer.etag)


def verify(path: AnyPath, etag: str | None = None) -> None:
    """Compare a file with the digest under which the Hub knows it, and remove it from the cache when it differs.

    Args:
        path: A file in a Hub cache. The name of its blob is its digest: sha256 of LFS and Xet files, git blob id of
            others.
        etag: The digest that the Hub reported, for caches without symbolic links. Where neither is known nothing is
            compared: so it is with files that ADFEATURES_UNVERIFIED let in, and later in caches without such links.

    Raises:
        DownloadError: When the digests differ.
    """
    path = Path(path)
    # one link only: a blob may itself be a link into a store that repositories share, where names are Xet hashes
    target = Path(os.readlink(path)) if path.is_symlink() else Path()
    expected = target.name if target.parent.name == "blobs" else etag or ""
    digest = {64: sha256, 40: git_blob_id}[len(expected)] if DIGEST.fullmatch(expected) else None
    if digest is None or (found := digest(path) if path.is_file() else "a pipe or device") == expected:
        return
    with suppress(OSError):
        os.unlink(os.path.realpath(path))
        for link in (path.parent / target, path) if target.name else ():
            link.unlink(missing_ok=True)
    removed = "It could not be removed: delete it by hand" if path.exists() else "It was removed from the cache"
    raise DownloadError(f"{path} has the wrong hash: expected {expected}, found {found}. {removed}.")


class _FileMissing(DownloadError):
    """The repository and the revision exist, the file does not."""


def _from_folder(path: Path, names: tuple[str, ...]) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise DownloadError(f"local-dir:{path} does not exist. Give an existing folder or file.")
    for name in names:
        for found in (path / name, path / PurePosixPath(name).name):
            if found.is_file():
                return found
    content = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    raise DownloadError(
        f"{path} has none of {', '.join(names)}. It has: {_enumerate(content)}. Name one of them: local-dir:{path}/FILE"
    )


def _from_hub(spec: str, names: tuple[str, ...], cache_dir: AnyPath | None) -> Path:
    form = re.fullmatch(r"hf-hub:(?P<repo>[^@:/]+/[^@:/]+)(@(?P<revision>[^:]+))?(:(?P<file>.+))?", spec)
    if form is None:
        raise InputError(f"{spec!r} is not of the form hf-hub:owner/repo[@revision][:path/in/repo].")
    repo, revision, names = form["repo"], form["revision"] or "main", (form["file"],) if form["file"] else names
    cached = [name for name in names if _Wanted.of(repo, name, revision, cache_dir).cached()]
    for name in cached or names:
        try:
            return download(repo, name, revision, cache_dir)
        except _FileMissing as error:
            missing = error
    raise DownloadError(f"{missing}\nTried in this order: {', '.join(names)}.") from missing


@dataclass(frozen=True)
class _Wanted:
    """One file of the Hub, with the cache and the endpoint of the moment it was asked for."""

    repo: str
    filename: str
    revision: str
    cache: Path
    endpoint: str

    @staticmethod
    def of(repo: str, filename: str, revision: str, cache_dir: AnyPath | None) -> _Wanted:
        from huggingface_hub import constants
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(repo)
        except ValueError as error:
            raise InputError(f"{repo!r} is not the name of a Hub repository, which is owner/name: {error}") from error
        for name in (filename, revision):
            if not name or "\\" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise InputError(f"{name!r} is not a path or revision in a Hub repository ({repo}).")
        environ = os.environ
        home_cache = os.path.join(environ["HF_HOME"], "hub") if environ.get("HF_HOME") else constants.HF_HUB_CACHE
        cache = cache_dir or environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or home_cache
        folder = Path(os.path.expandvars(os.path.expanduser(cache)))
        return _Wanted(repo, filename, revision, folder, hub_endpoint())

    def cached(self) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(self.repo, self.filename, cache_dir=self.cache, revision=self.revision)
        except (OSError, ValueError) as error:
            advice = "mend that folder, or use another by HF_HOME or cache_dir"
            raise self.error(f"the cache cannot be read ({error})", advice) from error
        return Path(found) if isinstance(found, str) else None

    def verified(self, path: Path, etag: str | None = None) -> Path:
        try:
            verify(path, etag)
        except OSError as error:
            advice = "run the same command again to download the file again"
            raise self.error(str(error).rstrip("."), advice) from error
        return path

    def partial_sizes(self) -> dict[str, int]:
        sizes = {}
        for part in (self.cache / f"models--{self.repo.replace('/', '--')}" / "blobs").glob("*.incomplete"):
            with suppress(OSError):
                sizes[part.name] = part.stat().st_size
        return sizes

    def error(self, reason: str, advice: str, kind: type[DownloadError] = DownloadError) -> DownloadError:
        advice = advice.replace("{repo}", self.repo).replace("{filename}", self.filename)
        return kind(
            f"Cannot get {self.filename} of {self.repo} (revision {self.revision}) from {self.endpoint}: {reason}.\n"
            f"Cache folder: {self.cache}\nNext step: {advice}."
        )


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the Hub."""
    from huggingface_hub import constants

    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or str(constants.HF_HUB_OFFLINE)
    return said.upper() in {"1", "ON", "YES", "TRUE"}


def _seconds(variable: str) -> float:
    from huggingface_hub import constants

    with suppress(ValueError):
        return float(os.environ.get(variable, ""))
    return float(getattr(constants, variable))


def _patience(wanted: _Wanted) -> Callable[[], None]:
    """What raises TimeoutError when nothing arrives any more, be it by this process or by another that has the lock."""
    sizes, last, limit = wanted.partial_sizes(), monotonic(), _PATIENCE + _seconds("HF_HUB_ETAG_TIMEOUT")

    def look() -> None:
        nonlocal sizes, last, limit
        now = wanted.partial_sizes()
        if any(size > sizes.get(name, 0) for name, size in now.items()):
            last, limit = monotonic(), 6 * _seconds("HF_HUB_DOWNLOAD_TIMEOUT")
        sizes = {name: max(size, sizes.get(name, 0)) for name, size in now.items()}
        if monotonic() - last > limit:
            raise TimeoutError(f"nothing arrived for {limit:.0f} s")

    return look


def hub_endpoint() -> str:
    """The address of the Hub or of the mirror that HF_ENDPOINT names.

    Raises:
        InputError: If that is no address.
    """
    from huggingface_hub import constants

    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    if not re.match("https?://[^/]", endpoint):
        raise InputError(f"HF_ENDPOINT is {endpoint!r}, which is not an http(s) address.")
    return endpoint


def _explain_failure(error: BaseException, reached: bool) -> tuple[str, str]:
    """The reason and the next step for an error of huggingface_hub."""
    from huggingface_hub import errors

    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    login = "check its name, ask for access on its page if it is gated, then run `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set and the file is not in the cache", _ELSEWHERE
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision", "name an existing branch, tag or full commit hash, such as main"
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return f"the Hub refuses access (HTTP {status}): the repository is private, gated or does not exist", login
    if status == 404:
        return "the repository does not exist or is private (HTTP 404)", login
    if status == 429:
        delay = response.headers.get("Retry-After")
        wait = f"{delay} s" if delay else "some minutes"
        return "the Hub asks for fewer requests (HTTP 429)", f"wait {wait}, or run `hf auth login`"
    if status:
        return f"the Hub answered HTTP {status}", "try again later, or set HF_ENDPOINT to a mirror"
    if isinstance(error, UnhashedError):
        advice = f"use a server that names it, as the Hub does, or set {UNVERIFIED}=1 to trust this one"
        return first_line(error), advice
    if isinstance(error, errors.FileMetadataError):
        reason = "the answer is not that of a Hub; is a proxy or login page in between?"
        return reason, "check the network and HF_ENDPOINT"
    if isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
        advice = f"free some space, or use another folder by HF_HOME or cache_dir; {_ELSEWHERE}"
        return f"the cache cannot be written ({error})", advice
    if not reached:
        return f"there is no connection ({first_line(error)})", _ELSEWHERE
    again = "run the same command again; on a slow line set HF_HUB_DOWNLOAD_TIMEOUT=60"
    return f"the download broke off ({first_line(error)}); no part of it is used", again


def first_line(error: BaseException) -> str:
    """What an error says, for the middle of a sentence."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _listing(wanted: _Wanted) -> str:
    from huggingface_hub import HfApi

    ask = HfApi(endpoint=wanted.endpoint).model_info
    patience = _seconds("HF_HUB_ETAG_TIMEOUT")
    try:
        asked = start(lambda: ask(wanted.repo, revision=wanted.revision, timeout=patience))
        info = await_result(asked, _patience(wanted))
    except hub_failures():
        return "look at the repository's page for the names of its files"
    names = [sibling.rfilename for sibling in info.siblings or []]
    folder = wanted.filename.rpartition("/")[0]
    beside = [name for name in names if folder and name.rpartition("/")[0] == folder]
    which = f"the files in {folder}: {_enumerate(beside)}" if beside else f"its files: {_enumerate(names)}"
    return f"name one of {which}"


def _enumerate(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(sorted(names)[:20]) or "(none)") + more
