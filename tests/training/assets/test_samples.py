"""The sample images of ``adfeatures demo`` are what training.assets.samples renders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.assets import samples

STORED = Path(samples.__file__).parents[2] / "adfeatures" / "assets" / "samples"


@pytest.mark.slow
def test_stored_images_are_the_rendered_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kind, to a gray level or two, since JPEG codecs differ."""
    monkeypatch.setattr(samples, "PARTS", {folder: numbers[:1] for folder, numbers in samples.PARTS.items()})
    assert samples.main(["--output", str(tmp_path)]) == 0
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*") if path.suffix != ".txt")
    assert len(files) == 10
    for file in files:
        found, stored = (np.asarray(Image.open(folder / file), dtype=float) for folder in (tmp_path, STORED))
        assert np.abs(found - stored).mean() < 1


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert samples.main(["--output", str(tmp_path / "file")]) == 2
    assert "choose another --output" in capsys.readouterr().err


def test_masks_cover_what_a_viewer_would_point_at() -> None:
    """Each mask is a small part of the picture, in which something differs from all good parts."""
    good = [_gray(path) for path in sorted((STORED / "test" / "good").iterdir())]
    for path in sorted((STORED / "masks").rglob("*.png")):
        mask = np.asarray(Image.open(path)) > 0
        assert set(np.unique(np.asarray(Image.open(path)))) == {0, 255}
        assert 0.0005 < mask.mean() < 0.03
        flawed = _gray(STORED / "test" / path.parent.name / f"{path.stem}.jpg")
        assert min(np.abs(flawed - other)[mask].mean() for other in good) > 8


def _gray(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("L"), dtype=float)
