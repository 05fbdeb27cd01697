"""The wheel that users install, and the promises of the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import adfeatures

REPOSITORY = Path(__file__).parents[1]


BUILD = "from setuptools import build_meta; import sys; getattr(build_meta, f'build_{sys.argv[1]}')(sys.argv[2])"
# What lies in a checkout and concerns nobody else.
STRAY = (
    ".env",
    "adfeatures/.env",
    "adfeatures/assets/.env",
    "adfeatures/__pycache__/cli.cpython-310.pyc",
    "runs/own.pth",
)


def tracked() -> list[str]:
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout.decode()
    return [file for file in listed.split("\0") if file and (REPOSITORY / file).is_file()]


def build(kind: str, source: Path, folder: Path) -> Path:
    """Call the build backend the way that pip does, in the environment that is there: no network is needed."""
    subprocess.run([sys.executable, "-c", BUILD, kind, str(folder)], cwd=source, capture_output=True, check=True)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with stray files, since builds write beside what they build."""
    folder = tmp_path_factory.mktemp("source")
    for file in tracked():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((REPOSITORY / file).read_bytes())
    for file in STRAY:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("secret")
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    info = f"adfeatures-{adfeatures.__version__}.dist-info"
    metadata = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")
    licenses = {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"}
    package = {file for file in tracked() if file.startswith("adfeatures/")}
    assert {"adfeatures/py.typed", "adfeatures/assets/residual_lite.in1k_v1.safetensors"} <= package
    assert sum(name.startswith("adfeatures/assets/samples/references/") for name in package) == 8
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(names) == sorted(package | licenses | {f"{info}/{name}" for name in metadata})
    # Small enough to install over a bad line.
    assert wheel.stat().st_size < 4_000_000


def test_sdist_holds_what_builds_the_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        root = f"adfeatures-{adfeatures.__version__}"
        names = {member.name.removeprefix(f"{root}/") for member in archive if member.isfile()}
        archive.extractall(tmp_path)
    made = {"PKG-INFO", "setup.cfg"} | {name for name in names if name.startswith("adfeatures.egg-info/")}
    needed = {"LICENSE", "NOTICE", "README.md", "pyproject.toml"}
    # setuptools adds the uppermost test files unless a MANIFEST.in forbids it.
    needed |= {file for file in tracked() if re.fullmatch(r"adfeatures/.*|tests/test\w*\.py", file)}
    assert names - made == needed
    assert sdist.stat().st_size < 4_000_000
    (tmp_path / "again").mkdir()
    again = build("wheel", tmp_path / root, tmp_path / "again")
    assert contents(again) == contents(wheel)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


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
    assert {file.split("/")[0] for file in tracked() if not file.startswith(".")} <= agreed


def test_samples_are_small() -> None:
    samples = REPOSITORY / "adfeatures" / "assets" / "samples"
    assert sum(path.stat().st_size for path in samples.rglob("*") if path.is_file()) <= 1_000_000


def test_the_package_never_imports_training() -> None:
    for path in (REPOSITORY / "adfeatures").rglob("*.py"):
        assert "import training" not in path.read_text() and "from training" not in path.read_text()


def test_checks_run_what_pyproject_says() -> None:
    says = (REPOSITORY / "pyproject.toml").read_text()
    jobs = yaml.safe_load((REPOSITORY / ".github/workflows/tests.yml").read_text())["jobs"]
    (lowest,) = re.findall("python-version': '([0-9.]+)'", str(jobs["oldest"]))
    assert f'requires-python = ">={lowest}"' in says and f'python_version = "{lowest}"' in says
    assert f'target-version = "py{lowest.replace(".", "")}"' in says
    files = (".ci/run", ".github/CONTRIBUTING.md", ".github/workflows/release.yml")
    pins = [re.findall(r"torch\w*==[\d.]+", (REPOSITORY / file).read_text()) for file in files]
    assert len(pins[0]) == 2 and pins == [pins[0]] * 3
