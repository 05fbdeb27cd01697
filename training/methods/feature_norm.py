"""FeatureNorm: how far the features lie from zero (paper section 3.5). Nothing is trained."""

from __future__ import annotations

from torch import Tensor

from adfeatures import scoring

from .base import Batch, Extractor, Loader, Predictions
from .trained import feature_maps, gather


class FeatureNorm:
    """Score every patch by the length of its feature, sqrt(|e| + 1) - 1, averaged over all levels.

    Made for projected residuals: pretraining makes those of normal patches short and those of anomalous ones long. Raw
    features go through the same formula, which is the baseline without pretraining.

    Args:
        extractor: What gives the features of a batch. The references are its own affair; for those retrieved for each
            image (`training.methods.retrieval`) the method is the same.
        sigma: Gaussian smoothing in pixels of the images.
    """

    def __init__(self, extractor: Extractor, *, sigma: float = scoring.SIGMA) -> None:
        self.extractor, self.sigma = extractor, sigma

    def fit(self, loader: Loader) -> FeatureNorm:
        """Do nothing, and read nothing of the loader."""
        return self

    def predict(self, loader: Loader) -> Predictions:
        """Score the images of a loader. Their scores are the maxima of their smoothed maps.

        Raises:
            InputError: For no images, images of several sizes, or features that are not finite.
        """
        return gather(self._score(batch) for batch in loader)

    def _score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        height, width = batch["image"].shape[-2:]
        maps = scoring.feature_norm_map(feature_maps(self.extractor, batch), (height, width), self.sigma)
        return maps, maps.amax(dim=(1, 2))
