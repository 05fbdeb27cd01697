"""The reference bank: patch features of a few normal images, and residuals against them (paper section 3.2)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from .errors import CheckpointError, InputError, ReferencesError
from .matching import as_maps, farthest_rows, image_of_each_patch, nearest_of_groups, nearest_rows, tokens_of
from .records import BankRecord

# Leave-one-out over a large bank costs the square of its images, and this many already give a stable quantile.
LEAVE_ONE_OUT_IMAGES = 64

# The reference image that a query must not be matched with: one for all, or one or None for each query.
Exclude: TypeAlias = "int | Sequence[int | None] | None"
# From a bank, maps of queries and what they must not be matched with, to what is scored of them.
Compare: TypeAlias = "Callable[[ReferenceBank, Sequence[Tensor], Exclude], list[Tensor]]"


@dataclass(eq=False)
class ReferenceBank:
    """Patch features of normal images of one product, with the record of how they were made.

    Attributes:
        rows: Per level the patches of all images, (N_l, C_l), image after image, row after row.
        image_of_row: Per level the index of the image that each row comes from, (N_l,) int32.
        grids: Per level the height and width of the maps.
        num_images: Number of reference images.
        scales: What the model's scorer took from the images, None where it takes nothing.
        kept: Per level the indices of the rows that images are matched with, (M_l,) int32; None for all.
        units: Per level the lengths (M_l,) that residuals against these rows are multiples of; None for 1.
        own: Per level the logarithms (M_l, 3) of how far these rows are from those of other images; None if not needed.
        groups: These rows are as many of each of this many groups of images, one group after another.
        looks: How many of the last channels say how a patch looks, and are not compared to find the nearest row.
        turned: Whether rows of rotated copies of the images follow those of the images, which are whole.
        record: How the bank was made. Its files, sha256s, model, threshold and quantile are attributes of the bank too.
    """

    rows: list[Tensor]
    image_of_row: list[Tensor]
    grids: list[tuple[int, int]]
    num_images: int
    scales: Tensor | None = None
    record: BankRecord = field(default_factory=BankRecord)
    kept: list[Tensor] | None = None
    units: list[Tensor] | None = None
    own: list[Tensor] | None = None
    groups: int = 1
    looks: int = 0
    turned: bool = False

    @classmethod
    def from_features(
        cls, features: Sequence[Tensor], images: Sequence[int] | None = None, looks: int = 0
    ) -> ReferenceBank:
        """Make a bank of the feature maps of K normal images, one (K, C_l, h_l, w_l) per level.

        Args:
            features: The maps.
            images: The image of each map, in ascending order, where these are of several views of an image.
            looks: How many of the last channels are not compared.

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
        images = range(count) if images is None else images
        return cls(
            # A copy in every case: the caller's tensors may change later.
            rows=[
                level.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).flatten(0, 2)
                for level in features
            ],
            image_of_row=[image_of_each_patch(level, images) for level in features],
            grids=[(level.shape[2], level.shape[3]) for level in features],
            num_images=images[-1] + 1,
            looks=looks,
        )

    @property
    def files(self) -> list[str]:
        """File name of each image, "" where it did not come from a file."""
        return self.record.files

    @property
    def sha256s(self) -> list[str]:
        """Hash of each image file or of its pixels, "" for tensors."""
        return self.record.sha256s

    @property
    def model(self) -> str | None:
        """Name of the model that made the features."""
        return self.record.model

    @property
    def quantile(self) -> float | None:
        """Quantile of the scores of normal images that the threshold is."""
        return self.record.quantile

    @property
    def threshold(self) -> float | None:
        """Image score above which an image counts as anomalous, None where none was set."""
        return self.record.threshold

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        if value is not None and not 0 <= value < math.inf:
            raise InputError(f"The threshold is {value}; it must be a score, 0 or more.")
        self.record.threshold = None if value is None else float(value)

    @property
    def complete(self) -> bool:
        """Whether every patch of every image is still there, as after ``coreset`` or of cut images it is not."""
        counts = [len(rows) for rows in self.rows]
        return self.turned or (self.record.geometry.is_plain and counts == self.patches_of_images)

    @property
    def patches_of_images(self) -> list[int]:
        """Per level how many patches whole images have together."""
        return [self.num_images * height * width for height, width in self.grids]

    @property
    def views_per_image(self) -> float:
        """How many tiles the images were cut into on average, by the rows that are there; 1 of whole images."""
        if self.record.geometry.tile is None:
            return 1
        return len(self.rows[0]) / (self.num_images * math.prod(self.grids[0]))

    @property
    def left_out(self) -> list[int]:
        """The images that are left out in turn: all, or LEAVE_ONE_OUT_IMAGES evenly spaced ones of more."""
        count = min(self.num_images, LEAVE_ONE_OUT_IMAGES)
        return torch.linspace(0, self.num_images - 1, count).round().int().tolist()

    def match(self, features: Sequence[Tensor], exclude: Exclude = None) -> list[Tensor]:
        """Find for every patch the bank row of highest cosine similarity, in bounded memory.

        Args:
            features: Maps of the queries, one (B, C_l, h_l, w_l) per level. The grids may differ from those of the
                references.
            exclude: Index of the reference that each of the B queries must not be matched with: one for all, or one or
                None for each.

        Returns:
            The matched rows, not normalized, as maps of the shapes of the features, without looks.

        Raises:
            InputError: For maps of other channels than the bank's.
            ReferencesError: Where nothing is left to match with.
        """
        places = self._places(features, exclude)
        return [
            as_maps(self._compared(index)[place].to(level.dtype), level)
            for index, (level, place) in enumerate(zip(features, places, strict=True))
        ]

    def residuals(self, features: Sequence[Tensor], exclude: Exclude = None) -> list[Tensor]:
        """Features minus their matched rows (equation 1 of the paper), in units of these rows where the bank has any.

        Arguments, shapes and errors as in ``match``.
        """
        residuals = []
        for index, (level, place) in enumerate(zip(features, self._places(features, exclude), strict=True)):
            rows = self._compared(index)
            residual = level[:, : rows.shape[1]] - as_maps(rows[place].to(level.dtype), level)
            if self.units is not None:
                residual = residual / as_maps(self.units[index][place, None].to(level.dtype), level)
            residuals.append(residual)
        return residuals

    def own_distances(self) -> list[Tensor]:
        """Cosine distances (M_l, G) of the rows that images are matched with to the nearest of other images by group.

        Infinite to a group without other images. The features must be of unit length, and the bank reduced.
        """
        return [
            nearest_of_groups(rows.flatten(0, 1), rows, owners, owners.flatten())[0]
            for rows, owners, _ in map(self.grouped, range(len(self.rows)))
        ]

    def grouped(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """What images are matched with: rows (G, M / G, C) of a level, the image of each, and looks (M, looks)."""
        rows, owners = self._matchable(index)
        compared = rows.shape[1] - self.looks
        size = (self.groups, -1)
        return rows[:, :compared].unflatten(0, size), owners.unflatten(0, size), rows[:, compared:]

    def features(self) -> list[Tensor]:
        """The feature maps of the references, one (K, C_l, h_l, w_l) per level.

        Raises:
            ReferencesError: After ``coreset``, which keeps no whole images.
        """
        if not self.complete:
            raise ReferencesError(
                "This bank is a coreset, or of cut images, and holds no whole ones. Set the references again without a "
                "coreset, as whole photos."
            )
        return self._maps()

    def _maps(self) -> list[Tensor]:
        own = self._upright(self.rows)
        return [rows.unflatten(0, (-1, *grid)).permute(0, 3, 1, 2) for rows, grid in zip(own, self.grids, strict=True)]

    def _upright(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Per level what is of the images themselves, of what is of all rows."""
        counts = self.patches_of_images if self.turned else map(len, tensors)
        return [own[:count] for own, count in zip(tensors, counts, strict=True)]

    def views_of(self, images: Sequence[int]) -> list[tuple[int, int]]:
        """The number of each map that this bank was made of, and its image, for these images."""
        owners = self._upright(self.image_of_row)[0][:: math.prod(self.grids[0])].tolist()
        return [(number, image) for image in images for number, owner in enumerate(owners) if owner == image]

    def leave_one_out(
        self,
        images: Sequence[int] | None = None,
        full: ReferenceBank | None = None,
        compare: Compare | None = None,
    ) -> Iterator[list[Tensor]]:
        """Residuals of reference images, each against the rows of the others, in batches.

        Args:
            images: Which references. The default is all, or LEAVE_ONE_OUT_IMAGES evenly spaced ones of more.
            full: Where the features of the references are, as ``from_features`` has made it. The default is this bank,
                which must be complete then.
            compare: What is taken instead of residuals.
        """
        compare = compare or ReferenceBank.residuals
        features = self.features() if full is None else full._maps()
        views = (full or self).views_of(self.left_out if images is None else images)
        for start in range(0, len(views), 8):
            numbers, owners = map(list, zip(*views[start : start + 8], strict=True))
            yield compare(self, [level[numbers] for level in features], owners)

    def of_rows(self, kept: Sequence[Tensor]) -> ReferenceBank:
        """A bank of some of the rows per level, without threshold, scales and units."""
        return ReferenceBank(
            rows=[rows[k] for rows, k in zip(self.rows, kept, strict=True)],
            image_of_row=[owners[k] for owners, k in zip(self.image_of_row, kept, strict=True)],
            grids=self.grids,
            num_images=self.num_images,
            record=self.record.undecided(),
            looks=self.looks,
        )

    def extended(self, other: ReferenceBank) -> ReferenceBank:
        """A bank of the images of both. Threshold and scales are those of neither, so they are dropped.

        Raises:
            ReferencesError: If the banks do not belong together.
        """
        whole = self.complete and other.complete and not (self.turned or other.turned)
        if not whole or self.grids != other.grids or self.model != other.model:
            raise ReferencesError(
                "Only whole banks of one model and one image size, without rotated references, can be joined; set all "
                "references at once instead."
            )
        owners = zip(self.image_of_row, other.image_of_row, strict=True)
        record = self.record.undecided()
        record.files, record.sha256s = self.files + other.files, self.sha256s + other.sha256s
        # Banks of earlier versions have none.
        record.pixels = (self.record.pixels or [""] * self.num_images) + other.record.pixels
        return ReferenceBank(
            rows=[torch.cat(pair) for pair in zip(self.rows, other.rows, strict=True)],
            image_of_row=[torch.cat([own, theirs + self.num_images]) for own, theirs in owners],
            grids=self.grids,
            num_images=self.num_images + other.num_images,
            record=record,
            looks=self.looks,
        )

    def with_turned(self, turned: Sequence[ReferenceBank]) -> ReferenceBank:
        """A bank with the rows of rotated copies of its images too, each counted to its image, without threshold."""
        banks = [self, *turned]
        return ReferenceBank(
            rows=[torch.cat(level) for level in zip(*(bank.rows for bank in banks), strict=True)],
            image_of_row=[torch.cat(level) for level in zip(*(bank.image_of_row for bank in banks), strict=True)],
            grids=self.grids,
            num_images=self.num_images,
            record=self.record.undecided(),
            looks=self.looks,
            turned=self.complete,
        )

    def coreset(self, fraction: float, seed: int = 0) -> ReferenceBank:
        """A smaller bank without threshold or scales: the rows that a greedy k-center search picks.

        Per level, in cosine distance, as Sener and Savarese (2018) do it in Euclidean distance.

        Args:
            fraction: Fraction of the rows to keep, in (0, 1].
            seed: Seed of the first row.

        Raises:
            InputError: For a fraction outside (0, 1].
        """
        if not 0 < fraction <= 1:
            raise InputError(f"The coreset fraction must lie in (0, 1], got {fraction}.")
        generator = torch.Generator().manual_seed(seed)
        return self.of_rows([farthest_rows(rows, fraction, generator) for rows in self.rows])

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a device or dtype move to every tensor, as ``nn.Module._apply`` does."""
        self.rows, self.image_of_row = [fn(rows) for rows in self.rows], [fn(owners) for owners in self.image_of_row]
        parts = (self.kept, self.units, self.own)
        self.kept, self.units, self.own = ([fn(own) for own in part] if part else None for part in parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the bank to a safetensors file, atomically."""
        from .bank_files import save_banks

        save_banks(path, {"default": self})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ReferenceBank:
        """Read a bank that ``save`` wrote.

        Raises:
            CheckpointError: For a file that is damaged, no bank, or holds the banks of several products.
        """
        from .bank_files import load_banks

        banks = load_banks(path)
        if len(banks) != 1:
            raise CheckpointError(
                f"{path} holds the banks of several products: {', '.join(banks)}. Load it with load_references."
            )
        return next(iter(banks.values()))

    def _excluded(self, batch: int, exclude: Exclude) -> list[int | None] | None:
        if exclude is None:
            return None
        if isinstance(exclude, int):
            excluded: list[int | None] = [exclude] * batch
        else:
            excluded = [None if index is None else int(index) for index in exclude]
        indices = {index for index in excluded if index is not None}
        if len(excluded) != batch or not indices <= set(range(self.num_images)):
            raise InputError(
                f"exclude must name one of {self.num_images} references for each of {batch} images, got {exclude}."
            )
        if indices and self.num_images == 1:
            raise ReferencesError("With a single reference image nothing is left to match it with. Add a second one.")
        return excluded

    def _matchable(self, index: int) -> tuple[Tensor, Tensor]:
        """The rows of a level that images are matched with, and the image of each."""
        if self.kept is None:
            return self.rows[index], self.image_of_row[index]
        kept = self.kept[index].long()  # ONNX takes no other indices.
        return self.rows[index][kept], self.image_of_row[index][kept]

    def _compared(self, index: int) -> Tensor:
        rows, _ = self._matchable(index)
        return rows[:, : rows.shape[1] - self.looks]

    def _places(self, features: Sequence[Tensor], exclude: Exclude) -> list[Tensor]:
        """Per level the place (B * h * w,) of the nearest row of every patch among those that can be matched."""
        found, expected = [level.shape[1] for level in features], [rows.shape[1] for rows in self.rows]
        if found not in (expected, [channels - self.looks for channels in expected]):
            raise InputError(f"The bank holds levels of {expected} channels, got features of {found}.")
        return [self._places_of_level(level, index, exclude) for index, level in enumerate(features)]

    def _places_of_level(self, level: Tensor, index: int, exclude: Exclude) -> Tensor:
        rows, owners = self._compared(index), self._matchable(index)[1]
        barred = self.barred(level, index, exclude)
        return nearest_rows(tokens_of(level[:, : rows.shape[1]]), rows, owners, barred)

    def barred(self, level: Tensor, index: int, exclude: Exclude) -> Tensor | None:
        """The image (B * h * w,) that each patch of maps (B, C, h, w) must not be matched with, -1 for none.

        Arguments and errors as of ``match``.
        """
        excluded = self._excluded(level.shape[0], exclude)
        if excluded is None:
            return None
        _, owners = self._matchable(index)
        if any(bool(owners.eq(image).all()) for image in set(excluded) if image is not None):
            raise ReferencesError("The coreset keeps rows of a single image only, so that image cannot be left out.")
        # No row is of image -1, so nothing is barred from the images that exclude none.
        return image_of_each_patch(level, [-1 if image is None else image for image in excluded])


def residuals_of_images(
    features: Sequence[Tensor],
    banks: Sequence[ReferenceBank],
    exclude: Sequence[int | None] | None = None,
    compare: Compare = ReferenceBank.residuals,
) -> list[Tensor]:
    """Residuals of a batch in which every image has a bank of its own, or shares one with others.

    Args:
        features: Maps of the images, one (B, C_l, h_l, w_l) per level.
        banks: The bank of each image, or the one of all.
        exclude: Index of the reference that each image must not be matched with, or None.
        compare: What is taken instead of residuals.

    Returns:
        Maps of the shapes of the features. Errors are those of ``ReferenceBank.match``.
    """
    if all(bank is banks[0] for bank in banks):
        return compare(banks[0], features, exclude)
    of_images: dict[int, list[Tensor]] = {}
    for bank in dict.fromkeys(banks):
        members = [index for index, other in enumerate(banks) if other is bank]
        own = None if exclude is None else [exclude[index] for index in members]
        found = compare(bank, [level[members] for level in features], own)
        of_images |= dict(zip(members, zip(*found, strict=True), strict=True))  # type: ignore[arg-type]
    return [torch.stack(level) for level in zip(*(of_images[index] for index in range(len(banks))), strict=True)]
