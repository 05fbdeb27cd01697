"""The command that trains the head: on which products, from what is kept, to which file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from adfeatures.checkpoints import load_checkpoint
from adfeatures.errors import InputError
from adfeatures.evidence import SEEN
from adfeatures.factory import load_learned
from adfeatures.learned import Head
from adfeatures.scoring import anomaly_maps
from training import learn
from training.judging.packages import PACKAGES
from training.judging.products import SETS, Product
from training.judging.scenes import Rendered
from training.learning import evidence, train
from training.learning.evidence import BACKBONE, Evidence, collect, files_of, maps_of
from training.learning.products import learning_products

pytestmark = pytest.mark.usefixtures("one_thread")

PRODUCTS = {f"rendered_{name}": Product("rendered", Rendered(name)) for name in ("vinyl", "label")}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Evidence of few pictures of two products."""
    for name, count in (("REFERENCES", 16), ("GOOD", 4), ("BAD", 6)):
        monkeypatch.setattr(evidence, name, count)
    monkeypatch.setattr(learn, "fetch", lambda folder, packages: None)
    monkeypatch.setattr(learn, "learning_products", lambda folder: PRODUCTS)
    monkeypatch.setattr(train, "BATCH", 2)
    for name, product in PRODUCTS.items():
        collect((name, product), tmp_path / "photographs", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_it_trains_from_what_is_kept_and_gives_the_same_bytes_again(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = {path: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert set(written) == {path for name in PRODUCTS for path in files_of(name, work)}
    options = ["--photographs", str(work / "photographs"), "--work", str(work), "--epochs", "8"]
    heads = work / "heads"
    heads.mkdir()
    for name, seed in (("first", "0"), ("again", "0"), ("other", "1")):
        assert learn.main([*options, "--seed", seed, "--output", str(heads / f"{name}.safetensors")]) == 0
    assert {path: path.stat().st_mtime_ns for path in work.glob("*.safetensors")} == written
    first, again, other = ((heads / f"{name}.safetensors").read_bytes() for name in ("first", "again", "other"))
    assert first == again != other
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if "loss" in line][:8]
    assert losses[-1] < losses[0]
    with safe_open(heads / "first.safetensors", "pt") as file:
        assert file.metadata()["products"] == "2" and file.metadata()["seed"] == "0"
    scorer = load_learned(BACKBONE, None, heads / "first.safetensors")
    assert all(parameter.isfinite().all() for parameter in scorer.head.parameters())
    assert set(load_checkpoint(heads / "first.safetensors").state_dict) == set(Head(3).state_dict())


@pytest.mark.slow
def test_several_processes_keep_the_same_evidence_and_none_of_it_twice(tmp_path: Path) -> None:
    first, second = PRODUCTS
    alone, several = tmp_path / "alone", tmp_path / "several"
    for folder in (alone, several):
        folder.mkdir()
    collect((first, PRODUCTS[first]), tmp_path / "photographs", alone)
    kept = files_of(first, several)
    files = train.gathered(PRODUCTS, tmp_path / "photographs", several, 2)
    assert files == [*kept, *files_of(second, several)] and set(several.iterdir()) == set(files)
    for path in kept:
        assert path.read_bytes() == (alone / path.name).read_bytes()
    written = [path.stat().st_mtime_ns for path in files]
    assert train.gathered(PRODUCTS, tmp_path / "photographs", several, 2) == files
    assert [path.stat().st_mtime_ns for path in files] == written


def test_evidence_of_another_version_is_refused(tmp_path: Path) -> None:
    save_file({"seen.0": torch.zeros(1, SEEN - 2, 4, 4)}, tmp_path / "old_8.safetensors")
    with pytest.raises(InputError, match=r"old_8\.safetensors is of another version .* --work"):
        Evidence.load(tmp_path / "old_8.safetensors")


@pytest.mark.slow
def test_maps_in_training_are_those_of_the_model_but_smaller(work: Path) -> None:
    kept = Evidence.load(next(path for path, count in files_of("rendered_label", work).items() if count == 8))
    assert kept.bad.tolist() == [False] * 4 + [True] * 6 and not kept.masks[:4].any()
    pictures = kept.of(torch.arange(10))
    scorer = load_learned(BACKBONE, None, None)
    small = maps_of(scorer, scorer.head(pictures.distances, pictures.scales, pictures.seen))
    # Channel 0 of the evidence is the distance, here already as a multiple of what is normal.
    compared = [torch.cat([d[:, None], s], dim=1) for d, s in zip(pictures.distances, pictures.seen, strict=True)]
    large = anomaly_maps(scorer, compared, [torch.ones(3, 4)], BACKBONE.img_size)
    assert small.shape == (10, 80, 80)
    middles = large[:, 2::4, 2::4]
    assert float((small - middles).abs().max()) < 0.1 * float(middles.max())


def test_products_share_no_photograph_with_those_that_judge(tmp_path: Path) -> None:
    stamps = tmp_path / "tuxpaint-stamps-default" / PACKAGES["tuxpaint-stamps-default"].folder
    patterns = tmp_path / "krita-data" / PACKAGES["krita-data"].folder
    judged = {"vehicles/7spoke256.png", "food/fruit/lemon.png", "animals/insects/Woodlouse.png"}
    others = {f"tools/tool{number}.png" for number in range(60)}
    for name in judged | others | {"tools/saw_mirror.png", "symbols/alphabets/a.png"}:
        (stamps / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (150, 90)).save(stamps / name)
    Image.new("RGBA", (100, 90)).save(stamps / "tools/small.png")
    patterns.mkdir(parents=True)
    for name in ("18_texture-bark.png", "14_texture-rock.png"):
        Image.new("L", (512, 512)).save(patterns / name)
    materials = tmp_path / "robosuite" / PACKAGES["robosuite"].folder
    materials.mkdir(parents=True)
    for name, side in (("steel-brushed.png", 660), ("can.png", 815), ("steel-scratched.png", 384)):
        Image.new("RGB", (side, side + 10)).save(materials / name)
    products = learning_products(tmp_path)
    sides = {p.setting.side for p in products.values() if getattr(p.setting, "package", "") == "robosuite"}  # type: ignore[attr-defined]
    assert sides == {198, 330}
    used = {name for product in products.values() for name in getattr(product.setting, "names", ())}
    assert used < others and 10 < len(used) < 60
    textures = {product.setting.name for product in products.values() if product.group == "texture"}  # type: ignore[attr-defined]
    assert "14_texture-rock.png" in textures and "18_texture-bark.png" not in textures
    settings = [str(product.setting) for table in SETS.values() for product in table.values()]
    assert not {str(product.setting) for product in products.values()} & set(settings)
    whole = {(p.setting.package, p.setting.name) for p in products.values() if hasattr(p.setting, "name")}  # type: ignore[attr-defined]
    judged_photos = {
        (product.setting.package, product.setting.name)  # type: ignore[attr-defined]
        for table in SETS.values()
        for product in table.values()
        if hasattr(product.setting, "name")
    }
    assert whole and not whole & judged_photos
    assert {"rendered_vinyl", "rendered_label"} < set(products) and "rendered_denim" not in products
