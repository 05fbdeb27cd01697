"""The published form of the method, written anew from the paper's equations, plainly, to compare with.

It projects the references to keys and values again for every image of every batch, materializes the attention weights,
and matches by the whole matrix of similarities, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import scoring
from .extractor import FeatureExtractor
from .projector import ResidualProjector


def naive_projection(projector: ResidualProjector, residuals: Sequence[Tensor]) -> list[Tensor]:
    """The projector in its published form, on the parameters of ours, which can be trained by it."""
    levels = zip(projector.children(), projector.num_heads, residuals, strict=True)
    return [_project_level(dict(level.named_parameters()), num_heads, x) for level, num_heads, x in levels]


def _project_level(parameters: dict[str, Tensor], num_heads: int, x: Tensor) -> Tensor:
    def affine(name: str, function: Callable[..., Tensor], tokens: Tensor) -> Tensor:
        return function(tokens, parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    tokens, expanded = x.flatten(2).transpose(1, 2), parameters["x_ref"].expand(len(x), -1, -1)
    references = affine("ref_proj.project", F.conv1d, expanded.transpose(1, 2)).permute(2, 0, 1)
    queries = tokens.transpose(0, 1)
    w_in, b_in, w_out, b_out = (tensor for name, tensor in parameters.items() if ".cross_attn." in name)
    # As torch's own module calls it, whose default is to return the attention weights.
    attended, _ = F.multi_head_attention_forward(
        queries, references, references, x.shape[1], num_heads, w_in, b_in, None, None, False, 0.0, w_out, b_out
    )
    tokens = tokens - attended.transpose(0, 1)
    hidden = affine("layers.0.mlp.fc1", F.linear, tokens)
    squeezed = F.relu(affine("layers.0.mlp.se.fc1", F.linear, hidden.mean(1, keepdim=True)))
    hidden = F.gelu(hidden * torch.sigmoid(affine("layers.0.mlp.se.fc2", F.linear, squeezed)))
    return (tokens + affine("layers.0.mlp.fc2", F.linear, hidden)).transpose(1, 2).reshape(x.shape)


def naive_residuals(features: Sequence[Tensor], banks: Sequence[Tensor]) -> list[Tensor]:
    """Maps (B, C, h, w) minus the most similar rows of banks (N, C), by the whole matrix of cosine similarities."""
    residuals = []
    for level, bank in zip(features, banks, strict=True):
        queries = level.permute(0, 2, 3, 1).flatten(0, 2)
        nearest = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).argmax(dim=1)
        residuals.append((queries - bank[nearest]).unflatten(0, (len(level), *level.shape[2:])).permute(0, 3, 1, 2))
    return residuals


def naive_features(extractor: FeatureExtractor, x: Tensor) -> list[Tensor]:
    """The whole path in its published form, with the backbone, the weights and the references of ours."""
    if extractor.projector is None:
        raise TypeError(f"{extractor.name} has no projector, and so no published form.")
    banks = next(iter(extractor.references.values())).rows
    return naive_projection(extractor.projector, naive_residuals(extractor.backbone(x), banks))


def naive_scores(extractor: FeatureExtractor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Maps and scores of the published form."""
    maps = scoring.feature_norm_map(naive_features(extractor, x), extractor.img_size)
    return maps, maps.amax(dim=(1, 2))
