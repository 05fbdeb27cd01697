"""Residuals of features against references, projected where there is a projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adfeatures.references import ReferenceBank, residuals_of_images
from adfeatures.scoring import Scorer

from ..methods.base import Batch, Extractor
from .feature_cache import content_key

# Product and view, which an image shares with its references.
Key = tuple[str, str]


class Residuals:
    """Residuals against the references of each image's product and view (paper section 3.2), projected (section 3.3).

    Args:
        features: Extractor of the backbone's features.
        banks: References by product and view. Where a view has none, those of the view "" serve.
        key_of: Product and view of each image by its path.
        projector: Projector of the residuals, None to take them as they are.
        scorer: Says which features residuals are taken of.
        leave_out: Compare an image that is itself among the references with the other ones alone, as nothing else gives
            it the residuals of a normal image. Otherwise they are zero, as in the original.
    """

    def __init__(
        self,
        features: Extractor,
        banks: Mapping[Key, ReferenceBank],
        key_of: Mapping[str, Key],
        projector: nn.Module | None,
        *,
        scorer: Scorer,
        leave_out: bool = True,
    ) -> None:
        self.features, self.banks, self.key_of, self.projector = features, banks, key_of, projector
        self.scorer, self.leave_out = scorer, leave_out

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Sequence[Tensor]:
        """Maps (B, C_l, h_l, w_l).

        An augmented image, whose path is None, is known by the "origin" that it was made from.

        Raises:
            ReferencesError: Where the only reference of an image is the image.
        """
        features = self.scorer.features(self.features(batch))
        pairs = [self._bank_and_own(path) for path in batch.get("origin", batch["path"])]
        residuals = residuals_of_images(features, [bank for bank, _ in pairs], [own for _, own in pairs])
        return residuals if self.projector is None else self.projector(residuals)

    def _bank_and_own(self, path: str) -> tuple[ReferenceBank, int | None]:
        """The bank of an image, and its own index there, if it has to be left out."""
        product, view = self.key_of[path]
        key = (product, view) if (product, view) in self.banks else (product, "")
        own, bank = content_key(path), self.banks[key]
        return bank, bank.sha256s.index(own) if self.leave_out and own in bank.sha256s else None
