"""Evaluating a model: on each product every method, once on raw features and once per draw of references on pretrained ones."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from adfeatures.errors import AdfeaturesError

from .. import metrics
from ..data import dataset
from ..data.items import ANOMALOUS, NORMAL, Item
from ..data.protocol import original_geometry
from ..methods import METHODS
from ..methods.base import Predictions
from . import figures
from .config import ORIGINAL, RETRIEVED, EvaluationConfig
from .draws import draw_references, given_references
from .inputs import Product, RawFeatures
from .pretrained_features import Features, Geometry, residual_features, retrieved_features
from .recipes import OF_RETRIEVED, RECIPES, base, known_loader, settings, title, train_loader
from .report import ORIGINAL_AUPRO
from .results import FOLDER, PRETRAINED, RAW, Record, Results, Run
from .subject import Subject

# What makes a product or a method fail and not the evaluation. A full disk ends it.
FAILURES = (ValueError, RuntimeError, MemoryError)
FIGURES, CACHE = "figures", "cache"
# Warnings from elsewhere are about the code of libraries, not about the data; and a virtual environment may lie in the
# checkout.
PACKAGES = tuple(str(Path(__file__).parents[2] / name) for name in ("adfeatures", "training"))
T = TypeVar("T")


class Group(NamedTuple):
    """What decides the features of a run. Runs of one group share them."""

    features: str
    draw: int | None
    retrieved: bool
    tag: str
    geometry: Geometry


class Fitted(NamedTuple):
    """A trained method, its settings, the number of training images, the best metrics of all epochs by product, and the time it took."""

    method: Any
    settings: dict[str, Any]
    images: int
    best: dict[str, dict[str, float]]
    seconds: float


class Evaluation:
    """Evaluates products and writes what it finds.

    Args:
        config: What is asked for.
        subject: The model.
        results: Where finished results are, and go.
    """

    def __init__(self, config: EvaluationConfig, subject: Subject, results: Results) -> None:
        self.config, self.subject, self.results = config, subject, results
        self.source = dataset(str(config.dataset))
        self.raw = RawFeatures(subject, Path(config.cache or results.folder / CACHE), config.workers)
        renamed = {"feature_norm": "feature_norm" + OF_RETRIEVED} if config.references == RETRIEVED else {}
        runs = [run for method in config.methods for run in self._runs(renamed.get(method, method))]
        self.runs = [run for run in runs if not RECIPES[base(run.method)].joint]
        self.joint_runs = [run for run in runs if RECIPES[base(run.method)].joint]

    def evaluate_product(self, name: str) -> None:
        """Do what is not done yet for one product alone, and make sure that it can be used for what is done for several together.

        A failure is recorded, not raised.

        Raises:
            AdfeaturesError: If there are results of other images, the disk is full, or a folder cannot be written.
        """
        records = {run: self.results.read(name, run) for run in self.runs + self.joint_runs}
        pending = [run for run, record in records.items() if record is None]
        try:
            product = self._product(name)
            if any(record is not None and record.get("images") != product.digest for record in records.values()):
                raise AdfeaturesError(
                    f"The results of {name} in {self.results.folder} are of other images than {self.config.root} holds now. "
                    f"Choose another --output, or remove {self.results.folder / FOLDER / name} to have them computed again."
                )
            if pending or self.results.failed(name):
                for preset in {self._group(run, name).geometry.images for run in records}:
                    product.encode(preset)
        except FAILURES as error:
            self.results.fail(name, error)
            return
        self.results.clear(name)
        self._evaluate([run for run in pending if run in self.runs], [product])

    def evaluate_jointly(self, run: Run, names: Sequence[str]) -> None:
        """Train one model on several products and score each, unless that is done.

        Products that cannot be used are left out.

        Failures and errors are those of ``evaluate_product``.
        """
        usable = [name for name in names if not self.results.failed(name)]
        if self._is_trained_on(run, usable):
            return
        group = self._group(run, usable[0])
        products = [
            product
            for product in map(self._product, usable)
            if self._attempt([run], [product], partial(self._check_trainable, group, product))[0] is not None
        ]
        if not self._is_trained_on(run, [product.name for product in products]):
            self._evaluate([run], products)

    def _is_trained_on(self, run: Run, names: Sequence[str]) -> bool:
        """Whether the results of these products are there and of a model that was trained on all of them."""
        return all((self.results.read(name, run) or {}).get("trained_on") == names for name in names)

    def _check_trainable(self, group: Group, product: Product) -> list[Item]:
        """The training images of a product by itself, so that one that cannot be used is told from the others."""
        product.encode(group.geometry.images)
        features = self._features(group, [product])
        features.remove()
        return features.trainable(product)

    def _runs(self, method: str) -> Iterator[Run]:
        yield Run(method, RAW)
        draws = [None] if method.endswith(OF_RETRIEVED) else range(self.config.draws)
        yield from (Run(method, PRETRAINED, draw) for draw in draws)

    def _product(self, name: str) -> Product:
        return Product(name, self.source, str(self.config.root), self.raw)

    def _group(self, run: Run, product: str) -> Group:
        method, pretrained = base(run.method), run.features == PRETRAINED
        geometry = Geometry(*(self._preset(method, role, product) for role in ("image", "reference")))
        retrieved = pretrained and run.method.endswith(OF_RETRIEVED)
        return Group(run.features, run.draw, retrieved, self.subject.tags[method] if pretrained else "", geometry)

    def _preset(self, method: str, role: str, product: str) -> str:
        sound = self.config.protocol != ORIGINAL
        return "squash" if sound else original_geometry(method, str(self.config.dataset), role, product)

    def _evaluate(self, runs: Sequence[Run], products: Sequence[Product]) -> None:
        def group_of(run: Run) -> Group:
            return self._group(run, products[0].name)

        for group, members in groupby(sorted(runs, key=lambda run: str(group_of(run))), group_of):
            own = list(members)
            features, noticed = self._attempt(own, products, partial(self._features, group, products))
            for run in own if features is not None else ():
                self._evaluate_run(run, group, features, products, noticed)
            if features is not None:
                features.remove()

    def _attempt(
        self, runs: Sequence[Run], products: Sequence[Product], step: Callable[[], T]
    ) -> tuple[T | None, list[str]]:
        """Take a step, and give what it returns with its warnings.

        Where it fails, that is recorded for the runs and products.
        """
        value = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value = step()
            except FAILURES as error:
                for run, product in itertools.product(runs, products):
                    self.results.fail(product.name, error, run)
        own = [
            str(w.message) for w in caught if issubclass(w.category, UserWarning) and w.filename.startswith(PACKAGES)
        ]
        return value, list(dict.fromkeys(own))

    def _evaluate_run(
        self, run: Run, group: Group, features: Features, products: Sequence[Product], noticed: Sequence[str]
    ) -> None:
        """Fit a method, and score each product with it."""
        fitted, while_fitting = self._attempt([run], products, partial(self._fit, run, group, features, products))
        for product in products if fitted is not None else ():
            record, while_scoring = self._attempt(
                [run], [product], partial(self._score, run, group, features, product, fitted)
            )
            if record is not None:
                of_product = product.truth(group.geometry.images).warnings + features.warnings(product)
                warned = [*noticed, *while_fitting, *while_scoring, *of_product]
                self.results.write(run, {**record, "trained_on": [p.name for p in products], "warnings": warned})
                if run.draw in (None, 0):
                    self._draw_curves(run.method, product.name)

    def _fit(self, run: Run, group: Group, features: Features, products: Sequence[Product]) -> Fitted:
        started, preset = time.perf_counter(), group.geometry.images
        chosen = settings(
            run.method, run.features, self.config, self.subject, preset, [product.name for product in products]
        )
        method = METHODS[base(run.method)](features.extractor, **chosen)
        items = [item for product in products for item in features.trainable(product)]
        size = tuple(products[0].truth(preset).masks.shape[1:])
        batches = train_loader(run.method, items, self.subject, preset, size, self.config.workers)
        best: dict[str, dict[str, float]] = {}

        def on_epoch(_: int) -> None:
            for product in products:
                found = self._metrics(product, preset, method.predict(known_loader(product.test, size)))
                best[product.name] = {
                    name: max(best.get(product.name, found)[name], value) for name, value in found.items()
                }

        if self.config.oracle and RECIPES[base(run.method)].epochs is not None:
            method.fit(batches, on_epoch=on_epoch)
        else:
            method.fit(batches)
        return Fitted(method, chosen, len(items), best, round(time.perf_counter() - started, 2))

    def _score(self, run: Run, group: Group, features: Features, product: Product, fitted: Fitted) -> Record:
        started, preset = time.perf_counter(), group.geometry.images
        truth = product.truth(preset)
        predictions = fitted.method.predict(known_loader(product.test, tuple(truth.masks.shape[1:])))
        record = {
            "product": product.name,
            "images": product.digest,
            "metrics": self._metrics(product, preset, predictions),
            "weights": features.weights,
            "geometry": group.geometry._asdict(),
            "references": features.references.get(product.name, []),
            "settings": fitted.settings,
            "counts": {
                "train": fitted.images,
                "normal": int((truth.labels == NORMAL).sum()),
                "anomalous": int((truth.labels == ANOMALOUS).sum()),
            },
            "seconds": {"fit": fitted.seconds, "predict": round(time.perf_counter() - started, 2)},
        }
        if features.retrieved:
            record["retrieved"] = {item.image: list(features.retrieved[item.image]) for item in product.test}
        if product.name in fitted.best:
            record["oracle"] = fitted.best[product.name]
        if run.draw in (None, 0):
            record["curves"] = figures.curves(predictions, truth.masks, truth.labels)
            path = self.results.folder / FIGURES / product.name / f"{run.name}-maps.png"
            figures.draw_maps(path, product.test, predictions, self.subject.transform(preset))
        return record

    def _metrics(self, product: Product, preset: str, predictions: Predictions) -> dict[str, float]:
        masks, labels, _ = product.truth(preset)
        found = asdict(metrics.evaluate(predictions.maps, masks, labels, predictions.scores))
        if self.config.protocol == ORIGINAL:
            found[ORIGINAL_AUPRO] = metrics.aupro_original(predictions.maps, masks)
        return found

    def _draw_curves(self, method: str, product: str) -> None:
        """Draw the curves of a method, of both kinds of features as far as they are there."""
        shown = [run for run in self.runs + self.joint_runs if run.method == method and run.draw in (None, 0)]
        records = [self.results.read(product, run) for run in shown]
        found = {record["features"]: record["curves"] for record in records if record is not None}
        path = self.results.folder / FIGURES / product / f"{method}-curves.png"
        figures.draw_curves(path, f"{title(method)} on {product}", found)

    def _features(self, group: Group, products: Sequence[Product]) -> Features:
        if group.features == RAW:
            return Features(self.raw.of(group.geometry.images))
        if group.retrieved:
            return retrieved_features(self.raw, group.geometry, group.tag, products[0])
        references = [self._references(product, group.draw) for product in products]
        leave_out = self.config.protocol != ORIGINAL
        owner = str(self.results.folder.resolve())
        return residual_features(
            self.raw, group.geometry, group.tag, products, references, leave_out=leave_out, owner=owner
        )

    def _references(self, product: Product, draw: int) -> list[Item]:
        given = self.config.given_references
        if given is not None:
            return given_references(given, str(self.config.dataset), product.name, self.config.shots)
        return draw_references(product.train, self.config.shots, draw)
