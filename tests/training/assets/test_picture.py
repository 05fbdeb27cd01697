"""The picture of the README is what the demo shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.assets import picture

STORED = Path(picture.__file__).parents[2] / ".github" / "demo.jpg"


@pytest.mark.slow
def test_the_stored_picture_is_that_of_the_demo(tmp_path: Path) -> None:
    """To a gray level or two, since JPEG codecs differ."""
    assert picture.main(["--output", str(tmp_path / "demo.jpg")]) == 0
    found, stored = (np.asarray(Image.open(path), dtype=float) for path in (tmp_path / "demo.jpg", STORED))
    assert found.shape == stored.shape and np.abs(found - stored).mean() < 1


@pytest.mark.slow
def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert picture.main(["--output", str(tmp_path / "file" / "demo.jpg")]) == 2
    assert "Traceback" not in capsys.readouterr().err
