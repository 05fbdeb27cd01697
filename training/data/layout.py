"""Data sets that keep one folder per product, in it one per split, in it one per kind of defect, as MVTec AD does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adfeatures.errors import ImageError, InputError
from adfeatures.sources import list_images

from .items import ANOMALOUS, NORMAL, Item
from .tree import SPLITS, StrPath, Tree, find_file, subfolders


@dataclass(frozen=True)
class Layout(Tree):
    """A data set in the manner of MVTec AD. Masks are paired with images by name.

    Attributes:
        normal: Name of the folder of normal images in each split.
        images: Folder of the images of one split and kind of defect, seen from the folder of the product.
        masks: Files in which the mask of an image may be, seen from there. The first is the one that is missed where
            none is there.
        masks_optional: Whether a product without the folder "ground_truth" simply has no masks.
    """

    normal: str = "good"
    images: str = "{split}/{defect}"
    masks: tuple[str, ...] = ("ground_truth/{defect}/{stem}_mask.png",)
    masks_optional: bool = False

    def find_products(self, root: StrPath) -> dict[str, Path]:
        """The products that are there, each with its folder. Where any folder may be one, so may the root itself."""
        if self.products:
            return super().find_products(root)
        if _has_split(Path(root)):
            return {Path(root).resolve().name: Path(root)}
        return {name: Path(root, name) for name in subfolders(Path(root)) if _has_split(Path(root, name))}

    def likeness(self, root: Path) -> float:
        """As for other data sets; least of all where any folder may be a product."""
        return super().likeness(root) if self.products else 0.1 * bool(self.find_products(root))

    def walk(self, root: StrPath, product: str, split: str) -> Iterator[tuple[Path, list[Item]]]:
        """See ``Tree.walk``."""
        folder = self.find_products(root)[product]
        kinds = subfolders(folder / split)
        if not kinds or (split == "train" and self.normal not in kinds):
            problem = f"holds no folder {self.normal!r}" if kinds else "is missing or has no sub-folders"
            raise InputError(
                f"{folder / split} {problem}. Images belong in {self.images.format(split=split, defect='<kind>')}/."
            )
        for kind in kinds:
            images = folder / self.images.format(split=split, defect=kind)
            yield images, [self._item(folder, product, split, kind, image) for image in _list(images)]

    def _item(self, folder: Path, product: str, split: str, kind: str, image: Path) -> Item:
        if kind == self.normal:
            return Item(str(image), NORMAL, product)
        if self.masks_optional and not (folder / "ground_truth").is_dir():
            return Item(str(image), ANOMALOUS, product, defect=kind)
        names = [place.format(split=split, defect=kind, stem=image.stem) for place in self.masks]
        places = [find_file(folder, name) for name in names]
        mask = next((place for place in places if place.is_file()), places[0])
        return Item(str(image), ANOMALOUS, product, str(mask), kind)


def _has_split(folder: Path) -> bool:
    # Unlike Path.is_dir, it does not raise where a folder above may not be read.
    return any(os.path.isdir(folder / split) for split in SPLITS)


def _list(folder: Path) -> list[Path]:
    try:
        return list_images(folder)
    except ImageError:
        return []
