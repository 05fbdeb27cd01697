"""Residuals of features against references, projected where there is a projector."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfeatures.references import ReferenceBank

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
        unit_length: Bring the features of every patch to unit length first.
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
        unit_length: bool = False,
        leave_out: bool = True,
    ) -> None:
        self.features, self.banks, self.key_of, self.projector = features, banks, key_of, projector
        self.unit_length, self.leave_out = unit_length, leave_out

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Sequence[Tensor]:
        """Maps (B, C_l, h_l, w_l).

        An augmented image, whose path is None, is known by the "origin" that it was made from.

        Raises:
            ReferencesError: Where the only reference of an image is the image.
        """
        features = prepared(self.features(batch), self.unit_length)
        groups: dict[tuple[Key, int | None], list[int]] = defaultdict(list)
        for index, path in enumerate(batch.get("origin", batch["path"])):
            groups[self._bank_and_own(path)].append(index)
        residuals = [torch.empty_like(level) for level in features]
        for (key, own), members in groups.items():
            of_members = self.banks[key].residuals([level[members] for level in features], exclude=own)
            for level, values in zip(residuals, of_members, strict=True):
                level[members] = values
        return residuals if self.projector is None else self.projector(residuals)

    def _bank_and_own(self, path: str) -> tuple[Key, int | None]:
        """The bank of an image, and its own index there, if it has to be left out."""
        product, view = self.key_of[path]
        key = (product, view) if (product, view) in self.banks else (product, "")
        own = content_key(path)
        known = self.banks[key].sha256s
        return key, known.index(own) if self.leave_out and own in known else None


def prepared(features: Sequence[Tensor], unit_length: bool) -> list[Tensor]:
    """Features (B, C_l, h_l, w_l), brought to unit length per patch where asked for."""
    return [F.normalize(level, dim=1) if unit_length else level for level in features]
