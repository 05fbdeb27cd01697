"""Centers of the angle loss: ``python -m training.centers --root DIR --backbone NAME --output centers.safetensors``.

The command resumes when it was interrupted, and then gives the same bytes as if it had not been.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from adfeatures.errors import InputError

from . import console
from .distributed import processes, world_size
from .pretraining.centers import centers_of
from .pretraining.config import CentersConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""

    def compute(config: CentersConfig) -> None:
        with processes(config.device) as device:
            if world_size() > 1:
                raise InputError(
                    "Centers are computed by one process. Call python -m training.centers without torchrun."
                )
            centers_of(config, device)
        print(f"{config.output}: done")

    return console.run_config("centers", "Compute the centers of the angle loss.", CentersConfig, compute, arguments)


if __name__ == "__main__":
    sys.exit(main())
