"""FeatureExtractor: backbone, reference banks and projector behind timm's surface. It computes on tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

from . import fitting, predictor, scoring
from .backbones import Encoder
from .bank_files import load_banks, save_banks
from .catalog import unknown
from .checkpoints import weights_fingerprint
from .errors import InputError, ReferencesError, UnknownNameError
from .geometry import PLAIN, Geometry
from .image_files import MAX_PIXELS
from .predictor import Images, Prediction, Products
from .projector import ResidualProjector
from .records import MAX_ROTATIONS
from .references import ReferenceBank, residuals_of_images
from .scoring import AnomalyMap, CosineRingScorer, FeatureNormScorer, Scorer
from .thresholds import Tail

DEFAULT_PRODUCT = "default"


class FeatureExtractor(nn.Module):
    """Pretrained residual features: what an image shows that its normal references do not.

    Always in eval mode. References are not part of the state dict; ``save_references`` keeps them.

    Args:
        backbone: Encoder of images (B, 3, H, W) to a list of maps.
        projector: Projector of the residuals, None to use the residuals as they are.
        scorer: How residuals become scores. The default is FeatureNorm with a projector, cosine distances without one.
        name: Model name with tag, kept with saved references.
        img_size: Height and width that images are resized to.
        pretrained_cfg: timm's description of the preprocessing and of the origin of the weights.
        out_indices: Indices of the levels that ``forward`` returns, from 0, negative from the end. The default is all.

    Attributes:
        levels: Blocks or stages of the backbone that the levels are, counted from 1.
        bit_depth: Bits in use, 9 to 16, of 16-bit photos that become references from now on. Each bank keeps its own.
        max_pixels: Pixels of photos in memory at a time, 1 to 89 million: they are decoded one by one and made smaller
            at once, whatever the size of a batch. A photo of more is refused.
    """

    runtime = "torch"
    # timm's name for the size of a classifier, which its tools for the Hub ask for.
    num_classes = 0

    def __init__(
        self,
        backbone: Encoder,
        projector: ResidualProjector | None,
        *,
        name: str,
        img_size: tuple[int, int],
        pretrained_cfg: Mapping[str, Any],
        scorer: Scorer | None = None,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector
        self.scorer: Scorer = scorer or (CosineRingScorer() if projector is None else FeatureNormScorer())
        self.name, self.img_size = name, img_size
        self.pretrained_cfg = self.default_cfg = dict(pretrained_cfg)
        self.levels, self.patch_size = backbone.levels, backbone.patch_size
        self.num_features = backbone.channels[-1]
        self.bit_depth, self.max_pixels = 16, MAX_PIXELS
        self._banks: dict[str, ReferenceBank] = {}
        self._indices = self._take(out_indices)
        levels = enumerate(zip(backbone.channels, backbone.reductions, strict=True), start=1)
        described = [{"num_chs": channels, "reduction": by, "module": f"level{n}"} for n, (channels, by) in levels]
        self.feature_info = FeatureInfo(described, tuple(self._indices))
        self.requires_grad_(False).eval()

    # Features

    @torch.no_grad()
    def forward(self, x: Tensor, product: Products = None) -> list[Tensor]:
        """Projected residual features of the chosen levels.

        Args:
            x: Transformed images (B, 3, H, W), sides multiples of ``patch_size``.
            product: Whose references to use, where several are held: one name, or one for each image.

        Returns:
            One (B, C_l, h_l, w_l) map per chosen level. No gradient flows into the extractor, heads can be trained on
            the maps.

        Raises:
            InputError: For a wrong shape or NaN.
            ReferencesError: If no references are set.
        """
        return self._project(self.residuals(x, product), self._indices)

    @torch.no_grad()
    def backbone_features(self, x: Tensor) -> list[Tensor]:
        """Maps of the frozen backbone, all levels; of unit length per patch in models that score cosine distances."""
        if not x.is_floating_point():
            raise InputError(
                f"Expected transformed images of a float type, got {x.dtype}. See create_transform(model)."
            )
        # A compiled graph does not branch on values; predictor refuses the scores that such images get.
        if not torch.compiler.is_compiling() and not torch.isfinite(x).all():
            raise InputError("The images hold NaN or infinite values.")
        return self.scorer.features(self.backbone(x.to(next(self.parameters()).dtype)))

    @torch.no_grad()
    def residuals(self, x: Tensor, product: Products = None) -> list[Tensor]:
        """Backbone maps minus the nearest reference patches, all levels. Arguments and errors as in ``forward``."""
        banks = self._banks_of(product, x.shape[0])
        return residuals_of_images(self.backbone_features(x), banks)

    def patches(self, x: Tensor) -> list[Tensor]:
        """What a bank keeps of transformed images: their features, and what the scorer puts behind. All levels."""
        return self.scorer.described(self.backbone_features(x), x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **ignored: None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Timm's way to ask for feature maps. The levels are counted from 0; an int takes that many of the last.

        Returns:
            The maps (B, C, h, w), or (B, h * w, C) for "NLC", after the last projected level unless
            ``intermediates_only``.

        Raises:
            InputError: For ``norm=True`` or prefix tokens, which these features do not have, or any other request that
                cannot be met.
        """
        refused = {"norm": norm, "return_prefix_tokens": return_prefix_tokens, **ignored}
        for argument, value in refused.items():
            if value is not None and value is not False:
                raise InputError(
                    f"{self.name} has no {argument}={value!r}: its features are projected residuals of patches."
                )
        if output_fmt not in ("NCHW", "NLC"):
            raise InputError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}.")
        last = len(self.levels) - 1
        chosen = self._take(indices)
        needed = chosen if intermediates_only or stop_early else sorted({*chosen, last})
        with torch.no_grad():
            maps = dict(zip(needed, self._project(self.residuals(x), needed), strict=True))
        intermediates = [maps[i] if output_fmt == "NCHW" else maps[i].flatten(2).transpose(1, 2) for i in chosen]
        return intermediates if intermediates_only else (maps[max(needed)], intermediates)

    def _take(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.levels)
        wanted = (
            range(count) if indices is None else range(count - indices, count) if isinstance(indices, int) else indices
        )
        taken = [index + count if index < 0 and not isinstance(indices, int) else index for index in wanted]
        if not taken or any(not 0 <= index < count for index in taken):
            raise InputError(f"Level indices {indices} do not exist: {self.name} has {count} levels, 0 to {count - 1}.")
        return taken

    def _project(self, residuals: Sequence[Tensor], indices: Sequence[int] | None = None) -> list[Tensor]:
        if self.projector is not None:
            return self.projector(residuals, indices)
        return list(residuals) if indices is None else [residuals[i] for i in indices]

    # References

    @property
    def references(self) -> dict[str, ReferenceBank]:
        """The reference banks by product; "default" where no product was named."""
        return dict(self._banks)

    def set_references(
        self,
        images: Images,
        product: str | None = None,
        *,
        coreset: float | None = None,
        rotations: int | None = None,
        geometry: Geometry = PLAIN,
    ) -> None:
        """Take normal images as the references of a product, in place of those it had.

        Args:
            images: Transformed float images (K, 3, H, W), or PIL images, uint8 arrays or paths, or a folder.
            product: Name of the product, if the model is to hold several.
            coreset: Fraction of the patches to keep, in (0, 1]; the default keeps all. Saves memory and time with many
                references.
            rotations: Also match images with the references rotated by this many equal steps of a full turn, for parts
                in any orientation. Setting them takes that many times longer, and none can be added later. The default
                is 8 for ``residual_lite.in1k_v2`` if one of the first eight references is much closer to the others
                when these are rotated, as those of such parts are, else 1.
            geometry: How photos are cut: into tiles, padded, to a region of interest; later photos are cut the same
                way. To photos that are cut, no references can be added later.

        Raises:
            ImageError: For a file that cannot be read or cut, or a folder without images.
            InputError: For no images, a wrong shape or NaN, rotations that are not whole or outside 1 to 64, or tensors
                that should be cut.
        """
        if rotations is not None:
            if rotations not in range(1, MAX_ROTATIONS + 1):
                raise InputError(f"rotations must lie in 1 to {MAX_ROTATIONS}, and be whole, got {rotations!r}.")
            rotations = int(rotations)
        self._banks[product or DEFAULT_PRODUCT] = fitting.fit(
            self, self._project, images, geometry=geometry, coreset=coreset, rotations=rotations
        )

    def add_references(self, images: Images, product: str | None = None) -> None:
        """Add normal images to the references of a product. The threshold is set again when it is next needed."""
        name = product or DEFAULT_PRODUCT
        if name not in self._banks:
            return self.set_references(images, product)
        bank = self._banks[name]
        (added,) = fitting.encode(self, images, bank.record.bit_depth, bank.record.known)
        both = bank.extended(added.full)
        self.scorer.prepare(both)
        both.scales = self.scorer.scales(both.leave_one_out(compare=self.scorer.compare), len(both.rows))
        self._banks[name] = both

    def clear_references(self) -> None:
        """Forget the references of all products."""
        self._banks.clear()

    def save_references(self, path: str | os.PathLike[str]) -> None:
        """Write the banks of all products to one safetensors file, atomically.

        This includes thresholds, taken from the references if none is set yet, and the hashes of images and weights.

        Raises:
            ReferencesError: If no references are set.
        """
        if not self._banks:
            raise ReferencesError(_NO_REFERENCES.format(name=self.name))
        fingerprint = weights_fingerprint(self.state_dict())
        for product, bank in self._banks.items():
            predictor.ensure_threshold(self, product)
            bank.record.fingerprint = fingerprint
        save_banks(path, self._banks)

    def load_references(self, path: str | os.PathLike[str]) -> None:
        """Read the banks that ``save_references`` wrote, in place of all references held.

        Raises:
            CheckpointError: For a file that is damaged or no bank.
            ReferencesError: For banks of another model, other weights or another input size.
        """
        self.hold_references(load_banks(path), str(path))

    def hold_references(self, banks: Mapping[str, ReferenceBank], source: str) -> None:
        """Take banks by product in place of all references held.

        Args:
            banks: The banks.
            source: What messages call them.

        Raises:
            ReferencesError: For banks of another model, other weights or another input size.
        """
        fingerprint = weights_fingerprint(self.state_dict())
        like = next(self.parameters())
        for bank in banks.values():
            self._check_bank(bank, source, fingerprint)
            bank.apply(lambda tensor: tensor.to(like if tensor.is_floating_point() else like.device))
        self._banks = dict(banks)

    def _check_bank(self, bank: ReferenceBank, source: str, fingerprint: Sequence[str]) -> None:
        advice = "Create that model, or make the bank again with: adfeatures fit"
        if bank.model not in (None, self.name):
            raise ReferencesError(f"{source} was made with {bank.model}, not with {self.name}. {advice}")
        if bank.model is not None and bank.record.form != self.scorer.form:
            raise ReferencesError(
                f"{source} was made by an earlier form of {self.name}. Make the bank again with: adfeatures fit"
            )
        if (size := bank.record.img_size) not in (None, self.img_size):
            raise ReferencesError(
                f"{source} was made for images of {size} pixels (height, width), not {self.img_size}. {advice}"
            )
        if [rows.shape[1] for rows in bank.rows] != [own + self.scorer.looks for own in self.backbone.channels]:
            raise ReferencesError(f"{source} holds features of other levels than those of {self.name}. {advice}")
        if bank.record.fingerprint and not set(bank.record.fingerprint) & set(fingerprint):
            raise ReferencesError(f"{source} was made with other weights of {self.name}. {advice}")

    @torch.no_grad()
    def reference_features(self, product: str | None = None) -> list[Tensor]:
        """Projected residual features of the references themselves, each matched with the others only.

        Returns:
            One (K, C_l, h_l, w_l) map per chosen level: normal training data for few-shot methods.

        Raises:
            ReferencesError: With fewer than two references, or after a coreset.
        """
        bank = self.bank(product)
        parts = [self._project(residuals, self._indices) for residuals in bank.leave_one_out(range(bank.num_images))]
        return [torch.cat(level) for level in zip(*parts, strict=True)]

    def bank(self, product: str | None = None) -> ReferenceBank:
        """The references of a product, which must be named where several are held.

        Raises:
            ReferencesError: If no references are set.
            UnknownNameError: For a product that has none, or none named among several.
        """
        if not self._banks:
            raise ReferencesError(_NO_REFERENCES.format(name=self.name))
        if product is None and len(self._banks) > 1:
            names = ", ".join(sorted(self._banks))
            raise UnknownNameError(
                f"There are references of several products: choose one with product=, or --product, of {names}."
            )
        if product is not None and product not in self._banks:
            raise UnknownNameError(unknown("product", product, self._banks))
        return next(iter(self._banks.values())) if product is None else self._banks[product]

    def _banks_of(self, product: Products, count: int) -> list[ReferenceBank]:
        """The bank of each image of a batch, or the one of all."""
        if product is None or isinstance(product, str):
            return [self.bank(product)]
        if len(product) != count:
            raise InputError(f"{len(product)} products were named for {count} images.")
        return [self.bank(name) for name in product]

    # Scores

    @torch.no_grad()
    def anomaly_map(
        self,
        x: Tensor,
        product: Products = None,
        *,
        sigma: float = scoring.SIGMA,
        counts: Tensor | None = None,
    ) -> AnomalyMap:
        """Anomaly maps and scores of transformed images (B, 3, H, W), independent of the rest of the batch.

        Args:
            x: Transformed images.
            product: Whose references to use, as in ``forward``.
            sigma: Gaussian smoothing in input pixels.
            counts: What counts of them, bool (B, H, W). The default is all; elsewhere the maps are 0.

        Returns:
            ``maps`` (B, H, W) at the input size and ``scores`` (B,), their maxima; float32.
        """
        banks, size = self._banks_of(product, x.shape[0]), (x.shape[2], x.shape[3])
        compared = residuals_of_images(self.patches(x), banks, compare=self.scorer.compare)
        scales = [bank.scales for bank in banks]
        maps = scoring.anomaly_maps(self.scorer, self._project(compared), scales, size, sigma, counts)
        return AnomalyMap(maps, maps.amax(dim=(1, 2)))

    @torch.no_grad()
    def leave_one_out_scores(self, product: str | None = None) -> list[float]:
        """Image scores of the references of a product, each against the others alone.

        Raises:
            ReferencesError: With a single reference, or after a coreset.
        """
        bank = self.bank(product)
        left_out = bank.leave_one_out(compare=self.scorer.compare)
        return scoring.image_scores(left_out, bank.scales, self.scorer, self._project, self.backbone.reductions[0])

    # Photos

    def score(
        self, images: Images, product: Products = None, *, batch_size: int = predictor.BATCH_SIZE
    ) -> list[Prediction]:
        """Score images as they are: read, squashed to the model's input size or cut as the references, mapped back.

        Args:
            images: Paths, PIL images or uint8 arrays, or a folder.
            product: Whose references to use: one name, or one for each image.
            batch_size: Images per forward pass.

        Returns:
            The predictions, whose maps take four bytes for each pixel of the images: give large ones a few at a time.

        Raises:
            ImageError: For an image that cannot be read.
            ReferencesError: If no references are set.
        """
        return predictor.predict(self, images, product, batch_size)

    def fit_threshold(
        self, quantile: float | None = None, *, normals: Images | None = None, product: str | None = None
    ) -> float:
        """Set the threshold of a product to a quantile of the scores of normal images.

        Args:
            quantile: Fraction of normal images that should stay below, in (0, 1]. The default is that of
                ``thresholds.QUANTILES``. Scorers with the tail "lognormal" predict from few images what the next ones
                will score, others take the quantile of these scores.
            normals: Normal images that are not references. The default scores every reference against the others.
            product: Whose threshold, where several products are held.

        Returns:
            The threshold. A warning says so where the images are too few for the quantile.

        Raises:
            ReferencesError: With a single reference and no other normal images.
        """
        return predictor.fit_threshold(self, quantile, normals, product)

    def threshold(self, product: str | None = None) -> float | None:
        """The threshold of a product, None where none was set yet. ``score`` and ``save_references`` set one."""
        return self.bank(product).threshold

    @property
    def top(self) -> float:
        """Top of the color scale of maps where no threshold gives one."""
        return self.scorer.top

    @property
    def tail(self) -> Tail:
        """How thresholds are taken from the scores of normal images."""
        return self.scorer.tail

    # Module behavior

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in eval mode, also as a part of a model in training: the statistics of the backbone must not move."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureExtractor:
        for bank in self._banks.values():
            bank.apply(fn)
        return super()._apply(fn, recurse)

    def as_input(self, x: Tensor) -> Tensor:
        """Transformed images on the device and in the precision of the model."""
        return x.to(next(self.parameters()))


_NO_REFERENCES = (
    "{name} compares images with normal references of the same product, and none are set. "
    "Call set_references(images or folder), or load_references(path)."
)
