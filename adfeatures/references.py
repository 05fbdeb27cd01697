"""The reference bank: patch features of a few normal images, and the residuals of other images against them (paper section 3.2)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from .checkpoints import atomic_path
from .errors import CheckpointError, InputError, ReferencesError

FORMAT = "adfeatures-references"
# One block of similarities, 1024 x 2048, stays in the processor's cache: larger ones are slower, and the whole matrix
# may not fit at all.
QUERIES_PER_CHUNK = 1024
ROWS_PER_CHUNK = 2048
# Leave-one-out over a large bank costs the square of its images, and this many already give a stable quantile.
LEAVE_ONE_OUT_IMAGES = 64


@dataclass(eq=False)
class ReferenceBank:
    """Patch features of normal images of one product, with what is needed to use them again months later.

    Attributes:
        rows: Per level the patches of all images, (N_l, C_l), image after image, row after row.
        images: Per level the image that each row comes from, (N_l,) int32.
        grids: Per level the height and width of the maps.
        num_images: Number of reference images.
        complete: Whether every patch of every image is still there (False after ``coreset``).
        files: File name of each image, "" where it did not come from a file.
        sha256s: Hash of each image file or of its pixels, "" for tensors.
        model: Name of the model that made the features.
        fingerprint: Hashes of that model's weights.
        img_size: Input height and width of that model.
        preset: Preset of the transform, None where the images came as tensors.
        bit_depth: Bits per channel that 16-bit images were read with.
        threshold: Image score above which an image counts as anomalous.
        quantile: Quantile of the scores of normal images that the threshold is.
        normal_scores: Scores of the normal images that the threshold was taken from: these ones, each left out, or
            others.
        scales: Typical distances of normal patches per level and ring, for models that score residuals directly.
    """

    rows: list[Tensor]
    images: list[Tensor]
    grids: list[tuple[int, int]]
    num_images: int
    complete: bool = True
    files: list[str] = field(default_factory=list)
    sha256s: list[str] = field(default_factory=list)
    model: str | None = None
    fingerprint: list[str] = field(default_factory=list)
    img_size: tuple[int, int] | None = None
    preset: str | None = None
    bit_depth: int = 16
    threshold: float | None = None
    quantile: float | None = None
    normal_scores: list[float] = field(default_factory=list)
    scales: Tensor | None = None

    @classmethod
    def from_features(cls, features: Sequence[Tensor]) -> ReferenceBank:
        """Make a bank of the feature maps of K normal images, one (K, C_l, h_l, w_l) per level.

        Raises:
            InputError: For no images, NaN, or levels with different numbers of images.
        """
        counts = {level.shape[0] for level in features}
        if len(counts) != 1 or not min(counts) or any(level.ndim != 4 for level in features):
            raise InputError(
                f"A bank needs maps (K, C, h, w) of the same K >= 1 images, got {[tuple(f.shape) for f in features]}."
            )
        if not all(torch.isfinite(level).all() for level in features):
            raise InputError("The reference features hold NaN or infinite values.")
        (count,) = counts
        return cls(
            # A copy in every case: the caller's tensors may change later.
            rows=[
                level.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).flatten(0, 2)
                for level in features
            ],
            images=[_image_of_each_patch(level, range(count)) for level in features],
            grids=[(level.shape[2], level.shape[3]) for level in features],
            num_images=count,
        )

    def match(self, features: Sequence[Tensor], exclude: int | Sequence[int] | None = None) -> list[Tensor]:
        """Find for every patch the bank row of highest cosine similarity, in bounded memory.

        Args:
            features: Maps of the queries, one (B, C_l, h_l, w_l) per level. The grids may differ from those of the
                references.
            exclude: Reference image that each of the B queries must not be matched with (one index for all, or one
                each).

        Returns:
            The matched rows, not normalized, as maps of the shapes of the features.

        Raises:
            InputError: For maps of other channels than the bank's.
            ReferencesError: Where nothing is left to match with.
        """
        found, expected = [level.shape[1] for level in features], [rows.shape[1] for rows in self.rows]
        if found != expected:
            raise InputError(f"The bank holds levels of {expected} channels, got features of {found}.")
        return [
            self._match_level(level, index, self._excluded(level.shape[0], exclude))
            for index, level in enumerate(features)
        ]

    def residuals(self, features: Sequence[Tensor], exclude: int | Sequence[int] | None = None) -> list[Tensor]:
        """Features minus their matched rows (equation 1 of the paper). Arguments, shapes and errors as in ``match``."""
        return [level - matched for level, matched in zip(features, self.match(features, exclude), strict=True)]

    def features(self) -> list[Tensor]:
        """The feature maps of the references, one (K, C_l, h_l, w_l) per level.

        Raises:
            ReferencesError: After ``coreset``, which keeps no whole images.
        """
        if not self.complete:
            raise ReferencesError(
                "This bank is a coreset and holds no whole images. Set the references again without a coreset."
            )
        return [
            rows.unflatten(0, (self.num_images, *grid)).permute(0, 3, 1, 2)
            for rows, grid in zip(self.rows, self.grids, strict=True)
        ]

    def leave_one_out(
        self, images: Sequence[int] | None = None, full: ReferenceBank | None = None
    ) -> Iterator[list[Tensor]]:
        """Residuals of reference images, each against the rows of the others, in batches.

        Args:
            images: Which references. The default is all, or LEAVE_ONE_OUT_IMAGES evenly spaced ones of more.
            full: Where the features of the references are; the default is this bank, which must be complete then.
        """
        features, count = (full or self).features(), self.num_images
        if images is None:
            images = torch.linspace(0, count - 1, min(count, LEAVE_ONE_OUT_IMAGES)).round().int().tolist()
        for start in range(0, len(images), 8):
            batch = list(images[start : start + 8])
            yield self.residuals([level[batch] for level in features], exclude=batch)

    def check(
        self, model: str, img_size: tuple[int, int], channels: Sequence[int], fingerprint: Sequence[str], source: str
    ) -> None:
        """Refuse to serve a model whose features are not those of the bank.

        Raises:
            ReferencesError: Saying what differs; ``source`` is what the message calls the bank.
        """
        advice = "Create that model, or make the bank again with: adfeatures fit"
        if self.model not in (None, model):
            raise ReferencesError(f"{source} was made with {self.model}, not with {model}. {advice}")
        if self.img_size not in (None, img_size):
            raise ReferencesError(
                f"{source} was made for images of {self.img_size} pixels (height, width), not {img_size}. {advice}"
            )
        if [rows.shape[1] for rows in self.rows] != list(channels):
            raise ReferencesError(f"{source} holds features of other levels than those of {model}. {advice}")
        if self.fingerprint and not set(self.fingerprint) & set(fingerprint):
            raise ReferencesError(f"{source} was made with other weights of {model}. {advice}")

    def extended(self, other: ReferenceBank) -> ReferenceBank:
        """A bank of the images of both. Threshold and scales are those of neither, so they are dropped.

        Raises:
            ReferencesError: If the banks do not belong together.
        """
        if not (self.complete and other.complete) or self.grids != other.grids or self.model != other.model:
            raise ReferencesError(
                "Only whole banks of one model and one image size can be joined; set all references at once instead."
            )
        return dataclasses.replace(
            self,
            rows=[torch.cat(pair) for pair in zip(self.rows, other.rows, strict=True)],
            images=[torch.cat([a, b + self.num_images]) for a, b in zip(self.images, other.images, strict=True)],
            num_images=self.num_images + other.num_images,
            files=self.files + other.files,
            sha256s=self.sha256s + other.sha256s,
            threshold=None,
            quantile=None,
            normal_scores=[],
            scales=None,
        )

    def coreset(self, fraction: float, seed: int = 0) -> ReferenceBank:
        """A smaller bank without threshold or scales: the rows that a greedy k-center search picks.

        Per level, in cosine distance, as Sener and Savarese (2018) do it in Euclidean distance.

        Args:
            fraction: Part of the rows to keep, in (0, 1].
            seed: Seed of the first row.

        Raises:
            InputError: For a fraction outside (0, 1].
        """
        if not 0 < fraction <= 1:
            raise InputError(f"The coreset fraction must lie in (0, 1], got {fraction}.")
        generator = torch.Generator().manual_seed(seed)
        kept = [_k_center(rows, max(1, round(fraction * len(rows))), generator) for rows in self.rows]
        return dataclasses.replace(
            self,
            rows=[rows[k] for rows, k in zip(self.rows, kept, strict=True)],
            images=[images[k] for images, k in zip(self.images, kept, strict=True)],
            complete=self.complete and fraction == 1,
            threshold=None,
            quantile=None,
            normal_scores=[],
            scales=None,
        )

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a device or dtype move to every tensor, as ``nn.Module._apply`` does."""
        self.rows, self.images = [fn(rows) for rows in self.rows], [fn(images) for images in self.images]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank to a safetensors file, atomically."""
        save_banks(path, {"default": self})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ReferenceBank:
        """Read a bank that ``save`` wrote.

        Raises:
            CheckpointError: For a file that is damaged, no bank, or holds the banks of several products.
        """
        banks = load_banks(path)
        if len(banks) != 1:
            raise CheckpointError(
                f"{path} holds the banks of several products: {', '.join(banks)}. Load it with load_references."
            )
        return next(iter(banks.values()))

    def _excluded(self, batch: int, exclude: int | Sequence[int] | None) -> Sequence[int] | None:
        if exclude is None:
            return None
        excluded = [exclude] * batch if isinstance(exclude, int) else [int(index) for index in exclude]
        if len(excluded) != batch or any(not 0 <= index < self.num_images for index in excluded):
            raise InputError(
                f"exclude must name one of {self.num_images} references for each of {batch} images, got {exclude}."
            )
        if self.num_images == 1:
            raise ReferencesError("With a single reference image nothing is left to match it with. Add a second one.")
        return excluded

    def _match_level(self, level: Tensor, index: int, excluded: Sequence[int] | None) -> Tensor:
        rows, images, queries = self.rows[index], self.images[index], _tokens(level)
        if excluded is not None and any((images == image).all() for image in set(excluded)):
            raise ReferencesError("The coreset keeps rows of a single image only, so that image cannot be left out.")
        chunks = queries.split(QUERIES_PER_CHUNK)
        barred = (
            [None] * len(chunks) if excluded is None else _image_of_each_patch(level, excluded).split(QUERIES_PER_CHUNK)
        )
        nearest = torch.cat([_nearest(chunk, rows, images, own) for chunk, own in zip(chunks, barred, strict=True)])
        return rows[nearest].to(level.dtype).unflatten(0, (level.shape[0], *level.shape[2:])).permute(0, 3, 1, 2)


def weights_fingerprint(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Hashes of weights as rounded to each half precision, so that a model and its ``.half()`` or ``.bfloat16()`` share one."""
    hashes = []
    for dtype in (torch.float16, torch.bfloat16):
        digest = hashlib.sha256()
        for key, value in state_dict.items():
            rounded = value.to("cpu", dtype if value.is_floating_point() else value.dtype)
            digest.update(key.encode() + rounded.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        hashes.append(digest.hexdigest())
    return hashes


def _nearest(queries: Tensor, rows: Tensor, images: Tensor, barred: Tensor | None) -> Tensor:
    """Index of the row of highest cosine similarity to each query, (Q,); rows of the query's barred image do not count."""
    queries = queries.float()
    best = torch.full((len(queries),), -torch.inf, device=queries.device)
    nearest = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    for start in range(0, len(rows), ROWS_PER_CHUNK):
        chunk = rows[start : start + ROWS_PER_CHUNK].float()
        # The length of the query does not change which row is nearest, so only the rows are normalized.
        with torch.autocast(queries.device.type, enabled=False):
            similarity = queries @ F.normalize(chunk, dim=1).T
        if barred is not None:
            similarity.masked_fill_(images[start : start + ROWS_PER_CHUNK] == barred[:, None], -torch.inf)
        value, index = similarity.max(dim=1)
        better = value > best
        best = torch.where(better, value, best)
        nearest = torch.where(better, index + start, nearest)
    return nearest


def _k_center(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices (count,) of rows, each the farthest from those before it, in ascending order."""
    units = F.normalize(rows.float(), dim=1)
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    similarity = units @ units[chosen[0]]
    for _ in tqdm(range(count - 1), desc="coreset", leave=False, disable=None):
        # A row already chosen has similarity 1, up to rounding; it must not be chosen twice.
        similarity[chosen[-1]] = torch.inf
        chosen.append(int(similarity.argmin()))
        similarity = torch.maximum(similarity, units @ units[chosen[-1]])
    return torch.tensor(sorted(chosen), device=rows.device)


def _tokens(level: Tensor) -> Tensor:
    """Maps (B, C, h, w) as patches (B * h * w, C)."""
    return level.permute(0, 2, 3, 1).flatten(0, 2)


def _image_of_each_patch(level: Tensor, image_of_each_map: Sequence[int]) -> Tensor:
    patches = level.shape[2] * level.shape[3]
    return torch.tensor(image_of_each_map, dtype=torch.int32, device=level.device).repeat_interleave(patches)


def save_banks(path: str | os.PathLike[str], banks: Mapping[str, ReferenceBank]) -> None:
    """Write the banks of several products to one safetensors file, atomically: the facts as JSON in its header, the rest as tensors."""
    tensors: dict[str, Tensor] = {}
    facts = []
    for number, (product, bank) in enumerate(banks.items()):
        for level, (rows, images) in enumerate(zip(bank.rows, bank.images, strict=True)):
            tensors[f"{number}.rows.{level}"], tensors[f"{number}.images.{level}"] = (
                rows.contiguous(),
                images.contiguous(),
            )
        if bank.scales is not None:
            tensors[f"{number}.scales"] = bank.scales.contiguous()
        facts.append({"product": product, **{name: getattr(bank, name) for name in _FACTS}})
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, "version": "1", "banks": json.dumps(facts)})


def load_banks(path: str | os.PathLike[str]) -> dict[str, ReferenceBank]:
    """Read the banks that ``save_banks`` wrote, by product.

    Raises:
        CheckpointError: For a file that is missing, damaged or no bank.
    """
    if not Path(path).is_file():
        raise CheckpointError(
            f"There is no reference bank {path}. Make one with: adfeatures fit --references DIR --bank {path}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} is not a reference bank. Make one with: adfeatures fit --references DIR --bank FILE"
                )
            if metadata.get("version") != "1":
                raise CheckpointError(
                    f"{path} was written by a newer version of adfeatures. Update the package: pip install -U adfeatures"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        facts = json.loads(metadata["banks"])
        banks = {entry.pop("product"): _bank(number, entry, tensors) for number, entry in enumerate(facts)}
    except (SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The reference bank {path} is damaged ({error}). Make it again with: adfeatures fit"
        ) from error
    if not all(torch.isfinite(rows).all() for bank in banks.values() for rows in bank.rows):
        raise CheckpointError(
            f"The reference bank {path} holds NaN or infinite values. Make it again with: adfeatures fit"
        )
    return banks


_FACTS = [f.name for f in dataclasses.fields(ReferenceBank) if f.name not in ("rows", "images", "scales")]


def _bank(number: int, facts: dict[str, object], tensors: Mapping[str, Tensor]) -> ReferenceBank:
    grids = [(int(h), int(w)) for h, w in facts.pop("grids")]  # type: ignore[attr-defined]
    size = facts.pop("img_size")
    return ReferenceBank(
        rows=[tensors[f"{number}.rows.{level}"] for level in range(len(grids))],
        images=[tensors[f"{number}.images.{level}"] for level in range(len(grids))],
        scales=tensors.get(f"{number}.scales"),
        grids=grids,
        img_size=None if size is None else (int(size[0]), int(size[1])),  # type: ignore[index]
        **facts,  # type: ignore[arg-type]
    )
