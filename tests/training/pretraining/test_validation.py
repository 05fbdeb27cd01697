"""The validation of a training: each image against the references of its view, whatever the number of processes."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import tiny_extractor
from helpers.real_iad_tree import write_real_iad
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import roc_auc_score

from adfeatures.catalog import BACKBONES
from adfeatures.errors import ImageError
from adfeatures.extractor import FeatureExtractor
from adfeatures.images import ImageTransform, build_transform, read_image
from adfeatures.projector import ResidualProjector
from adfeatures.scoring import feature_norm_map
from training.data import real_iad
from training.data.images import ImageDataset
from training.data.items import Item
from training.data.transforms import MaskTransform
from training.metrics import SELECTED_BY, aupro_original
from training.pretraining import validation as module
from training.pretraining.frozen_backbone import FrozenBackbone
from training.pretraining.trials import Trial, held_out_trials
from training.pretraining.validation import Scores, validate

SIZE = (56, 56)
STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    root = write_real_iad(tmp_path_factory.mktemp("tree"), ("bottle_cap", "pcb", "usb"), ok=4, ng=2, views=3)
    train, held_out = real_iad.split_by_sample(real_iad.read(root, ("bottle_cap", "pcb", "usb")), 0.5, 0)
    return held_out_trials(real_iad.reference_pool(train), held_out, limit=5, seed=0)


def tiny_model() -> tuple[FrozenBackbone, ResidualProjector]:
    model = tiny_extractor()
    assert model.projector is not None
    entry = replace(BACKBONES["dinov2_base"], img_size=SIZE, normalization=STATISTICS)
    return FrozenBackbone("tiny", model.backbone, entry), model.projector


def make(trials: list[Trial], **settings: Any) -> tuple[Callable[..., Scores], ResidualProjector]:
    backbone, projector = tiny_model()
    return partial(validate, backbone=backbone, trials=trials, **settings), projector


def naive_feature_norm(trial: Trial) -> tuple[np.ndarray, np.ndarray]:
    """Maps and masks (N, H, W) of a trial, one image after the other, each against the references of its own view."""
    (backbone, projector), transform = tiny_model(), build_transform(SIZE, *STATISTICS)
    maps, masks = [], []
    for item in trial.test:
        with torch.no_grad():
            levels = backbone.module(transform(read_image(item.image))[None])
            images = torch.stack([transform(read_image(r.image)) for r in trial.references[item.view]])
            references = backbone.module(images)
            residuals = []
            for level, bank in zip(levels, references, strict=True):
                rows, queries = bank.permute(0, 2, 3, 1).flatten(0, 2), level[0].flatten(1).T
                nearest = torch.cosine_similarity(queries[:, None], rows[None], dim=2).argmax(dim=1)
                residuals.append((queries - rows[nearest]).T.reshape_as(level))
            maps.append(feature_norm_map(projector(residuals), SIZE)[0].numpy())
        mask = torch.zeros(1, *SIZE) if item.mask is None else MaskTransform(SIZE)(read_image(item.mask))
        masks.append(mask[0].numpy())
    return np.stack(maps), np.stack(masks)


def test_scores_are_those_of_each_image_against_the_references_of_its_view(trials: list[Trial]) -> None:
    assert all(len(trial.references) > 1 for trial in trials) and len(trials) == 3
    validation, projector = make(trials, methods=("norm",))
    found = validation(projector)["norm"]
    image, pixel = [], []
    for trial in trials:
        maps, masks = naive_feature_norm(trial)
        image.append(roc_auc_score([item.label for item in trial.test], maps.max(axis=(1, 2))))
        pixel.append(roc_auc_score(masks.ravel(), maps.ravel()))
    assert found["img"] == pytest.approx(np.mean(image), abs=1e-6)
    assert found["pix"] == pytest.approx(np.mean(pixel), abs=1e-4)


def test_the_approximate_aupro_is_that_of_the_published_code(trials: list[Trial]) -> None:
    scores = []
    for original in (True, False):
        score, projector = make([replace(trial, original_aupro=original) for trial in trials], methods=("norm",))
        scores.append(score(projector)["norm"])
    found, exact = scores
    expected = fmean(aupro_original(*naive_feature_norm(trial)) for trial in trials)
    assert found == {**exact, "pro": pytest.approx(expected, abs=1e-3)} and found["pro"] != exact["pro"]


def test_processes_share_the_trials(trials: list[Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    validation, projector = make(trials)
    expected = validation(projector)
    keys = {"img", "pix", "pro"}
    assert {method: set(scores) for method, scores in expected.items()} == {"norm": keys, "angle": keys}
    found: dict[int, list[Scores]] = {}
    shares = []
    monkeypatch.setattr(module, "world_size", lambda: 4)
    for rank in range(4):  # the last one gets no trial
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(
            module, "gather_objects", lambda own, rank=rank: found.update({rank: own}) or list(found.values())
        )
        shares.append(make(trials)[0])
        shares[rank](projector)
    assert [len(found[rank]) for rank in range(4)] == [1, 1, 1, 0]
    monkeypatch.setattr(module, "gather_objects", lambda own: list(found.values()))
    assert shares[0](projector) == shares[3](projector) == expected


def test_each_image_is_read_once_a_method(trials: list[Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[str] = Counter()
    original = ImageDataset.__getitem__

    def counted(self: ImageDataset, index: int) -> dict[str, object]:
        reads[self.items[index].image] += 1
        return original(self, index)

    monkeypatch.setattr(ImageDataset, "__getitem__", counted)
    validation, projector = make(trials[:1])
    validation(projector)
    # FeatureNorm learns from no images.
    assert reads == {**{item.image: 1 for item in trials[0].train}, **{item.image: 2 for item in trials[0].test}}


def test_the_projector_stays_as_it_is_and_nothing_is_held(trials: list[Trial]) -> None:
    validation, projector = make(trials[:1], methods=("norm",))
    projector.bfloat16().requires_grad_(True)
    before = {key: value.clone() for key, value in projector.state_dict().items()}
    validation(projector)
    assert all(
        torch.equal(value, before[key]) and value.dtype == torch.bfloat16
        for key, value in projector.state_dict().items()
    )
    assert all(parameter.requires_grad for parameter in projector.parameters())
    # Training has a use for the memory.
    gc.collect()
    extractors = [each for each in gc.get_objects() if type(each) is FeatureExtractor]
    assert not any(each.name == "validation" for each in extractors)


def test_residuals_alone_are_another_thing_to_evaluate(trials: list[Trial]) -> None:
    validation, projector = make(trials[:1], methods=("norm",))
    assert validation(None) != validation(projector)


def test_a_product_whose_masks_are_empty_leaves_the_means_of_pixels_to_the_others(trials: list[Trial]) -> None:
    blank = replace(trials[1], test=[replace(item, mask=None) for item in trials[1].test])
    (one, two, both, alone) = ([trials[0]], [trials[1]], [trials[0], blank], [blank])
    with pytest.warns(UndefinedMetricWarning, match="no pixel is anomalous"):
        validation, projector = make(both, methods=("norm",))
        found, undefined = (each(projector)["norm"] for each in (validation, make(alone, methods=("norm",))[0]))
    first, second = (make(trial, methods=("norm",))[0](projector)["norm"] for trial in (one, two))
    assert (found["pix"], found["pro"]) == (first["pix"], first["pro"])
    assert found["img"] == pytest.approx((first["img"] + second["img"]) / 2)
    assert undefined["img"] == second["img"] and np.isnan([undefined["pix"], undefined["pro"]]).all()


def broken(item: Item, folder: Path) -> Item:
    path = folder / f"broken{len(list(folder.iterdir()))}.jpg"
    path.write_bytes(b"no image")
    return replace(item, image=str(path))


def test_images_that_cannot_be_read_are_passed_over(trials: list[Trial], tmp_path: Path) -> None:
    """The next image takes the place of one, with its own label and mask; a reference has no substitute."""
    trial = trials[0]
    (view, references), *others = trial.references.items()
    damaged = replace(
        trial,
        references={view: [broken(references[0], tmp_path), *references], **dict(others)},
        train=[broken(trial.train[0], tmp_path), *trial.train[1:]],
        test=[*trial.test[:-1], broken(trial.test[-1], tmp_path)],
    )
    replaced = replace(trial, train=[trial.train[1], *trial.train[1:]], test=[*trial.test[:-1], trial.test[0]])
    assert trial.test[-1].label != trial.test[0].label
    validation, projector = make([damaged])
    with pytest.warns(UserWarning, match=r"broken\d.jpg.* The validation does without it"):
        found = validation(projector)
    assert found == make([replaced])[0](projector) != make([trial])[0](projector)


@pytest.mark.parametrize("what", ["references", "test", "mask"])
@pytest.mark.filterwarnings("ignore:Cannot read")
def test_what_nothing_can_stand_in_for_is_an_error(trials: list[Trial], tmp_path: Path, what: str) -> None:
    trial = trials[0]
    if what == "references":
        trial = replace(
            trial,
            references={view: [broken(item, tmp_path) for item in items] for view, items in trial.references.items()},
        )
    elif what == "test":
        trial = replace(trial, test=[broken(item, tmp_path) for item in trial.test])
    else:
        masks = [
            replace(item, mask=trial.references["C1"][0].image + ".gone" if item.mask else None) for item in trial.test
        ]
        trial = replace(trial, test=masks)
    validation, projector = make([trial])
    message = {
        "references": "None of the references .* can be read",
        "test": "10 images in a row",
        "mask": r"Cannot open .*\.gone: No such file",
    }
    with pytest.raises(ImageError, match=message[what]):
        validation(projector)


def test_the_methods_are_those_that_select_checkpoints() -> None:
    assert {name: method.__name__ for name, method in module._SELECTORS.items()} == SELECTED_BY


def test_images_and_references_have_the_geometry_of_the_trial(
    trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    presets, found = ("resize256_crop224", "resize224_crop224"), []
    for name in ("_Readable", "_references"):
        original = getattr(module, name)

        def noting(items: Sequence[Item], transform: ImageTransform, original: Any = original) -> Any:
            found.append((original.__name__, transform))
            return original(items, transform)

        monkeypatch.setattr(module, name, noting)
    backbone, projector = tiny_model()
    deep = replace(backbone, bit_depth=12)
    validate(projector, deep, [replace(trials[0], presets=presets)], methods=("norm",))
    expected = {
        name: build_transform(SIZE, *STATISTICS, preset=preset, bit_depth=12)
        for name, preset in zip(("_Readable", "_references"), presets, strict=True)
    }
    assert dict(found) == expected
