"""Render the sample images of ``adfeatures demo``: ``python -m training.assets.samples --output DIR``.

They show one product of `training.data.synthetic`, good and with four kinds of defects, as its first camera sees it.
Everything is computed, so the images need no license but the project's own, and the masks are exact.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from adfeatures.errors import AdfeaturesError

from .. import console
from ..data.synthetic.camera import Relief
from ..data.synthetic.canvas import Part
from ..data.synthetic.defects import Damage, dent, rust, scratch
from ..data.synthetic.hardware import FLANGE_SCREWS, bushed_flange
from ..data.synthetic.specimen import DEFECT, Specimen, build, stream

# Rendered at twice the size of the images, which smooths edges.
SIZE, SCALE, CROP = 800, 2, (0, 50, 400, 350)
JPEG_QUALITY = 86
# Numbers of the parts in each folder; those with defects were chosen for places where a defect can be judged.
PARTS: dict[str, Sequence[int]] = {
    "references": range(8),
    "test/good": range(6),
    "test/scratch": (2, 7, 0),
    "test/dent": (7, 9),
    "test/rust": (10, 7),
    "test/wrong_screw": (0, 1),
}
DAMAGES: dict[str, Damage] = {"scratch": scratch, "dent": dent, "rust": rust}
STRENGTH = 0.2, 0.6
LICENSE = """\
The images and masks in this folder were rendered by training/assets/samples.py of this project:
    python -m training.assets.samples --output DIR
No photograph or other work went into them. They are under the license of the project, MIT.
"""


def render(output: Path) -> None:
    """Write LICENSE.txt, references/, test/<kind>/ and masks/<defect>/ below ``output``.

    With the same libraries the files are the same.

    Raises:
        AdfeaturesError: If they cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "LICENSE.txt").write_text(LICENSE, encoding="utf-8")
        for seed, (folder, numbers) in enumerate(PARTS.items(), start=1):
            for index, number in enumerate(numbers):
                image, mask = _photograph((seed, number), Path(folder).name)
                _save(image, output / folder / f"{index:03d}.jpg", quality=JPEG_QUALITY)
                if mask is not None:
                    _save(mask, output / "masks" / Path(folder).name / f"{index:03d}.png", optimize=True)
    except OSError as error:
        raise AdfeaturesError(
            f"Cannot write to {output}: {error}. Free some space or choose another --output."
        ) from error


def _photograph(key: tuple[int, int], kind: str) -> tuple[Image.Image, Image.Image | None]:
    """The picture of one part, and the mask of its defect: white where at least half of a pixel changed."""
    sound = build(bushed_flange, key, SIZE)
    flawed = _flawed(sound, key, kind)
    specimen = Specimen(key, SIZE, Relief.of(sound), None if flawed is None else Relief.of(flawed))
    image, mask = specimen.photograph(1)
    image = image.reduce(SCALE).crop(CROP)
    if mask is None:
        return image, None
    return image, Image.fromarray(mask).reduce(SCALE).crop(CROP).point(lambda value: 255 * (value >= 128))


def _flawed(sound: Part, key: tuple[int, int], kind: str) -> Part | None:
    """The same part with a defect, None where it has none."""
    rng = stream(key, DEFECT)
    if kind == "wrong_screw":
        return build(partial(bushed_flange, wrong=int(rng.integers(FLANGE_SCREWS))), key, SIZE)
    if kind not in DAMAGES:
        return None
    flawed = replace(sound, maps=sound.maps.copy())
    DAMAGES[kind](flawed, rng, rng.uniform(*STRENGTH))
    return flawed


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.assets.samples", description="Render the sample images of adfeatures demo."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    options = parser.parse_args(arguments)
    return console.run("samples", lambda: render(options.output))


if __name__ == "__main__":
    sys.exit(main())
