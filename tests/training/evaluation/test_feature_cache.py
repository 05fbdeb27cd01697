"""The cache of features: what was encoded once is never encoded again, and what is read is what was computed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import photo, write_photos
from safetensors.torch import save_file
from torch import Tensor

from adfeatures.errors import AdfeaturesError, ImageError, InputError
from training.evaluation import feature_cache
from training.evaluation.feature_cache import CachedExtractor, content_key, place_key


class Counting:
    """An extractor of two levels that says which images it has seen."""

    def __init__(self) -> None:
        self.seen: list[str | None] = []

    def __call__(self, batch: Mapping[str, Any]) -> list[Tensor]:
        self.seen += batch["path"]
        image = batch["image"]
        return [image[:, :2] / 3, image[..., ::2, ::2] * 7]


def batch_of(paths: list[Path], seed: int = 0) -> dict:
    images = torch.rand(len(paths), 3, 8, 6, generator=torch.Generator().manual_seed(seed))
    return {"image": images, "path": [str(path) for path in paths]}


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return write_photos(tmp_path / "photos", range(4))


def test_gives_the_features_bit_for_bit(paths: list[Path], tmp_path: Path) -> None:
    batch = batch_of(paths)
    kept = CachedExtractor(Counting(), tmp_path / "cache", {"model": 1})
    for found in (kept(batch), kept(batch)):
        expected = [batch["image"][:, :2] / 3, batch["image"][..., ::2, ::2] * 7]
        for level, full in zip(found, expected, strict=True):
            assert level.dtype == torch.float32 and torch.equal(level, full)


def test_encodes_an_image_once_in_all_runs(paths: list[Path], tmp_path: Path) -> None:
    extractor = Counting()
    first = CachedExtractor(extractor, tmp_path / "cache", {"model": 1})(batch_of(paths[:2]))
    later = CachedExtractor(extractor, tmp_path / "cache", {"model": 1})(batch_of(paths))
    assert extractor.seen == [str(path) for path in paths]
    assert all(torch.equal(a, b[:2]) for a, b in zip(first, later, strict=True))


def test_knows_images_by_their_content(paths: list[Path], tmp_path: Path) -> None:
    extractor = Counting()
    kept = CachedExtractor(extractor, tmp_path / "cache", {"model": 1})
    kept(batch_of(paths))
    moved = tmp_path / "elsewhere.png"
    shutil.copy(paths[0], moved)
    assert kept.holds(str(moved))
    kept(batch_of([moved]))
    assert len(extractor.seen) == 4
    photo(77).save(paths[0])
    os.utime(paths[0], ns=(1, 1))
    assert not kept.holds(str(paths[0]))
    kept(batch_of(paths[:1]))
    assert extractor.seen[4:] == [str(paths[0])]
    with pytest.raises(ImageError, match=r"Cannot open .*missing\.png: No such file"):
        content_key(str(tmp_path / "missing.png"))


def test_place_key_tells_copies_apart(paths: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.png"
    shutil.copy(paths[0], copy)
    assert content_key(str(copy)) == content_key(str(paths[0]))
    assert place_key(str(copy)) != place_key(str(paths[0]))
    before = place_key(str(copy))
    photo(78).save(copy)
    assert place_key(str(copy)) != before


def test_another_identity_shares_nothing(paths: list[Path], tmp_path: Path) -> None:
    extractor = Counting()
    for identity in ({"preset": "squash"}, {"preset": "resize224_crop224"}):
        CachedExtractor(extractor, tmp_path / "cache", identity)(batch_of(paths[:1]))
    assert len(extractor.seen) == 2


def test_augmented_images_pass_by(paths: list[Path], tmp_path: Path) -> None:
    kept = CachedExtractor(Counting(), tmp_path / "cache", {})
    batch = {**batch_of(paths), "path": [None] * 4}
    found = kept(batch)
    assert torch.equal(found[0], batch["image"][:, :2] / 3)
    assert not list(kept.folder.rglob("*.safetensors"))


def test_damaged_files_are_written_anew(paths: list[Path], tmp_path: Path) -> None:
    extractor = Counting()
    first = CachedExtractor(extractor, tmp_path, {})
    expected = first(batch_of(paths[:1]))
    (file,) = first.folder.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    found = CachedExtractor(extractor, tmp_path, {})(batch_of(paths[:1]))
    assert len(extractor.seen) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "content",
    [
        {"0": torch.ones(2, 4, 4)},
        {"0": torch.ones(2, 4, 5), "1": torch.ones(2, 4, 4)},
        {"0": torch.ones(1, 4, 4), "2": torch.ones(1, 4, 4)},
        {"0": torch.full((1, 4, 4), torch.nan), "1": torch.ones(1, 4, 4)},
        {"0": torch.ones(1, 4, 4).half(), "1": torch.ones(1, 4, 4)},
        {"0": torch.ones(4), "1": torch.ones(4)},
        {},
    ],
)
def test_files_of_other_features_are_written_anew(
    paths: list[Path], tmp_path: Path, content: dict[str, Tensor]
) -> None:
    kept = CachedExtractor(Counting(), tmp_path, {})
    expected = kept(batch_of(paths))
    save_file(content, kept._file(str(paths[1])))
    for _ in range(2):
        found = kept(batch_of(paths))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_files_that_vanish_are_written_anew(paths: list[Path], tmp_path: Path) -> None:
    """As when another evaluation deletes them."""
    extractor = Counting()
    kept = CachedExtractor(extractor, tmp_path, {})
    for _ in range(2):
        expected = kept(batch_of(paths))
    shutil.rmtree(kept.folder)
    found = kept(batch_of(paths))
    assert len(extractor.seen) == 8 and kept.holds(str(paths[0]))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_remove(paths: list[Path], tmp_path: Path) -> None:
    extractor = Counting()
    kept, other = (CachedExtractor(extractor, tmp_path, {"a": number}) for number in (1, 2))
    kept(batch_of(paths))
    kept.remove()
    assert not kept.folder.exists() and other.folder.exists()
    kept(batch_of(paths))
    assert len(extractor.seen) == 8


def test_features_that_are_not_finite_are_not_kept(paths: list[Path], tmp_path: Path) -> None:
    batch = batch_of(paths)
    batch["image"][2] = float("nan")
    kept = CachedExtractor(Counting(), tmp_path, {})
    with pytest.raises(InputError, match=f"features of {paths[2]} hold NaN"):
        kept(batch)
    assert not list(kept.folder.rglob("*.safetensors"))


def test_full_disk(paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept = CachedExtractor(Counting(), tmp_path / "cache", {})
    monkeypatch.setattr(feature_cache, "save_file", full)
    with pytest.raises(AdfeaturesError, match="No space left") as caught:
        kept(batch_of(paths))
    # Not one of the errors of a single product, after which the evaluation would go on.
    assert not isinstance(caught.value, (ValueError, RuntimeError))
    assert not kept.holds(str(paths[0])) and not list(kept.folder.rglob("*.safetensors"))
