"""How the entry points end: errors in one line, and exit codes as those of the ``adfeatures`` command."""

from __future__ import annotations

import sys
from collections.abc import Callable

from adfeatures.errors import AdfeaturesError

DONE, SOME_FAILED, NOTHING_DONE, INTERRUPTED = 0, 1, 2, 130


def run(entry: str, function: Callable[[], int | None]) -> int:
    """Call a function and turn its errors into a line on stderr and an exit code.

    Args:
        entry: Name of the entry point, such as "pretrain".
        function: What to run. It returns an exit code, or None for DONE.
    """
    try:
        return function() or DONE
    except AdfeaturesError as error:
        print(f"training.{entry}: error: {error}", file=sys.stderr)
        return NOTHING_DONE
    except KeyboardInterrupt:
        print(f"training.{entry}: interrupted. What was written before is kept; the same command goes on from there.", file=sys.stderr)
        return INTERRUPTED
