"""What is run: which backbones, trainings, data sets and methods, each with the weights and references of the paper."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from adfeatures import catalog
from adfeatures.errors import InputError, UnknownNameError

from ..console import check_choices, option
from ..data import DATASETS
from ..distributed import cores
from ..evaluation.config import LISTS, ORIGINAL, SOUND, EvaluationConfig
from ..evaluation.model import serving_tag
from ..evaluation.results import OF_LISTED
from ..methods import METHODS
from ..pretraining.config import PretrainConfig

BACKBONES = {
    "dinov2_base": "DINOv2-base",
    "dinov2_large": "DINOv2-large",
    "clip_base": "CLIP-base",
    "clip_large": "CLIP-large",
    "imagebind_huge": "ImageBind",
}
# Names of the folders of the paper's data sets: ours and those that their archives, or the authors, give them.
FOLDERS = {
    "mvtec": ("mvtec", "mvtec_anomaly_detection"),
    "visa": ("visa", "VisA"),
    "btad": ("btad", "BTAD", "BTech_Dataset_transformed"),
    "mvtec3d": ("mvtec3d", "mvtec_3d_anomaly_detection"),
    "mpdd": ("mpdd", "MPDD"),
}
REAL_IAD = "Real-IAD"
# Where projectors come from: the published weights, or a pretraining with these options.
PUBLISHED, BOTH = "published", "both"
TRAININGS: Mapping[str, Mapping[str, Any]] = {
    BOTH: {},
    "angle": {"losses": "angle"},
    "norm": {"losses": "norm"},
    "no_residual": {"no_residual": True},
}
# The methods of the paper's ablations.
ABLATED = ("padim", "patchcore", "feature_norm")
TRAINED = "trained"


@dataclass(frozen=True)
class ReproduceConfig:
    """The options of ``python -m training.reproduce``."""

    data: str = option(
        "data",
        "folder of the data sets, mvtec, visa, btad, mvtec3d, mpdd and Real-IAD, under these or the authors' names; "
        "with 8shot, aligned/references, dtd/images and fg_mask where they are there",
    )
    output: str = option("runs/reproduce", "output folder; the same command resumes")
    only: tuple[str, ...] = option(
        (),
        f"take only these of the backbones ({', '.join(BACKBONES)}), methods ({', '.join(METHODS)}, module:Class), "
        f"data sets ({', '.join(FOLDERS)}) and projectors ({', '.join((PUBLISHED, *TRAININGS))}: the first is the "
        "default, the others are pretrained here)",
    )
    weights: str | None = option(
        None,
        "folder to use instead of the Hub: imagebind_huge.pth and so on, dino-base/checkpoints_pro_angle.pth and so on",
    )
    protocol: str = option(ORIGINAL, f"of the evaluation; methods from outside need {SOUND}", (ORIGINAL, SOUND))
    tables: bool = option(False, "only write the tables of existing results; no model is loaded")
    smoke: bool = option(False, "everything in miniature, on rendered images and tiny random backbones")
    workers: int = option(cores(), "processes that read images; the default is one per core")
    device: str | None = option(None, "cpu or cuda; the default is cuda if available")

    def __post_init__(self) -> None:
        check_choices(self)
        known = (*BACKBONES, *METHODS, *FOLDERS, PUBLISHED, *TRAININGS)
        for name in self.only:
            if name not in known and ":" not in name:
                raise UnknownNameError(catalog.unknown("backbone, method, data set or projector", name, known))


@dataclass(frozen=True)
class Plan:
    """What a config asks for, as far as it is on disk.

    Attributes:
        backbones: Names of backbones, each with where its projectors come from: names of TRAININGS, or PUBLISHED.
        for_training, for_evaluation: Options in the place of the paper's.
    """

    config: ReproduceConfig
    backbones: Mapping[str, Sequence[str]]
    for_training: Mapping[str, Any] = field(default_factory=dict)
    for_evaluation: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: ReproduceConfig) -> Plan:
        """The paper's."""
        named = tuple(name for name in (PUBLISHED, *TRAININGS) if name in config.only)
        return cls(config, dict.fromkeys(_chosen(BACKBONES, config.only), named or (PUBLISHED,)))

    @property
    def data_sets(self) -> dict[str, Path]:
        """The data sets that are there, each with its folder.

        Raises:
            InputError: If there are none, or not those that are named.
        """
        data, only = Path(self.config.data), self.config.only
        places = {
            name: next((data / own for own in FOLDERS[name] if DATASETS[name].find_products(data / own)), None)
            for name in _chosen(FOLDERS, only)
        }
        missing = [f"{DATASETS[name].title} ({data / FOLDERS[name][0]})" for name, place in places.items() if not place]
        found = {name: place for name, place in places.items() if place}
        if not found or (missing and set(only) & set(FOLDERS)):
            raise InputError(f"{data} lacks {', '.join(missing)}. Extract it there, or give another --data.")
        return found

    def training(self, backbone: str, training: str) -> PretrainConfig:
        """How a projector is trained."""
        given = {
            "root": str(Path(self.config.data, REAL_IAD)),
            "output": str(self._run(backbone, training)),
            "backbone": backbone,
            "backbone_weights": self._backbone_weights(backbone),
            "workers": self.config.workers,
            "device": self.config.device,
        }
        return PretrainConfig(**{**given, **TRAININGS[training], **self.for_training})

    def evaluations(self, backbone: str, data_set: str, root: Path) -> Iterator[EvaluationConfig]:
        """On a data set: one for all methods that take the same projector and references."""
        config, data = self.config, Path(self.config.data)
        lists, shots = data / "aligned/references", data / "8shot" if (data / "8shot" / data_set).is_dir() else None
        groups = self._groups((lists / data_set).is_dir())
        for training, (group, methods) in product(self.backbones[backbone], groups.items()):
            if training not in (PUBLISHED, BOTH):
                methods = [name for name in methods if name in ABLATED or ":" in name]
            if not methods:
                continue
            given = {
                **self._projector(backbone, training, group.removesuffix(OF_LISTED)),
                "backbone_weights": self._backbone_weights(backbone),
                "method": tuple(methods),
                "dataset": data_set,
                "root": str(root),
                "output": str(Path(config.output, training, backbone, data_set, group)),
                "references": f"{LISTS}{lists}" if group.endswith(OF_LISTED) else shots and str(shots),
                "protocol": config.protocol,
                # As the paper reports methods that train.
                "oracle": True,
                "textures": _there(data / "dtd/images"),
                "foregrounds": _there(data / "fg_mask"),
                "cache": str(self.cache),
                "workers": config.workers,
                "device": config.device,
            }
            yield EvaluationConfig(**{**given, **self.for_evaluation})

    def _groups(self, has_lists: bool) -> dict[str, list[str]]:
        """The methods by the projector that they take; FeatureNorm by itself where there are lists for it."""
        outside = [name for name in self.config.only if ":" in name]
        groups: dict[str, list[str]] = defaultdict(list)
        for name in [name for name in METHODS if name in self.config.only] + outside or METHODS:
            # The models of the paper have the same tags.
            kind = serving_tag("adpretrain_dinov2_base", name).rpartition("_")[2]
            groups[kind + OF_LISTED * (has_lists and name == "feature_norm")].append(name)
        return groups

    @property
    def cache(self) -> Path:
        """Where features are kept while a data set is evaluated."""
        return Path(self.config.output, "cache")

    def _run(self, backbone: str, training: str) -> Path:
        return Path(self.config.output, TRAINED, backbone, training)

    def _projector(self, backbone: str, training: str, kind: str) -> dict[str, str | None]:
        if training != PUBLISHED:
            return {"model": str(self._run(backbone, training) / f"checkpoints_pro_{kind}.safetensors")}
        model, tag = f"adpretrain_{backbone}", f"realiad_{kind}"
        file = catalog.MODELS[model].tags[tag].hub_file
        return {"model": f"{model}.{tag}", "weights": self._local(file[1]) if file else None}

    def _backbone_weights(self, backbone: str) -> str | None:
        names = [f"{backbone}.safetensors"]
        names += [catalog.BACKBONES[backbone].original_file] if backbone in catalog.BACKBONES else []
        return next(filter(None, map(self._local, names)), None)

    def _local(self, name: str) -> str | None:
        return None if self.config.weights is None else _there(Path(self.config.weights, name))


def _chosen(kind: Iterable[str], only: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a kind that are named, or all."""
    return tuple(name for name in kind if name in only) or tuple(kind)


def _there(path: Path) -> str | None:
    return str(path) if path.exists() else None
