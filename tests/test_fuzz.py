"""Damaged and hostile files of every kind: a result that is finite, or a plain error that names the file.

For longer: ``FUZZ_SECONDS=600 pytest -m release tests/test_fuzz.py``, so many processor seconds for each kind of
file.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers import fuzzing
from helpers.evaluation_records import record
from helpers.fuzzing import Target, fuzz
from helpers.models import photo, tiny_extractor
from helpers.published import as_published
from helpers.publishing import OwnCheckpoint
from torch import nn

from adfeatures import create_model
from adfeatures.bank_files import load_banks
from adfeatures.checkpoints import convert, load_checkpoint, save_checkpoint
from adfeatures.errors import InputError
from adfeatures.extractor import FeatureExtractor
from adfeatures.geometry import Geometry, Region
from adfeatures.images import read_image
from adfeatures.projector import ResidualProjector
from adfeatures.references import ReferenceBank
from training.data.fingerprint import Fingerprint
from training.data.manifest import read_manifest
from training.evaluation.results import PRETRAINED, Combination, Results
from training.pretraining.centers import _origin, load_centers
from training.pretraining.config import PretrainConfig
from training.pretraining.curves import read_log
from training.pretraining.run import TrainingRun

pytestmark = pytest.mark.filterwarnings("ignore")


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def checkpoint(path: Path) -> None:
    """What is read is finite, and the same when it was converted."""
    found = load_checkpoint(path)
    assert all(map(math.isfinite, found.metrics.values()))
    assert all(value.double().isfinite().all() for value in found.state_dict.values())
    (destination := path.with_name("converted.safetensors")).unlink(missing_ok=True)
    again = convert(path, destination)
    assert again.metrics == found.metrics and again.state_dict.keys() == found.state_dict.keys()
    assert all(torch.equal(again.state_dict[key], value) for key, value in found.state_dict.items())


def checkpoints(folder: Path) -> list[Target]:
    torch.manual_seed(0)
    state = ResidualProjector([4], num_heads=2, num_keys=3).state_dict()
    mixed = {"a": torch.arange(6).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(True)}
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.jit.save(torch.jit.script(module), str(folder / "scripted.pt"))
    save_checkpoint(folder / "one.safetensors", {**state, **mixed}, metrics={"img_auc": 0.5}, metadata={"model": "x"})
    pickles = (saved(mixed), as_published(state), saved({"state_dict": mixed, "epoch": 3}), saved(nn.Linear(2, 2)))
    old = tuple(saved(content, _use_new_zipfile_serialization=False) for content in (mixed, {"model": mixed}))
    return [
        Target("w.pth", pickles, checkpoint),
        Target("w.pt", (*old, (folder / "scripted.pt").read_bytes()), checkpoint),
        Target("w.safetensors", [(folder / "one.safetensors").read_bytes()], checkpoint),
    ]


def score(known: dict[str, ReferenceBank], path: Path, model: FeatureExtractor) -> None:
    """A defect is not passed, whatever the rows are, where threshold and scales are still those of the bank."""
    for product, bank in model.references.items():
        (found,) = model.score(photo(99), product)
        assert math.isfinite(found.score) and found.score >= 0 and np.isfinite(found.map).all()
        assert found.threshold is None or (0 <= found.threshold < math.inf)
        assert found.is_anomalous == (None if found.threshold is None else found.score > found.threshold)
        same = product in known and bank.threshold == known[product].threshold
        same = same and bank.record.geometry == known[product].record.geometry
        if same and (bank.scales is None or torch.equal(bank.scales, cast(Any, known[product].scales))):
            assert found.is_anomalous is not False, "the bank passes a defect"
    model.save_references(path)
    model.load_references(path)


def fit(path: Path, model: FeatureExtractor) -> None:
    """Everything else that is done with a bank."""
    for product, bank in model.references.items():
        if bank.num_images > 1 and bank.complete:
            assert all(level.isfinite().all() for level in model.reference_features(product))
        assert math.isfinite(model.fit_threshold(normals=[photo(seed) for seed in (7, 8, 9)], product=product))
        bank.coreset(0.5)
        if bank.record.geometry.is_plain:
            model.add_references([photo(11)], product)
    model.save_references(path)
    assert load_banks(path).keys() == model.references.keys()


def banks(folder: Path) -> list[Target]:
    targets = []
    own = tiny_extractor()
    plain = FeatureExtractor(own.backbone, None, name="plain", img_size=(56, 56), pretrained_cfg=own.pretrained_cfg)
    for model in (own, plain):
        model.set_references([photo(seed) for seed in range(2)])
        model.set_references([photo(seed) for seed in range(2, 5)], "bottle", coreset=0.5)
        cut = Geometry(tile=40, overlap=4, keep_aspect=True, region=Region.read(photo(1).convert("L")))
        model.set_references([photo(seed) for seed in range(2)], "strip", geometry=cut)
        for product, bank in model.references.items():
            bank.threshold = model.score(photo(99), product)[0].score / 2
        model.save_references(path := folder / f"{model.name}.safetensors")
        # As earlier versions wrote them: with a hash, nothing that is damaged would get any further.
        seeds, read = [path.read_bytes().replace(b'"sha256":', b'"before":')], partial(load, model)
        scored, fitted = (
            partial(score, load_banks(path), folder / "s.safetensors"),
            partial(fit, folder / "f.safetensors"),
        )
        targets += [Target("bank.safetensors", seeds, read, scored), Target("bank.safetensors", seeds, read, fitted)]
    return targets


def load(model: FeatureExtractor, path: Path) -> FeatureExtractor:
    model.clear_references()
    model.load_references(path)
    return model


def models(folder: Path) -> list[Target]:
    own = OwnCheckpoint(folder / "own.safetensors")
    backbone = folder / "backbone.safetensors"

    def use(model: FeatureExtractor) -> None:
        if math.prod(model.img_size) > 1 << 17:
            return
        model.set_references([photo(seed) for seed in range(3)])
        (found,) = model.score(photo(99))
        assert math.isfinite(found.score) and np.isfinite(found.map).all()

    return [
        Target(
            "own.safetensors",
            [own.path.read_bytes()],
            lambda path: create_model(weights=path, backbone_weights=backbone),
            use,
        )
    ]


def documents(folder: Path) -> list[Target]:
    settings = {"weights": {"backbone": "ab"}, "shots": 8, "bit_depth": 16, "split": None}
    combination = Combination("padim", PRETRAINED, 0)
    finished = record("bottle", "padim", PRETRAINED, 0, 1, oracle={"aupro": None}, warnings=["few"])
    failed = {"product": "bottle", "error": "x", "method": "padim", "features": PRETRAINED, "draw": 0}
    names = [f"{name}.png" for name in range(3)]
    manifest = "image,mask,product,label\n0.png,,a,0\n1.png,2.png,,1\n"
    for name in names:
        (folder / "table").mkdir(exist_ok=True)
        photo(0).save(folder / "table" / name)
    prints = Fingerprint([f"{number:064x}" for number in (1 << 250, 5 << 240, 77)]).to_text()
    center = {"center.1": torch.ones(3), "center.2": torch.ones(2)}
    entry = SimpleNamespace(channels=(3, 2), normalization=((0.5,) * 3, (1.0,) * 3), blocks=(1, 2), img_size=(8, 8))
    backbone = cast(Any, SimpleNamespace(entry=entry, name="b", fingerprint=["ab"], bit_depth=16, preset="squash"))
    save_checkpoint(folder / "c.safetensors", center, metadata=_origin(backbone))
    buffer = io.BytesIO()
    np.save(buffer, np.ones((2, 3), np.float32))
    log = [{"kind": "step", "epoch": 0, "step": n, "loss": 0.5, "norm": {"pro": 0.1}} for n in range(3)]

    def finite(centers: list[torch.Tensor]) -> None:
        assert all(center.isfinite().all() for center in centers)

    def records(path: Path) -> None:
        results = Results.__new__(Results)
        results.folder = path.parents[2]
        results.records()
        results.read("bottle", combination)

    return [
        Target(
            "run/results/bottle/padim-pretrained-0.json", [json.dumps(r).encode() for r in (finished, failed)], records
        ),
        Target("run2/settings.json", [json.dumps(settings).encode()], lambda path: Results(path.parent, settings)),
        Target("table/images.csv", [manifest.encode()], read_manifest),
        Target("log.jsonl", ["\n".join(map(json.dumps, log)).encode()], read_log),
        Target(
            "centers.safetensors",
            [(folder / "c.safetensors").read_bytes()],
            lambda p: load_centers(p, backbone),
            finite,
        ),
        Target("centers.npy", [buffer.getvalue()], lambda p: load_centers(p, backbone), finite),
        Target("prints.json", [prints.encode()], fingerprint),
    ]


def fingerprint(path: Path) -> None:
    with suppress(ValueError):  # It is read from a file of the package alone.
        Fingerprint.from_text(path.read_bytes().decode(errors="replace"))


def resume(path: Path) -> TrainingRun:
    torch.manual_seed(0)
    run, layer = TrainingRun(PretrainConfig(output=str(path.parent))), nn.Linear(2, 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    run.depend_on("images", "abc")
    run.resume(cast(ResidualProjector, layer), optimizer, {"model": "tiny"})
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    return run


def states(folder: Path) -> list[Target]:
    (folder / "state").mkdir()
    seeds = []
    for _ in range(2):
        run = resume(folder / "state/state.pt")
        run.advance()
        run.save()
        seeds.append((folder / "state/state.pt").read_bytes())
    return [Target("state/state.pt", seeds, resume, TrainingRun.save)]


def images(folder: Path) -> list[Target]:
    def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
        buffer = io.BytesIO()
        photo(3, (24, 20)).convert("RGB" if mode != "I;16" else "L").convert(mode).save(buffer, kind, **options)
        return buffer.getvalue()

    png = [encoded("PNG", mode) for mode in ("RGB", "P", "LA", "1", "I;16")]
    exif = photo(0).getexif()
    exif[0x0112] = 6
    others = [
        encoded("JPEG", exif=exif),
        encoded("JPEG", "L", progressive=True),
        encoded("GIF", "P"),
        encoded("BMP"),
        encoded("WEBP"),
        encoded("PPM"),
        b"P2 3 2 15 # x\n1 2 3 4 5 15\n",
        encoded("JPEG2000"),
    ]
    tiffs = [encoded("TIFF", mode, compression=c) for mode in ("RGB", "L", "CMYK") for c in (None, "tiff_lzw")]

    def use(image: Any) -> None:
        assert image.mode == "RGB" and np.asarray(image).dtype == np.uint8

    return [
        Target("i.png", png, read_image, use),
        Target("i.img", others, read_image, use),
        Target("i.tif", tiffs, read_image, use),
    ]


# How many rounds of each are played for a commit.
KINDS: dict[Callable[[Path], list[Target]], int] = {
    checkpoints: 60,
    banks: 30,
    models: 5,
    documents: 60,
    states: 20,
    images: 60,
}


def play(make: Callable[[Path], list[Target]], folder: Path, rounds: int = 0, seconds: float = 0) -> None:
    seed = random.SystemRandom().randrange(1 << 32) if seconds else 0
    targets = make(folder)
    for number, target in enumerate(targets):
        finds = fuzz(target, folder, rounds, seconds / len(targets), seed)
        for index, content in enumerate(finds.values()):
            (folder / f"find-{number}-{index}").write_bytes(content)
        assert not finds, f"with the seed {seed}, see {folder}/find-*:\n" + "\n".join(finds)


@pytest.mark.slow
@pytest.mark.parametrize("make", KINDS)
def test_no_file_escapes(make: Callable[[Path], list[Target]], tmp_path: Path) -> None:
    play(make, tmp_path, rounds=KINDS[make])


@pytest.mark.release
@pytest.mark.parametrize("make", KINDS)
def test_no_file_escapes_for_long(make: Callable[[Path], list[Target]], tmp_path: Path) -> None:
    play(make, tmp_path, seconds=float(os.environ.get("FUZZ_SECONDS", 10)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda path: {}[path], "KeyError"),
        (lambda path: _raise(InputError("damaged")), "does not name the file"),
        (lambda path: time.sleep(20), "Hang: more than 1 s"),
        (lambda path: bytearray(1 << 27).count(1), "too much memory"),
    ],
)
def test_faults_are_found(
    fault: Callable[[Path], Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "MAX_SECONDS", 1)
    monkeypatch.setattr(fuzzing, "MAX_BYTES", 1 << 26)
    (problem,) = fuzz(Target("x", [b"{}"], fault), tmp_path)
    assert says in problem


def _raise(error: Exception) -> None:
    raise error
