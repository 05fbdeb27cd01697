"""What pretraining and centers begin with: the images to learn from, and the frozen backbone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch

from adfeatures.catalog import unknown
from adfeatures.errors import InputError, UnknownNameError

from ..data import folder, real_iad
from ..data.fingerprint import digests
from ..data.image_cache import ImageCache
from ..data.items import Item
from ..data.manifest import read_manifest
from ..distributed import gather_objects, rank, world_size
from .config import InputsConfig
from .frozen_backbone import load_frozen_backbone


class Inputs:
    """The images of a config and its backbone.

    Attributes:
        train: What to train on.
        normal: Those of it that may serve as references.
        held_out: What is kept for validation.
        title: "Real-IAD" where all images are of it; other data may come in the same layout.
        backbone: The backbone, on the device.
        workers: Processes that read images.

    Raises:
        UnknownNameError: For a product that the data do not have.
        InputError: As the readers raise it.
        AdfeaturesError: As ``load_backbone`` raises it.
    """

    def __init__(self, config: InputsConfig, device: torch.device) -> None:
        # The images come first: nobody waits for weights to hear of a wrong folder.
        self.train, self.held_out = read_split(config)
        self.normal = real_iad.reference_pool(self.train)
        known = config.data == "real_iad" and {item.product for item in self.train} <= set(real_iad.PRODUCTS)
        self.title = real_iad.TREE.title if known else None
        self.backbone = load_frozen_backbone(config, device)
        self.workers, self._cache_folder = config.workers, config.cache

    @cached_property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of the images to train on and, for the cache, of their masks, by path. All ranks share the work.

        Files that cannot be read are left out.
        """
        files = [item.image for item in self.train]
        if self._cache_folder is not None:
            files += [item.mask for item in self.train if item.mask is not None]
        shares = gather_objects(digests(files[rank() :: world_size()], self.workers))
        return {path: digest for share in shares for path, digest in share.items()}

    @cached_property
    def cache(self) -> ImageCache | None:
        """The cache with all images to train on, if there is to be one; errors as of ``ImageCache``."""
        if self._cache_folder is None:
            return None
        cache = ImageCache(self._cache_folder, self.backbone.transform, self.digests)
        # One process works for all of its machine.
        cache.fill(self.train, self.workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        return cache


def read_split(config: InputsConfig) -> tuple[list[Item], list[Item]]:
    """The items to train on, and those that are held out; errors as of the readers."""
    if config.filter_list is not None and config.data != "real_iad":
        raise InputError(f"A filter list goes with the data of Real-IAD only, not with {config.data}.")
    readers: dict[str, Callable[[str, Sequence[str] | None], list[Item]]] = {
        "real_iad": partial(real_iad.read, filter_list=config.filter_list),
        "folder": _read_folder,
        "manifest": _read_manifest,
    }
    items = readers[config.data](config.root, config.products or None)
    return real_iad.split_by_sample(items, config.held_out, config.seed)


def _read_folder(root: str, products: Sequence[str] | None) -> list[Item]:
    items = [item for split in ("train", "test") for item in folder.TREE.find_items(root, split, products)]
    # Where the folder lies must not decide which images are held out.
    return [dataclasses.replace(item, sample=os.path.relpath(item.image, root).replace(os.sep, "/")) for item in items]


def _read_manifest(path: str, products: Sequence[str] | None) -> list[Item]:
    items = read_manifest(path)
    known = dict.fromkeys(item.product for item in items)
    for product in products or ():
        if product not in known:
            raise UnknownNameError(unknown("product", product, known))
    return [item for item in items if products is None or item.product in products]
