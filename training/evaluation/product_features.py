"""The features that methods take of products: raw ones, or those that references make of them."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adfeatures.errors import InputError
from adfeatures.references import BankRecord, ReferenceBank, residuals_of_images
from adfeatures.scoring import Scorer

from ..data.images import loader
from ..data.items import Item
from ..methods.base import Batch, Extractor
from ..methods.retrieval import RetrievedReferences
from .feature_cache import CachedExtractor, content_key, place_key
from .product import Product
from .raw_features import KnownImages, RawFeatures
from .residuals import Key, Residuals


class FeatureKind(NamedTuple):
    """What decides features besides the images.

    Attributes:
        images: Preset of `adfeatures.images` for the images.
        references: Preset for their references.
        tag: Tag of the trained weights, None for raw features.
        draw: Number of the draw of references, None where they are retrieved or none are needed.
    """

    images: str
    references: str
    tag: str | None = None
    draw: int | None = None


@dataclass
class ProductFeatures:
    """Features of some products, computed once for all methods that take the same.

    Attributes:
        extractor: What gives them.
        kind: What decides them.
        weights: Name of the trained weights, None for raw features.
        references: Reference files of each product, as given, with their SHA-256.
        single: The references, by SHA-256, that are training images and have no others to be compared with.
        retrieved: Where the references are retrieved or listed: those of each image so far, by its path.
        remove: Deletes what was kept on disk for these features alone.
    """

    extractor: Extractor
    kind: FeatureKind
    weights: str | None = None
    references: Mapping[str, list[dict[str, str]]] = field(default_factory=dict)
    single: frozenset[str] = frozenset()
    retrieved: Mapping[str, Sequence[str]] = field(default_factory=dict)
    remove: Callable[[], None] = lambda: None

    def trainable(self, product: Product) -> list[Item]:
        """The training images that have such features.

        Raises:
            InputError: If there are none.
        """
        items = [item for item in product.train if not self.single or content_key(item.image) not in self.single]
        if not items:
            count = len(product.train)
            one = "a single normal training image" if count == 1 else f"{count} normal training images, copies of one"
            raise InputError(f"{product.name} has {one}, which is its reference. Nothing is left to learn from.")
        return items

    def record(self, product: Product) -> dict[str, Any]:
        """What the results say of the features of a product."""
        facts: dict[str, Any] = {
            "product": product.name,
            "weights": self.weights,
            "geometry": {"images": self.kind.images, "references": self.kind.references},
            "references": self.references.get(product.name, []),
        }
        if self.retrieved:
            facts["retrieved"] = {item.image: list(self.retrieved[item.image]) for item in product.test}
        return facts

    def warnings(self, product: Product) -> list[str]:
        """What is odd about the references of a product."""
        known = {entry["sha256"] for entry in self.references.get(product.name, [])}
        copies = sum(content_key(item.image) in known for item in product.test) if known else 0
        single = "The only reference is a training image, which is left out of the training."
        return [f"{copies} test images are references as well."] * bool(copies) + [single] * bool(self.single & known)


def residual_features(
    raw: RawFeatures,
    kind: FeatureKind,
    products: Sequence[Product],
    references: Sequence[Sequence[Item]],
    *,
    leave_out: bool,
    owner: str,
) -> ProductFeatures:
    """Projected residuals of products against fixed references of each.

    Args:
        raw: Raw features, with the model.
        kind: Presets and tag.
        products: The products.
        references: References of each product.
        leave_out: Whether a training image that is a reference is compared with the other references alone.
        owner: Whose they are: evaluations that share a folder of features do not delete each other's.

    Raises:
        ImageError: For a reference that cannot be read.
    """
    weights = raw.model.weights[kind.tag or ""]
    banks: dict[Key, ReferenceBank] = {}
    for product, items in zip(products, references, strict=True):
        raw.encode(items, kind.references)
        for view in {item.view for item in items}:
            banks[product.name, view] = _bank(raw, kind.references, [item for item in items if item.view == view])
    key_of = {item.image: (product.name, item.view) for product in products for item in (*product.train, *product.test)}
    residuals = Residuals(
        raw.of(kind.images), banks, key_of, weights.projector, scorer=raw.model.scorer, leave_out=leave_out
    )
    identity = {
        "images": raw.identity(kind.images),
        "references": [kind.references, sorted((*key, *bank.sha256s) for key, bank in banks.items())],
        "projector": weights.fingerprint,
        "leave_out": leave_out,
        "owner": owner,
    }
    kept = CachedExtractor(residuals, raw.folder, identity, place_key, raw.model.device)
    files: dict[str, list[dict[str, str]]] = defaultdict(list)
    for (name, _), bank in sorted(banks.items()):
        files[name] += [{"file": file, "sha256": sha} for file, sha in zip(bank.files, bank.sha256s, strict=True)]
    single = [bank.sha256s[0] for bank in banks.values() if bank.num_images == 1 and leave_out]
    return ProductFeatures(kept, kind, weights.name, files, frozenset(single), remove=kept.remove)


def projected_features(raw: RawFeatures, kind: FeatureKind) -> ProductFeatures:
    """Features that a projector makes of raw ones, without references: an ablation of the paper."""
    weights = raw.model.weights[kind.tag or ""]
    assert weights.projector is not None
    project = torch.no_grad()(weights.projector)
    return ProductFeatures(lambda batch: project(raw.of(kind.images)(batch)), kind, weights.name)


def retrieved_features(raw: RawFeatures, kind: FeatureKind, product: Product) -> ProductFeatures:
    """Projected residuals of a product against references retrieved for each image from all training images."""
    weights, scorer = raw.model.weights[kind.tag or ""], raw.model.scorer
    extractor = RetrievedReferences(
        lambda batch: scorer.features(raw.of(kind.images)(batch)),
        weights.projector,
        KnownImages(product.train, raw.model.img_size),
    )
    return ProductFeatures(extractor, kind, weights.name, retrieved=extractor.lists)


def listed_features(raw: RawFeatures, kind: FeatureKind, lists: Mapping[str, Sequence[Item]]) -> ProductFeatures:
    """Projected residuals of images, each against references of its own.

    Args:
        raw: Raw features, with the model.
        kind: Presets and tag.
        lists: References of each image, by its path.

    Raises:
        ImageError: For a reference that cannot be read.
    """
    weights, scorer = raw.model.weights[kind.tag or ""], raw.model.scorer
    every = {item.image: item for items in lists.values() for item in items}
    raw.encode(list(every.values()), kind.references)

    def extract(batch: Batch) -> Sequence[Tensor]:
        known = (KnownImages(lists[path], raw.model.img_size) for path in batch["path"])
        maps = (_all_of(raw.of(kind.references), images) for images in known)
        banks = [_prepared(levels, scorer) for levels in maps]
        residuals = residuals_of_images(scorer.features(raw.of(kind.images)(batch)), banks)
        return residuals if weights.projector is None else weights.projector(residuals)

    files = {path: [item.image for item in items] for path, items in lists.items()}
    return ProductFeatures(torch.no_grad()(extract), kind, weights.name, retrieved=files)


def _all_of(extractor: Extractor, images: KnownImages) -> list[Tensor]:
    """The maps (N, C_l, h_l, w_l) of all images."""
    batches = [extractor(batch) for batch in loader(images)]
    return [torch.cat(level) for level in zip(*batches, strict=True)]


def _bank(raw: RawFeatures, preset: str, items: Sequence[Item]) -> ReferenceBank:
    """The bank of references whose features are known. Copies are left out, with a warning."""
    kept: dict[str, Item] = {}
    for item in items:
        if kept.setdefault(content_key(item.image), item) is not item:
            warnings.warn(f"The reference {item.image} is a copy of another one and is left out.", stacklevel=2)
    known = KnownImages(list(kept.values()), raw.model.img_size)
    bank = _prepared(_all_of(raw.of(preset), known), raw.model.scorer)
    bank.record = BankRecord(files=[item.image for item in kept.values()], sha256s=list(kept))
    return bank


def _prepared(maps: Sequence[Tensor], scorer: Scorer) -> ReferenceBank:
    """The bank of references, of their maps from the backbone."""
    bank = ReferenceBank.from_features(scorer.features(maps))
    scorer.prepare(bank)
    return bank
