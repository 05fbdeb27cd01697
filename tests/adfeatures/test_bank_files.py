"""The files of banks: what was saved comes back bit for bit, and no damaged file is taken for a bank."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.banks import full_bank, maps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from adfeatures.bank_files import load_banks, save_banks
from adfeatures.errors import AdfeaturesError, CheckpointError, InputError
from adfeatures.geometry import Geometry
from adfeatures.records import BankRecord
from adfeatures.reduction import reduce
from adfeatures.references import ReferenceBank


def assert_same(one: ReferenceBank, other: ReferenceBank) -> None:
    for entry in dataclasses.fields(ReferenceBank):
        a, b = getattr(one, entry.name), getattr(other, entry.name)
        for left, right in [(a, b)] if not isinstance(a, list) else [(len(a), len(b)), *zip(a, b, strict=True)]:
            if isinstance(left, Tensor):
                assert left.dtype == right.dtype and torch.equal(left, right)
            else:
                assert type(left) is type(right) and left == right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduced", [False, True])
def test_saved_and_loaded_bit_for_bit(dtype: torch.dtype, reduced: bool, tmp_path: Path) -> None:
    bank = full_bank()
    if reduced:
        bank = bank.coreset(0.5)
        bank.record.threshold, bank.record.quantile = 0.5, 1.0
    bank.apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
    path = tmp_path / "new folder" / "bank.safetensors"
    bank.save(path)
    assert_same(ReferenceBank.load(path), bank)
    assert_same(ReferenceBank.load(str(path)), bank)
    assert [entry.name for entry in path.parent.iterdir()] == ["bank.safetensors"]
    bank.coreset(0.5).save(path)
    assert len(ReferenceBank.load(path).rows[0]) == len(bank.rows[0]) // 2


def test_every_fact_is_tested() -> None:
    plain, full = BankRecord(), full_bank().record
    for entry in dataclasses.fields(BankRecord):
        assert getattr(plain, entry.name) != getattr(full, entry.name)


def test_turned_bank_saved_and_loaded(tmp_path: Path) -> None:
    upright, turned = (ReferenceBank.from_features(maps(name, count=3), looks=1) for name in ("references", "queries"))
    bank = upright.with_turned([turned])
    bank.record.rotations = 2
    reduce(bank, 20)
    bank.save(tmp_path / "bank.safetensors")
    loaded = ReferenceBank.load(tmp_path / "bank.safetensors")
    assert loaded.turned and loaded.complete
    assert_same(loaded, bank)
    bank.record.geometry = Geometry(keep_aspect=True)
    bank.save(tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match="rows of whole images"):
        ReferenceBank.load(tmp_path / "cut.safetensors")
    bank.record.geometry = Geometry()
    bank.rows[1], bank.image_of_row[1] = bank.rows[1][:17], bank.image_of_row[1][:17]
    bank.kept, bank.groups = None, 1
    bank.save(tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match="rows of whole images"):
        ReferenceBank.load(tmp_path / "short.safetensors")


def test_bare_bank_saved_and_loaded(tmp_path: Path) -> None:
    bank = ReferenceBank.from_features(maps("references", count=1))
    bank.save(tmp_path / "bank.safetensors")
    assert_same(ReferenceBank.load(tmp_path / "bank.safetensors"), bank)


def test_banks_of_several_products(tmp_path: Path) -> None:
    path = tmp_path / "banks.safetensors"
    banks = {
        "screw": full_bank(),
        "Flügel 0.1": ReferenceBank.from_features(maps("more", count=2)),
        "": full_bank(threshold=None),
    }
    save_banks(path, banks)
    loaded = load_banks(path)
    assert list(loaded) == list(banks)
    for product, bank in banks.items():
        assert_same(loaded[product], bank)
    with pytest.raises(CheckpointError, match="several products: screw, Flügel"):
        ReferenceBank.load(path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "bank.safetensors"
    full_bank().save(path)
    return path


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a bank file holds, without the hash of it, as earlier versions wrote it."""
    with safe_open(path, framework="pt") as file:
        metadata = {key: text for key, text in file.metadata().items() if key != "sha256"}
        # copied, since old versions of safetensors map them from the file, which tests write over
        return {key: file.get_tensor(key).clone() for key in file.keys()}, metadata  # noqa: SIM118


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:4],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[8:],
        lambda data: bytes(range(256)) * 20,
        lambda data: b"\xff" * 16 + data,
        lambda data: pickle.dumps({"rows": [1, 2, 3]}),
    ],
)
def test_damaged_files(damage: Callable[[bytes], bytes], saved: Path) -> None:
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(CheckpointError, match=r"bank\.safetensors.*adfeatures fit"):
        load_banks(saved)


def _fact(name: str, content: object) -> Callable[[dict[str, Tensor], list[dict]], object]:
    return lambda tensors, facts: facts[0].update({name: content})


def _no_fact(name: str) -> Callable[[dict[str, Tensor], list[dict]], object]:
    return lambda tensors, facts: facts[0].pop(name)


@pytest.mark.parametrize(
    "spoil",
    [
        _fact("something_new", 1),
        _fact("grids", 5),
        _fact("grids", [[3, 4]] * 3),
        _fact("img_size", [224]),
        _no_fact("grids"),
        _no_fact("num_images"),
        _no_fact("product"),
        lambda tensors, facts: tensors.pop("0.rows.1"),
        lambda tensors, facts: tensors.pop("0.images.0"),
        *(_fact("threshold", value) for value in (float("nan"), float("inf"), -1.0, "1", True, [1.0], 10**400)),
        *(_fact("quantile", value) for value in (0, 1.5, float("nan"), "0.9")),
        *(_fact("normal_scores", value) for value in ([float("nan")], [-1.0], 5, ["1"], [None])),
        *(_fact("num_images", value) for value in (0, -1, 2.0, True, "4", 10**30)),
        *(_fact("grids", value) for value in ([], [[3, 4]], [[3, 4], [0, 3]], [[3, 4], [2, 3.0]], [[3, 1e9], [2, 3]])),
        *(_fact("img_size", value) for value in ([0, 224], [224.0, 224], "224", [1, 2, 3])),
        *(_fact("bit_depth", value) for value in (8, 17, 12.0, None, True)),
        *(_fact("files", value) for value in (["a"], [1, 2, 3, 4], "abcd", None)),
        *(_fact("pixels", value) for value in (["a"], [1, 2, 3, 4], None)),
        *(_fact("sha256s", value) for value in (["a"] * 5, 7)),
        *(_fact("model", value) for value in (3, ["a"])),
        _fact("fingerprint", [1]),
        _fact("preset", 5),
        _fact("product", 5),
        _fact("normal_scores", [float("inf")]),
        _fact("complete", "yes"),
        lambda tensors, facts: facts.clear(),
        lambda tensors, facts: facts.append(facts[0]),
        lambda tensors, facts: tensors.update({"0.rows.1": tensors["0.rows.1"].to(torch.float8_e4m3fn)}),
        lambda tensors, facts: tensors.update({"0.scales": torch.ones(2, 4).to(torch.float8_e5m2)}),
        lambda tensors, facts: tensors.update({"0.rows.1": torch.ones(24, 0)}),
        lambda tensors, facts: tensors.update({"0.scales": torch.zeros(2, 4)}),
        lambda tensors, facts: tensors.update({"0.scales": -torch.ones(2, 4)}),
        lambda tensors, facts: tensors.update({"0.scales": torch.ones(3, 4)}),
        lambda tensors, facts: tensors.update({"0.scales": torch.ones(2, 3)}),
        lambda tensors, facts: tensors.update({"0.scales": torch.full((2, 4), 2.1)}),
        lambda tensors, facts: tensors["0.scales"][1, 0].fill_(1e9),
        lambda tensors, facts: tensors["0.rows.1"][2, 3].fill_(-3e38),
        lambda tensors, facts: tensors.update({"0.scales": torch.ones(2)}),
        lambda tensors, facts: tensors.update({"0.rows.1": torch.ones(24)}),
        lambda tensors, facts: tensors.update({"0.rows.1": torch.ones(24, 5, dtype=torch.int32)}),
        lambda tensors, facts: tensors.update({"0.rows.1": torch.ones(0, 5)}),
        lambda tensors, facts: tensors.update({"0.images.1": tensors["0.images.1"][:-1]}),
        lambda tensors, facts: tensors.update({"0.images.1": tensors["0.images.1"] + 1}),
        lambda tensors, facts: tensors.update({"0.images.1": tensors["0.images.1"] - 1}),
        lambda tensors, facts: tensors.update({"0.images.1": tensors["0.images.1"].float()}),
        lambda tensors, facts: facts.append("screw"),
        lambda tensors, facts: facts.append({"product": "screw"}),
    ],
)
def test_inconsistent_files(spoil: Callable[[dict[str, Tensor], list[dict]], object], saved: Path) -> None:
    tensors, metadata = contents(saved)
    facts = json.loads(metadata["banks"])
    spoil(tensors, facts)
    save_file(tensors, saved, {**metadata, "banks": json.dumps(facts)})
    with pytest.raises(
        CheckpointError, match=r"bank\.safetensors is damaged, or not a reference bank .*adfeatures fit"
    ):
        load_banks(saved)


@pytest.mark.parametrize("complete", [True, False])
def test_files_of_before_0_1_say_whether_the_bank_is_complete(complete: bool, saved: Path) -> None:
    expected = load_banks(saved)["default"]
    tensors, metadata = contents(saved)
    facts = json.loads(metadata["banks"])
    facts[0]["complete"] = complete
    # beside it, since what is expected may still be mapped from the file
    before = saved.with_name("before.safetensors")
    save_file(tensors, before, {**metadata, "banks": json.dumps(facts)})
    assert_same(load_banks(before)["default"], expected)


@pytest.mark.parametrize("damage", ["threshold", "scales", "rows", "names"])
def test_what_could_be_true_but_was_not_written(damage: str, saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        digest = file.metadata()["sha256"]
    tensors, metadata = contents(saved)
    facts = json.loads(metadata["banks"])
    if damage == "threshold":
        facts[0]["threshold"] = 3e5
    elif damage == "scales":
        tensors["0.scales"][0, 0] *= 1.001
    elif damage == "rows":
        tensors["0.rows.0"][0, 0] += 1e-3
    else:
        facts[0]["files"][:2] = facts[0]["files"][1::-1]
        facts[0]["files"][0] += "x"
    honest = {**metadata, "banks": json.dumps(facts)}
    save_file(tensors, saved, honest)
    load_banks(saved)
    save_file(tensors, saved, {**honest, "sha256": digest})
    with pytest.raises(
        CheckpointError, match="damaged, or not a reference bank .its content is not what was written.*adfeatures fit"
    ):
        load_banks(saved)


@pytest.mark.parametrize("name", ["0.rows.1", "0.scales"])
@pytest.mark.parametrize("content", [torch.nan, torch.inf])
def test_files_with_nan(content: float, name: str, saved: Path) -> None:
    tensors, metadata = contents(saved)
    tensors[name][1, 3] = content
    save_file(tensors, saved, metadata)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        load_banks(saved)


@pytest.mark.parametrize("banks", ["", "{", "[1]", "{}x", "null", "[" * 100_000, "1" * 5000, "[NaN]"])
def test_files_with_broken_facts(banks: str, saved: Path) -> None:
    tensors, metadata = contents(saved)
    save_file(tensors, saved, {**metadata, "banks": banks})
    with pytest.raises(CheckpointError, match="damaged"):
        load_banks(saved)


def test_a_bank_replaces_nothing_but_a_bank(saved: Path, tmp_path: Path) -> None:
    full_bank(threshold=0.25).save(saved)
    assert load_banks(saved)["default"].threshold == 0.25
    for name, content in (("photo.jpg", b"\xff\xd8photo"), ("weights.safetensors", b""), ("notes", b"x" * 100)):
        path = tmp_path / name
        path.write_bytes(content)
        if name.startswith("weights"):
            save_file({"x": torch.ones(1)}, path)
        before = path.read_bytes()
        with pytest.raises(InputError, match=f"{name} exists and is not a reference bank"):
            full_bank().save(path)
        assert path.read_bytes() == before
    (tmp_path / "empty").touch()
    full_bank().save(tmp_path / "empty")


def test_files_that_are_no_banks(saved: Path) -> None:
    tensors, metadata = contents(saved)
    for other in (None, {"format": "pt"}, {**metadata, "format": "adfeatures"}):
        save_file(tensors, saved, other)
        with pytest.raises(CheckpointError, match="not a reference bank"):
            load_banks(saved)
    with pytest.raises(CheckpointError, match=r"missing\.safetensors: No such file .*To make a bank: adfeatures fit"):
        load_banks(saved.with_name("missing.safetensors"))
    os.mkfifo(saved.with_name("pipe"))
    for path in (saved.parent, saved.with_name("pipe"), saved.with_name("x" * 300), "/dev/zero"):
        with pytest.raises(CheckpointError, match="Cannot open .*To make a bank: adfeatures fit"):
            load_banks(path)
        with pytest.raises(AdfeaturesError, match="is not a reference bank|Cannot write"):
            full_bank().save(path)


@pytest.mark.parametrize("fact", [{"threshold": float("nan")}, {"quantile": 2.0}, {"normal_scores": [float("inf")]}])
def test_facts_that_could_not_be_read_are_not_written(tmp_path: Path, fact: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="banks"):
        full_bank(**fact).save(tmp_path / "bank.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_of_a_newer_version(saved: Path) -> None:
    tensors, metadata = contents(saved)
    save_file(tensors, saved, {**metadata, "version": "2"})
    with pytest.raises(CheckpointError, match="newer version of adfeatures"):
        load_banks(saved)


@pytest.mark.parametrize(
    "name, content",
    [
        ("kept.0", torch.tensor([-1, 0], dtype=torch.int32)),
        ("kept.0", torch.tensor([0, 10**6], dtype=torch.int32)),
        ("kept.0", torch.zeros(0, dtype=torch.int32)),
        ("kept.0", torch.zeros(2)),
        ("units.0", torch.zeros(1)),
        ("units.0", torch.full((2,), float("nan"))),
        ("units.0", torch.tensor([1.0, -1.0])),
        ("units.1", None),
    ],
)
def test_what_images_are_matched_with_is_checked(name: str, content: Tensor | None, tmp_path: Path) -> None:
    bank = full_bank()
    bank.kept = [torch.tensor([0, 1], dtype=torch.int32) for _ in bank.rows]
    bank.units = [torch.tensor([1.0, 2.0]) for _ in bank.rows]
    path = tmp_path / "bank.safetensors"
    bank.save(path)
    assert_same(ReferenceBank.load(path), bank)
    with safe_open(path, framework="pt") as file:
        metadata = {key: text for key, text in file.metadata().items() if key != "sha256"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if content is None:
        del tensors[f"0.{name}"]
    else:
        tensors[f"0.{name}"] = content
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="damaged"):
        ReferenceBank.load(path)
