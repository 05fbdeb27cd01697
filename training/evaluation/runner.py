"""Evaluating a model: on each product every method, once on raw features and once per draw on pretrained ones."""

from __future__ import annotations

import itertools
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from adfeatures.errors import AdfeaturesError

from .. import metrics
from ..data.draws import draw_references, given_references
from ..data.images import loader
from ..data.items import Item
from ..data.protocol import original_geometry
from ..methods import METHODS, find_method
from ..methods.base import Predictions
from . import pictures
from .config import ORIGINAL, RETRIEVED, EvaluationConfig
from .feature_cache import remove_owned
from .fitting import settings, train_loader
from .model import EvaluatedModel
from .overlap import Overlaps
from .product import Product
from .product_features import (
    FeatureKind,
    ProductFeatures,
    listed_features,
    projected_features,
    residual_features,
    retrieved_features,
)
from .raw_features import KnownImages, RawFeatures
from .reference_lists import listed_references
from .results import FOLDER, OF_LISTED, OF_RETRIEVED, PRETRAINED, RAW, Combination, Record, Results
from .tables import ORIGINAL_AUPRO, title
from .views import PART_AUROC, by_view, part_auroc

# What makes a product or a method fail and not the evaluation. A full disk ends it.
FAILURES = (ValueError, RuntimeError, MemoryError)
FIGURES, CACHE = "figures", "cache"
# Warnings from elsewhere are about the code of libraries, not about the data; and a virtual environment may lie in the
# checkout.
PACKAGES = tuple(str(Path(__file__).parents[2] / name) for name in ("adfeatures", "training"))
T = TypeVar("T")


class Fitted(NamedTuple):
    """A trained method, the best metrics of all its epochs by product, and the start of its records."""

    method: Any
    best: dict[str, dict[str, float]]
    record: Record


class Evaluation:
    """Evaluates products and writes what it finds.

    Attributes:
        alone: What is evaluated on each product by itself.
        jointly: What is trained on all products together.
    """

    def __init__(self, config: EvaluationConfig, model: EvaluatedModel, results: Results, overlaps: Overlaps) -> None:
        self.config, self.model, self.results, self.overlaps = config, model, results, overlaps
        self.raw = RawFeatures(model, Path(config.cache or results.folder / CACHE), config.workers)
        self.alone: list[Combination] = []
        self.jointly: list[Combination] = []
        for name in config.methods:
            (self.jointly if find_method(name).joint else self.alone).extend(self._combinations(name))

    def remove_leftovers(self) -> None:
        """Remove the features that killed commands have left for this folder of results alone."""
        remove_owned(self.raw.folder, self._owner)

    @property
    def _owner(self) -> str:
        return str(self.results.folder.resolve())

    @property
    def combinations(self) -> list[Combination]:
        """Everything that is evaluated on each product."""
        return self.alone + self.jointly

    def evaluate_product(self, name: str) -> None:
        """Do what is not done yet for one product alone, and make sure that it can be used for what is done jointly.

        Failures are recorded.

        Raises:
            AdfeaturesError: If there are results of other images, the disk is full, or a folder cannot be written.
        """
        records = {
            combination: self._mark(combination, self.results.read(name, combination))
            for combination in self.combinations
        }
        pending = [combination for combination, record in records.items() if record is None]
        try:
            product = self._product(name)
            if any(record is not None and record.get("images") != product.digest for record in records.values()):
                raise AdfeaturesError(
                    f"The results of {name} in {self.results.folder} are of other images than {self.config.root} holds "
                    f"now. Choose another --output, or remove {self.results.folder / FOLDER / name} "
                    "to have them computed again."
                )
            if pending or self.results.failed(name):
                for preset in {self._kind(combination, name).images for combination in records}:
                    product.encode(preset)
        except FAILURES as error:
            self.results.fail(name, error)
            return
        self.results.clear(name)
        by_kind: dict[FeatureKind, list[Combination]] = defaultdict(list)
        for combination in pending:
            if combination in self.alone:
                by_kind[self._kind(combination, name)].append(combination)
        for kind, combinations in by_kind.items():
            self._evaluate(kind, combinations, [product])
        self._draw_curves(name)

    def evaluate_jointly(self, combination: Combination, names: Sequence[str]) -> None:
        """Train one model on the products that can be used and score each, unless that is done.

        Failures and errors are those of ``evaluate_product``.
        """
        usable = [name for name in names if not self.results.failed(name)]
        if self._is_trained_on(combination, usable):
            return
        kind = self._kind(combination, usable[0])
        products = []
        for product in map(self._product, usable):
            # Each by itself first, so that one that cannot be used is told from the others.
            if self._attempt([combination], [product], [], partial(self._check_trainable, kind, product)):
                products.append(product)
        if not self._is_trained_on(combination, [product.name for product in products]):
            self._evaluate(kind, [combination], products)
            for product in products:
                self._draw_curves(product.name)

    def _is_trained_on(self, combination: Combination, names: Sequence[str]) -> bool:
        """Whether the results of these products are there and of a model that was trained on all of them."""
        return all((self.results.read(name, combination) or {}).get("trained_on") == names for name in names)

    def _check_trainable(self, kind: FeatureKind, product: Product) -> list[Item]:
        product.encode(kind.images)
        features = self._features(kind, [product])
        features.remove()
        return features.trainable(product)

    def _combinations(self, method: str) -> Iterator[Combination]:
        kind = ""
        if method == "feature_norm":
            kind = OF_RETRIEVED * (self.config.references == RETRIEVED) + OF_LISTED * bool(self.config.reference_lists)
        method += kind
        yield Combination(method, RAW)
        for draw in [None] if kind else range(self.config.draws):
            yield Combination(method, PRETRAINED, draw)

    def _product(self, name: str) -> Product:
        return Product(name, self.config.tree, self.config.root, self.raw)

    def _kind(self, combination: Combination, product: str) -> FeatureKind:
        method, images, references = combination.base, "squash", "squash"
        if self.config.protocol == ORIGINAL:
            images, references = original_geometry(method, self.config.dataset, product)
        tag = self.model.tags[method] if combination.features == PRETRAINED else None
        return FeatureKind(images, references, tag, combination.draw)

    def _features(self, kind: FeatureKind, products: Sequence[Product]) -> ProductFeatures:
        if kind.tag is None:
            return ProductFeatures(self.raw.of(kind.images), kind)
        if not self.model.weights[kind.tag].takes_residuals:
            return projected_features(self.raw, kind)
        if kind.draw is None and self.config.reference_lists is not None:
            (product,) = products
            lists = listed_references(self.config.reference_lists, self.config.dataset, self._folder(product), product)
            return listed_features(self.raw, kind, lists)
        if kind.draw is None:
            return retrieved_features(self.raw, kind, products[0])
        references = [self._references(product, kind.draw) for product in products]
        leave_out = self.config.protocol != ORIGINAL
        return residual_features(self.raw, kind, products, references, leave_out=leave_out, owner=self._owner)

    def _folder(self, product: Product) -> Path:
        return self.config.tree.find_products(self.config.root)[product.name]

    def _references(self, product: Product, draw: int) -> list[Item]:
        folder, shots = self.config.given_references, self.config.shots
        if folder is None:
            return draw_references(product.train, shots, draw)
        return given_references(folder, self.config.dataset, product.name, shots)

    def _attempt(
        self,
        combinations: Sequence[Combination],
        products: Sequence[Product],
        noticed: list[str],
        step: Callable[[], T],
    ) -> T | None:
        """Take a step; its warnings come to those ``noticed``, its failure to the records, and then there is None.

        The code of a method from outside may fail in any way.
        """
        failures = FAILURES if {combination.base for combination in combinations} <= set(METHODS) else (Exception,)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value = step()
            except failures as error:
                if isinstance(error, AdfeaturesError) and not isinstance(error, FAILURES):
                    raise
                for combination, product in itertools.product(combinations, products):
                    self.results.fail(product.name, error, combination)
                return None
        own = [w for w in caught if issubclass(w.category, UserWarning) and w.filename.startswith(PACKAGES)]
        noticed += dict.fromkeys(str(warning.message) for warning in own)
        return value

    def _evaluate(self, kind: FeatureKind, combinations: Sequence[Combination], products: Sequence[Product]) -> None:
        """Fit the methods of combinations that share their features, and score each product with them."""
        by_features: list[str] = []
        features = self._attempt(combinations, products, by_features, partial(self._features, kind, products))
        if features is None:
            return
        for combination in combinations:
            by_fit = [*by_features]
            fitted = self._attempt([combination], products, by_fit, partial(self._fit, combination, features, products))
            if fitted is None:
                continue
            for product in products:
                noticed = [*by_fit]
                score = partial(self._score, combination, features, fitted, product)
                record = self._attempt([combination], [product], noticed, score)
                if record is not None:
                    noticed += product.truth(kind.images).warnings + product.noticed + features.warnings(product)
                    if combination.is_shown:
                        # Drawn anew when all that it shows is there.
                        self._curves_path(combination, product.name).unlink(missing_ok=True)
                    self.results.write(combination, {**record, "warnings": noticed})
        features.remove()

    def _fit(self, combination: Combination, features: ProductFeatures, products: Sequence[Product]) -> Fitted:
        started, preset, names = time.perf_counter(), features.kind.images, [product.name for product in products]
        entry = find_method(combination.base)
        chosen = settings(entry, combination.features, self.config, self.model, preset, names)
        method = entry.create(features.extractor, **chosen)
        items = [item for product in products for item in features.trainable(product)]
        batches = train_loader(entry, items, self.model, preset, self.config.workers)
        best: dict[str, dict[str, float]] = {}

        def on_epoch(_: int) -> None:
            for product in products:
                found = self._metrics(product, preset, self._predict(method, product))
                before = best.get(product.name, found)
                best[product.name] = {name: max(before[name], value) for name, value in found.items()}

        if self.config.oracle and entry.epochs is not None:
            method.fit(batches, on_epoch=on_epoch)
        else:
            method.fit(batches)
        seconds = {"fit": round(time.perf_counter() - started, 2)}
        record = {"settings": chosen, "counts": {"train": len(items)}, "seconds": seconds, "trained_on": names}
        return Fitted(method, best, record)

    def _predict(self, method: Any, product: Product) -> Predictions:
        return Predictions(*method.predict(loader(KnownImages(product.test, self.model.img_size))))

    def _score(self, combination: Combination, features: ProductFeatures, fitted: Fitted, product: Product) -> Record:
        started, preset = time.perf_counter(), features.kind.images
        truth, predictions = product.truth(preset), self._predict(fitted.method, product)
        found = self._metrics(product, preset, predictions)
        anomalous = int(truth.labels.sum())
        record = {
            **fitted.record,
            **features.record(product),
            "images": product.digest,
            "metrics": found,
            "overlap": self._overlap(features.weights, product.name),
            "counts": {**fitted.record["counts"], "normal": len(truth.labels) - anomalous, "anomalous": anomalous},
            "seconds": {**fitted.record["seconds"], "predict": round(time.perf_counter() - started, 2)},
        }
        if views := by_view(product.test, predictions, truth.masks, truth.labels):
            record["views"] = views
        if product.name in fitted.best:
            record["oracle"] = fitted.best[product.name]
        if combination.is_shown:
            record["curves"] = pictures.curves(predictions, truth.masks, truth.labels)
            path = self.results.folder / FIGURES / product.name / f"{combination.name}-maps.png"
            pictures.draw_maps(path, product.test, predictions, self.model.transform(preset))
        return record

    def _metrics(self, product: Product, preset: str, predictions: Predictions) -> dict[str, float]:
        masks, labels, _ = product.truth(preset)
        found = asdict(metrics.evaluate(predictions.maps, masks, labels, predictions.scores))
        if self.config.protocol == ORIGINAL:
            found[ORIGINAL_AUPRO] = metrics.aupro_original(predictions.maps, masks)
        if any(item.view for item in product.test):
            found[PART_AUROC] = part_auroc(product.test, predictions.scores, labels)
        return found

    def _overlap(self, weights: str | None, product: str) -> dict[str, Any] | None:
        """The mark of a record: how many of its images the weights were trained on; None where that is not known."""
        found = self.overlaps.get((weights or "", product))
        return None if found is None else asdict(found)

    def _mark(self, combination: Combination, record: Record | None) -> Record | None:
        """Mark what was found before there were marks, or before the weights were known to overlap."""
        if record is not None:
            overlap = self._overlap(record.get("weights"), record["product"])
            if overlap is not None and record.get("overlap") is None:
                record["overlap"] = overlap
                self.results.write(combination, record)
        return record

    def _draw_curves(self, product: str) -> None:
        """Draw the curves of a product that are not there: a picture for each method, of all features with results."""
        found: dict[tuple[Path, str], dict[str, pictures.Curves]] = defaultdict(dict)
        for combination in self.combinations:
            if combination.is_shown and (record := self.results.read(product, combination)) is not None:
                picture = self._curves_path(combination, product), f"{title(combination.method)} on {product}"
                found[picture][combination.features] = record.get("curves", {})
        for (path, heading), by_features in found.items():
            if not path.exists():
                pictures.draw_detection_curves(path, heading, by_features)

    def _curves_path(self, combination: Combination, product: str) -> Path:
        return self.results.folder / FIGURES / product / f"{combination.method_file}-curves.png"
