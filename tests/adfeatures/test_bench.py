"""The measurements: both forms must agree, and the command must say what it measured.

No time is asserted, since machines differ.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from helpers.models import tiny_extractor

from adfeatures import bench, measuring
from adfeatures.bench import BenchSizes, naive_features, naive_projection, naive_residuals
from adfeatures.extractor import FeatureExtractor
from adfeatures.projector import ResidualProjector
from adfeatures.references import ReferenceBank

TINY = BenchSizes(
    repeats=1,
    seconds=1,
    width=64,
    depth=4,
    keys=24,
    grid=2,
    batches=(1, 2),
    references=2,
    many=3,
    matching=(6, 40),
    bank=(5, 300),
    photo=(64, 48),
)
# Of 20, 21 and 23 channels 16 is no divisor, so they take 10, 7 and 1 heads.
WIDTHS = [(32, 48, 64), (20, 21, 23)]


@pytest.fixture(autouse=True)
def without_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "REST", 0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives torch back the threads it had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("batch", [1, 3])
def test_naive_projection_equals_ours(channels: tuple[int, ...], batch: int) -> None:
    torch.manual_seed(0)
    ours = ResidualProjector(channels, num_keys=24).requires_grad_(False)
    residuals = [torch.randn(batch, c, 3, 4) for c in channels]
    torch.testing.assert_close(naive_projection(ours, residuals), ours(residuals), rtol=1e-5, atol=1e-5)


def test_gradients_of_the_naive_projection_are_ours() -> None:
    torch.manual_seed(0)
    ours = ResidualProjector((32, 20), num_keys=24)
    naive = copy.deepcopy(ours)
    residuals = [torch.randn(2, c, 3, 4) for c in (32, 20)]
    for projected in (ours(residuals), naive_projection(naive, residuals)):
        torch.stack([level.square().mean() for level in projected]).sum().backward()
    for (name, parameter), other in zip(ours.named_parameters(), naive.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None, name
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_naive_residuals_equal_ours() -> None:
    torch.manual_seed(0)
    bank = ReferenceBank.from_features([torch.randn(3, c, 4, 5) for c in (8, 12)])
    features = [torch.randn(2, c, 3, 2) for c in (8, 12)]
    torch.testing.assert_close(naive_residuals(features, bank.rows), bank.residuals(features), rtol=0, atol=0)


def test_naive_features_equal_ours() -> None:
    ours = tiny_extractor()
    ours.set_references(torch.randn(3, 3, 56, 56))
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(naive_features(ours, images), ours(images), rtol=1e-5, atol=1e-5)


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
        naive_features(ours, torch.randn(1, 3, 56, 56))


@pytest.mark.slow
def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    monkeypatch.setattr(bench, "QUICK", TINY)
    assert bench.main(["--quick", "--threads", "1"]) == 0
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
        f"adpretrain_dinov2_base, 2 references: {s}"
        for s in ("decode and transform", "backbone", "matching", "projector", "map", "all stages")
    ]
    for count in (2, 3):
        expected += [f"residual_lite: setting {count} references", f"residual_lite, {count} references: all stages"]
    expected += ["matching 6 x 40 rows of 64", "peak of a process: projector, batch 2"]
    expected += ["peak of a process: extractor, batch 2", "beyond the bank: 5 x 300 rows of 64"]
    for what in expected:
        assert any(row.startswith(what) for row in rows), what
    end = header.index(" ratio") + len(" ratio")
    assert all(row[end - 1] != " " and row[end : end + 2].strip() == "" for row in rows), "the columns are not aligned"


def test_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "in_child", lambda function, *arguments: None)
    monkeypatch.setattr(bench, "FULL", TINY)
    assert bench.main(["--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    rows = {row["what"]: row for row in printed["rows"]}
    assert printed["run"] == "full" and printed["sizes"]["keys"] == 24 and printed["threads"] == torch.get_num_threads()
    compared = rows["projector, 4 levels of 64, batch 2"]
    assert min(compared["ours"], compared["naive"], compared["ratio"]) > 0 and "largest difference" in compared["note"]
    died = rows["peak of a process: projector, batch 2"]
    assert died["ours"] is died["naive"] is died["ratio"] is None and died["note"].startswith("not measured")


@pytest.mark.skipif(not measuring.peak_megabytes(), reason="this system counts no peak")
@pytest.mark.parametrize("forms", [bench.projector_forms, bench.extractor_forms])
@pytest.mark.parametrize("index", [0, 1])
def test_batches_have_a_peak(forms: Callable[[BenchSizes, int], Sequence[bench.Form]], index: int) -> None:
    peak = bench.batch_peak(forms, TINY, index)
    assert peak is not None and peak > 50


def test_both_forms_of_a_batch_agree() -> None:
    for forms in (bench.projector_forms, bench.extractor_forms):
        with torch.no_grad():
            ours, naive = (form() for form in forms(TINY, 2))
        torch.testing.assert_close(naive, ours, rtol=1e-4, atol=1e-5)
