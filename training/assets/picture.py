"""Make the picture of the README, that of the demo: ``python -m training.assets.picture --output FILE``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from adfeatures.demo import run_demo
from adfeatures.images import read_image
from adfeatures.overlays import save_picture

from .. import console

JPEG_QUALITY = 86


def draw(path: Path) -> None:
    """Write the picture of the demo of the embedded default, in the format of the suffix.

    Raises:
        AdfeaturesError: If it cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_demo(folder)
        save_picture(read_image(Path(folder) / "demo.png"), path, quality=JPEG_QUALITY)


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.assets.picture", description="Make the picture of the README, as the demo shows it."
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write, as .github/demo.jpg")
    options = parser.parse_args(arguments)
    return console.run("picture", lambda: draw(options.output))


if __name__ == "__main__":
    sys.exit(main())
