"""The products that the head is trained on: what the packages of the judge have beside its own, and materials."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..data.synthetic import PRODUCTS
from ..judging.packages import PACKAGES
from ..judging.products import SETS, Product
from ..judging.scenes import Objects, Rendered, Texture, Whole

# Of an object that was cut out.
LEAST_PIXELS = 140
TEXTURE_PIXELS = 400
# Sides of a crop, of the shorter one of a texture.
CROPS = (0.3, 0.5)
GROUNDS = ((0.16, 0.17, 0.18), (0.78, 0.78, 0.75), (0.35, 0.45, 0.58), (0.55, 0.42, 0.3))
# Letters, formulas and flags are flat drawings.
_FLAT = ("symbols/alphabets", "symbols/math", "town/flags")
_SCENES = {
    "opencv-doc": "aloeL.jpg blox.jpg building.jpg butterfly.jpg detect_blob.png digits.png ellipses.jpg fruits.jpg "
    "graf1.png home.jpg imageTextR.png leuvenA.jpg pca_test1.jpg right06.jpg rubberwhale1.png squirrel_cls.jpg "
    "starry_night.jpg stuff.jpg sudoku.png",
    "scikit-image": "cell.png chelsea.png clock_motion.png moon.png motorcycle_left.png text.png",
}
_TEXTURES = {
    "krita-data": "*.png",
    "robosuite": "*.png",
    "metaworld": "**/textures/*.png",
    "opencv-doc": "baboon.jpg",
    "scikit-image": "hubble_deep_field.jpg",
}
# Pictures of something, next to nothing, or there twice.
_NO_TEXTURES = {
    *("can.png", "cereal.png", "ceramic.png", "glass.png", "lemon.png", "soda.png"),
    *("scene/textures/height1.png", "textures/tennis.png", "textures/metal.png"),
}


def learning_products(photographs: Path) -> dict[str, Product]:
    """Products by name, from the folder that the judge's packages lie in; none shares a photograph with the SETS."""
    found: dict[str, Product] = {}
    for package, names in _SCENES.items():
        found |= {_name(package, name): Product("fixed", Whole(package, name)) for name in names.split()}
    for number, (package, name, side) in enumerate(_textures(photographs)):
        changes = (("stretched",), ("tint",), ())[number % 3]
        gray = package == "krita-data" or number % 4 == 3
        texture = Texture(package, name, side)
        found[f"{_name(package, name)}_{side}"] = Product("texture", texture, gray=gray, changes=changes)
    stamps = list(_stamps(photographs))
    for number, name in enumerate(stamps):
        found[_name("stamps", name)] = _laid(number, name, stamps[(7 * number + 3) % len(stamps)])
    for name in sorted({*PRODUCTS} - _judged("product")):
        found[_name("rendered", name)] = Product("rendered", Rendered(name))
    return found


def _laid(number: int, name: str, other: str) -> Product:
    """An object that lies as one of six kinds of product do."""
    ground, gray = GROUNDS[number // 6 % len(GROUNDS)], number % 3 == 2
    match number % 6:
        case 0:
            return Product("fixed", Objects((name,), ground, side=0.8), gray=gray)
        case 1 | 2:
            return Product("free", Objects((name,), ground, side=0.62, turn=180, stray=0.06), gray=gray)
        case 3:
            turn = 180.0 if number % 4 == 1 else 15.0
            tray = Objects((name,), ground, side=0.28, grid=(3, 3), turn=turn, stray=0.015, other=other)
            return Product("pieces", tray, gray=gray)
        case 4:
            heap = Objects((name,), ground, side=0.19, grid=(9, 9), turn=180, heap=True, other=other)
            return Product("heap", heap, gray=gray)
        case _:
            return Product("fixed", Objects((name,), ground, side=0.7, turn=8, stray=0.02), gray=gray)


def _textures(photographs: Path) -> Iterator[tuple[str, str, int]]:
    judged = _judged("name")
    for package, pattern in _TEXTURES.items():
        folder = photographs / package / PACKAGES[package].folder
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder).as_posix()
            if name in judged or name in _NO_TEXTURES:
                continue
            with Image.open(path) as image:
                shorter = min(image.size)
            if shorter >= TEXTURE_PIXELS:
                yield from ((package, name, round(share * shorter)) for share in CROPS)


def _stamps(photographs: Path) -> Iterator[str]:
    judged = _judged("names") | _judged("other")
    package = "tuxpaint-stamps-default"
    folder = photographs / package / PACKAGES[package].folder
    for path in sorted(folder.rglob("*.png")):
        name = path.relative_to(folder).as_posix()
        left_out = zlib.crc32(name.encode()) % 2 == 0  # All would take more than an hour.
        if left_out or name in judged or name.startswith(_FLAT) or path.stem.endswith("_mirror"):
            continue
        with Image.open(path) as image:
            if max(image.size) >= LEAST_PIXELS:
                yield name


def _judged(field: str) -> set[str]:
    """What the products of the judge have in a field of their settings."""
    held = (getattr(product.setting, field, None) for table in SETS.values() for product in table.values())
    return {name for value in held if value for name in ([value] if isinstance(value, str) else value)}


def _name(package: str, name: str) -> str:
    return f"{package}_{name.rpartition('.')[0] or name}".replace("/", "_")
