"""Photographs with free licenses, out of packages of PyPI and Debian."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from adfeatures.errors import AdfeaturesError
from adfeatures.images import read_image

# The wheel is the same on every machine when its platform and Python are named.
_PIP = ("--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64", "--python-version", "3.12")


@dataclass(frozen=True)
class Package:
    """A package that photographs are taken from.

    Attributes:
        version: The one and only version.
        file: Name of the file that is fetched.
        sha256: Its hash.
        license: License of the photographs.
        folder: Where they lie within it.
    """

    version: str
    file: str
    sha256: str
    license: str
    folder: str

    @property
    def of_debian(self) -> bool:
        """Whether it is Debian's, or else of PyPI."""
        return self.file.endswith(".deb")


# Those that the judge takes products from.
JUDGED = {
    "scikit-image": Package(
        version="0.26.0",
        file="scikit_image-0.26.0-cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        sha256="7df650e79031634ac90b11e64a9eedaf5a5e06fcd09bcd03a34be01745744466",
        license="BSD-3-Clause; the photographs are CC0 or in the public domain",
        folder="skimage/data",
    ),
    "opencv-doc": Package(
        version="4.6.0+dfsg-12",
        file="opencv-doc_4.6.0+dfsg-12_all.deb",
        sha256="4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
        license="BSD-3-Clause",
        folder="usr/share/doc/opencv-doc/examples/data",
    ),
    "tuxpaint-stamps-default": Package(
        version="2022.06.04-1",
        file="tuxpaint-stamps-default_2022.06.04-1_all.deb",
        sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        license="GPL-2.0-or-later",
        folder="usr/share/tuxpaint/stamps",
    ),
    "krita-data": Package(
        version="1:5.1.5+dfsg-2+deb12u1",
        file="krita-data_1%3a5.1.5+dfsg-2+deb12u1_all.deb",
        sha256="fa4092f3214e406c9354982b45709dc6e4696b940592177e1ea4414357053b47",
        license="GPL-2.0-or-later",
        folder="usr/share/krita/patterns",
    ),
}
PACKAGES = {
    **JUDGED,
    "robosuite": Package(
        version="1.5.2",
        file="robosuite-1.5.2-py3-none-any.whl",
        sha256="b9e02df55de8949739de6ba1d196d2ba59cf33c51a76efcfbe5c2f73cdcf99ce",
        license="MIT",
        folder="robosuite/models/assets/textures",
    ),
    "metaworld": Package(
        version="3.1.1",
        file="metaworld-3.1.1-py3-none-any.whl",
        sha256="99e25d9baf97f2f1a19ca89c0d2ca9c6a2b396d9a9be81729de64eedc683f0d3",
        license="MIT",
        folder="metaworld/assets",
    ),
}


def fetch(folder: Path, packages: Mapping[str, Package]) -> None:
    """Fetch and extract packages that are not in ``folder`` yet.

    Raises:
        AdfeaturesError: If one cannot be fetched, or is not the file that is expected.
    """
    ready(folder)
    for name, package in packages.items():
        if not (folder / package.file).exists():
            _download(name, package, folder)
        if hashlib.sha256((folder / package.file).read_bytes()).hexdigest() != package.sha256:
            raise AdfeaturesError(
                f"{folder / package.file} is not the file that is expected. Remove it, and try again."
            )
        if not (folder / name).is_dir():
            # Under another name until all is there.
            partial = folder / f"{name}.partial"
            _extract(folder / package.file, partial)
            partial.rename(folder / name)


def ready(folder: Path) -> None:
    """Make a folder, where it is not there yet.

    Raises:
        AdfeaturesError: If that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdfeaturesError(f"{folder} cannot be used as a folder: {error}. Choose another one.") from error


def _download(name: str, package: Package, folder: Path) -> None:
    pinned = f"{name}={package.version}" if package.of_debian else f"{name}=={package.version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *_PIP, pinned]
    _command(["apt-get", "download", pinned] if package.of_debian else pip, folder)


def _extract(file: Path, folder: Path) -> None:
    if file.suffix == ".deb":
        _command(["dpkg-deb", "-x", file.name, folder.name], file.parent)
    else:
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)


def _command(words: Sequence[str], folder: Path) -> None:
    try:
        subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        raise AdfeaturesError(
            f"{' '.join(words)} failed in {folder}: {said} The protocol needs pip and Debian 12 with its apt-get and "
            "dpkg-deb; or put the files there that it names."
        ) from error


@dataclass(frozen=True)
class Photographs:
    """The photographs below the folder that ``fetch`` filled, as float32 arrays in [0, 1]."""

    folder: Path

    def photo(self, package: str, name: str) -> np.ndarray:
        """Colors (H, W, 3)."""
        return _read(self._path(package, name))

    def cutout(self, package: str, name: str) -> np.ndarray:
        """Colors and opacity (H, W, 4) of an object, without its empty margins."""
        return _cut_out(self._path(package, name))

    def _path(self, package: str, name: str) -> Path:
        return self.folder / package / PACKAGES[package].folder / name


@cache
def _read(path: Path) -> np.ndarray:
    return np.asarray(read_image(path), np.float32) / 255


@cache
def _cut_out(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        rgba = image.convert("RGBA")
    return np.asarray(rgba.crop(rgba.getchannel("A").getbbox()), np.float32) / 255
