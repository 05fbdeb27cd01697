"""The table of models: complete, consistent, and readable without torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from adfeatures import catalog
from adfeatures.errors import UnknownNameError

MODELS = catalog.MODELS


@pytest.mark.parametrize("name", catalog.BACKBONES)
def test_backbones_describe_every_level(name: str) -> None:
    entry = catalog.BACKBONES[name]
    assert len(entry.blocks) == len(entry.channels) == len(entry.reductions)
    assert list(entry.blocks) == sorted(set(entry.blocks)) and entry.blocks[0] >= 1
    assert all(side % entry.patch_size == 0 for side in entry.img_size)
    assert entry.license and entry.origin.startswith("https://") and entry.original_file
    assert entry.asset is None or (catalog.ASSETS / entry.asset).is_file()


@pytest.mark.parametrize("name", MODELS)
def test_models_refer_to_what_is_there(name: str) -> None:
    model = MODELS[name]
    assert not model.backbone or model.backbone in catalog.BACKBONES
    assert model.scoring in ("feature_norm", "residual")
    assert model.default_tag is None or model.default_tag in model.tags
    for tag in model.tags.values():
        optional = ("hub_file", "local", "head", "typical_distances")
        assert all(getattr(tag, field.name) for field in dataclasses.fields(tag) if field.name not in optional)
        assert (model.scoring == "residual") == (tag.typical_distances is not None)
    facts = catalog.describe(name)
    assert facts["model"] == (f"{name}.{model.default_tag}" if model.tags else name)


def test_the_default_is_a_model_with_a_tag_that_needs_no_download() -> None:
    arch, tag = catalog.find_model(catalog.DEFAULT_MODEL)
    assert tag is not None and MODELS[arch].tags[tag].hub_file is None
    assert catalog.BACKBONES[MODELS[arch].backbone].asset is not None


def test_names_are_split_and_checked() -> None:
    assert catalog.find_model("residual_lite") == ("residual_lite", None)
    assert catalog.find_model("residual_lite.in1k_v1") == ("residual_lite", "in1k_v1")
    for name, says in (
        ("residual_light", "Did you mean 'residual_lite'"),
        ("a/b", "hf-hub:"),
        ("residual_lite.x", "x"),
    ):
        with pytest.raises(UnknownNameError, match=says):
            catalog.find_model(name)
    assert catalog.place("owner/repo", "a/b.pth") == "hf-hub:owner/repo:a/b.pth"


def test_the_table_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, adfeatures.catalog; assert not {'torch', 'numpy', 'timm', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
