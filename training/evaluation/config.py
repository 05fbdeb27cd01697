"""What an evaluation is asked to do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adfeatures.errors import InputError

from ..console import REQUIRED, check_choices, option
from ..data import DATASETS, dataset
from ..data.real_iad import RealIAD
from ..data.tree import Tree
from ..distributed import cores
from ..methods import METHODS, find_method

SOUND, ORIGINAL = "sound", "original"
ALL, RETRIEVED, LISTS = "all", "retrieved", "lists:"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The options of ``python -m training.evaluate``."""

    model: str = option(REQUIRED, "name from adfeatures.list_models(), or trained weights: a path, local-dir:, hf-hub:")
    weights: str | None = option(None, "trained weights of a named model")
    backbone_weights: str | None = option(None, "weights of the backbone")
    img_size: tuple[int, ...] = option((), "input height and width in pixels; the default is the model's")
    bit_depth: int = option(16, "bits in use in 16-bit images, 9 to 16: 12 for values of 0 to 4095")
    method: tuple[str, ...] = option(
        (ALL,),
        f"all, or some of {', '.join(METHODS)}; or module:Class, any class with (extractor), fit(loader) and "
        "predict(loader), which returns training.methods.base.Predictions",
    )
    dataset: str = option(REQUIRED, "kind of data set in root", tuple(DATASETS))
    root: str = option(REQUIRED, "folder of the data set (for a manifest: the CSV file)")
    products: tuple[str, ...] = option((), "products to evaluate; the default is all")
    split: str | None = option(
        None,
        "Real-IAD: folder of its official lists, realiad_jsons or a variant; the default judges the parts that "
        "training.pretrain holds out by default",
    )
    output: str = option(REQUIRED, "folder of the results; existing ones are kept, and the evaluation resumes")
    shots: int = option(8, "references per product")
    draws: int = option(
        1, "draws of references: number d takes the images d * shots to (d + 1) * shots of the sorted training images"
    )
    references: str | None = option(
        None,
        "folder of given references; or retrieved: FeatureNorm compares each image with its like; or lists:DIR, with "
        "those that the authors' lists name for it",
    )
    protocol: str = option(SOUND, "original: geometry and quirks of the published code", (SOUND, ORIGINAL))
    epochs: int | None = option(None, "epochs of CFLOW, GLASS and UniAD; the default is the paper's 25, 640 and 1000")
    allow_overlap: bool = option(False, "also judge images that the weights were trained on; all results are marked")
    oracle: bool = option(False, "also report the best value over the epochs, chosen on the test images")
    textures: str | None = option(None, "GLASS: folder of texture images (DTD); the default generates them")
    foregrounds: str | None = option(None, "GLASS: folder of foreground masks, <product>/<name of the training image>")
    cache: str | None = option(None, "folder of the features; the default is the folder cache in output")
    workers: int = option(cores(), "processes that read images; the default is one per core")
    device: str | None = option(None, "cpu or cuda; the default is cuda if available")

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.method:
            raise InputError(f"method is {ALL}, or some of {', '.join(METHODS)}; got none.")
        for name in self.methods:
            find_method(name)
        if self.bit_depth not in range(9, 17):
            raise InputError(f"bit_depth must be 9 to 16, got {self.bit_depth}.")
        if self.workers < 0:
            raise InputError(f"workers must not be below 0, got {self.workers}.")
        if self.shots < 1 or self.draws < 1 or (self.epochs is not None and self.epochs < 1):
            raise InputError(
                f"shots, draws and epochs must be 1 or more, got {self.shots}, {self.draws} and {self.epochs}."
            )
        if self.draws > 1 and self.given_references:
            raise InputError(f"{self.references} holds one set of references, which is one draw: leave out --draws.")
        if self.split is not None and self.dataset != "real_iad":
            raise InputError(f"--split is for real_iad, not for {self.dataset}: leave it out.")
        for name, folder in self._folders.items():
            if folder is not None and not Path(folder).is_dir():
                raise InputError(f"There is no folder {folder}: correct --{name}.")
        if self.protocol == ORIGINAL and (outside := [name for name in self.methods if name not in METHODS]):
            raise InputError(
                f"The published code, whose protocol is original, has no {', '.join(outside)}: leave out --protocol."
            )
        if self.protocol == ORIGINAL and self.img_size and set(self.img_size) != {224}:
            raise InputError(
                f"The protocol original is made for 224 x 224 pixels, not {self.img_size}: leave out --img-size."
            )
        if len(self.img_size) > 2:
            raise InputError(f"img_size is one side or height and width, got {self.img_size}.")

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, without "all"."""
        names = (*METHODS, *self.method) if ALL in self.method else self.method
        return tuple(dict.fromkeys(name for name in names if name != ALL))

    @property
    def tree(self) -> Tree:
        """The data set, with its official split where that is asked for."""
        found = dataset(self.dataset)
        return replace(found, lists=Path(self.split)) if isinstance(found, RealIAD) and self.split else found

    @property
    def given_references(self) -> str | None:
        """The folder of given references, None where they are drawn."""
        return None if self.references == RETRIEVED or self.reference_lists else self.references

    @property
    def reference_lists(self) -> str | None:
        """The folder of the lists of references of FeatureNorm, None where there are none."""
        before, lists, folder = (self.references or "").partition(LISTS)
        return folder if lists and not before else None

    @property
    def size(self) -> tuple[int, int] | None:
        """Input height and width, None for the model's."""
        if self.protocol == ORIGINAL:
            return (224, 224)
        return (self.img_size[0], self.img_size[-1]) if self.img_size else None

    def settings(self) -> dict[str, Any]:
        """What decides the numbers of a method on a product."""
        chosen = {name: value for name, value in dataclasses.asdict(self).items() if name not in _FREE}
        places = {name: folder and str(Path(folder).resolve()) for name, folder in self._folders.items()}
        if self.reference_lists is not None:
            places["references"] = f"{LISTS}{places['references']}"
        return chosen | places

    @property
    def _folders(self) -> dict[str, str | None]:
        return {
            "references": self.reference_lists or self.given_references,
            "textures": self.textures,
            "foregrounds": self.foregrounds,
            "split": self.split,
        }


# What may differ between commands that fill one folder: it changes no number, or names what else to evaluate.
_FREE = (
    "output", "root", "products", "method", "draws", "cache", "workers", "device", "backbone_weights", "weights",
    "allow_overlap"
)  # fmt: skip
