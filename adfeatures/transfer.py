"""One download by huggingface_hub that believes nothing of what a server says, and that can be given up."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

_T = TypeVar("_T")
UNVERIFIED = "ADFEATURES_UNVERIFIED"
# sha256 of LFS and Xet files, git blob id of others
DIGEST = re.compile("[0-9a-f]{64}|[0-9a-f]{40}")


class UnansweredError(OSError):
    """The cause is why a server said nothing of use about a file. huggingface_hub catches no error of this class."""


class UnhashedError(OSError):
    """A server does not say which hash a file should have."""


class Transfer:
    """hf_hub_download in a copy of its module, where the two functions that ask the server are watched.

    Whoever else uses huggingface_hub in this process notices nothing. Three things that a server says name files or
    bound them: the hash of the file, which names the blob and is compared by ``adfeatures.hub``; the commit, which
    names the folder; the size, beyond which no byte is written.

    Attributes:
        reached: Whether the server has answered.
        etag: The hash of the file, or where ADFEATURES_UNVERIFIED is 1 and there is none a name that is no hash.
    """

    def __init__(self) -> None:
        spec: Any = find_spec("huggingface_hub.file_download")
        library = module_from_spec(spec)
        spec.loader.exec_module(library)
        steps = vars(library)
        self._download, self._ask, self._receive = map(
            steps.__getitem__, ("hf_hub_download", "get_hf_file_metadata", "http_get")
        )
        steps.update(get_hf_file_metadata=self._metadata, http_get=self._body)
        # what writes files of Xet can be neither bounded nor stopped
        steps.update(is_xet_available=lambda: False)
        self._over = threading.Event()
        self.reached, self.etag = False, ""

    def run(self, repo: str, filename: str, look: Callable[[], None], **options: Any) -> Path:
        """Call hf_hub_download until ``look`` raises; then nothing more is written and the lock of the blob is free."""
        result = start(lambda: Path(self._download(repo, filename, **options)))
        try:
            return await_result(result, look)
        finally:
            self._over.set()
            wait([result], timeout=1)

    def _metadata(self, url: str, **options: Any) -> Any:
        from huggingface_hub.errors import EntryNotFoundError, FileMetadataError

        missing: Any = None
        try:
            found = self._ask(url, **options)
            commit = found.commit_hash or ""
        except EntryNotFoundError as error:
            missing = error
            # hf_hub_download notes under the name of the commit that it has no such file
            commit = missing.response.headers.get("X-Repo-Commit", "0" * 40)
        except hub_failures() as error:
            # hf_hub_download would ask again for up to six minutes
            raise UnansweredError from error
        self.reached = True
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise UnansweredError from FileMetadataError(f"{commit!r} is not a commit")
        if missing:
            raise missing
        if found.size is None:
            raise UnansweredError from FileMetadataError("no size is announced")
        self.etag = found.etag if DIGEST.fullmatch(found.etag or "") else _stand_in(url, found)
        return replace(found, etag=self.etag, xet_file_data=None)

    def _body(self, url: str, temp_file: Any, **options: Any) -> None:
        if isinstance(temp_file, _Bounded):
            return self._receive(url, temp_file, **options)
        part, size = Path(temp_file.name), options["expected_size"]
        self._go_on()
        # the lock of the blob is held, so that another part of it is left of a download that was killed
        for left in part.parent.glob(f"{self.etag}.*.incomplete"):
            if left != part:
                left.unlink(missing_ok=True)
        try:
            missing, free = size - temp_file.tell(), shutil.disk_usage(part.parent).free
            if missing < 0:
                raise _TooMuchError(f"what arrived before is more than the announced {size} bytes")
            if missing > free:
                raise _TooMuchError(errno.ENOSPC, f"{missing} bytes are announced, {free} are free", str(part.parent))
            return self._receive_on(url, temp_file, size, options)
        except BaseException:
            # as new versions of huggingface_hub do; Windows keeps it while it is open
            with suppress(OSError):
                part.unlink()
            raise

    def _receive_on(self, url: str, file: Any, size: int, options: dict[str, Any]) -> None:
        """Go on after a drop, and begin again where Range is ignored: huggingface_hub does so in new versions only."""
        tries = 2
        while True:
            self._go_on()
            had = file.tell()
            try:
                return await_result(start(lambda: self._receive(url, _Bounded(file, size), **options)), self._go_on)
            except _TooMuchError:
                if not options.get("resume_size"):
                    raise
                file.seek(0)
                file.truncate()
            except hub_failures() as error:
                tries = 2 if file.tell() > had else tries - 1
                if not tries or self._over.is_set() or getattr(error, "response", None) is not None:
                    raise
            options["resume_size"] = file.tell()
            time.sleep(0.5)

    def _go_on(self) -> None:
        if self._over.is_set():
            raise TimeoutError("the download was given up")


def _stand_in(url: str, found: Any) -> str:
    if os.environ.get(UNVERIFIED) != "1":
        raise UnhashedError(f"the server does not name the hash of the file (its ETag is {found.etag!r})")
    return f"unverified-{hashlib.sha256(f'{url} {found.commit_hash} {found.etag}'.encode()).hexdigest()}"


class _Bounded:
    """A file that takes no byte beyond the announced size."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.tell, self.seek, self.truncate = file.tell, file.seek, file.truncate

    def write(self, chunk: bytes) -> None:
        if self.tell() + len(chunk) > self._size:
            raise _TooMuchError(f"more than the announced {self._size} bytes arrived")
        self._file.write(chunk)
        self._file.flush()


class _TooMuchError(OSError):
    """A server sends more than it announced, or announces more than there is room for."""


def start(call: Callable[[], _T]) -> Future[_T]:
    """Run ``call`` in a thread that the end of the process does not wait for."""
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="adfeatures-download", daemon=True).start()
    return result


def await_result(result: Future[_T], look: Callable[[], None]) -> _T:
    """Wait for a result for as long as ``look`` does not raise.

    huggingface_hub waits as long as a server's Retry-After says and begins a long file again for ever where a server
    cuts it off and ignores Range. It cannot be told to stop.
    """
    while not wait([result], timeout=0.2).done:
        look()
    return result.result()


def hub_failures() -> tuple[type[BaseException], ...]:
    """What huggingface_hub raises where the Hub refuses, is out of reach or answers nonsense."""
    from huggingface_hub.errors import HfHubHTTPError

    # HfHubHTTPError derives from the error class of whichever HTTP library this version of huggingface_hub uses
    return (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)
