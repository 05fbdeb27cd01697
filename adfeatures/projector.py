"""The projector: cross-attention from residual patches to learnable keys and values (paper section 3.3).

The keys and values do not depend on the input. Outside of training they are computed once and kept (the frozen form);
in training they are computed once per forward pass, whatever the batch. Both forms share one code path and one set of
parameters, with the published names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import make_divisible
from torch import Tensor, nn

from .errors import InputError


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map of tokens (B, L, C) to (B, L, weight.shape[0]), by the faster of torch's two ways."""
    if torch.compiler.is_compiling() or tokens.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return F.linear(tokens, weight, bias)
    # On a CPU torch convolves by oneDNN and multiplies by MKL, which leaves half of an AMD processor unused.
    return F.conv1d(tokens.transpose(1, 2), weight[..., None], bias).transpose(1, 2)


class _SqueezeExcite(nn.Module):
    """Gate the channels of tokens (B, L, C) by their mean over the tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = make_divisible(channels / 16, 8)
        self.fc1 = nn.Linear(channels, squeezed)
        self.fc2 = nn.Linear(squeezed, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.fc2(F.relu(self.fc1(tokens.mean(dim=1, keepdim=True)))).sigmoid()


class _Mlp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.se = _SqueezeExcite(4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.gelu(self.se(linear(tokens, self.fc1.weight, self.fc1.bias)))
        return linear(hidden, self.fc2.weight, self.fc2.bias)


class _CrossAttention(nn.Module):
    """Multi-head attention under the parameter names of torch's own; keys and values are projected apart."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def keys_values(self, references: Tensor) -> tuple[Tensor, Tensor]:
        """Project references (1, R, C) to keys and values (1, heads, R, C / heads)."""
        channels = references.shape[-1]
        projected = linear(references, self.in_proj_weight[channels:], self.in_proj_bias[channels:])
        keys, values = projected.chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend from tokens (B, L, C)."""
        channels = tokens.shape[-1]
        queries = self._split(linear(tokens, self.in_proj_weight[:channels], self.in_proj_bias[:channels]))
        # The images share their keys, so their tokens form one long sequence: the fused kernel reads the keys once.
        queries = queries.transpose(0, 1).flatten(1, 2).unsqueeze(0).contiguous()
        attended = F.scaled_dot_product_attention(queries, keys, values)
        attended = attended.squeeze(0).unflatten(1, tokens.shape[:2]).permute(1, 2, 0, 3).flatten(2)
        return linear(attended, self.out_proj.weight, self.out_proj.bias)

    def _split(self, tokens: Tensor) -> Tensor:
        # The fused kernel takes no others than contiguous ones.
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).contiguous()


class _Layer(nn.Module):
    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.cross_attn = _CrossAttention(channels, num_heads)
        self.mlp = _Mlp(channels)

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # What normal references explain is taken away: the minus of the paper's residual attention.
        tokens = tokens - self.cross_attn(tokens, keys, values)
        return tokens + self.mlp(tokens)


class _ReferenceProjection(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv1d(channels, channels, kernel_size=1)
        nn.init.kaiming_normal_(self.project.weight, mode="fan_in", nonlinearity="leaky_relu")

    def forward(self, tokens: Tensor) -> Tensor:
        return linear(tokens, self.project.weight[..., 0], self.project.bias)


class _LevelProjector(nn.Module):
    def __init__(self, channels: int, num_heads: int, num_keys: int) -> None:
        super().__init__()
        self.x_ref = nn.Parameter(torch.randn(1, num_keys, channels))
        self.ref_proj = _ReferenceProjection(channels)
        self.layers = nn.ModuleList([_Layer(channels, num_heads)])
        self._frozen: _Frozen | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Project residual maps (B, C, h, w) to maps of the same shape."""
        tokens = self.layers[0](x.flatten(2).transpose(1, 2), *self._keys_values())
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:]).contiguous()

    def _keys_values(self) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            # What is kept would be a constant of the graph, whatever becomes of the parameters.
            return self._compute_keys_values()
        attention = self._attention
        sources = (self.x_ref, *self.ref_proj.parameters(), attention.in_proj_weight, attention.in_proj_bias)
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            keys, values = self._compute_keys_values()
            # An optimizer's step may follow this pass's gradients, and a fused one leaves no trace in the parameters.
            keys.register_hook(self._thaw)
            return keys, values
        if self._frozen is None or not self._frozen.follows(sources):
            # Kept values serve later calls in any mode: no inference tensors, nor in autocast's lower precision.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.x_ref.device.type, enabled=False):
                self._frozen = _Frozen(sources, self._compute_keys_values())
        return self._frozen.keys_values

    def _thaw(self, gradient: Tensor) -> None:
        self._frozen = None

    def _compute_keys_values(self) -> tuple[Tensor, Tensor]:
        return self._attention.keys_values(self.ref_proj(self.x_ref))

    @property
    def _attention(self) -> _CrossAttention:
        return cast(_Layer, self.layers[0]).cross_attn

    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _LevelProjector:
        # A move to another device or dtype lets go of the memory held here.
        self._frozen = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, object]:
        # Copies and pickles hold the parameters alone: what follows from them is soon computed again.
        return {**self.__dict__, "_frozen": None}


class _Frozen:
    """Keys and values, with the state of the parameters that they were computed from."""

    def __init__(self, sources: tuple[Tensor, ...], keys_values: tuple[Tensor, Tensor]) -> None:
        self.keys_values, self._sources = keys_values, sources
        self._states = [_state(source) for source in sources]
        # Held, so that new values put in their place (``parameter.data = ...``) cannot come to lie at their address.
        self._memory = [source.detach() for source in sources]

    def follows(self, sources: tuple[Tensor, ...]) -> bool:
        same = all(old is new for old, new in zip(self._sources, sources, strict=True))
        return same and self._states == [_state(source) for source in sources]


def _state(tensor: Tensor) -> object:
    """What changes whenever the tensor's values do."""
    waiting = tensor.is_leaf and tensor.requires_grad and tensor.grad is not None
    if waiting or tensor.is_inference():
        # A step that waits might not be counted, and inference tensors count nothing: equal to no other state.
        return object()
    return tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device


class ResidualProjector(nn.Module):
    """One independent projector per level, with the state-dict keys of the published files: ``l1_proj.x_ref`` ...

    Args:
        channels: Channels of each level.
        num_heads: Attention heads. A level whose channels this does not divide takes the largest divisor below it.
        num_keys: Learnable references per level.
    """

    # Ordinary parameters even where all else is made in inference mode, whose tensors do not count their changes.
    @torch.inference_mode(False)
    def __init__(self, channels: Sequence[int], num_heads: int = 16, num_keys: int = 2048) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.num_heads = tuple(next(heads for heads in range(num_heads, 0, -1) if c % heads == 0) for c in channels)
        for number, (c, heads) in enumerate(zip(self.channels, self.num_heads, strict=True), start=1):
            self.add_module(f"l{number}_proj", _LevelProjector(c, heads, num_keys))

    def forward(self, residuals: Sequence[Tensor], indices: Sequence[int] | None = None) -> list[Tensor]:
        """Project residual maps, one (B, C_l, h_l, w_l) per level, to maps of the same shapes.

        Args:
            residuals: Maps of all levels.
            indices: Levels to project and return, counted from 0. The default is all.

        Raises:
            InputError: If the number of levels or their channels differ from those of the projector.
        """
        found = tuple(r.shape[1] for r in residuals)
        if found != self.channels:
            raise InputError(f"The projector takes levels of {self.channels} channels, got {found}.")
        projectors = list(self.children())
        chosen = range(len(projectors)) if indices is None else indices
        return [projectors[index](residuals[index]) for index in chosen]
