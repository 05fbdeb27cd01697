"""Conditional normalizing flows of affine coupling blocks, as CFLOW builds them with FrEIA's "all in one" block."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adfeatures.errors import InputError

CLAMP = 1.9
# The sub-net's output is scaled down, so that every block begins close to a rotation.
SUBNET_SCALE = 0.1
SOFTPLUS_SCALE, SOFTPLUS_BETA = 0.1, 0.5


class ConditionalFlow(nn.Module):
    """An invertible map of vectors to standard normal ones, under a condition.

    Draws its initial values from torch's global generator.

    Args:
        channels: Length C of the vectors, at least 2.
        condition: Length of the conditions.
        blocks: Number of coupling blocks.

    Raises:
        InputError: For vectors that cannot be split in two.
    """

    def __init__(self, channels: int, condition: int, blocks: int = 8) -> None:
        super().__init__()
        if channels < 2:
            raise InputError(f"A coupling block splits its channels in two; got features of {channels} channel.")
        self.blocks = nn.ModuleList(CouplingBlock(channels, condition) for _ in range(blocks))

    def forward(self, vectors: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, C) under conditions (N, K) to (N, C); with it the log-determinants of the Jacobians, (N,)."""
        log_det = vectors.new_zeros(len(vectors))
        for block in self.blocks:
            vectors, change = block(vectors, conditions)
            log_det = log_det + change
        return vectors, log_det

    def log_likelihood(self, vectors: Tensor, conditions: Tensor) -> Tensor:
        """Log-likelihood per channel of (N, C) under a standard normal prior, (N,)."""
        normal, log_det = self(vectors, conditions)
        return (log_det - normal.square().sum(dim=1) / 2) / vectors.shape[1] - math.log(2 * math.pi) / 2


class CouplingBlock(nn.Module):
    """Change the second half of the channels as the first and the condition say, then scale, shift and rotate all."""

    rotation: Tensor

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        changed = channels // 2
        self.split = (channels - changed, changed)
        inputs = channels - changed + condition
        self.subnet = nn.Sequential(nn.Linear(inputs, 2 * inputs), nn.ReLU(), nn.Linear(2 * inputs, 2 * changed))
        # The softplus of this value is 1 / SOFTPLUS_SCALE: the block begins with a scale of one.
        raw_scale = math.log(math.expm1(SOFTPLUS_BETA / SOFTPLUS_SCALE)) / SOFTPLUS_BETA
        self.raw_scale = nn.Parameter(torch.full((channels,), raw_scale))
        self.offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("rotation", random_rotation(channels))

    def forward(self, vectors: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments and result as of the whole flow."""
        kept, changed = vectors.split(self.split, dim=1)
        raw, shift = (SUBNET_SCALE * self.subnet(torch.cat([kept, conditions], dim=1))).chunk(2, dim=1)
        log_factor = CLAMP * raw.tanh()
        vectors = torch.cat([kept, changed * log_factor.exp() + shift], dim=1)
        scale = SOFTPLUS_SCALE * F.softplus(self.raw_scale, beta=SOFTPLUS_BETA)
        return (vectors * scale + self.offset) @ self.rotation.T, log_factor.sum(dim=1) + scale.log().sum()


def random_rotation(size: int) -> Tensor:
    """A rotation (size, size), uniform over all: the sign fix makes the QR decomposition of normal values unique."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    q = q * r.diagonal().sign()
    q[:, 0] *= torch.linalg.det(q).sign()
    return q.float()


def position_code(height: int, width: int, size: int = 128) -> Tensor:
    """Sine and cosine code of positions, (height * width, size), row after row; ``size`` is even.

    The first half of the channels encodes the column and the second the row: sines at even channels k, cosines beside
    them, both of frequency exp(-k ln(10000) / (size / 2)).
    """
    half = size // 2
    frequencies = torch.exp(-torch.arange(0, half, 2) * math.log(1e4) / half)

    def axis(length: int) -> Tensor:
        angles = torch.arange(length)[:, None] * frequencies
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :half]

    return torch.cat(torch.broadcast_tensors(axis(width), axis(height)[:, None]), dim=2).flatten(0, 1)
