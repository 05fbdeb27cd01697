"""What is missing or misnamed in a data set: ``python -m training.evaluate --check DIR``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adfeatures.catalog import unknown
from adfeatures.errors import ImageError, InputError
from adfeatures.image_files import IMAGE_SUFFIXES
from training.console import DONE, SOME_FAILED, progress
from training.distributed import cores

from . import DATASETS, dataset
from .images import in_parallel, noticing, read_item, shared_masks, some, summarize
from .items import ANOMALOUS, NORMAL, Item
from .tree import StrPath, Tree, nearby, subfolders


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


def report(root: StrPath, name: str | None = None) -> tuple[str, int]:
    """The problems of a data set as text, and an exit code: DONE, or SOME_FAILED where one is serious.

    Arguments and errors are those of ``check``.
    """
    named = name or recognize(root)
    problems = check(root, named)
    serious = sum(problem.serious for problem in problems)
    lines = [f"{root} holds {dataset(named).title}; products: {len(dataset(named).find_products(root))}."]
    if name is None:
        lines += [f"This was told by its folders. If it is wrong, name it with --dataset: {', '.join(DATASETS)}."]
    found = f"errors: {serious}, warnings: {len(problems) - serious}" if problems else "Nothing is missing or misnamed."
    return "\n".join([*lines, *map(str, problems), found]), SOME_FAILED if serious else DONE


def check(root: StrPath, name: str | None = None) -> list[Problem]:
    """Look at every folder, image and mask of a data set.

    Args:
        root: Folder of the data set.
        name: One of `DATASETS`; None recognizes it by its folders.

    Raises:
        UnknownNameError: For an unknown data set.
        InputError: If the folder is not that of the data set, or of none that is known; the message says which one to
            give.
    """
    tree = dataset(name or recognize(root))
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
    if not os.path.exists(root):
        raise InputError(f"There is no folder {root}.")
    if name := _recognized(root):
        return name
    titles = ", ".join(tree.title for tree in DATASETS.values())
    near = nearby(root, lambda folder: _recognized(folder) is not None)
    advice = f"Give {near} instead." if near else f"Known are {titles}; name one with --dataset to see what is missed."
    raise InputError(f"{root} is not the folder of a data set. {advice}")


def _recognized(root: Path) -> str | None:
    best = max(DATASETS, key=lambda name: DATASETS[name].likeness(root))
    if not DATASETS[best].likeness(root):
        return None
    # The folder of one product of a known data set looks like one of your own.
    path = root.resolve()
    known = {name for name, tree in DATASETS.items() if path.name in tree.products}
    return None if not DATASETS[best].products and known and _recognized(path.parent) in known else best


def _unread(path: Path, reason: str) -> Problem:
    return Problem(f"{path} is not read{reason}", serious=False)


def _check_products(tree: Tree, root: Path, products: dict[str, Path]) -> Iterator[Problem]:
    """The products that are not there, and the folders beside the products."""
    # A tree of other products in the layout of a known data set lacks none.
    known = tree.products if set(tree.products) & set(products) else ()
    if missing := [product for product in known if product not in products]:
        lack = f"{root} lacks {len(missing)} of {len(known)} products of {tree.title}: {', '.join(missing)}."
        yield Problem(f"{lack} Extract the rest.")
    if root in products.values():
        return
    folder = next(iter(products.values())).parent
    for name in subfolders(folder):
        if known and name not in (*known, *tree.others):
            yield _unread(folder / name, f". {unknown(f'product of {tree.title}', name, known)}")
        elif not known and name not in products:
            yield _unread(folder / name, f": it holds none of the folders {', '.join(tree.folders)}.")


def _check_folders(tree: Tree, product: Path) -> Iterator[Problem]:
    """The folders in a product that nothing reads."""
    for name in subfolders(product):
        if name not in tree.folders:
            yield _unread(product / name, f". {unknown('folder', name, tree.folders)}")
    kinds, masks = tuple(subfolders(product / "test")), product / "ground_truth"
    for name in subfolders(masks) if kinds and masks.name in tree.folders else ():
        if name not in kinds:
            yield _unread(masks / name, f": test has no such folder. {unknown('kind', name, kinds)}")


def _check_product(tree: Tree, root: StrPath, product: str, folder: Path) -> Iterator[Problem]:
    items: list[Item] = []
    complete = True
    for split in tree.splits:
        try:
            with noticing() as texts:
                walked = dict(tree.walk(root, product, split))
        except InputError as error:
            yield Problem(str(error))
            complete = False
            continue
        yield from (Problem(text, serious=False) for text in texts)
        for place, found in walked.items():
            if not found:
                yield Problem(f"{place} holds no images. Extract it again, or remove it.")
        of_split = sum(walked.values(), [])
        yield from _check_labels([item.label for item in of_split], folder / split, split)
        items += of_split
    yield from _check_files(items, product)
    if complete and tree.folders:
        yield from _check_left_over(items)


def _check_labels(labels: Sequence[int], folder: Path, split: str) -> Iterator[Problem]:
    normal = labels.count(NORMAL)
    if normal == 0:
        yield Problem(f"{folder} holds no normal images.")
    if normal == 1 and split == "train":
        yield Problem(f"{folder} holds a single normal image, so that no two references can be compared.", False)
    if split != "train" and ANOMALOUS not in labels:
        yield Problem(f"{folder} holds no images with defects, so that no metric can be computed.")


def _check_files(items: Sequence[Item], product: str) -> Iterator[Problem]:
    """Read all images and masks. What many files may share is one problem."""
    there = {item: item.mask is None or os.path.isfile(item.mask) for item in items if os.path.isfile(item.image)}
    lost = [item.image for item in items if item not in there]
    bare = [f"{item.image} (mask expected in {item.mask})" for item, is_whole in there.items() if not is_whole]
    for kind, paths in (("missing images", lost), ("images without their mask", bare)):
        if paths:
            yield Problem(f"{product} has {len(paths)} {kind}: {some(paths)}.")
    noticed: dict[Item, list[str]] = {}
    looks = in_parallel(
        _look, [item if is_whole else replace(item, mask=None) for item, is_whole in there.items()], cores()
    )
    for item, found in zip(
        there, progress(looks, total=len(there), desc=product, unit="images", leave=False), strict=True
    ):
        if isinstance(found, ImageError):
            yield Problem(str(found))
        else:
            noticed[item] = found
    for text in summarize(noticed, noticed.values()):
        yield Problem(f"{product} has {text}", serious=False)
    yield from map(Problem, shared_masks(items))


def _look(item: Item) -> list[str] | ImageError:
    """What is odd about an image and its mask, or why they cannot be read."""
    try:
        return read_item(item)[2]
    except ImageError as error:
        return error


def _check_left_over(items: Sequence[Item]) -> Iterator[Problem]:
    """Image files beside the images and masks that belong to no item: masks without an image, or misnamed ones."""
    used = {os.path.abspath(path) for item in items for path in (item.image, item.mask) if path}
    for folder in sorted({os.path.dirname(path) for path in used}):
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        files = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
        if left := [name for name in files if os.path.join(folder, name) not in used]:
            belong = f"{folder} has {len(left)} files that belong to no image: {some(left)}."
            yield Problem(f"{belong} Add their images, or rename them.")
