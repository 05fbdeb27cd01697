"""FeatureExtractor: backbone, reference banks and projector behind a timm-compatible surface."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import FeatureInfo
from torch import Tensor, nn

from . import scoring
from .backbones import EfficientNet, VisionTransformer
from .catalog import unknown
from .errors import InputError, ReferencesError, UnknownNameError
from .images import build_transform, read_image
from .projector import ResidualProjector
from .references import ReferenceBank, load_banks, save_banks, weights_fingerprint
from .scoring import AnomalyMap
from .sources import ImageSource, digest, distinct, image_sources, name_of
from .timm_backbones import TimmBackbone

Images: TypeAlias = "Tensor | ImageSource | Sequence[ImageSource]"

PRESET = "squash"
QUANTILE = 0.99
# Images per forward pass where the caller does not say.
BATCH = 8


class Prediction(NamedTuple):
    """The score of one image.

    Attributes:
        score: Image score, >= 0, without upper bound: the maximum of the smoothed map at the model's input size.
        map: Anomaly map at the size of the original image, float32 (H, W).
        threshold: Score above which an image counts as anomalous, None with a single reference image.
        is_anomalous: The decision, None without a threshold.
        is_reference: Whether the image is one of the references; then its score says nothing, since it was compared
            with itself.
    """

    score: float
    map: np.ndarray
    threshold: float | None
    is_anomalous: bool | None
    is_reference: bool


class FeatureExtractor(nn.Module):
    """Pretrained residual features: what an image shows that its normal references do not.

    Always in eval mode. References are not part of the state dict; ``save_references`` keeps them.

    Args:
        backbone: Encoder of images (B, 3, H, W) to a list of maps.
        projector: Projector of the residuals, None to use the residuals as they are.
        name: Model name with tag, kept with saved references.
        img_size: Height and width that images are resized to.
        pretrained_cfg: timm's description of the preprocessing and of the origin of the weights.
        out_indices: Levels that ``forward`` returns, counted from 0, negative from the end. The default is all.
        residual_scales: For models that score residuals directly: typical distances per level and ring, for one
            reference only.
    """

    def __init__(
        self,
        backbone: VisionTransformer | EfficientNet | TimmBackbone,
        projector: ResidualProjector | None,
        *,
        name: str,
        img_size: tuple[int, int],
        pretrained_cfg: Mapping[str, Any],
        out_indices: Sequence[int] | None = None,
        residual_scales: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector
        self.name, self.img_size = name, img_size
        self.pretrained_cfg = self.default_cfg = dict(pretrained_cfg)
        self.levels, self.patch_size = backbone.levels, backbone.patch_size
        self.num_features = backbone.channels[-1]
        self.bit_depth = 16
        self._residual_scales = residual_scales
        self._banks: dict[str, ReferenceBank] = {}
        self._indices = self._take(out_indices)
        described = [
            {"num_chs": channels, "reduction": reduction, "module": f"level{number}"}
            for number, (channels, reduction) in enumerate(
                zip(backbone.channels, backbone.reductions, strict=True), start=1
            )
        ]
        self.feature_info = FeatureInfo(described, tuple(self._indices))
        self.requires_grad_(False).eval()

    # Features

    @torch.no_grad()
    def forward(self, x: Tensor, product: str | Sequence[str | None] | None = None) -> list[Tensor]:
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
        """Maps of the frozen backbone, all levels; of unit length per patch in models that score residuals directly."""
        if not torch.isfinite(x).all():
            raise InputError("The images hold NaN or infinite values.")
        maps = self.backbone(x)
        return maps if self._residual_scales is None else [F.normalize(level, dim=1) for level in maps]

    @torch.no_grad()
    def residuals(self, x: Tensor, product: str | Sequence[str | None] | None = None) -> list[Tensor]:
        """Backbone maps minus the nearest reference patches, all levels. Arguments and errors as in ``forward``."""
        groups = self._groups(product, x.shape[0])
        features = self.backbone_features(x)
        if len(groups) == 1:
            return next(iter(groups)).residuals(features)
        residuals = [torch.empty_like(level) for level in features]
        for bank, members in groups.items():
            for level, part in zip(residuals, bank.residuals([level[members] for level in features]), strict=True):
                level[members] = part
        return residuals

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
        """timm's way to ask for feature maps. The levels are counted from 0; an int takes that many of the last.

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

    def _project(self, residuals: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
        return [residuals[i] for i in indices] if self.projector is None else self.projector(residuals, indices)

    # References

    @property
    def references(self) -> dict[str, ReferenceBank]:
        """The reference banks by product; "default" where no product was named."""
        return dict(self._banks)

    def set_references(self, images: Images, product: str | None = None, *, coreset: float | None = None) -> None:
        """Take normal images as the references of a product, in place of those it had.

        Args:
            images: Transformed float images (K, 3, H, W), or PIL images, uint8 arrays or paths, or a folder.
            product: Name of the product, where the model shall hold several.
            coreset: Part of the patches to keep, in (0, 1]; the default keeps all. Saves memory and time with many
                references.

        Raises:
            ImageError: For a file that cannot be read or a folder without images.
            InputError: For no images, a wrong shape or NaN.
        """
        bank = self._encode(images)
        self._banks[product or "default"] = (
            self._reduced(bank, coreset) if coreset is not None else self._with_scales(bank, bank)
        )

    def add_references(self, images: Images, product: str | None = None) -> None:
        """Add normal images to the references of a product. A threshold is taken anew when it is next needed."""
        name = product or "default"
        new = self._encode(images, known=self._banks[name].sha256s if name in self._banks else ())
        bank = self._banks[name].extended(new) if name in self._banks else new
        self._banks[name] = self._with_scales(bank, bank)

    def clear_references(self) -> None:
        """Forget the references of all products."""
        self._banks.clear()

    def save_references(self, path: str | os.PathLike[str]) -> None:
        """Write the banks of all products, with thresholds and the hashes of files and weights, to one safetensors file, atomically.

        Raises:
            ReferencesError: If no references are set.
        """
        if not self._banks:
            raise ReferencesError(_NO_REFERENCES.format(name=self.name))
        fingerprint = weights_fingerprint(self.state_dict())
        for product, bank in self._banks.items():
            self.threshold(product)
            bank.fingerprint = fingerprint
        save_banks(path, self._banks)

    def load_references(self, path: str | os.PathLike[str]) -> None:
        """Read the banks that ``save_references`` wrote, in place of all references held.

        Raises:
            CheckpointError: For a file that is damaged or no bank.
            ReferencesError: For banks of another model, other weights or another input size.
        """
        banks, fingerprint = load_banks(path), weights_fingerprint(self.state_dict())
        for bank in banks.values():
            bank.check(self.name, self.img_size, self.backbone.channels, fingerprint, source=str(path))
            bank.apply(lambda t: t.to(self._device, self._dtype if t.is_floating_point() else t.dtype))
        self._banks = banks
        self.bit_depth = next(iter(banks.values())).bit_depth

    @torch.no_grad()
    def reference_features(self, product: str | None = None) -> list[Tensor]:
        """Projected residual features of the references themselves, each matched with the others only.

        Returns:
            One (K, C_l, h_l, w_l) map per chosen level: normal training data for few-shot methods.

        Raises:
            ReferencesError: With fewer than two references, or after a coreset.
        """
        bank = self._bank(product)
        parts = [self._project(residuals, self._indices) for residuals in bank.leave_one_out(range(bank.num_images))]
        return [torch.cat(level) for level in zip(*parts, strict=True)]

    # Scores

    @torch.no_grad()
    def anomaly_map(
        self, x: Tensor, product: str | Sequence[str | None] | None = None, *, sigma: float = scoring.SIGMA
    ) -> AnomalyMap:
        """Anomaly maps and scores of transformed images (B, 3, H, W), independent of the rest of the batch.

        Args:
            x: Transformed images.
            product: Whose references to use, as in ``forward``.
            sigma: Gaussian smoothing in input pixels.

        Returns:
            ``maps`` (B, H, W) at the input size and ``scores`` (B,), their maxima; float32.
        """
        residuals, groups = self.residuals(x, product), self._groups(product, x.shape[0])
        maps = torch.empty(x.shape[0], *x.shape[2:], device=x.device)
        for bank, members in groups.items():
            maps[members] = self._maps([level[members] for level in residuals], bank, (x.shape[2], x.shape[3]), sigma)
        return AnomalyMap(maps, maps.amax(dim=(1, 2)))

    def score(
        self, images: Images, product: str | Sequence[str | None] | None = None, *, batch_size: int = BATCH
    ) -> list[Prediction]:
        """Score images as they are: read, squashed to the model's input size, mapped back to their own size.

        Args:
            images: Paths, PIL images or uint8 arrays, or a folder.
            product: Whose references to use: one name, or one for each image.
            batch_size: Images per forward pass.

        Raises:
            ImageError: For an image that cannot be read.
            ReferencesError: If no references are set.
        """
        if isinstance(images, Tensor):
            raise InputError("score takes images; for transformed tensors there is anomaly_map.")
        sources = image_sources(images)
        products = [product] * len(sources) if product is None or isinstance(product, str) else list(product)
        if len(products) != len(sources):
            raise InputError(f"{len(products)} products were named for {len(sources)} images.")
        predictions: list[Prediction] = []
        for start in range(0, len(sources), batch_size):
            part = slice(start, start + batch_size)
            predictions += self._score_batch(sources[part], products[part])
        return predictions

    def fit_threshold(
        self, quantile: float = QUANTILE, *, normals: Images | None = None, product: str | None = None
    ) -> float:
        """Set the threshold of a product to a quantile of the scores of normal images.

        Args:
            quantile: Part of normal images that shall stay below, in (0, 1].
            normals: Normal images that are not references. The default scores every reference against the others.
            product: Whose threshold, where several products are held.

        Returns:
            The threshold. A warning says so where the images are too few for the quantile.

        Raises:
            ReferencesError: With a single reference and no other normal images.
        """
        bank = self._bank(product)
        if normals is not None:
            bank.normal_scores = self._scores_of(normals, product)
        elif not bank.normal_scores:
            bank.normal_scores = self._leave_one_out_scores(bank, bank)
            for index in scoring.outliers(bank.normal_scores):
                warnings.warn(
                    f"Reference {bank.files[index] or index} looks anomalous among the others. Is it a good part?",
                    stacklevel=2,
                )
        bank.threshold, bank.quantile = scoring.normal_quantile(bank.normal_scores, quantile), quantile
        count = len(bank.normal_scores)
        if count * (1 - quantile) < 1:
            warnings.warn(
                f"{count} normal images cannot pin down the {quantile:g} quantile: "
                f"expect about one false alarm in {count + 1} good images.",
                stacklevel=2,
            )
        return bank.threshold

    @property
    def map_scale(self) -> float:
        """Top of the color scale for maps without a threshold."""
        return scoring.RESIDUAL_TOP if self.projector is None else scoring.FEATURE_NORM_TOP

    def threshold(self, product: str | None = None) -> float | None:
        """The threshold of a product; taken from its references where it is not set yet, None where there is only one of them."""
        bank = self._bank(product)
        if bank.threshold is None and (bank.num_images > 1 or bank.normal_scores):
            return self.fit_threshold(product=product)
        return bank.threshold

    def _scores_of(self, normals: Images, product: str | None) -> list[float]:
        if isinstance(normals, Tensor):
            batches = normals.to(self._device, self._dtype).split(BATCH)
            return [score for batch in batches for score in self.anomaly_map(batch, product).scores.tolist()]
        return [self._score_batch([source], [product])[0].score for source in image_sources(normals)]

    def _score_batch(self, sources: Sequence[ImageSource], products: Sequence[str | None]) -> list[Prediction]:
        images, x = self._read(sources)
        result = self.anomaly_map(x, products)
        predictions = []
        for source, image, product, smoothed, score in zip(sources, images, products, *result, strict=True):
            bank, threshold = self._bank(product), self.threshold(product)
            resized = F.interpolate(
                smoothed[None, None], size=(image.height, image.width), mode="bilinear", align_corners=False
            )
            decision = None if threshold is None else score.item() > threshold
            known = digest(source) in bank.sha256s
            predictions.append(Prediction(score.item(), resized[0, 0].cpu().numpy(), threshold, decision, known))
        return predictions

    def _maps(
        self, residuals: Sequence[Tensor], bank: ReferenceBank, size: tuple[int, int], sigma: float = scoring.SIGMA
    ) -> Tensor:
        if self.projector is not None:
            return scoring.feature_norm_map(self.projector(residuals), size, sigma)
        assert bank.scales is not None
        distances = [scoring.cosine_distances(level) for level in residuals]
        return scoring.fuse(
            [scoring.divide_by_ring(d, s) for d, s in zip(distances, bank.scales, strict=True)], size, sigma
        )

    # Banks and thresholds

    def _encode(self, images: Images, known: Sequence[str] = ()) -> ReferenceBank:
        if isinstance(images, Tensor):
            named, count = {}, len(images)
            batches: Iterator[Tensor] = iter(images.to(self._device, self._dtype).split(BATCH))
        else:
            named = distinct(image_sources(images), known)
            sources, count = list(named.values()), len(named)
            batches = (self._read(sources[start : start + BATCH])[1] for start in range(0, count, BATCH))
        if not count:
            raise InputError("No reference images were given. Give at least one normal image, better eight.")
        parts = [self.backbone_features(batch) for batch in batches]
        bank = ReferenceBank.from_features([torch.cat(level) for level in zip(*parts, strict=True)])
        bank.files = [name_of(source) for source in named.values()] or [""] * count
        bank.sha256s = list(named) or [""] * count
        bank.model, bank.img_size, bank.bit_depth = self.name, self.img_size, self.bit_depth
        bank.preset = None if isinstance(images, Tensor) else PRESET
        return bank

    def _reduced(self, full: ReferenceBank, fraction: float) -> ReferenceBank:
        bank = self._with_scales(full.coreset(fraction), full)
        if full.num_images > 1:
            # Later the whole images are gone, so their scores are taken now.
            bank.normal_scores = self._leave_one_out_scores(bank, full)
        return bank

    @torch.no_grad()
    def _with_scales(self, bank: ReferenceBank, full: ReferenceBank) -> ReferenceBank:
        if self._residual_scales is None or self.projector is not None:
            return bank
        if bank.num_images == 1:
            bank.scales = torch.tensor(self._residual_scales)
        else:
            parts = [[scoring.cosine_distances(level) for level in part] for part in bank.leave_one_out(full=full)]
            bank.scales = scoring.ring_scales([torch.cat(level) for level in zip(*parts, strict=True)]).cpu()
        return bank

    @torch.no_grad()
    def _leave_one_out_scores(self, bank: ReferenceBank, full: ReferenceBank) -> list[float]:
        reduction = self.backbone.reductions[0]
        size = (full.grids[0][0] * reduction, full.grids[0][1] * reduction)
        return [
            score
            for part in bank.leave_one_out(full=full)
            for score in self._maps(part, bank, size).amax(dim=(1, 2)).tolist()
        ]

    def _bank(self, product: str | None) -> ReferenceBank:
        if not self._banks:
            raise ReferencesError(_NO_REFERENCES.format(name=self.name))
        if product is None and len(self._banks) > 1:
            raise UnknownNameError(
                f"References of several products are set: name one of {', '.join(sorted(self._banks))}."
            )
        if product is not None and product not in self._banks:
            raise UnknownNameError(unknown("product", product, self._banks))
        return next(iter(self._banks.values())) if product is None else self._banks[product]

    def _groups(self, product: str | Sequence[str | None] | None, count: int) -> dict[ReferenceBank, Any]:
        """The banks to use, each with an index of its images in the batch."""
        if product is None or isinstance(product, str):
            return {self._bank(product): slice(None)}
        if len(product) != count:
            raise InputError(f"{len(product)} products were named for {count} images.")
        banks = [self._bank(name) for name in product]
        return {
            bank: torch.tensor([i for i, other in enumerate(banks) if other is bank], device=self._device)
            for bank in dict.fromkeys(banks)
        }

    def _read(self, sources: Sequence[ImageSource]) -> tuple[list[Image.Image], Tensor]:
        """The images as they are, and transformed for the model."""
        images = [read_image(source, bit_depth=self.bit_depth) for source in sources]
        transform = build_transform(
            self.img_size, self.pretrained_cfg["mean"], self.pretrained_cfg["std"], preset=PRESET
        )
        return images, torch.stack([transform(image) for image in images]).to(self._device, self._dtype)

    # Module behavior

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in eval mode, also as a part of a model in training: the statistics of the backbone must not move."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureExtractor:
        for bank in self._banks.values():
            bank.apply(fn)
        return super()._apply(fn, recurse)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


_NO_REFERENCES = (
    "{name} compares images with normal references of the same product, and none are set. "
    "Call set_references(images or folder), or load_references(path)."
)
