"""Records of two products, two methods and three draws, and tables of Markdown read back."""

from __future__ import annotations

import numpy as np

from training.evaluation.results import PRETRAINED, RAW, Record
from training.evaluation.tables import METRICS


def metrics(seed: int) -> dict[str, float]:
    """Seven numbers, all different."""
    return dict(zip(METRICS, np.random.RandomState(seed).permutation(1000)[:7] / 1000, strict=True))


def record(product: str, method: str, features: str, draw: int | None, seed: int, **more: object) -> Record:
    return {
        "product": product,
        "method": method,
        "features": features,
        "draw": draw,
        "metrics": metrics(seed),
        "weights": "m.tag",
        **more,
    }


def records() -> list[Record]:
    """Two products, two methods, three draws."""
    made = []
    for number, (product, method) in enumerate(
        [(p, m) for m in ("patchcore", "feature_norm") for p in ("bottle", "cable")]
    ):
        made.append(record(product, method, RAW, None, 100 + number))
        made += [record(product, method, PRETRAINED, draw, 10 * number + draw) for draw in range(3)]
    return made


def parse(table: str) -> list[dict[str, str]]:
    """A table of Markdown as dicts by the titles of its columns."""
    head, _, *body = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.strip().splitlines()
    ]
    return [dict(zip(head, row, strict=True)) for row in body]


def values(made: list[Record], method: str, product: str, features: str) -> np.ndarray:
    """Metrics (draws, 7) of the records."""
    own = [r for r in made if (r["method"], r["product"], r["features"]) == (method, product, features)]
    return np.array([[r["metrics"][name] for name in METRICS] for r in sorted(own, key=lambda r: r["draw"] or 0)])
