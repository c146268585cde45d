from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from apt.layers import Part
from apt.layers.rope import rotate
from apt_attention_tva.provider import TVA
from apt_attention_tva.tva import NarrowAttention, TriVeinAttention

from .conftest import D_MODEL, HEADS, output, states, trained

OPTIONS = [
    {"r": 2},
    {"rank": 6, "per_head": True},
    {"num_kv_heads": 1, "per_head": True, "scale": "head"},
    {"r": 4, "s": 2, "tau": 0.1},
    {"rank": 5, "positions": "none"},
    {"rank": 5, "project": "last", "window": 5, "bias": "qkv"},
    {"rank": 4, "project": "last", "per_head": True, "qk_norm": True, "bias": "all"},
    {"r": 2, "qk_norm": True, "window": 5, "rope_scaling": {"type": "yarn", "factor": 4, "original_max_seq_len": 8}},
]


def tva(**options: object) -> TriVeinAttention:
    layer = trained(TVA.model_validate(options))
    assert isinstance(layer, TriVeinAttention)
    return layer


def reference(layer: TriVeinAttention, x: Tensor) -> Tensor:
    """The formula of the docstring, head by head, with all scores in memory."""
    shape, seq = layer.shape, x.shape[1]
    heads, kv_heads, d = shape.num_heads, shape.num_kv_heads, layer.d_head
    scale = (layer.rank if layer.apt_provider.scale == "rank" else d) ** -0.5
    wide = linear(x, layer.qkv.weight, layer.qkv.bias).unflatten(-1, (-1, d)).transpose(1, 2)
    q, k, v = wide.split((heads, kv_heads, kv_heads), 1)

    def place(t: Tensor, norm: nn.Module | None) -> Tensor:
        t = t if norm is None else norm(t)
        positions = torch.arange(seq).unsqueeze(0)
        return t if shape.rope_theta is None else rotate(t, positions, shape.rope_theta, shape.rope_scaling)

    distance = torch.arange(seq).unsqueeze(1) - torch.arange(seq)
    hidden = (distance < 0) | (distance >= (shape.window or seq))
    mixed = []
    for head in range(heads):
        kv = head * kv_heads // heads
        down, up = (p[kv if len(p) > 1 else 0] for p in (layer.down, layer.up))
        one, two = q[:, head : head + 1], k[:, kv : kv + 1]
        if layer.late:
            one, two = (place(t, norm) @ down.T for t, norm in ((one, layer.q_norm), (two, layer.k_norm)))
        else:
            one, two = (place(t @ down.T, norm) for t, norm in ((one, layer.q_norm), (two, layer.k_norm)))
        scores = (one @ two.mT * scale).masked_fill(hidden, -math.inf)
        mixed.append((scores.softmax(-1) @ (v[:, kv : kv + 1] @ down.T)) @ up.T)
    return linear(torch.cat(mixed, -1)[:, 0], layer.out.weight, layer.out.bias)


@pytest.mark.parametrize("options", [o for o in OPTIONS if "s" not in o])
@pytest.mark.parametrize("seq", [3, 40])
def test_it_is_its_formula_whether_weights_are_composed_or_not(options: dict[str, object], seq: int) -> None:
    layer, x = tva(**options), states(2, seq)
    torch.testing.assert_close(output(layer(x)), reference(layer, x))


@pytest.mark.parametrize("scale", ["rank", "head"])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_with_identity_projectors_it_is_scaled_dot_product_attention(scale: str, kv_heads: int) -> None:
    layer, x = tva(r=1, scale=scale, num_kv_heads=kv_heads), states(2, 13)
    width = D_MODEL // HEADS
    with torch.no_grad():
        for projector in (layer.down, layer.up):
            projector.copy_(torch.eye(width))
    q, k, v = (
        linear(x, layer.qkv.weight).unflatten(-1, (-1, width)).transpose(1, 2).split((HEADS, kv_heads, kv_heads), 1)
    )
    q, k = (rotate(t, torch.arange(13).unsqueeze(0), 10_000.0) for t in (q, k))
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv_heads != HEADS)
    torch.testing.assert_close(output(layer(x)), layer.out(mixed.transpose(1, 2).flatten(2)))


def test_at_full_rank_an_orthogonal_projector_changes_nothing_but_rotations() -> None:
    layer, x = trained(TVA(r=1, positions="none")), states(2, 13)
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    outputs = []
    for down in (torch.eye(8, dtype=torch.float64), basis):
        with torch.no_grad():
            layer.down.copy_(down)  # type: ignore[operator]
            layer.up.copy_(down.T)  # type: ignore[operator]
        outputs.append(output(layer(x)))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("options", OPTIONS)
def test_folded_it_is_plain_narrow_attention_with_the_same_outputs_and_cache(options: dict[str, object]) -> None:
    layer, x = tva(**options), states(2, 13)
    folded = layer.fold()
    assert isinstance(folded, NarrowAttention)
    assert not folded.training
    torch.testing.assert_close(output(folded(x)), output(layer(x)))
    cache = folded.create_cache(2, 13, torch.float64, torch.device("cpu"))
    assert cache.k.shape == layer.create_cache(2, 13, torch.float64, torch.device("cpu")).k.shape
    steps = torch.cat([output(folded(token, cache=cache)) for token in x.split(1, 1)], 1)
    torch.testing.assert_close(steps, output(layer(x)))
    single = layer.float()
    torch.testing.assert_close(output(single.fold()(x.float())), output(single(x.float())), atol=1e-5, rtol=1e-5)
    memory = states(2, 6, seed=3).float()
    across = [output(each(x.float(), memory=memory, causal=False)) for each in (single, single.fold())]
    torch.testing.assert_close(*across, atol=1e-5, rtol=1e-5)


def test_folding_leaves_fewer_numbers_and_the_layer_as_it_was() -> None:
    layer, x = tva(r=4), states(1, 5)
    before = output(layer(x))
    folded = layer.fold()
    assert sum(p.numel() for p in folded.parameters()) == 4 * D_MODEL * HEADS * layer.rank
    with torch.no_grad():
        folded.inward.weight.zero_()
    assert torch.equal(output(layer(x)), before)


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({}, 4),
        ({"r": 1}, 16),
        ({"r": 3}, 6),
        ({"r": 100}, 2),
        ({"rank": 10}, 10),
        ({"rank": 7, "positions": "none"}, 7),
    ],
)
def test_the_rank_is_the_head_width_over_r_rounded_up_to_even(options: dict[str, object], rank: int) -> None:
    provider = TVA.model_validate(options)
    assert provider.get_rank(64, 4) == rank
    assert provider.get_cache_size(64, 4) == 2 * 4 * rank


def test_projectors_start_orthonormal_and_transposed() -> None:
    layer = TVA(per_head=True, num_kv_heads=2, r=2).create_layer(64, 4)
    assert layer.down.shape == (2, 8, 16)
    torch.testing.assert_close(layer.down @ layer.down.mT, torch.eye(8).expand(2, -1, -1), atol=1e-5, rtol=0)
    assert torch.equal(layer.up, layer.down.mT)


def test_its_state_dict_has_these_names() -> None:
    assert list(TVA(s=1).create_layer(8, 2).state_dict()) == [
        "down",
        "up",
        "compensator.down",
        "compensator.read",
        "compensator.write",
        "compensator.gate.weight",
        "compensator.gate.bias",
        "qkv.weight",
        "out.weight",
    ]


@pytest.mark.parametrize(
    "changed",
    [
        {"r": 4},
        {"rank": 2},
        {"per_head": True},
        {"scale": "head"},
        {"num_kv_heads": 1},
        {"rope_theta": 100.0},
        {"positions": "none"},
        {"project": "last"},
        {"head_width": 12},
        {"qk_norm": True},
        {"bias": "qkv"},
        {"window": 3},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"s": 1},
        {"s": 1, "tau": 0.9},
        {"s": 1, "subspace_loss": 0.5},
    ],
)
def test_every_option_has_an_effect(changed: dict[str, object]) -> None:
    plain = {"r": 2} | ({"s": 1} if len(changed) > 1 else {})
    results = []
    for options in (plain, plain | changed):
        layer = tva(**options)
        layer = layer.float().eval()
        results.append(layer(states(1, 13).float()))
    assert not all(torch.equal(a, b) for a, b in zip(*map(tensors, results), strict=False))


def tensors(result: Tensor | Part) -> list[Tensor]:
    return [result.output, *result.losses.values()] if isinstance(result, Part) else [result]


def test_scores_of_all_tokens_are_never_in_memory() -> None:
    layer = TVA().create_layer(32, 2)
    seq, largest = 700, 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.untyped_storage().nbytes() // 4)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(1, seq, 32))
    assert largest < seq * seq


def test_a_layer_that_is_trained_keeps_its_formula() -> None:
    torch.manual_seed(0)
    layer, x = TVA(r=2, s=1).create_layer(D_MODEL, HEADS), states(2, 13).float()
    assert isinstance(layer, nn.Module)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    target, losses = torch.randn(2, 13, D_MODEL), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (output(layer(x)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(output(layer.fold()(x)), output(layer(x)), atol=1e-5, rtol=1e-5)
