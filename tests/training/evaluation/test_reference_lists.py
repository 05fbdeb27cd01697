"""Listed references: whose they are, on any machine, and what is wrong with a list."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.trees import write_mvtec, write_visa

import adfeatures
from adfeatures.errors import InputError
from adfeatures.images import read_image
from training import evaluate
from training.data import dataset
from training.data.items import Item
from training.evaluation import pictures
from training.evaluation.product import Product
from training.evaluation.reference_lists import listed_references

AUTHORS = "/home/someone/cable/data/mvtec_anomaly_detection"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_mvtec(tmp_path / "mvtec", ("bottle", "cable"), good=4, test_good=1, bad=2, size=(48, 48))


def product(root: Path, name: str, of: str = "mvtec") -> Product:
    return Product(name, dataset(of), root, raw=None)  # type: ignore[arg-type]


def write_lists(folder: Path, root: Path, name: str, of: str = "mvtec", authors: str = AUTHORS) -> dict[str, list[str]]:
    """Every test image has two training images, other ones for each, in the form of the published lists."""
    own = product(root, name, of)
    train = [item.image for item in own.train]

    def there(path: str) -> str:
        return f"{authors}/{Path(path).relative_to(root).as_posix()}"

    wanted = {item.image: [train[n % len(train)], train[(n + 1) % len(train)]] for n, item in enumerate(own.test)}
    folder.mkdir(parents=True, exist_ok=True)
    lists = {there(image): [there(reference) for reference in of_image] for image, of_image in wanted.items()}
    (folder / f"{name}.json").write_text(json.dumps(lists))
    return wanted


def found(folder: Path, root: Path, name: str, of: str = "mvtec") -> dict[str, list[str]]:
    lists = listed_references(str(folder), of, root / name, product(root, name, of))
    return {image: [item.image for item in items] for image, items in lists.items()}


@pytest.mark.parametrize("authors", [AUTHORS, "C:\\data\\bottle", "bottle/bottle", ""])
@pytest.mark.parametrize("place", ["mvtec", "."])
def test_paths_of_another_machine_are_found_below_the_product(
    root: Path, tmp_path: Path, authors: str, place: str
) -> None:
    for name in ("bottle", "cable"):
        wanted = write_lists(tmp_path / "lists" / place, root, name, authors=authors)
        if "\\" in authors:
            file = tmp_path / "lists" / place / f"{name}.json"
            file.write_text(file.read_text().replace("/", "\\\\"))
        assert found(tmp_path / "lists", root, name) == wanted


def test_visa(tmp_path: Path) -> None:
    root = write_visa(tmp_path / "visa", ("candle",), size=(16, 16))
    wanted = write_lists(tmp_path / "lists/visa", root, "candle", "visa")
    assert found(tmp_path / "lists", root, "candle", "visa") == wanted and len(wanted) == 4


Lists = dict[str, Any]


def lose(lists: Lists) -> None:
    lists.pop(next(iter(lists)))


def misname(lists: Lists) -> None:
    for references in lists.values():
        references[0] = f"{AUTHORS}/bottle/train/good/999.png"


def climb(lists: Lists) -> None:
    next(iter(lists.values()))[0] = "/x/bottle/../cable/train/good/000.png"


def cheat(lists: Lists) -> None:
    next(iter(lists.values()))[0] = next(iter(lists))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose, "has no references for 1 of 3 test images: .*000.png"),
        (misname, r"names 1 files that are not below .*bottle: .*/train/good/999.png"),
        (climb, r"names 1 files that are not below .*bottle: /x/bottle/\.\./cable"),
        (cheat, "names test images as references of"),
        (lambda lists: lists.update({f"{AUTHORS}/bottle/test/good/777.png": []}), "names 1 files .*777.png"),
        (lambda lists: lists.update({next(iter(lists)): []}), "has no references for 1 of 3"),
        (
            lambda lists: lists.update({next(iter(lists)): "a.png"}),
            r"no lists .*bottle.json.* must be a list, not 'a.png'",
        ),
        (lambda lists: lists.update({next(iter(lists)): [None]}), r"no lists .*bottle.json.*\[0\] must be text"),
    ],
)
def test_what_is_wrong_is_named(root: Path, tmp_path: Path, change: Callable[[Lists], Any], message: str) -> None:
    write_lists(tmp_path / "lists/mvtec", root, "bottle")
    file = tmp_path / "lists/mvtec/bottle.json"
    lists = json.loads(file.read_text())
    change(lists)
    file.write_text(json.dumps(lists))
    with pytest.raises(InputError, match=message):
        found(tmp_path / "lists", root, "bottle")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000], ids=["empty", "a list", "cut off", "deep"])
def test_what_is_no_list(root: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "bottle.json").write_text(text)
    with pytest.raises(InputError, match="no lists of references: .*bottle.json"):
        found(tmp_path, root, "bottle")
    with pytest.raises(InputError, match="There is no list of references of cable: neither .*mvtec.cable.json nor"):
        found(tmp_path, root, "cable")


def test_feature_norm_compares_each_image_with_those_that_are_listed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "draw_detection_curves", lambda *_: None)
    monkeypatch.setattr(pictures, "draw_maps", lambda *_: None)
    wanted = write_lists(tmp_path / "lists/mvtec", root, "bottle")
    scores: list[list[float]] = []
    score = evaluate.Evaluation._predict

    def spy(self: Any, method: Any, of: Any) -> Any:
        predictions = score(self, method, of)
        scores.append(predictions.scores.tolist())
        return predictions

    monkeypatch.setattr(evaluate.Evaluation, "_predict", spy)
    options = f"--model residual_lite --img-size 64 --dataset mvtec --root {root} --output {tmp_path / 'run'}"
    lists = f"--method feature_norm --shots 2 --references lists:{tmp_path / 'lists'} --workers 0"
    assert evaluate.main([*options.split(), *lists.split()]) == 1  # there is no list of cable
    (record,) = [
        json.loads(path.read_text()) for path in (tmp_path / "run/results/bottle").glob("*listed-pretrained.json")
    ]
    assert record["retrieved"] == wanted and record["method"] == "feature_norm_listed" and record["draw"] is None
    assert "FeatureNorm (listed references)" in (tmp_path / "run/results.md").read_text()
    failed = json.loads(next((tmp_path / "run/results/cable").glob("*pretrained.json")).read_text())
    assert "There is no list of references of cable" in failed["error"]

    model = adfeatures.create_model(img_size=64)
    transform = adfeatures.create_transform(model)
    expected = []
    for image, references in wanted.items():
        model.set_references(references, rotations=1)
        residuals = model.residuals(transform(read_image(image))[None])
        expected.append(adfeatures.scoring.feature_norm_map(residuals, (64, 64)).max().item())
    # On raw features of the bottle, on its residuals, and on raw features of the cable.
    assert len(scores) == 3 and scores[1] == pytest.approx(expected, rel=1e-4)


def test_other_methods_draw_their_references(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"--model residual_lite --img-size 64 --dataset mvtec --root {root} --output {tmp_path / 'run'}"
    arguments = [*options.split(), "--method", "patchcore", "--references"]
    assert evaluate.main([*arguments, "lists:nowhere"]) == 2
    assert "There is no folder nowhere: correct --references" in capsys.readouterr().err
    config = evaluate.EvaluationConfig(
        model="residual_lite", dataset="mvtec", root=str(root), output="o", references=f"lists:{tmp_path}"
    )
    assert config.given_references is None and config.reference_lists == str(tmp_path)


def test_items_are_normal_images_of_the_product(root: Path, tmp_path: Path) -> None:
    write_lists(tmp_path, root, "bottle")
    lists = listed_references(str(tmp_path), "mvtec", root / "bottle", product(root, "bottle"))
    assert {type(item) for items in lists.values() for item in items} == {Item}
    assert {(item.label, item.product) for items in lists.values() for item in items} == {(0, "bottle")}
