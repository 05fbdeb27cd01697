"""Real-IAD (Wang et al., CVPR 2024): thirty products, each part photographed from five sides.

Layout: ``realiad_512/<product>/OK/S####/*.jpg`` and ``realiad_512/<product>/NG/<defect>/S####/*.jpg``. An image is
anomalous where a mask lies beside it: the name up to its first dot, with ``.png``. Photographs in the NG tree whose
side does not show the defect have no mask and are normal images there, but only the OK tree serves as references.
Nothing but the side is taken from a file name, because names disagree with their folders about the defect, and some
have a double underscore before the number.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unicodedata import normalize

from adfeatures.catalog import unknown
from adfeatures.errors import InputError

from .items import ANOMALOUS, NORMAL, Item, rank
from .real_iad_lists import read_filter, split_items
from .tree import SPLITS, StrPath, Tree, check_split, subfolders

PRODUCTS = (
    "audiojack", "bottle_cap", "button_battery", "end_cap", "eraser", "fire_hood", "mint", "mounts", "pcb",
    "phone_battery", "plastic_nut", "plastic_plug", "porcelain_doll", "regulator", "rolled_strip_base",
    "sim_card_set", "switch", "tape", "terminalblock", "toothbrush", "toy", "toy_brick", "transistor1", "u_block",
    "usb", "usb_adaptor", "vcpill", "wooden_beads", "woodstick", "zipper"
)  # fmt: skip
FOLDER = "realiad_512"
VIEWS = ("C1", "C2", "C3", "C4", "C5")
GOOD = "good"


def read(root: StrPath, products: Sequence[str] | None = None, filter_list: StrPath | None = None) -> list[Item]:
    """Every image of the OK and NG trees, whatever its official split, as the pretraining takes them.

    The order is the original's: all images of view C1 first, then C2 and so on; within a view product after product, OK
    before NG. What the original leaves to the file system is sorted by name.

    Args:
        root: The folder that holds ``realiad_512``, or that folder itself.
        products: Which products. The default is the thirty of PRODUCTS or, where the folder has none of these, all that
            it has.
        filter_list: A JSON list of the NG images to keep, as paths like ``bottle_cap/NG/ZW/S0121/<name>.jpg``, or a
            folder of such lists named ``<product>.json``. A path must be equal as a whole; the original keeps an image
            where its name is a part of any entry.

    Raises:
        InputError: For missing or empty folders, all of them in one message; for a name without a view; for a broken
            filter list.
    """
    folder = _data_folder(Path(root))
    if not folder.is_dir():
        raise InputError(f"There is no folder {root}. Give the folder that holds {FOLDER}, or {FOLDER} itself.")
    names = _names(folder) if products is None else tuple(dict.fromkeys(products))
    _check_complete(folder, names)
    kept = None if filter_list is None else read_filter(Path(filter_list), names)
    items = [item for product in names for item in _product_items(folder, product, kept)]
    if kept is not None and all(_is_ok(item) for item in items):
        raise InputError(
            f"{filter_list} keeps no NG image of {folder}. "
            "Its entries must be paths like bottle_cap/NG/ZW/S0121/<name>.jpg."
        )
    defective = {item.product for item in items if not _is_ok(item)}
    if bare := [f"{name}/NG" for name in names if name not in defective]:
        kept_by = "" if kept is None else f" that {filter_list} keeps"
        warnings.warn(f"There are no images in {', '.join(bare)} of {folder}{kept_by}.", stacklevel=2)
    return sorted(items, key=lambda item: item.view)


def reference_pool(items: Sequence[Item]) -> list[Item]:
    """The images that may serve as references: those of the OK tree, without the ones that have a mask after all."""
    return [item for item in items if _is_ok(item) and item.label == NORMAL]


def split_by_sample(items: Sequence[Item], fraction: float, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """Hold out whole parts, so that no part is seen from one side in training and from another in the evaluation.

    Of each product, and of its OK and NG trees separately, ``fraction`` of the parts is held out: at least one and at
    most all but one, where there are two or more; 0 holds out nothing. Which ones depends on the names of the parts and
    the seed, neither on the order of the items nor on other products. Training comes first, each in the order given.

    Raises:
        InputError: For a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise InputError(f"The held-out fraction must lie in [0, 1), got {fraction}.")
    if fraction == 0:
        return list(items), []
    strata: dict[tuple[str, bool], set[str]] = defaultdict(set)
    for item in items:
        strata[item.product, _is_ok(item)].add(_sample(item))
    held_out: set[tuple[str, bool, str]] = set()
    for stratum, samples in strata.items():
        ranked = sorted(samples, key=partial(rank, seed))
        count = min(max(1, math.floor(fraction * len(ranked) + 0.5)), len(ranked) - 1)
        held_out.update((*stratum, sample) for sample in ranked[:count])
    parts: tuple[list[Item], list[Item]] = ([], [])
    for item in items:
        parts[(item.product, _is_ok(item), _sample(item)) in held_out].append(item)
    return parts


def default_split(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """What ``training.pretrain`` by default trains on, and what it holds out."""
    return split_by_sample(items, fraction=0.1, seed=42)


def _is_ok(item: Item) -> bool:
    return item.defect == GOOD


def _sample(item: Item) -> str:
    return item.sample or item.image


def _data_folder(root: Path) -> Path:
    return root / FOLDER if os.path.isdir(root / FOLDER) else root


def _names(folder: Path) -> tuple[str, ...]:
    found = subfolders(folder)
    return PRODUCTS if set(PRODUCTS) & set(found) or not found else tuple(found)


def _check_complete(folder: Path, products: Sequence[str]) -> None:
    missing, empty = [], []
    for product in products:
        tree = folder / product / "OK"
        if not tree.is_dir():
            missing.append(f"{product}/OK" if tree.parent.is_dir() else product)
        elif not any(_images(tree / sample) for sample in subfolders(tree)):
            empty.append(f"{product}/OK")
    problems = [f"There is no {', '.join(missing)}."] if missing else []
    problems += [f"There are no images in {', '.join(empty)}."] if empty else []
    problems += [unknown("product", name, PRODUCTS) for name in missing if "/" not in name and name not in PRODUCTS]
    if problems:
        advice = f"Extract the archives of these products to {folder}, or name only the products that you have."
        raise InputError("\n  ".join([f"{folder} is not complete.", *problems, advice]))


def _product_items(folder: Path, product: str, kept: Collection[str] | None) -> Iterator[Item]:
    yield from _tree_items(folder, f"{product}/OK", product, GOOD)
    for defect in subfolders(folder / product / "NG"):
        for item in _tree_items(folder, f"{product}/NG/{defect}", product, defect):
            if kept is None or f"{item.sample}/{os.path.basename(item.image)}" in kept:
                yield item


def _tree_items(folder: Path, tree: str, product: str, defect: str) -> Iterator[Item]:
    for sample in subfolders(folder / tree):
        part = f"{tree}/{sample}"
        names = [name for name in os.listdir(folder / part) if name.lower().endswith(".png")]
        masks = {normalize("NFC", os.path.splitext(name)[0]): name for name in names}
        for name in _images(folder / part):
            mask = masks.get(normalize("NFC", name.partition(".")[0]))
            yield Item(
                image=str(folder / part / name),
                label=ANOMALOUS if mask else NORMAL,
                product=product,
                mask=str(folder / part / mask) if mask else None,
                defect=defect,
                view=_view(folder / part / name),
                sample=part,
            )


def _view(image: Path) -> str:
    # The last one, because the name begins with the product, which may hold such letters too.
    views = re.findall(r"(?<![A-Za-z0-9])C[1-5](?![A-Za-z0-9])", image.name)
    if not views:
        raise InputError(f"{image}: the name holds no view, one of {', '.join(VIEWS)}. Rename or remove it.")
    return str(views[-1])


def _images(folder: Path) -> list[str]:
    return sorted(
        name for name in os.listdir(folder) if name.lower().endswith((".jpg", ".jpeg")) and not name.startswith(".")
    )


@dataclass(frozen=True)
class RealIAD(Tree):
    """A data set that is split by part and not by folders.

    Attributes:
        lists: Folder of the official lists that split it. Without one it is split as ``training.pretrain`` does.
    """

    lists: Path | None = None

    def likeness(self, root: Path) -> float:
        """The folder of the published archives, or that of any product, leaves no doubt."""
        names = subfolders(root)
        trees = [root / name / "OK" for name in names if name not in SPLITS]
        return 2.0 * (FOLDER in names or any(map(os.path.isdir, trees)))

    def find_products(self, root: StrPath) -> dict[str, Path]:
        """The products that are there, those of the thirty or others."""
        folder = _data_folder(Path(root))
        trees = {name: [folder / name / tree for tree in self.folders] for name in subfolders(folder)}
        return {name: folder / name for name, of_name in trees.items() if any(map(os.path.isdir, of_name))}

    def walk(self, root: StrPath, product: str, split: str) -> Iterator[tuple[Path, list[Item]]]:
        """All images of a product, whatever the split."""
        yield self.find_products(root)[product], read(root, [product])

    def find_items(self, root: StrPath, split: str, products: Sequence[str] | None = None) -> list[Item]:
        """The items for an evaluation.

        Without lists "train" are the normal images of the OK tree that ``training.pretrain`` by default does not hold
        out, and "test" is all that it holds out. Errors are those of ``read`` and ``split_items``, and UnknownNameError
        for another split.
        """
        check_split(split)
        items = read(root, products)
        if self.lists is None:
            train, held_out = default_split(items)
            return held_out if split == "test" else reference_pool(train)
        names = dict.fromkeys(item.product for item in items)
        return [item for name in names for item in split_items(self.lists, name, split, items)]


TREE = RealIAD("Real-IAD", PRODUCTS, ("OK", "NG"), splits=("",))
