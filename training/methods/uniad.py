"""UniAD (You et al. 2022): one transformer for all products reconstructs feature maps; what it cannot is anomalous.

The network is missing from the published ADPretrain code (its files are empty). This one is built from the UniAD paper,
section 3, with the settings that ADPretrain's configuration lists, so numbers of the ADPretrain paper may differ from
ours for that reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfeatures.errors import InputError

from ..console import progress
from .base import Batch, Extractor, Loader, Predictions
from .trained import feature_maps, first_maps, gather, seeded

EVALUATE_EVERY = 10
DECAY_EVERY, DECAY = 800, 0.1
MAX_GRADIENT_NORM = 0.1


@dataclass(eq=False)
class UniAD:
    """Train one reconstruction transformer on the normal images of all products.

    Its input are the levels, concatenated; levels of a finer grid than the coarsest are resized to that one bilinearly.
    A pixel's score is the distance of the reconstruction from the input, upsampled, without smoothing; an image's score
    is the maximum of its map.

    Raises:
        InputError: For a width that cannot be split into the heads, or into rows and columns.
    """

    extractor: Extractor  # of the features of a batch
    _: KW_ONLY
    hidden: int = 512  # width of the transformer, even and a multiple of heads
    heads: int = 8  # of the attention
    layers: int = 4  # of the encoder, and of the decoder
    feed_forward: int = 2048  # width within the feed-forward layers
    dropout: float = 0.1  # rate, in training
    # Side of the square around a position, itself included, that it must not attend to, odd. On a grid that such
    # squares would cover it shrinks to the largest that leaves something; a single position attends to itself.
    neighbors: int = 7
    jitter: float = 20  # scale of the noise on the input in training
    epochs: int = 1000  # the learning rate falls to a tenth after 801, as in the original
    learning_rate: float = 1e-4  # of AdamW
    seed: int = 133  # of the initial weights, the jitter and dropout
    network: ReconstructionTransformer | None = field(default=None, init=False)  # after ``fit``

    def __post_init__(self) -> None:
        if self.hidden % 2 or self.hidden % self.heads:
            raise InputError(f"hidden must be even and a multiple of heads, got {self.hidden} and {self.heads}.")

    def fit(self, loader: Loader, on_epoch: Callable[[int], None] | None = None) -> UniAD:
        """Train on normal images.

        Args:
            loader: Batches of the training images of all products (the paper: 8, shuffled).
            on_epoch: Called with the number of finished epochs after every tenth and after the last, when ``predict``
                can be called.

        Raises:
            InputError: For no images, images of several sizes, or NaN features.
        """
        first = _joined(first_maps(self.extractor, loader))
        with seeded(self.seed):
            self.network = network = ReconstructionTransformer(
                first.shape[1],
                first.shape[2:],
                hidden=self.hidden,
                heads=self.heads,
                layers=self.layers,
                feed_forward=self.feed_forward,
                dropout=self.dropout,
                neighbors=self.neighbors,
            ).to(first.device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.learning_rate, weight_decay=1e-4)
        # The original tells its schedule the number of the epoch that has ended, counted from 0.
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda ended: DECAY ** (max(ended - 1, 0) // DECAY_EVERY)
        )
        generator = torch.Generator().manual_seed(self.seed)
        for epoch in progress(range(1, self.epochs + 1), desc="UniAD", leave=False):
            network.train()
            for batch in loader:
                features = self._features(batch, network)
                # Dropout draws from the global generators only.
                with seeded(int(torch.randint(2**62, (), generator=generator)), first.device):
                    loss = F.mse_loss(network(jittered(features, self.jitter)), features)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
                optimizer.step()
            schedule.step()
            if on_epoch is not None and (epoch % EVALUATE_EVERY == 0 or epoch == self.epochs):
                on_epoch(epoch)
        return self

    @torch.no_grad()
    def predict(self, loader: Loader) -> Predictions:
        """Score images by distances of 0 or more; higher is more anomalous.

        Raises:
            InputError: Before ``fit``, for no images, images of another size than in training, or NaN features.
        """
        if self.network is None:
            raise InputError("This UniAD is not trained yet; call fit first.")
        network = self.network.eval()
        return gather(self._score(batch, network) for batch in loader)

    def _score(self, batch: Batch, network: ReconstructionTransformer) -> tuple[Tensor, Tensor]:
        features = self._features(batch, network)
        distances = (network(features) - features).norm(dim=1, keepdim=True)
        maps = F.interpolate(distances, batch["image"].shape[-2:], mode="bilinear", align_corners=True)[:, 0]
        return maps, maps.flatten(1).amax(dim=1)

    def _features(self, batch: Batch, network: ReconstructionTransformer) -> Tensor:
        features = _joined(feature_maps(self.extractor, batch))
        grid, trained = tuple(features.shape[2:]), tuple(network.grid)
        if grid != trained:
            raise InputError(
                f"This UniAD was trained on maps of {trained} positions, got {grid}. Give all images the same size."
            )
        return features


def _joined(levels: Sequence[Tensor]) -> Tensor:
    """All levels as one map (B, sum of C_l, h, w) on the coarsest grid."""
    grid = min((level.shape[2:] for level in levels), key=lambda grid: grid.numel())
    return torch.cat([F.interpolate(level, grid, mode="bilinear", align_corners=True) for level in levels], dim=1)


def jittered(features: Tensor, scale: float) -> Tensor:
    """Add normal noise of standard deviation ``scale`` |x| / C to every vector x of (B, C, h, w): feature jittering."""
    deviation = scale * features.norm(dim=1, keepdim=True) / features.shape[1]
    return features + deviation * torch.randn_like(features)


def neighbor_mask(grid: Sequence[int], side: int) -> Tensor:
    """Which positions (h w, h w) must not attend to which: those within the square of ``side`` around them, bool.

    The square is smaller where it would leave nothing to attend to, and absent on a grid of one position.
    """
    half = (min(side, max(grid) - 1) - 1) // 2
    positions = torch.cartesian_prod(*map(torch.arange, grid))
    return ((positions[:, None] - positions).abs() <= half).all(dim=2)


class ReconstructionTransformer(nn.Module):
    """The network: neighbor-masked encoder, and a decoder whose every layer starts from queries of its own.

    Draws its initial values from torch's global generator: linear layers each their own by Xavier's uniform rule, all
    else once for the layers of the encoder and once for those of the decoder, as in the original.
    """

    def __init__(
        self,
        channels: int,
        grid: torch.Size,
        *,
        hidden: int,
        heads: int,
        layers: int,
        feed_forward: int,
        dropout: float,
        neighbors: int,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.input = nn.Linear(channels, hidden)
        self.rows = nn.Parameter(torch.rand(grid[0], hidden // 2))
        self.columns = nn.Parameter(torch.rand(grid[1], hidden // 2))
        sizes = (hidden, heads, feed_forward, dropout)
        self.encoder = _copies(_EncoderLayer(*sizes), layers)
        self.decoder = _copies(_DecoderLayer(grid.numel(), *sizes), layers)
        self.norm = nn.LayerNorm(hidden)
        self.output = nn.Linear(hidden, channels)
        self.register_buffer("mask", neighbor_mask(grid, neighbors))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Reconstruct maps (B, C, h, w)."""
        tokens = self.input(features.flatten(2).transpose(1, 2))
        positions = torch.cat(torch.broadcast_tensors(self.columns, self.rows[:, None]), dim=2).flatten(0, 1)
        for layer in self.encoder:
            tokens = layer(tokens, positions, self.mask)
        decoded = tokens
        for layer in self.decoder:
            decoded = layer(decoded, tokens, positions, self.mask)
        return self.output(self.norm(decoded)).transpose(1, 2).unflatten(2, self.grid)


def _copies(layer: nn.Module, count: int) -> nn.ModuleList:
    return nn.ModuleList(copy.deepcopy(layer) for _ in range(count))


class _Attention(nn.Module):
    """Masked attention, residual and norm; positions are added to queries and keys, not to values."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden, heads, dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, queries: Tensor, memory: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        inputs = (queries + positions, memory + positions, memory)
        attended, _ = self.attention(*inputs, attn_mask=mask, need_weights=False)
        return self.norm(queries + self.dropout(attended))


class _FeedForward(nn.Module):
    def __init__(self, hidden: int, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(hidden, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, hidden), nn.Dropout(dropout)
        )
        self.norm = nn.LayerNorm(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens + self.layers(tokens))


class _EncoderLayer(nn.Module):
    def __init__(self, hidden: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.attention = _Attention(hidden, heads, dropout)
        self.feed_forward = _FeedForward(hidden, feed_forward, dropout)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        return self.feed_forward(self.attention(tokens, tokens, positions, mask))


class _DecoderLayer(nn.Module):
    """Ask with learned queries (h w, hidden): first what was encoded, then what the layer before decoded."""

    def __init__(self, positions: int, hidden: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(positions, hidden))
        self.of_encoded = _Attention(hidden, heads, dropout)
        self.of_decoded = _Attention(hidden, heads, dropout)
        self.feed_forward = _FeedForward(hidden, feed_forward, dropout)

    def forward(self, decoded: Tensor, encoded: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        tokens = self.of_encoded(self.queries.expand_as(encoded), encoded, positions, mask)
        return self.feed_forward(self.of_decoded(tokens, decoded, positions, mask))
