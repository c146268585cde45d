"""The layers that every attention test is run on: both providers, with options that change the path through them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from apt.core.providers import AttentionProvider, RopeScaling
from apt.layers import Part
from apt_attention_tva.provider import TVA, Autopoietic

settings.register_profile("apt", deadline=None)  # the first call of a PyTorch function is slow
settings.load_profile("apt")

D_MODEL, HEADS = 24, 3
NTK = RopeScaling(type="ntk", factor=4)

CASES: dict[str, AttentionProvider] = {
    "tva": TVA(r=2),
    "tva, a projector a head, normals": TVA(rank=6, per_head=True, s=2, tau=0.3, scale="head"),
    "tva, multi-query": TVA(r=4, num_kv_heads=1),
    "tva, no positions": TVA(rank=3, positions="none"),
    "tva, projected last, a window, normed": TVA(rank=5, project="last", window=6, qk_norm=True, per_head=True),
    "tva, a window, stretched, biases": TVA(r=2, window=6, rope_scaling=NTK, bias="all", num_kv_heads=1),
    "autopoietic": Autopoietic(alpha=0.3, beta=0.8, epsilon=0.5),
    "autopoietic, multi-query": Autopoietic(num_kv_heads=1, init_tau=0.8),
    "autopoietic, a window, normed": Autopoietic(alpha=0.3, beta=0.8, epsilon=0.5, window=6, qk_norm=True),
    "autopoietic, neutral": Autopoietic(alpha=0, beta=0, epsilon=0, init_tau=1),
}

MakeLayer = Callable[..., nn.Module]


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def provider(request: pytest.FixtureRequest) -> AttentionProvider:
    return request.param


@pytest.fixture
def layer(provider: AttentionProvider) -> nn.Module:
    return trained(provider)


def trained(provider: AttentionProvider, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """A layer in float64 whose every parameter has left its starting point."""
    torch.manual_seed(seed)
    made = provider.create_layer(D_MODEL, HEADS, dropout)
    assert isinstance(made, nn.Module)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made.double().eval()


def states(batch: int, seq: int, seed: int = 1) -> Tensor:
    """Random states [batch, seq, D_MODEL] in float64."""
    return torch.randn(batch, seq, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output(result: Tensor | Part) -> Tensor:
    """The tensor of whatever a layer returned."""
    return result.output if isinstance(result, Part) else result
