"""Every hyper-parameter of the pretraining and of its centers, once.

The defaults are the recipe of the published weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adfeatures.errors import InputError
from adfeatures.images import PRESETS

from ..console import check_choices, option
from ..data import DATASETS
from ..distributed import cores

SOUND, PUBLISHED = "sound", "published"
# What the published weights were made with, where another form can be asked for.
_PUBLISHED_FORMS = {
    "preset": "resize224_crop224",
    "precision": "bfloat16",
    "anchors": "both",
    "pseudo_huber": "code",
    "view_statistics": "original",
    "pool": None,
    "losses": "both",
    "no_residual": False,
}
# What is cut from the middle of images by every preset but the first, which takes them whole.
_CROPPED_SIDE = 224
# What may differ between a run and its resumption, because it changes no number.
FREE = (
    "output", "root", "validation_root", "backbone_weights", "centers", "filter_list",
    "workers", "cache", "save_every", "device", "max_steps"
)  # fmt: skip


@dataclass(frozen=True)
class InputsConfig:
    """The images and the frozen backbone, which the pretraining and its centers take alike."""

    output: str = option("runs/pretrain", "folder of the run; an existing run is resumed")
    recipe: str = option(
        SOUND,
        "published: as the published weights were trained, on the central 224 x 224 pixels of images",
        (SOUND, PUBLISHED),
    )
    # Data
    data: str = option("real_iad", "kind of data set in root", ("real_iad", "folder", "manifest"))
    root: str = option("data/Real-IAD", "folder of the data set (for a manifest: the CSV file)")
    products: tuple[str, ...] = option((), "products to train on; the default is all")
    filter_list: str | None = option(None, "Real-IAD: folder or file of lists of the anomalous images to keep")
    bit_depth: int = option(16, "bits in use in 16-bit images, 9 to 16: 12 for values of 0 to 4095")
    held_out: float = option(0.1, "fraction of the samples held out for validation")
    # Model
    backbone: str = option("dinov2_base", "name of a backbone of adfeatures, or of a timm ViT or CNN")
    backbone_weights: str | None = option(None, "its weights; the default is the published ones")
    img_size: tuple[int, ...] = option((), "input height and width in pixels; the default is the backbone's")
    preset: str = option(
        None,
        "geometry of images and masks: squashed whole, or resized by their shorter side and cropped to 224 x 224; "
        "the default is squash, or what the recipe has",
        PRESETS,
    )
    levels: tuple[int, ...] = option((), "blocks or stages, counted from 1; the default is the backbone's")
    # Running
    seed: int = option(42, "seed of weights, order, augmentation and references")
    workers: int = option(cores(), "processes that read images; the default is one per core")
    cache: str | None = option(
        None,
        "folder that keeps all images at the size of the input, for this and other runs (224 x 224: 157 kB an image); "
        "the default reads and resizes their files whenever they are drawn",
    )
    device: str | None = option(None, "cpu or cuda; the default is cuda if available")

    def __post_init__(self) -> None:
        self._default_of_recipe("preset", PRESETS[0])
        check_choices(self)
        for name, form in _PUBLISHED_FORMS.items() if self.recipe == PUBLISHED else ():
            if (value := getattr(self, name, form)) != form:
                raise InputError(
                    f"The recipe published has {form or 'no'} {name}, not {value}: "
                    f"leave out --{name.replace('_', '-')}, or --recipe."
                )
        self._check_numbers("workers", "seed")
        if not 0 <= self.held_out < 1:
            raise InputError(f"held_out must lie in [0, 1), got {self.held_out}.")
        if not 9 <= self.bit_depth <= 16:
            raise InputError(f"bit_depth must be 9 to 16, got {self.bit_depth}.")
        if len(self.img_size) > 2:
            raise InputError(f"img_size is one side or height and width, got {self.img_size}.")
        if self.preset != PRESETS[0] and self.img_size and set(self.img_size) != {_CROPPED_SIDE}:
            raise InputError(
                f"The preset {self.preset} cuts out {_CROPPED_SIDE} x {_CROPPED_SIDE} pixels, not {self.img_size}: "
                f"leave out --img-size, or --{'recipe' if self.recipe == PUBLISHED else 'preset'}."
            )

    @property
    def size(self) -> tuple[int, int] | None:
        """Input height and width in pixels, None for the backbone's."""
        if self.preset != PRESETS[0]:
            return _CROPPED_SIDE, _CROPPED_SIDE
        return (self.img_size[0], self.img_size[-1]) if self.img_size else None

    def _default_of_recipe(self, name: str, sound: str) -> None:
        """Fill in what was not asked for."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, _PUBLISHED_FORMS[name] if self.recipe == PUBLISHED else sound)

    def _check_numbers(self, *names: str, positive: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not (value > 0 if positive else value >= 0):
                raise InputError(f"{name} must {'be above' if positive else 'not be below'} 0, got {value}.")


@dataclass(frozen=True)
class CentersConfig(InputsConfig):
    """How centers are computed: by default on the images that ``training.pretrain`` trains on."""

    output: str = option("centers.safetensors", "file to write")
    held_out: float = option(0.1, "fraction of the samples left out, as in pretraining with the same seed")
    images: int | None = option(None, "number of normal images, drawn at random; the default is all")
    shots: int = option(4, "references per image")
    batch_size: int = option(16, "images encoded at once")
    seed: int = option(42, "seed of the images left out and the references")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers("images", "shots", "batch_size", positive=True)
        if Path(self.output).suffix != ".safetensors":
            raise InputError(f"Centers are written as .safetensors, not {self.output}.")


@dataclass(frozen=True)
class PretrainConfig(InputsConfig):
    """How a projector is pretrained.

    Method: section 4.1 and appendix of the paper, and the published code where it differs.
    """

    # Projector
    num_heads: int = option(16, "attention heads per level")
    num_keys: int = option(2048, "learnable references per level")
    # Recipe
    batch_size: int = option(32, "images per step, over all devices")
    accumulate: int = option(1, "micro-batches per device and step; the contrast is within a micro-batch")
    shots: tuple[int, ...] = option((1, 4, 8), "numbers of references; each step draws one of them")
    epochs: int = option(10, "epochs")
    milestones: tuple[int, ...] = option((7, 9), "epochs after which the learning rate is divided by ten")
    lr: float = option(1e-4, "learning rate of Adam")
    weight_decay: float = option(5e-4, "L2 penalty in the gradient")
    losses: str = option("both", "ablation of the paper: a single loss", ("both", "angle", "norm"))
    no_residual: bool = option(False, "ablation of the paper: project features instead of residuals")
    temperature: float = option(0.15, "temperature of the angle loss")
    anchors: str = option("both", "views that are anchors of the angle loss (the paper: first)", ("both", "first"))
    radius: float = option(0.4, "largest radius of the norm loss")
    margin: float = option(0.75, "margin of the norm loss")
    pseudo_huber: str = option("code", "form of the norm", ("code", "paper"))
    centers: str | None = option(None, "file made by training.centers; the default computes it at the start")
    view_statistics: str = option(
        "original", "of the augmented views: original is CLIP's for DINOv2 as well", ("original", "backbone")
    )
    precision: str = option(
        None,
        "autocast: float32 weights, bfloat16 products; bfloat16: everything, as in the published training; "
        "the default is autocast, or what the recipe has",
        ("autocast", "float32", "bfloat16"),
    )
    max_steps: int | None = option(None, "number of steps to stop after")
    # References
    pool: int | None = option(
        None,
        "encode this many references per product and view once and draw from them; the default encodes in each step",
    )
    # Validation
    validation: str = option(
        "held_out", "what selects the checkpoints: held-out samples, or a data set", ("held_out", *DATASETS, "none")
    )
    validation_root: str | None = option(None, "folder of that data set")
    validation_references: str | None = option(
        None, "folder of given references, as of training.evaluate; the default takes normal training images"
    )
    validation_shots: int = option(8, "references of a product and view in the validation")
    eval_every: int = option(1, "epochs between validations; the last epoch is always validated")
    validation_images: int = option(200, "most images of a product for each of: memory bank, normal, anomalous")
    save_every: int = option(500, "steps between two checkpoints to resume from")

    def __post_init__(self) -> None:
        self._default_of_recipe("precision", "autocast")
        super().__post_init__()
        self._check_numbers("num_heads", "num_keys", "batch_size", "accumulate", "epochs", "max_steps", positive=True)
        self._check_numbers("temperature", "save_every", "validation_images", positive=True)
        self._check_numbers("lr", "weight_decay", "radius", "margin")
        if not self.shots or min(self.shots) < 1 or (self.pool is not None and self.pool < 1):
            raise InputError(f"shots and pool count reference images, at least 1; got {self.shots} and {self.pool}.")
        self._check_numbers("validation_shots", "eval_every", positive=True)
        if self.no_residual and (self.centers or self.pool):
            raise InputError("Without residuals there are no references and no centers: leave out centers and pool.")
        if self.validation in DATASETS and self.validation_root is None:
            title = DATASETS[self.validation].title
            raise InputError(f"validation={self.validation} needs validation_root, the folder of {title}.")

    @property
    def learning_rates(self) -> list[float]:
        """The learning rate of each epoch, a tenth of the previous one from each milestone on."""
        return [self.lr * 0.1 ** sum(epoch >= at for at in self.milestones) for epoch in range(self.epochs)]

    def to_text(self) -> str:
        """JSON, as the state of a run and the header of its checkpoints hold it."""
        return json.dumps(dataclasses.asdict(self))

    def changed_since(self, earlier: Mapping[str, Any]) -> list[str]:
        """What changes numbers and was otherwise in the config of an earlier run, for people."""
        # What an earlier version did not ask for was as it is now by default.
        other = {**vars(PretrainConfig(recipe=earlier.get("recipe", SOUND))), **earlier}
        return [
            f"{name} was {repr(other.get(name))[:99]}, is {value!r}"
            for name, value in json.loads(self.to_text()).items()
            if name not in FREE and other.get(name) != value
        ]
