"""Flows against autograd: their log-determinants are those of their Jacobians, and they are invertible."""

from __future__ import annotations

import pytest
import torch

from adfeatures.errors import InputError
from training.methods.flows import ConditionalFlow, CouplingBlock, random_rotation


def randomized(flow: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return flow.double()


@pytest.mark.parametrize("channels", [2, 5, 8])
def test_log_determinants_are_those_of_the_jacobians(channels: int) -> None:
    torch.manual_seed(0)
    flow = randomized(ConditionalFlow(channels, 6, blocks=3))
    vectors, conditions = torch.randn(4, channels).double(), torch.randn(4, 6).double()
    _, found = flow(vectors, conditions)
    for vector, condition, log_det in zip(vectors, conditions, found, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x, c=condition: flow(x[None], c[None])[0][0], vector)
        # The rotations are so only to the precision of float32.
        assert torch.linalg.slogdet(jacobian).logabsdet.item() == pytest.approx(log_det.item(), abs=1e-6)


def test_likelihood_is_that_of_the_change_of_variables() -> None:
    torch.manual_seed(0)
    flow = ConditionalFlow(6, 4, blocks=2)
    randomized(flow)
    vectors, conditions = torch.randn(5, 6).double(), torch.randn(5, 4).double()
    normal, log_det = flow(vectors, conditions)
    prior = torch.distributions.Normal(0, 1).log_prob(normal).sum(dim=1)
    torch.testing.assert_close(flow.log_likelihood(vectors, conditions), (prior + log_det) / 6)


def test_a_block_begins_close_to_a_rotation() -> None:
    torch.manual_seed(0)
    block = CouplingBlock(8, 4)
    scale = 0.1 * torch.nn.functional.softplus(block.raw_scale, beta=0.5)
    torch.testing.assert_close(scale, torch.ones(8))
    rotation = random_rotation(7)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(7), atol=1e-6, rtol=0)
    assert torch.linalg.det(rotation).item() == pytest.approx(1, abs=1e-5)


def test_vectors_that_cannot_be_split() -> None:
    with pytest.raises(InputError, match="splits its channels in two"):
        ConditionalFlow(1, 4)
