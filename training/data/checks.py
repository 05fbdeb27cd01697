"""What is missing or misnamed in a data set: ``python -m training.evaluate --check DIR``."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from adfeatures.catalog import unknown
from adfeatures.errors import ImageError, InputError
from adfeatures.images import IMAGE_SUFFIXES, read_image
from training.console import DONE, SOME_FAILED

from . import DATASETS, dataset, real_iad, visa
from .images import different_sizes, read_mask
from .items import ANOMALOUS, NORMAL, Item
from .tree import SPLITS, StrPath, Tree, nearby, subfolders

# How many files a problem names that many files share.
NAMED = 3


@dataclass(frozen=True)
class Problem:
    """Something wrong with a data set.

    Attributes:
        text: What is wrong, with which file or folder, and what to do.
        serious: False where the data can be used as it is.
    """

    text: str
    serious: bool = True

    def __str__(self) -> str:
        return f"{'error' if self.serious else 'warning'}: {self.text}"


class RealIAD(Tree):
    """Real-IAD, which this project splits by part and not by folders: walked as a whole whatever the split."""

    def find_products(self, root: StrPath) -> dict[str, Path]:
        root = Path(root)
        folder = root / real_iad.FOLDER if os.path.isdir(root / real_iad.FOLDER) else root
        return {
            name: folder / name
            for name in subfolders(folder)
            if any(os.path.isdir(folder / name / tree) for tree in self.folders)
        }

    def walk(self, root: StrPath, product: str, split: str) -> Iterator[tuple[Path, list[Item]]]:
        yield self.find_products(root)[product], real_iad.read(root, [product])

    def find_items(self, root: StrPath, split: str, products: Sequence[str] | None = None) -> list[Item]:
        return real_iad.find_items(root, split, products)


def report(root: StrPath, dataset: str | None = None) -> tuple[str, int]:
    """The problems of a data set as text, and an exit code: DONE, or SOME_FAILED where one is serious.

    Arguments and errors are those of ``check``.
    """
    name = dataset or recognize(root)
    problems = check(root, name)
    serious = sum(problem.serious for problem in problems)
    lines = [f"{root} holds {DATASETS[name]}; products: {len(tree_of(name).find_products(root))}."]
    if dataset is None:
        lines.append(
            f"This was told by its folders. If it is wrong, say which data set it is with --dataset: {', '.join(DATASETS)}."
        )
    found = f"errors: {serious}, warnings: {len(problems) - serious}" if problems else "Nothing is missing or misnamed."
    return "\n".join([*lines, *map(str, problems), found]), SOME_FAILED if serious else DONE


def check(root: StrPath, dataset: str | None = None) -> list[Problem]:
    """Look at every folder, image and mask of a data set.

    Args:
        root: Folder of the data set.
        dataset: One of `DATASETS`; None recognizes it by its folders.

    Raises:
        UnknownNameError: For an unknown data set.
        InputError: If the folder is not that of the data set, or of none that is known; the message says which one to
            give.
    """
    tree = tree_of(dataset or recognize(root))
    products = tree.find_products(root)
    if not products:
        raise InputError(tree.wrong_root(root))
    problems = list(_check_products(tree, Path(root), products))
    for product, folder in products.items():
        problems += _check_folders(tree, folder)
        problems += _check_product(tree, root, product, folder)
    return list(dict.fromkeys(problems))


def recognize(root: StrPath) -> str:
    """The name in `DATASETS` of the data set whose folders these are.

    Raises:
        InputError: If it is none; the message names a folder close by that is one.
    """
    root = Path(root)
    if not os.path.isdir(root):
        raise InputError(f"There is no folder {root}.")
    name = _recognized(root)
    if name is None:
        near = nearby(root, lambda folder: _recognized(folder) is not None)
        advice = (
            f"Give {near} instead."
            if near
            else f"Known are {', '.join(DATASETS.values())}; name one with --dataset to see what is missed."
        )
        raise InputError(f"{root} is not the folder of a data set. {advice}")
    return name


def _recognized(root: Path) -> str | None:
    names = subfolders(root)
    if os.path.isfile(root / visa.TABLE):
        return "visa"
    if real_iad.FOLDER in names or any(os.path.isdir(root / name / "OK") for name in names if name not in SPLITS):
        return "real_iad"
    sets = {
        name: len(set(names) & set(dataset(name).PRODUCTS)) for name in DATASETS if name not in ("real_iad", "folder")
    }
    best = max(sets, key=lambda name: sets[name])
    if sets[best] and 2 * sets[best] >= len(names):
        return best
    path = root.resolve()
    if path.parent != path and any(
        path.name in dataset(name).PRODUCTS and _recognized(path.parent) == name for name in sets
    ):
        return None  # The folder of one product of a known data set.
    return "folder" if dataset("folder").TREE.find_products(root) else None


def tree_of(name: str) -> Tree:
    """The products and folders of a data set.

    Raises:
        UnknownNameError: For an unknown data set.
    """
    module = dataset(name)
    return RealIAD(DATASETS[name], real_iad.PRODUCTS, ("OK", "NG")) if name == "real_iad" else module.TREE


def _check_products(tree: Tree, root: Path, products: dict[str, Path]) -> Iterator[Problem]:
    """The products that are not there, and the folders beside the products."""
    # A tree of other products in the layout of a known data set lacks none.
    known = tree.products if set(tree.products) & set(products) else ()
    if missing := [product for product in known if product not in products]:
        yield Problem(
            f"{root} lacks {len(missing)} of {len(known)} products of {tree.title}: {', '.join(missing)}. Extract the rest."
        )
    if root in products.values():
        return
    folder = next(iter(products.values())).parent
    for name in subfolders(folder):
        if known and name not in known and name != visa.TABLE.parent.name:
            yield Problem(
                f"{folder / name} is not read. {unknown(f'product of {tree.title}', name, known)}", serious=False
            )
        elif not known and name not in products:
            yield Problem(
                f"{folder / name} is not read: it holds none of the folders {', '.join(tree.folders)}.", serious=False
            )


def _check_folders(tree: Tree, product: Path) -> Iterator[Problem]:
    """The folders in a product that nothing reads."""
    for name in subfolders(product):
        if name not in tree.folders:
            yield Problem(f"{product / name} is not read. {unknown('folder', name, tree.folders)}", serious=False)
    kinds, masks = tuple(subfolders(product / "test")), product / "ground_truth"
    for name in subfolders(masks) if kinds and masks.name in tree.folders else ():
        if name not in kinds:
            yield Problem(
                f"{masks / name} is not read: test has no such folder. {unknown('kind', name, kinds)}", serious=False
            )


def _check_product(tree: Tree, root: StrPath, product: str, folder: Path) -> Iterator[Problem]:
    items: list[Item] = []
    complete = True
    # Real-IAD has no folders of splits, so it is read as a whole.
    for split in ("",) if isinstance(tree, RealIAD) else SPLITS:
        try:
            folders = list(tree.walk(root, product, split))
        except InputError as error:
            yield Problem(str(error))
            complete = False
            continue
        yield from (
            Problem(f"{empty} holds no images. Extract it again, or remove it.")
            for empty, found in folders
            if not found
        )
        of_split = [item for _, found in folders for item in found]
        yield from _check_labels(of_split, folder / split, split)
        items += of_split
    yield from _check_files(items, product)
    if complete:
        yield from _check_left_over(items)


def _check_labels(items: Sequence[Item], folder: Path, split: str) -> Iterator[Problem]:
    normal = sum(item.label == NORMAL for item in items)
    if normal == 0:
        yield Problem(f"{folder} holds no normal images.")
    if normal == 1 and split == "train":
        yield Problem(
            f"{folder} holds a single normal image, so that no two references can be compared.", serious=False
        )
    if split != "train" and all(item.label != ANOMALOUS for item in items):
        yield Problem(f"{folder} holds no images with defects, so that no metric can be computed.")


def _check_files(items: Sequence[Item], product: str) -> Iterator[Problem]:
    """Read all images and masks. What many files may share is one problem."""
    shared: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for item in tqdm(items, desc=product, leave=False, disable=None):
        if not os.path.isfile(item.image):
            shared["missing images", True].append(item.image)
        elif item.mask is not None and not os.path.isfile(item.mask):
            shared["images without their mask", True].append(f"{item.image} (mask expected in {item.mask})")
        try:
            picture = read_image(item.image) if os.path.isfile(item.image) else None
            mask = read_mask(item.mask) if item.mask is not None and os.path.isfile(item.mask) else None
        except ImageError as error:
            yield Problem(str(error))
            continue
        if mask is None:
            continue
        if picture is not None and mask.size != picture.size:
            yield Problem(different_sizes(item, picture.size, mask.size))
        for kind in _odd_values(np.asarray(mask)):
            shared[kind, False].append(str(item.mask))
    yield from (
        Problem(f"{product} has {len(paths)} {kind}: {_some(paths)}.", serious)
        for (kind, serious), paths in shared.items()
    )


def _odd_values(mask: np.ndarray) -> Iterator[str]:
    if not mask.any():
        yield "masks without a defect"
    elif mask.any(axis=2).all():
        yield "masks in which every pixel is a defect"
    if ((mask > 0) & (mask < 255)).any():
        yield "gray masks, in which all above 0 counts as defect"


def _check_left_over(items: Sequence[Item]) -> Iterator[Problem]:
    """Image files beside the images and masks that belong to no item: masks without an image, or misnamed ones."""
    used = {os.path.abspath(path) for item in items for path in (item.image, item.mask) if path}
    for folder in sorted({os.path.dirname(path) for path in used}):
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        files = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
        if left := [name for name in files if os.path.join(folder, name) not in used]:
            yield Problem(
                f"{folder} has {len(left)} files that belong to no image: {_some(left)}. Add their images, or rename them."
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
