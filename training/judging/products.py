"""The products of the protocol, and their pictures."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from . import defects
from .camera import SCENE, Shot
from .packages import Photographs
from .scenes import Map, Objects, Rendered, Scene, Setting, Texture, Whole

# Of a place where a defect changes next to nothing, another one is taken.
TRIES, VISIBLE_PIXELS = 30, 20


@dataclass(frozen=True)
class Product:
    """A product, and what may befall it.

    Attributes:
        group: What kind of product it is, for means over groups.
        setting: What is photographed.
        gray: Whether the camera is gray.
        changes: Changes of the whole scene that are defects here: of the global ones of its generator.
    """

    group: str
    setting: Setting
    gray: bool = False
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pictures:
    """Pictures of one product, RGB of 320 x 320 pixels.

    Attributes:
        references: Normal ones, to draw references of.
        tests: Normal and defective ones.
        kinds: The defect of each test picture, "" where it is normal.
        masks: Where the defect of each is seen, bool (N, 320, 320); all False where it is normal.
        located: Whether the mask of each says where the defect is: not so where the whole scene has changed.
    """

    references: list[Image.Image]
    tests: list[Image.Image]
    kinds: list[str]
    masks: np.ndarray
    located: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """1 where a test picture is defective."""
        return np.array([kind != "" for kind in self.kinds], dtype=int)


def _stamps(*names: str, **settings: Any) -> Objects:
    return Objects(tuple(f"{name}.png" for name in names), **settings)


_DARK, _PALE, _BLUE, _WOOD = (0.16, 0.17, 0.18), (0.78, 0.78, 0.75), (0.35, 0.45, 0.58), (0.55, 0.42, 0.3)

DEVELOPMENT: Mapping[str, Product] = {
    "coins": Product("fixed", Whole("scikit-image", "coins.png", (0, 40, 384, 303)), gray=True),
    "page": Product("print", Whole("scikit-image", "page.png"), gray=True),
    "board": Product("electronics", Whole("opencv-doc", "board.jpg", (0, 0, 340, 426))),
    "cup": Product("fixed", Whole("scikit-image", "coffee.png", (100, 0, 500, 400))),
    "grass": Product("texture", Texture("scikit-image", "grass.png", 220), gray=True),
    "tissue": Product("tissue", Texture("scikit-image", "ihc.png", 220), changes=("tint",)),
    "sackcloth": Product(
        "texture", Texture("krita-data", "02b_WoofTissue.png", 200), gray=True, changes=("stretched",)
    ),
    "chain_mail": Product("texture", Texture("krita-data", "21_texture-chainmail.png", 220), gray=True),
    "tractor_wheel": Product("fixed", _stamps("vehicles/wheel_tractor", ground=_PALE, side=0.8)),
    "orange": Product("free", _stamps("food/fruit/orange_seville", ground=_BLUE, side=0.6, turn=180, stray=0.06)),
    "mixer": Product(
        "gray free", _stamps("household/tools/cementmixer", ground=_DARK, side=0.6, turn=180, stray=0.06), gray=True
    ),
    "fruit_tray": Product(
        "pieces",
        _stamps(
            "food/fruit/kiwi",
            "food/fruit/Apricot_whole",
            ground=_WOOD,
            side=0.27,
            grid=(3, 3),
            turn=180,
            stray=0.015,
            other="food/fruit/lemon.png",
        ),
    ),
    "pecans": Product(
        "heap",
        _stamps(
            "food/nuts/pecan", ground=_DARK, side=0.18, grid=(9, 9), turn=180, heap=True, other="food/nuts/almond.png"
        ),
    ),
    "rendered_circuit_board": Product("electronics", Rendered("circuit_board")),
    "rendered_hex_nut": Product("free", Rendered("hex_nut")),
    "rendered_denim": Product("texture", Rendered("denim"), changes=("stretched",)),
}

FINAL: Mapping[str, Product] = {
    "tea_box": Product("print", Whole("opencv-doc", "box.png"), gray=True),
    "cards": Product("print", Whole("opencv-doc", "cards.png", (90, 60, 510, 400))),
    "chips": Product("electronics", Whole("opencv-doc", "board.jpg", (340, 0, 640, 426))),
    "retina": Product("tissue", Whole("scikit-image", "retina.jpg"), changes=("defocus",)),
    "gravel": Product("texture", Texture("scikit-image", "gravel.png", 220), gray=True, changes=("skewed",)),
    "brick": Product("texture", Texture("scikit-image", "brick.png", 220), gray=True, changes=("skewed",)),
    "scales": Product("texture", Texture("krita-data", "22_texture-reptile.png", 220), gray=True),
    "bark": Product("texture", Texture("krita-data", "18_texture-bark.png", 220), gray=True),
    "car_wheel": Product("fixed", _stamps("vehicles/7spoke256", ground=_PALE, side=0.8), gray=True),
    "bulb": Product("fixed", _stamps("household/Lightbulb", ground=_BLUE, side=0.8)),
    "woodlouse": Product(
        "gray free", _stamps("animals/insects/Woodlouse", ground=_PALE, side=0.7, turn=180, stray=0.05), gray=True
    ),
    "anemone": Product("free", _stamps("plants/flowers/anemone_red", ground=_DARK, side=0.65, turn=180, stray=0.06)),
    "candies": Product("pieces", Whole("opencv-doc", "smarties.png", (0, 0, 400, 355))),
    "pie_tray": Product(
        "pieces",
        _stamps(
            "seasonal/christmas/Mince_Pie",
            ground=_DARK,
            side=0.4,
            grid=(2, 2),
            turn=30,
            stray=0.02,
            other="food/fruit/avocado.png",
        ),
    ),
    "almonds": Product(
        "heap",
        _stamps(
            "food/nuts/almond",
            ground=_WOOD,
            side=0.17,
            grid=(9, 9),
            turn=180,
            heap=True,
            other="food/nuts/walnut.png",
        ),
    ),
    "rendered_connector_plug": Product("electronics", Rendered("connector_plug")),
    "rendered_leather": Product("texture", Rendered("leather")),
    "rendered_gear": Product("free", Rendered("gear")),
}
SETS = {"development": DEVELOPMENT, "final": FINAL}


def pictures(
    name: str,
    photographs: Photographs,
    *,
    references: int,
    good: int,
    bad: int,
    seed: int = 0,
    product: Product | None = None,
) -> Pictures:
    """The pictures of a product. The same arguments give the same pixels.

    Args:
        name: Its name.
        photographs: Where the photographs are.
        references: Normal pictures to draw references of.
        good: Normal test pictures.
        bad: Defective test pictures, of all kinds in turn.
        seed: Another seed gives other pictures.
        product: The product, where it is of none of the SETS.
    """
    final = product is None and name in FINAL
    product = product or (FINAL if final else DEVELOPMENT)[name]
    kinds, changes = (defects.SECOND, defects.SECOND_GLOBAL) if final else (defects.FIRST, defects.FIRST_GLOBAL)
    possible = {kind: damage for kind, damage in kinds.items() if not (product.gray and kind == "color")}
    possible |= {kind: changes[kind] for kind in product.changes}
    wanted = [""] * good + [list(possible)[number % len(possible)] for number in range(bad)]

    def specimen(group: int, number: int, kind: str = "") -> tuple[Image.Image, Map]:
        key = (seed, zlib.crc32(name.encode()), group, number)
        shot = Shot(np.random.default_rng((*key, 1)))
        scene, mask = _flawed(product, photographs, key, kind, possible)
        picture = shot.picture(scene, gray=product.gray)
        return picture, shot.mask(mask)

    tests = [specimen(1, number, kind) for number, kind in enumerate(wanted)]
    return Pictures(
        references=[specimen(0, number)[0] for number in range(references)],
        tests=[picture for picture, _ in tests],
        kinds=wanted,
        masks=np.stack([mask for _, mask in tests]),
        located=np.array([kind not in changes for kind in wanted]),
    )


def _flawed(
    product: Product,
    photographs: Photographs,
    key: tuple[int, ...],
    kind: str,
    possible: Mapping[str, defects.Damage],
) -> tuple[Map, Map]:
    """Colors of a scene, and where its defect is."""

    def scene(flaw: str | None = None) -> Scene:
        found = product.setting.scene(photographs, np.random.default_rng((*key, 0)), flaw=flaw)
        if product.gray:
            found.colors = found.colors.mean(axis=2, keepdims=True).repeat(3, axis=2)
        return found

    sound = scene()
    if not kind:
        return sound.colors, np.zeros((SCENE, SCENE), bool)
    if product.setting.pieces and kind in ("missing", "swapped"):
        flawed = scene(kind).colors
        return flawed, defects.changed(sound.colors, flawed)
    rng = np.random.default_rng((*key, 2))
    for _ in range(TRIES):
        flawed = np.clip(possible[kind](sound, rng), 0, 1)
        mask = defects.changed(sound.colors, flawed)
        if mask.sum() >= VISIBLE_PIXELS:
            break
    return flawed, mask
