"""Fingerprints: what they find, that nothing is missed, and how large they are."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from training.data.fingerprint import Fingerprint


def digests(count: int, seed: int = 0) -> list[str]:
    return [row.tobytes().hex() for row in np.random.RandomState(seed).randint(0, 256, (count, 32)).astype(np.uint8)]


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_all_images_are_found_and_no_others(count: int) -> None:
    known = digests(count)
    found = Fingerprint.from_text(Fingerprint(known).to_text())
    assert len(found) == count and all(digest in found for digest in known)
    assert not any(digest in found for digest in digests(1000, seed=1))


def test_the_smallest_and_the_largest_digest() -> None:
    ends = ["0" * 64, "f" * 64]
    found = Fingerprint.from_text(Fingerprint(ends).to_text())
    assert all(end in found for end in ends) and "0" * 9 + "1" + "0" * 54 not in found
    assert "f" * 64 not in Fingerprint(["0" * 64])


def test_neither_order_nor_copies_matter() -> None:
    known = digests(100)
    assert Fingerprint(known[::-1] + known[:5]).to_text() == Fingerprint(known).to_text()


def test_a_hundred_thousand_images_take_a_few_hundred_kilobytes() -> None:
    assert len(Fingerprint(digests(100_000)).to_text()) < 420_000


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b"two")):
        (tmp_path / name).write_bytes(content)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    paths = [str(tmp_path / name) for name in ("a", "b", "missing", "pipe")]
    found = Fingerprint.of(paths, workers=2)
    assert found.to_text() == Fingerprint.of(paths[::-1]).to_text() and len(found) == 2
    assert hashlib.sha256(b"one").hexdigest() in found and hashlib.sha256(b"three").hexdigest() not in found


def test_shares_together_are_the_whole() -> None:
    every = digests(50)
    shares = [Fingerprint(every[number::3]) for number in range(3)]
    assert Fingerprint.union(shares).to_text() == Fingerprint(every).to_text()
    assert Fingerprint.union([shares[0], shares[0]]).to_text() == shares[0].to_text()


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "bloom"},
        {"images": 2},
        {"images": 4},
        {"images": 10**12},
        {"images": "3"},
        {"differences": "no base85 \x7f"},
        {"differences": "c$@"},
        {"differences": None},
    ],
)
def test_what_is_no_fingerprint(change: dict[str, object]) -> None:
    facts = json.loads(Fingerprint(digests(3)).to_text())
    with pytest.raises(ValueError, match="."):
        Fingerprint.from_text(json.dumps({**facts, **change}))
    with pytest.raises(ValueError, match="must be an object"):
        Fingerprint.from_text("[]")
