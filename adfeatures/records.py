"""What a reference bank knows of its images: how they were read and cut, and what was decided with them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .geometry import PLAIN, Geometry

MAX_ROTATIONS = 64


@dataclass
class BankRecord:
    """How a bank was made, and what was decided with it.

    Attributes:
        files: File name of each image, "" where it did not come from a file.
        sha256s: Hash of each image file, or of an image in memory, "" for tensors.
        pixels: Hash of the pixels of each image, upright and in RGB, "" for tensors and in banks of earlier versions.
        model: Name of the model that made the features.
        fingerprint: Hashes of that model's weights.
        form: What that model's scorer does to maps, None where it does nothing, and in banks of earlier versions.
        img_size: Input height and width of that model.
        preset: Preset of the transform, None where the images came as tensors.
        bit_depth: Bits per channel that 16-bit images were read with, and images to be compared with these are.
        threshold: Image score above which an image counts as anomalous.
        quantile: Quantile of the scores of normal images that the threshold is.
        normal_scores: Scores of the normal images that the threshold was taken from: these ones, each left out, or
            others.
        geometry: How the images were cut, and images to be compared with these are.
        rotations: In how many equal steps of a full turn the images were rotated.
    """

    files: list[str] = field(default_factory=list)
    sha256s: list[str] = field(default_factory=list)
    pixels: list[str] = field(default_factory=list)
    model: str | None = None
    fingerprint: list[str] = field(default_factory=list)
    form: str | None = None
    img_size: tuple[int, int] | None = None
    preset: str | None = None
    bit_depth: int = 16
    threshold: float | None = None
    quantile: float | None = None
    normal_scores: list[float] = field(default_factory=list)
    geometry: Geometry = PLAIN
    rotations: int = 1

    @property
    def known(self) -> set[str]:
        """The hashes that the images are known by."""
        return {*self.sha256s, *self.pixels} - {""}

    def facts(self) -> dict[str, Any]:
        """All of it as JSON has it; what earlier versions do not know is left out where it says nothing."""
        plain = {"geometry"} if self.geometry.is_plain else set()
        plain |= {"form"} if self.form is None else set()
        plain |= {"rotations"} if self.rotations == 1 else set()
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in plain}

    def undecided(self) -> BankRecord:
        """The same without the threshold and what it was taken from."""
        return dataclasses.replace(self, threshold=None, quantile=None, normal_scores=[])
