from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from apt.core.providers import AttentionProvider
from apt_attention_tva.provider import TVA, Autopoietic

PROVIDERS = [
    TVA(),
    TVA(r=2, num_kv_heads=2, per_head=True),
    TVA(r=1, s=3),
    TVA(r=2, positions="none"),
    TVA(r=2, project="last", num_kv_heads=2, window=4),
    TVA(rank=6, project="last", qk_norm=True, per_head=True, head_width=24, bias="all"),
    TVA(rank=5, project="last", positions="learned", s=2),
    TVA(r=2, qk_norm=True, positions="none", window=20),
    Autopoietic(),
    Autopoietic(num_kv_heads=1, epsilon=0),
    Autopoietic(num_kv_heads=2, qk_norm=True, window=20),
    Autopoietic(alpha=0, beta=0, epsilon=0, positions="none"),
]
SIZES = [(64, 4, 2, 5), (64, 4, 2, 60), (64, 4, 1, 300), (96, 4, 3, 128)]
EVERY = [(provider, *size) for provider, size in itertools.product(PROVIDERS, SIZES)]


def build(provider: AttentionProvider, d_model: int, num_heads: int) -> nn.Module:
    layer = provider.create_layer(d_model, num_heads)
    assert isinstance(layer, nn.Module)
    return layer


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages, other than parameters, that a forward pass keeps for the backward pass."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = layer(x)
    assert result is not None
    return sum(kept.values())


@pytest.mark.parametrize(("provider", "d_model", "num_heads", "batch", "seq"), EVERY)
def test_estimates_agree_with_what_pytorch_counts(
    provider: AttentionProvider, d_model: int, num_heads: int, batch: int, seq: int
) -> None:
    layer = build(provider, d_model, num_heads)
    assert provider.get_parameter_count(d_model, num_heads) == sum(p.numel() for p in layer.parameters())
    x = torch.randn(batch, seq, d_model, requires_grad=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        layer(x[:1])
    assert provider.get_flops_estimate(seq, d_model, num_heads) == pytest.approx(counter.get_total_flops(), rel=0.01)
    estimate = provider.get_memory_estimate(seq, d_model, num_heads, batch)
    assert estimate == pytest.approx(saved_bytes(layer, x), rel=0.05)


@pytest.mark.parametrize("seq", [300, 600])
def test_memory_grows_with_the_sequence_and_not_with_its_square(seq: int) -> None:
    for provider in (TVA(), Autopoietic()):
        layer = build(provider, 32, 2)
        one, double = (saved_bytes(layer, torch.randn(1, length, 32, requires_grad=True)) for length in (seq, 2 * seq))
        # Autopoietic attention keeps one byte, not floating-point numbers, for each pair of query and key.
        assert double < 2.1 * one + 2 * seq**2
