from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from apt.layers.rope import rotate
from apt_attention_tva.autopoietic import AutopoieticAttention
from apt_attention_tva.costs import BLOCK
from apt_attention_tva.provider import Autopoietic

from .conftest import D_MODEL, HEADS, output, states, trained

NEUTRAL = {"epsilon": 0, "alpha": 0, "beta": 0, "init_tau": 1}


def heads_of(layer: AutopoieticAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width, kv_heads = layer.shape.width, layer.shape.num_kv_heads
    q, k, v = (
        linear(x, layer.qkv.weight).unflatten(-1, (-1, width)).transpose(1, 2).split((HEADS, kv_heads, kv_heads), 1)
    )
    q, k = (rotate(t, torch.arange(x.shape[1]).unsqueeze(0), 10_000.0) for t in (q, k))
    return q, *(t.repeat_interleave(HEADS // kv_heads, 1) for t in (k, v))


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("seq", [13, BLOCK + 9])
def test_at_the_neutral_settings_it_is_softmax_attention(kv_heads: int, seq: int) -> None:
    torch.manual_seed(0)
    layer = Autopoietic(num_kv_heads=kv_heads, **NEUTRAL).create_layer(D_MODEL, HEADS).double().eval()
    x = states(2, seq)
    q, k, v = heads_of(layer, x)
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(layer(x), layer.out(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("seq", [13, BLOCK + 9])
def test_it_is_its_formula(kv_heads: int, seq: int) -> None:
    layer = trained(Autopoietic(epsilon=0.5, alpha=0.3, beta=0.8, num_kv_heads=kv_heads))
    assert isinstance(layer, AutopoieticAttention)
    x = states(2, seq)
    q, k, v = heads_of(layer, x)
    scores = q @ k.mT / math.sqrt(layer.shape.width)
    mixed = torch.zeros_like(q)
    tau = 2 ** math.tanh(layer.theta.item())
    for i in range(seq):
        s = scores[:, :, i, : i + 1]
        m = s.mean(1, keepdim=True)
        p = m.softmax(-1)
        entropy = -(p * p.log()).sum(-1, keepdim=True) / math.log(i + 1) if i else torch.zeros(2, 1, 1)
        bend = (torch.relu(s.unsqueeze(-1) * layer.line["slope"] + layer.line["offset"]) * layer.line["height"]).sum(-1)
        z = (0.7 * s + 0.3 * m + 0.5 * bend) / (tau * torch.exp(0.8 * (entropy - 0.5)))
        mixed[:, :, i] = (z.softmax(-1).unsqueeze(-2) @ v[:, :, : i + 1])[:, :, 0]
    torch.testing.assert_close(output(layer(x)), layer.out(mixed.transpose(1, 2).flatten(2)))


def test_a_fresh_layer_is_attention_at_its_temperature() -> None:
    torch.manual_seed(0)
    layer = Autopoietic(alpha=0, beta=0, epsilon=0.5, init_tau=1.3).create_layer(D_MODEL, HEADS).double()
    x = states(1, 9)
    q, k, v = heads_of(layer, x)
    mixed = scaled_dot_product_attention(q / 1.3, k, v, is_causal=True)
    torch.testing.assert_close(layer(x), layer.out(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("init_tau", [0.51, 1.0, 1.3, 1.99])
def test_the_temperature_starts_where_it_is_told(init_tau: float) -> None:
    layer = Autopoietic(init_tau=init_tau).create_layer(D_MODEL, HEADS)
    assert 2 ** layer.theta.tanh().item() == pytest.approx(init_tau, rel=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"epsilon": 0.2},
        {"alpha": 0.5},
        {"beta": 0.9},
        {"sr_ratio": 1},
        {"init_tau": 0.7},
        {"num_kv_heads": 1},
        {"positions": "none"},
    ],
)
def test_every_option_has_an_effect(changed: dict[str, object]) -> None:
    x, plain = states(1, 13), {"epsilon": 0.5, "sr_ratio": 2}
    before, after = (trained(Autopoietic.model_validate(options)) for options in (plain, plain | changed))
    if "sr_ratio" in changed:
        assert before.line["height"].numel() < after.line["height"].numel() == D_MODEL
    assert not torch.allclose(output(before(x)), output(after(x)))


def test_its_state_dict_has_these_names() -> None:
    assert list(Autopoietic().create_layer(8, 2).state_dict()) == [
        "theta",
        "qkv.weight",
        "out.weight",
        "line.height",
        "line.offset",
        "line.slope",
    ]
    assert list(Autopoietic(epsilon=0).create_layer(8, 2).state_dict()) == ["theta", "qkv.weight", "out.weight"]


def test_a_row_that_may_see_nothing_is_zero() -> None:
    layer, x = trained(Autopoietic()), states(1, 5)
    mask = torch.tensor([[False, False, True, True, True]])
    q, k, v = heads_of(layer, x)
    mixed = layer.attend(q, k, v, causal=True, mask=mask, window=None)
    assert not mixed[:, :, :2].any()
    assert bool(mixed[:, :, 2:].any())
