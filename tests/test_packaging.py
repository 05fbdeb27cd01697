"""The wheel that users install, and the promises of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import adfeatures

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without isolation, from a copy: neither the network nor the checkout is touched."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = (
        subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True)
        .stdout.decode()
        .split("\0")
    )
    for file in filter(None, files):
        if (REPOSITORY / file).is_file() and not file.startswith("tests/"):
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((REPOSITORY / file).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"adfeatures"}
    for needed in ("adfeatures/py.typed", f"adfeatures/assets/{adfeatures.DEFAULT_MODEL}.safetensors"):
        assert needed in names
    assert sum(name.startswith("adfeatures/assets/samples/references/") for name in names) == 8
    assert any(name.endswith("licenses/NOTICE") for name in names) and any(
        name.endswith("licenses/LICENSE") for name in names
    )
    # Small enough to install over a bad line.
    assert wheel.stat().st_size < 4_000_000


@pytest.mark.slow
def test_wheel_works_on_its_own(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import adfeatures, pathlib; assert pathlib.Path(adfeatures.__file__).is_relative_to(pathlib.Path.cwd())\n"
    code += "from adfeatures.demo import SAMPLES\n"
    code += "model = adfeatures.create_model(references=SAMPLES / 'references')\n"
    code += "print(len(model.score(SAMPLES / 'references')))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == "8", result.stderr


def test_visible_top_level_is_the_one_agreed() -> None:
    files = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, check=True, text=True
    ).stdout.splitlines()
    agreed = {
        "adfeatures",
        "training",
        "hubconf.py",
        "tests",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "NOTICE",
        "CHANGELOG.md",
    }
    assert {file.split("/")[0] for file in files if not file.startswith(".")} <= agreed


def test_samples_are_small() -> None:
    samples = REPOSITORY / "adfeatures" / "assets" / "samples"
    assert sum(path.stat().st_size for path in samples.rglob("*") if path.is_file()) <= 1_000_000


def test_the_package_never_imports_training() -> None:
    for path in (REPOSITORY / "adfeatures").rglob("*.py"):
        assert "import training" not in path.read_text() and "from training" not in path.read_text()
