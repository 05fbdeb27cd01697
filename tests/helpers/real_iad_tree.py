"""A small data set in the layout of Real-IAD, with what is odd in the published one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from helpers.models import photo
from PIL import Image

SIZE = (48, 40)


def write_real_iad(
    root: Path,
    products: Sequence[str] = ("bottle_cap", "pcb"),
    *,
    ok: int = 3,
    ng: int = 2,
    views: int = 2,
    defects: Sequence[str] = ("HS", "ZW"),
    size: tuple[int, int] = SIZE,
) -> Path:
    """Write ``root/realiad_512``: per product ``ok`` good parts and ``ng`` of each defect, each from ``views`` sides.

    The last side of a defective part shows nothing and has no mask. The first defective part of a product has a double
    underscore in its names, and the code of another defect than its folder.

    Returns:
        The root.
    """
    seed = 0
    for product in products:
        for number in range(ok):
            for view in range(1, views + 1):
                name = f"{product}_{number + 300:04d}_OK_C{view}_20230925185139.jpg"
                _write(root / f"realiad_512/{product}/OK/S{number + 300:04d}" / name, seed := seed + 1, size)
        for defect in defects:
            for number in range(ng):
                odd = defect == defects[0] and number == 0
                code, underscore = (defects[-1], "__") if odd else (defect, "_")
                for view in range(1, views + 1):
                    name = f"{product}{underscore}{number:04d}_NG_{code}_C{view}_20230926131720.jpg"
                    path = root / f"realiad_512/{product}/NG/{defect}/S{number:04d}" / name
                    _write(path, seed := seed + 1, size)
                    if view < views:
                        _write_mask(path.with_suffix(".png"), seed, size)
    return root


def write_official_lists(root: Path, folder: Path, products: Sequence[str], ok_tested: int = 2) -> Path:
    """Lists in the form of the official ones: the last good parts and all defective ones are the test.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True)
    for product in products:
        base = root / "realiad_512" / product
        content: dict[str, object] = {"meta": {"normal_class": "OK", "prefix": f"{product}/", "pre_transform": []}}
        parts = [sorted((base / tree).glob("**/S*")) for tree in ("OK", "NG")]
        for split, own in (("train", parts[0][:-ok_tested]), ("test", parts[0][-ok_tested:] + parts[1])):
            content[split] = [_entry(base, product, image) for part in own for image in sorted(part.glob("*.jpg"))]
        (folder / f"{product}.json").write_text(json.dumps(content))
    return folder


def _entry(base: Path, product: str, image: Path) -> dict[str, str | None]:
    mask = image.with_suffix(".png")
    defect = image.parent.parent.name if mask.exists() else "OK"
    path, drawn = image.relative_to(base).as_posix(), mask.relative_to(base).as_posix() if mask.exists() else None
    return {"category": product, "anomaly_class": defect, "image_path": path, "mask_path": drawn}


def _write(path: Path, seed: int, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed, size).save(path, quality=95)


def _write_mask(path: Path, seed: int, size: tuple[int, int]) -> None:
    mask = np.zeros((size[1], size[0]), np.uint8)
    top, left = np.random.RandomState(seed).randint(0, [size[1] // 2, size[0] // 2])
    mask[top : top + size[1] // 2, left : left + size[0] // 2] = 255
    Image.fromarray(mask).save(path)
