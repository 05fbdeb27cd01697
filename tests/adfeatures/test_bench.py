"""The measurements: both forms must agree, and the command must say what it measured.

No time is asserted, since machines differ.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

import pytest
import torch
from helpers.models import tiny_extractor

from adfeatures import bench
from adfeatures.bench import NaiveExtractor, NaiveProjector, Sizes, naive_residuals
from adfeatures.extractor import FeatureExtractor
from adfeatures.projector import ResidualProjector
from adfeatures.references import ReferenceBank

TINY = Sizes(
    repeats=1,
    seconds=1,
    width=64,
    depth=4,
    keys=24,
    grid=2,
    batches=(1, 2),
    references=2,
    matching=(6, 40),
    bank=(5, 300),
    photo=(64, 48),
)
# Of 20, 21 and 23 channels 16 is no divisor, so they take 10, 7 and 1 heads.
WIDTHS = [(32, 48, 64), (20, 21, 23)]


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives torch back the threads it had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("batch", [1, 3])
def test_naive_projector_equals_ours(channels: tuple[int, ...], batch: int) -> None:
    torch.manual_seed(0)
    ours = ResidualProjector(channels, num_keys=24).requires_grad_(False)
    residuals = [torch.randn(batch, c, 3, 4) for c in channels]
    torch.testing.assert_close(NaiveProjector(ours)(residuals), ours(residuals), rtol=1e-5, atol=1e-5)


def test_naive_residuals_equal_ours() -> None:
    torch.manual_seed(0)
    bank = ReferenceBank.from_features([torch.randn(3, c, 4, 5) for c in (8, 12)])
    features = [torch.randn(2, c, 3, 2) for c in (8, 12)]
    torch.testing.assert_close(naive_residuals(features, bank.rows), bank.residuals(features), rtol=0, atol=0)


def test_naive_extractor_equals_ours() -> None:
    ours = tiny_extractor()
    ours.set_references(torch.randn(3, 3, 56, 56))
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(NaiveExtractor(ours)(images), ours(images), rtol=1e-5, atol=1e-5)


def test_default_sizes_are_those_of_the_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeatureExtractor, "set_references", lambda self, images: None)
    with torch.device("meta"):
        measured = bench.build_extractor(bench.FULL)
        cataloged = bench.create_model(bench.MODEL, pretrained=False)
    shapes = [{key: tensor.shape for key, tensor in model.state_dict().items()} for model in (measured, cataloged)]
    assert shapes[0] == shapes[1] and measured.img_size == cataloged.img_size


def test_a_model_without_projector_has_no_published_form() -> None:
    ours = tiny_extractor()
    ours.projector = None
    with pytest.raises(TypeError, match="no projector"):
        NaiveExtractor(ours)


def test_table(capsys: pytest.CaptureFixture[str], threads: None) -> None:
    assert bench.main(["--quick", "--threads", "1"], quick=TINY) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"torch {torch.__version__}, device cpu, threads 1, processors ")
    assert "quick run" in lines[1] and "300 rows" in lines[1]
    header, rows = lines[2], lines[3:]
    assert header.split()[:4] == ["what", "ours", "naive", "ratio"]
    expected = [
        "projector, 4 levels of 64, batch 1",
        "projector, 4 levels of 64, batch 2",
        "adpretrain_dinov2_base, batch 1",
    ]
    expected += [
        f"adpretrain_dinov2_base: {s}"
        for s in ("decode and transform", "backbone", "matching", "projector", "map", "all stages")
    ]
    expected += ["residual_lite: backbone", "matching 6 x 40 rows of 64", "peak of a process: projector, batch 2"]
    expected += ["peak of a process: extractor, batch 2", "beyond the bank: 5 x 300 rows of 64"]
    for what in expected:
        assert any(row.startswith(what) for row in rows), what
    end = header.index(" ratio") + len(" ratio")
    assert all(row[end - 1] != " " and row[end : end + 2].strip() == "" for row in rows), "the columns are not aligned"


def test_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_in_child", lambda function, *arguments: None)
    assert bench.main(["--json"], full=TINY) == 0
    printed = json.loads(capsys.readouterr().out)
    rows = {row["what"]: row for row in printed["rows"]}
    assert printed["run"] == "full" and printed["sizes"]["keys"] == 24 and printed["threads"] == torch.get_num_threads()
    compared = rows["projector, 4 levels of 64, batch 2"]
    assert min(compared["ours"], compared["naive"], compared["ratio"]) > 0 and "largest difference" in compared["note"]
    died = rows["peak of a process: projector, batch 2"]
    assert died["ours"] is died["naive"] is died["ratio"] is None and died["note"].startswith("not measured")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows counts no peak")
def test_peak_is_that_of_the_child_alone() -> None:
    ballast = torch.ones(100_000_000)
    here, child = bench._peak_megabytes(), bench._in_child(bench._peak_megabytes)
    assert here is not None and child is not None
    assert child < here - 200 and len(ballast)
    assert bench._in_child(bench.batch_peak, TINY, False, True) is not None


def test_a_child_that_dies_gives_no_number() -> None:
    assert bench._in_child(os._exit, 1) is None
