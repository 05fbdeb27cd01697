"""One run at a time in a folder or for a file, which clears away what killed runs have left there.

The system holds the lock and frees it when the process ends, however it ends, so none is ever stale. It is a record
lock: one of flock would be kept by worker processes that outlive a killed run for some seconds. Across computers it
holds where the network file system does. Where a file system knows no locks, there is a warning instead.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from .checkpoints import TEMPORARY
from .errors import AdfeaturesError, InputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".adfeatures.lock"
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
# Windows lets nobody read a byte that is locked, so that is one beyond the text.
_LOCKED_BYTE = 4096
# To the system the threads of a process are one owner.
_own: set[str] = set()
_guard = threading.Lock()


@contextmanager
def only_run_in(folder: str | os.PathLike[str], *parts: str) -> Iterator[None]:
    """Keep other runs out of a folder, made if need be, for the length of the block.

    Temporary files of killed runs are removed from it, and from everything below the named parts of it.

    Raises:
        AdfeaturesError: If another run writes to it, which is named, or it cannot be written.
        InputError: For a file, or a link among the parts or below them.
    """
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"Cannot write to {folder}: it is a file. Choose a folder.")
    refuse_links(folder, *parts)
    with _lock(folder / LOCK, folder):
        beside = (path for path in folder.glob(".*") if not _of_another(path))
        remove_leftovers([*beside, *(path for part in parts for path in (folder / part).rglob(".*"))])
        yield


@contextmanager
def only_run_for(file: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other runs from writing a file for the length of the block, and remove what killed ones left beside it.

    Raises:
        AdfeaturesError: If another run writes it, which is named, or its folder cannot be written.
        InputError: For a path that ends in no name.
    """
    file = Path(file)
    if not file.name:
        raise InputError(f"{str(file)!r} is not the name of a file. Choose one.")
    with _lock(file.with_name(f".{file.stem[:32]}{LOCK}"), file):
        remove_leftovers(file.parent.glob(f".{glob.escape(file.stem[:32])}.adfeatures-*"))
        yield


def _of_another(path: Path) -> bool:
    """Whether a temporary file belongs to a run for one file of the folder, which may be alive."""
    return path.with_name(f"{path.name.rpartition('.adfeatures-')[0]}{LOCK}").exists()


def refuse_links(folder: str | os.PathLike[str], *parts: str) -> None:
    """Refuse symbolic links where something is going to be written: among the named parts of a folder and below them.

    The folder itself may be one. A link beside the parts is replaced by what ``atomic_path`` writes in its place.

    Raises:
        InputError: For the first link that is found.
    """
    for part in parts:
        top = os.path.join(folder, part)
        below = (os.path.join(path, name) for path, *names in os.walk(top) for name in chain(*names))
        for path in chain([top], below):
            if os.path.islink(path):
                raise InputError(f"{path} is a link, so files elsewhere would change. Remove it, or write elsewhere.")


def remove_leftovers(paths: Iterable[Path], older_than: float = 0) -> None:
    """Remove those of the paths that ``atomic_path`` made and no longer needs: its process was killed.

    Args:
        paths: Where to look, with the name of each.
        older_than: Seconds since they were last written, where living processes may be writing others.
    """
    for path in [path for path in paths if TEMPORARY.fullmatch(path.name)]:
        if not older_than or time.time() - path.lstat().st_mtime > older_than:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _lock(path: Path, target: Path) -> Iterator[None]:
    key = os.path.realpath(path)
    with _guard:
        if key in _own:
            raise AdfeaturesError(_refusal(target, path, f"{os.getpid()} {socket.gethostname()}"))
        _own.add(key)
    try:
        is_new = not path.parent.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _locked(path, target)
        except OSError as error:
            advice = "free some space, or choose" if error.errno == errno.ENOSPC else "choose"
            raise AdfeaturesError(
                f"Cannot write to {target}: {error}. So it cannot be used: {advice} another."
            ) from error
        try:
            yield
        finally:
            _release(path, descriptor)
            if is_new:
                with suppress(OSError):  # Something was written to it.
                    path.parent.rmdir()
    finally:
        _own.discard(key)


def _locked(path: Path, target: Path) -> int:
    """The descriptor of a lock file that no other process holds."""
    while True:
        # Never through a link that somebody has put there.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _acquire(descriptor)
        except OSError as error:
            owner = os.read(descriptor, 1000).decode(errors="replace")
            if error.errno in _HELD_BY_ANOTHER:
                os.close(descriptor)
                raise AdfeaturesError(_refusal(target, path, owner)) from None
            warnings.warn(
                f"{path.parent} is on a file system without locks ({error}): make sure that no other run writes there.",
                stacklevel=2,
            )
        if _is_at(path, descriptor):
            break
        os.close(descriptor)  # Its owner has removed it meanwhile.
    with suppress(OSError):  # On a full disk the lock holds all the same.
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()} {time.strftime('%Y-%m-%d %H:%M')}".encode())
    return descriptor


def _acquire(descriptor: int) -> None:
    if sys.platform == "win32":
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _release(path: Path, descriptor: int) -> None:
    """Remove the lock file while it is held, so that it is nobody else's; Windows removes no file that is open."""
    if sys.platform == "win32":
        os.close(descriptor)
        with suppress(OSError):
            path.unlink()
        return
    with suppress(OSError):
        if _is_at(path, descriptor):
            path.unlink()
    os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _refusal(target: Path, path: Path, owner: str) -> str:
    process, host, since = (*owner.split(" ", 2), "", "", "")[:3]
    text = f"Another run writes to {target}: process {process or 'unknown'} on {host or 'an unknown computer'}"
    text += f", since {since}." * bool(since) or "."
    text += " Wait until it is done, or stop it, or write elsewhere."
    return text if host == socket.gethostname() else f"{text} If that computer is down, remove {path}."
