"""What a command prints, on any console: names that cannot be shown, readers that have left, users that interrupt."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Exit codes: all was done, some images failed, nothing could be done.
DONE, SOME_FAILED, NOTHING_DONE = 0, 1, 2
# As shells report a program that a closed pipe, or Ctrl-C, has ended.
PIPE_CLOSED, INTERRUPTED = 141, 130


@contextmanager
def console() -> Iterator[None]:
    """Escape what the console cannot show instead of failing, and end quietly when nobody reads any more.

    The first Ctrl-C raises KeyboardInterrupt, a second one ends the process at once.

    Raises:
        SystemExit: With PIPE_CLOSED, when the output is closed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _interrupts():
            yield
        if sys.stdout is not None:  # As it is where a program has no console at all.
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_CLOSED)


@contextmanager
def _interrupts() -> Iterator[None]:
    # Signals are the main thread's, and a program that calls a command may handle them in its own way.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    process = os.getpid()

    def end(*_: object) -> None:
        if os.getpid() == process:  # And no worker that was forked.
            os.write(2, b"Interrupted again: ended at once. The next run clears away what is half written.\n")
        os._exit(INTERRUPTED)

    def interrupt(_: object, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is swallowed.__code__:  # Where it would be swallowed too.
                once_more()
                return
            frame = frame.f_back
        signal.signal(signal.SIGINT, end)
        raise KeyboardInterrupt

    def once_more() -> None:
        threading.Timer(0.1, os.kill, (process, signal.SIGINT)).start()

    def swallowed(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            before(unraisable)
            return
        # It came while an object was being deleted, where exceptions have no effect: once more, a little later.
        signal.signal(signal.SIGINT, interrupt)
        once_more()

    signal.signal(signal.SIGINT, interrupt)
    before, sys.unraisablehook = sys.unraisablehook, swallowed
    try:
        yield
    finally:
        sys.unraisablehook = before
        # Once interrupted, the second one may come while the process ends.
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
