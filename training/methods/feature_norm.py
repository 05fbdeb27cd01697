"""FeatureNorm: how far the features lie from zero (paper section 3.5). Nothing is trained."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from adfeatures import scoring

from .base import Batch, Extractor, Loader, Predictions
from .trained import feature_maps, gather


@dataclass(eq=False)
class FeatureNorm:
    """Score every patch by the length of its feature, sqrt(|e| + 1) - 1, averaged over all levels.

    Made for projected residuals: pretraining makes those of normal patches short and those of anomalous ones long. Raw
    features go through the same formula, which is the baseline without pretraining.
    """

    extractor: Extractor  # of the features of a batch; references, retrieved ones too, are its own affair
    _: KW_ONLY
    sigma: float = scoring.SIGMA  # of the Gaussian smoothing, in pixels of the images

    def fit(self, loader: Loader) -> FeatureNorm:
        """Do nothing, and read nothing of the loader."""
        return self

    def predict(self, loader: Loader) -> Predictions:
        """Score the images of a loader. Their scores are the maxima of their smoothed maps.

        Raises:
            InputError: For no images, images of several sizes, or features that are not finite.
        """
        return gather(map(self._score, loader))

    def _score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        maps = scoring.feature_norm_map(feature_maps(self.extractor, batch), batch["image"].shape[-2:], self.sigma)
        return maps, maps.amax(dim=(1, 2))
