"""Planted data: residual vectors that really are sparse sums of known directions."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ray_explain.features.sae import SAE
from ray_explain.features.training import train_sae

K = 3  # planted directions in each token


class Planted(NamedTuple):
    directions: Float[Tensor, "planted d_model"]
    activations: Float[Tensor, "tokens planted"]
    residual: Float[Tensor, "tokens d_model"]


def plant(seed: int, tokens: int = 8000, d_model: int = 32, planted: int = 48, norm: float = 20.0) -> Planted:
    """Each token is a sum of K of the directions, about `norm` long, off centre, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = functional.normalize(torch.randn(planted, d_model, generator=generator), dim=1)
    chosen = torch.rand(tokens, planted, generator=generator).topk(K, dim=1).indices
    strengths = 1 + torch.rand(tokens, K, generator=generator)
    activations = torch.zeros(tokens, planted).scatter_(1, chosen, strengths * norm / 2.5)
    noise = torch.randn(tokens, d_model, generator=generator) * norm / 500
    centre = functional.normalize(torch.randn(d_model, generator=generator), dim=0) * norm / 2
    return Planted(directions, activations, activations @ directions + noise + centre)


@pytest.fixture(scope="session")
def planting() -> Callable[..., Planted]:
    return plant


@pytest.fixture(scope="session")
def planted() -> Planted:
    return plant(seed=0)


@pytest.fixture(scope="session")
def trained(planted: Planted) -> SAE:
    return train_sae(planted.residual, d_sae=64, k=K, steps=300, batch_tokens=512, seed=0, layer=1)


@pytest.fixture(scope="session")
def random_sae() -> Callable[..., SAE]:
    return make_random_sae


def make_random_sae(d_sae: int = 12, d_model: int = 6, seed: int = 0, **settings) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "encoder": torch.randn(d_sae, d_model, generator=generator),
        "encoder_bias": torch.randn(d_sae, generator=generator),
        "directions": torch.randn(d_sae, d_model, generator=generator),
        "decoder_bias": torch.randn(d_model, generator=generator),
    }
    if settings.get("activation") == "jumprelu":
        tensors["threshold"] = torch.rand(d_sae, generator=generator)
    return SAE(**{**tensors, **settings})
