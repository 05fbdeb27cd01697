"""What pretraining and centers begin with: the images to learn from, and the frozen backbone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from adfeatures import catalog
from adfeatures.backbones import Encoder
from adfeatures.checkpoints import weights_fingerprint
from adfeatures.errors import InputError, UnknownNameError
from adfeatures.factory import load_backbone
from adfeatures.images import ImageTransform, build_transform

from ..data import folder, real_iad
from ..data.items import Item
from ..data.manifest import read_manifest
from .config import InputsConfig


@dataclass(frozen=True)
class FrozenBackbone:
    """A backbone that is not trained, with what is known of it.

    Attributes:
        name: The name that it was asked for by.
        module: Maps images (B, 3, H, W) to one map (B, C_l, h_l, w_l) per level.
        entry: Its description, with the levels and the input size in use.
    """

    name: str
    module: Encoder
    entry: catalog.Backbone

    @cached_property
    def fingerprint(self) -> list[str]:
        """Hashes of its weights; see ``weights_fingerprint``."""
        return weights_fingerprint(self.module.state_dict())

    @property
    def transform(self) -> ImageTransform:
        """The way from an image to its input, without augmentation."""
        return build_transform(self.entry.img_size, *self.entry.normalization)

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.module.parameters()).device


def read_split(config: InputsConfig) -> tuple[list[Item], list[Item]]:
    """The items to train on, and those that are held out.

    Raises:
        UnknownNameError: For a product that the manifest does not have.
        InputError: As the readers raise it, and for a filter list of another data set than Real-IAD.
    """
    return real_iad.split_by_sample(_read_items(config), config.held_out, config.seed)


def load_frozen_backbone(config: InputsConfig, device: torch.device) -> FrozenBackbone:
    """The backbone of a config, on a device; errors as of ``load_backbone``."""
    # Random weights, where they are asked for, are the same in whatever resumes or precedes the pretraining.
    torch.manual_seed(config.seed)
    module, entry = load_backbone(
        config.backbone, weights=config.backbone_weights, img_size=config.size, levels=config.levels or None
    )
    return FrozenBackbone(config.backbone, module.to(device), entry)


def _read_items(config: InputsConfig) -> list[Item]:
    root, products = config.root, config.products or None
    if config.data == "real_iad":
        return real_iad.read(root, products, config.filter_list)
    if config.filter_list is not None:
        raise InputError(f"A filter list goes with the data of Real-IAD only, not with {config.data}.")
    if config.data == "manifest":
        return _of_products(read_manifest(root), products)
    items = [item for split in ("train", "test") for item in folder.TREE.find_items(root, split, products)]
    # Where the folder lies must not decide which images are held out.
    return [dataclasses.replace(item, sample=os.path.relpath(item.image, root).replace(os.sep, "/")) for item in items]


def _of_products(items: list[Item], products: Sequence[str] | None) -> list[Item]:
    known = {item.product: item for item in items}
    for product in products or ():
        if product not in known:
            raise UnknownNameError(catalog.unknown("product", product, known))
    return [item for item in items if products is None or item.product in products]
