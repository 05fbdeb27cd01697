"""What all data sets on disk share: finding and choosing products, and saying what is wrong with a folder."""

from __future__ import annotations

import os
import unicodedata
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TypeAlias

from adfeatures.catalog import unknown
from adfeatures.errors import InputError, UnknownNameError
from adfeatures.sources import OF_FILE_SYSTEMS

from .items import Item

SPLITS = ("train", "test")
# What network storage, archives and operating systems leave in any folder.
StrPath: TypeAlias = "str | os.PathLike[str]"


@dataclass(frozen=True)
class Tree(ABC):
    """How one data set keeps its files.

    Attributes:
        title: Name of the data set in messages.
        products: Names of the products, which are those of their folders. Empty where any folder may hold a product.
        folders: What the folder of a product may hold.
        others: Folders beside those of the products that belong to the data set.
        splits: What ``walk`` takes to see everything; an empty name where the folders are not those of splits.
    """

    title: str
    products: tuple[str, ...] = ()
    folders: tuple[str, ...] = ("train", "test", "ground_truth")
    others: tuple[str, ...] = ()
    splits: tuple[str, ...] = SPLITS

    @abstractmethod
    def walk(self, root: StrPath, product: str, split: str) -> Iterator[tuple[Path, list[Item]]]:
        """The folders of images of a product that is there, each with its items.

        Their masks are named even where they are missing.

        Raises:
            InputError: If the folders are not those of this data set.
        """

    def find_products(self, root: StrPath) -> dict[str, Path]:
        """The products that are there, each with its folder."""
        return {product: Path(root, product) for product in self.products if os.path.isdir(Path(root, product))}

    def likeness(self, root: Path) -> float:
        """How much a folder looks like this data set: 0 not at all, above 1 without doubt.

        Else it is the share of its folders that are products, from one half on.
        """
        names = subfolders(root)
        share = len(set(names) & set(self.products)) / max(1, len(names))
        return share if share >= 0.5 else 0.0

    def find_items(self, root: StrPath, split: str, products: Sequence[str] | None = None) -> list[Item]:
        """The images of a split, product after product, in the order of the original code.

        That order is, in the manner of MVTec AD, by kind of defect and then by file name; in VisA, normal images first
        and then as in its table.

        Args:
            root: Folder that holds the folders of the products.
            split: "train" or "test".
            products: Which products to take, in this order; None takes all that are there.

        Raises:
            UnknownNameError: For an unknown split, or a product that the data set does not have.
            InputError: If the root holds no product, or not one that was asked for; if a folder is missing or empty; if
                an image with a defect has no mask. The message names what is missing.
        """
        check_split(split)
        chosen, present = self.choose(root, products), self.find_products(root)
        if missing := [product for product in chosen if product not in present]:
            raise InputError(f"{root} holds no {', '.join(missing)}. Extract the rest of {self.title}. {_check(root)}")
        items = []
        for product in chosen:
            for folder, found in self.walk(root, product, split):
                if not found:
                    raise InputError(f"No images in {folder}. Extract it again, or remove it. {_check(root)}")
                items += found
        for item in items:
            if not os.path.isfile(item.image):
                raise InputError(f"The image {item.image} is missing. {_check(root)}")
            if item.mask is not None and not os.path.isfile(item.mask):
                raise InputError(
                    f"The image {item.image} shows a defect, but its mask {item.mask} is missing. {_check(root)}"
                )
        return items

    def choose(self, root: StrPath, asked: Sequence[str] | None = None) -> list[str]:
        """The products that are asked for, of which some may be missing; all that are there where none are.

        Folders that are asked for but are no products, as where a shell lists all, are left out with a warning.

        Raises:
            UnknownNameError: For a product that the data set does not have.
            InputError: If the root holds no product, or none is left.
        """
        present = self.find_products(root)
        if not present:
            raise InputError(self.wrong_root(root))
        known, folder = self.products or tuple(present), next(iter(present.values())).parent
        chosen = []
        for product in dict.fromkeys(asked or present):
            if product in (*known, *present):
                chosen.append(product)
            elif os.path.isdir(folder / product):
                warnings.warn(f"{folder / product} holds no product of {self.title} and is left out.", stacklevel=2)
            else:
                raise UnknownNameError(unknown(f"product of {self.title}", product, known))
        if not chosen:
            raise InputError(f"{root} holds no product of {self.title} among {', '.join(asked or ())}.")
        return chosen

    def wrong_root(self, root: StrPath) -> str:
        """The message for a root that holds no product: what belongs there, and a folder close by that holds some."""
        if not os.path.isdir(root):
            return f"There is no folder {root}. Give the folder of {self.title}."
        near = nearby(Path(root), lambda folder: bool(self.find_products(folder)))
        advice = (
            f"Give {near} instead."
            if near
            else f"Give the folder that holds {', '.join(self.products[:3]) or 'the products'}, ..."
        )
        return f"{root} holds no product of {self.title}. {advice}"


def check_split(split: str) -> None:
    """Raise UnknownNameError for a split that is none of `SPLITS`."""
    if split not in SPLITS:
        raise UnknownNameError(unknown("split", split, SPLITS))


def nearby(root: Path, fits: Callable[[Path], bool]) -> Path | None:
    """The first folder that fits among the two above a root and the two levels below it."""
    below = [root / name for name in subfolders(root)]
    folders = [*root.resolve().parents[:2], *below, *(folder / name for folder in below for name in subfolders(folder))]
    return next(filter(fits, folders), None)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; none where the folder cannot be listed.

    Hidden ones and those of file systems are left out.
    """
    try:
        names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    except OSError:
        return []
    return sorted(name for name in names if not name.startswith(".") and name not in OF_FILE_SYSTEMS)


def find_file(folder: Path, name: str) -> Path:
    """The path of a file in a folder, also where its letters are composed in another way than in its name.

    Some systems write an accent as a character of its own (NFD). Where there is no such file, it is where it should be.
    """
    path = folder / name
    if os.path.lexists(path):
        return path
    for part in PurePath(name).parts:
        wanted = unicodedata.normalize("NFC", part)
        alike = (entry for entry in _names(folder) if unicodedata.normalize("NFC", entry) == wanted)
        folder /= next(alike, part)
    return folder if os.path.lexists(folder) else path


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (OSError, ValueError):  # ValueError: a name with a null character
        return []


def _check(root: StrPath) -> str:
    return f"See what else is missing with: python -m training.evaluate --check {root}"
