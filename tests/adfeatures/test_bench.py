"""The measurements: both forms must agree, and the command must say what it measured.

No time is asserted, since machines differ.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from helpers.models import tiny_extractor

from adfeatures import bench, measuring
from adfeatures.bench import BenchSizes
from adfeatures.extractor import FeatureExtractor
from adfeatures.projector import ResidualProjector
from adfeatures.published import naive_features, naive_projection, naive_residuals
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
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes a minute; tests marked ``gpu`` and ``release`` do it."""
    monkeypatch.setattr(bench, "_compiled", lambda function, device: function)


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


STAGES = ("decode", "transform", "backbone", "match", "project", "score", "all stages", "decoded image to map")


def test_stages_are_timed_photo_after_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, rests = iter([9.0] * 6 + [1.0, 2, 4, 8, 16, 32] * 5), list[bool]()

    def timed(function: Callable[[], object], *, rested: bool = True) -> tuple[float, object]:
        rests.append(rested)
        return next(taken) / 1000, function()

    monkeypatch.setattr(bench, "timed", timed)
    ours = tiny_extractor()
    ours.set_references(torch.randn(2, 3, 56, 56))
    rows = {row.what.partition(": ")[2]: row.ours for row in bench.stage_rows(ours, TINY)}
    assert rows == dict(zip(STAGES, (1, 2, 4, 8, 16, 32, 63, 62), strict=True))
    assert not any(rests) and next(taken, None) is None


@pytest.mark.release
@pytest.mark.usefixtures("threads", "not_compiled")
def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", replace(TINY, repeats=2, seconds=600))
    assert bench.main(["--quick", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"torch {torch.__version__}, device cpu, threads 1, processors ")
    assert "hardware" in lines[0] and "quick run in float32" in lines[1] and "300 rows" in lines[1]
    assert lines[2] == "" and lines[3:5] == [measuring.HEADER, measuring.RULE]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[5:]]
    assert all(len(row) == 6 for row in rows)
    found = {row[0]: row for row in rows}
    model = "adpretrain_dinov2_base"
    compared = [f"projector, 4 levels of 64, batch {batch}, ms" for batch in (1, 2)]
    compared += [f"{model}, batch 1, {kind}, ms" for kind in ("torch", "torch.compile", "onnx", "openvino")]
    compared += [f"residual_lite, batch 1, {kind}, ms" for kind in ("torch.compile", "onnx", "openvino")]
    compared += ["matching 6 x 40 rows of 64, ms"]
    stages = [f"{model}, 2 references: {stage}, ms" for stage in STAGES]
    default = [stage for stage in STAGES if stage != "project"]
    setting = [[f"residual_lite: setting {count} references{how}, ms" for how in (", rotated", "")] for count in (2, 3)]
    folder = [f"residual_lite, {count} references: a photo of a folder, ms" for count in (2, 3)]
    several, many = ([f"residual_lite, {count} references: {stage}, ms" for stage in default] for count in (2, 3))
    alone = [f"start of Python, {bench.START}, s", "beyond the bank: 5 x 300 rows of 64, MB"]
    peaks = [f"peak of a process: {what}, batch 2, torch, MB" for what in ("projector", "extractor")]
    of_default = [*setting[0], *several, folder[0], *setting[1], *many, folder[1]]
    assert list(found) == [*compared[:-1], *stages, *of_default, compared[-1], alone[0], *peaks, alone[1]]
    for what in compared:
        assert min(float(cell.replace(",", "")) for cell in found[what][1:4]) > 0, what
        assert " to " in found[what][4] and "largest difference" in found[what][5], what
    for what in (*stages, *several, *many, alone[0]):
        assert (
            float(found[what][1].replace(",", "")) > 0 and found[what][2:4] == ["-", "-"] and " to " in found[what][4]
        )
    assert all(float(found[what][1].replace(",", "")) > 0 for what in (*setting[0], *setting[1], *folder))
    assert "images a second" in found[f"{model}, batch 1, torch, ms"][5]


@pytest.mark.slow
@pytest.mark.parametrize("kind", bench.RUNTIMES)
@pytest.mark.parametrize(
    ("build", "other"),
    [(bench.build_extractor, bench.NAIVE), (bench.build_default, bench.EAGER)],
    ids=["model", "default"],
)
def test_exported_forms_agree(kind: str, build: Callable[[BenchSizes], FeatureExtractor], other: str) -> None:
    with torch.no_grad():
        ours, theirs = (bench.extractor_form(TINY, 1, of, build)() for of in (kind, other))
    torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_that_of_ours_alone(not_compiled: None) -> None:
    sizes = replace(TINY, dtype="bfloat16")
    for form in (bench.projector_form, bench.extractor_form):
        with torch.no_grad():
            exact, half, naive = form(TINY, 2, "torch")(), form(sizes, 2, "torch")(), form(sizes, 2, bench.NAIVE)()
        torch.testing.assert_close(tuple(naive), tuple(exact), rtol=1e-4, atol=1e-5)
        for a, b in zip(half, naive, strict=True):
            assert not torch.equal(a.float(), b)
            torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05 * b.abs().max().item())


def test_what_cannot_run_here_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with torch.no_grad():
        sizes = replace(TINY, dtype="bfloat16")
        rows = [bench._attempt("what", sizes, 1, kind, bench.build_extractor, list, "") for kind in bench.RUNTIMES]
    assert [row.ours for row in rows] == [None, None]
    assert "onnx does not compute in bfloat16" in rows[0].note and "pip install" in rows[1].note
    with pytest.raises(SystemExit), monkeypatch.context() as without:
        without.setattr(torch.cuda, "is_available", lambda: False)
        bench.main(["--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.usefixtures("not_compiled")
def test_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "in_child", lambda function, *arguments: None)
    monkeypatch.setattr(bench, "FULL", TINY)
    monkeypatch.setattr(bench, "RUNTIMES", ())
    monkeypatch.setattr(bench, "START", "pass")
    assert bench.main(["--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    rows = {row["what"]: row for row in printed["rows"]}
    assert printed["run"] == "full" and printed["sizes"]["keys"] == 24 and printed["threads"] == torch.get_num_threads()
    compared = rows["projector, 4 levels of 64, batch 2"]
    assert min(compared["ours"], compared["naive"], compared["ratio"]) > 0 and "largest difference" in compared["note"]
    died = rows["peak of a process: projector, batch 2, torch"]
    assert died["ours"] is died["naive"] is died["ratio"] is None and died["note"].startswith("not measured")


@pytest.mark.skipif(not measuring.peak_megabytes(), reason="this system counts no peak")
@pytest.mark.parametrize("form", [bench.projector_form, bench.extractor_form])
@pytest.mark.parametrize("kind", [bench.EAGER, bench.NAIVE])
def test_batches_have_a_peak(form: Callable[[BenchSizes, int, str], bench.Form], kind: str) -> None:
    peak = bench.batch_peak(form, TINY, 2, kind)
    assert peak is not None and peak > 50


def test_both_forms_of_a_batch_agree() -> None:
    for form in (bench.projector_form, bench.extractor_form):
        with torch.no_grad():
            ours, naive = (form(TINY, 2, kind)() for kind in (bench.EAGER, bench.NAIVE))
        torch.testing.assert_close(tuple(naive), tuple(ours), rtol=1e-4, atol=1e-5)


@pytest.mark.release
def test_compiled_form_agrees() -> None:
    with torch.no_grad():
        ours, naive = (bench.extractor_form(TINY, 2, kind)() for kind in (bench.COMPILED, bench.NAIVE))
    torch.testing.assert_close(tuple(naive), tuple(ours), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("form", [bench.projector_form, bench.extractor_form])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("bfloat16", 0.05)])
@pytest.mark.parametrize("kind", [bench.EAGER, bench.COMPILED])
@pytest.mark.parametrize("batch", [1, 3])
def test_forms_agree_on_a_gpu(
    form: Callable[[BenchSizes, int, str], bench.Form], dtype: str, bound: float, kind: str, batch: int
) -> None:
    sizes = replace(TINY, device="cuda", dtype=dtype)
    with torch.no_grad():
        naive, run = form(sizes, batch, bench.NAIVE)(), form(sizes, batch, kind)
        for _ in range(3):  # The first runs of a graph record it.
            ours = [level.float().clone() for level in run()]
    for a, b in zip(ours, naive, strict=True):
        assert a.device.type == "cuda"
        torch.testing.assert_close(a, b, rtol=bound, atol=bound * b.abs().max().item())


@pytest.mark.gpu
def test_table_of_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", TINY)
    monkeypatch.setattr(bench, "GPU_BATCHES", (1, 2))
    assert bench.main(["--quick", "--device", "cuda", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    for batch in (1, 2):
        for kind in (bench.EAGER, bench.COMPILED):
            assert f"{bench.MODEL}, batch {batch}, {kind}, ms" in printed
    for kind in (bench.EAGER, bench.COMPILED):
        assert f"peak of a process: extractor, batch 2, {kind}, MB" in printed
    assert printed.count("images a second") == 4 and "not measured" not in printed
