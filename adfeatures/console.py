"""What a command prints, on any console: names that cannot be shown, readers that have left."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# As shells report a program that a closed pipe has ended.
PIPE_CLOSED = 141


@contextmanager
def console() -> Iterator[None]:
    """Escape what the console cannot show instead of failing, and end quietly when nobody reads any more.

    Raises:
        SystemExit: With PIPE_CLOSED, when the output is closed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        if sys.stdout is not None:  # As it is where a program has no console at all.
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_CLOSED)
