"""The ways of attention: the same numbers, whichever is taken."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apt.layers.attend import attend
from apt.layers.ways import Shape, Way, choose_ways, each_its_own, mix_by, possible_ways, shape_of, watch_shapes

WAYS: tuple[Way, ...] = ("sdpa", "padded", "explicit")


def inputs(
    heads: int = 4,
    kv_heads: int = 2,
    seq: int = 6,
    width: int = 5,
    v_width: int = 7,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads * 1000 + seq * 10 + width)
    sizes = ((2, heads, seq, width), (2, kv_heads, seq, width), (2, kv_heads, seq, v_width))
    q, k, v = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def by_hand(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, visible: Tensor | None, scale: float | None) -> Tensor:
    """In float64, row by row, as the formula says."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    result = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = [
                    j
                    for j in range(k.shape[2])
                    if (not causal or j <= i)
                    and (visible is None or bool(visible.expand(*q.shape[:3], k.shape[2])[b, h, i, j]))
                ]
                if seen:
                    scores = k[b, h // group, seen] @ q[b, h, i] * (q.shape[3] ** -0.5 if scale is None else scale)
                    result[b, h, i] = scores.softmax(0) @ v[b, h // group, seen]
    return result


@pytest.mark.parametrize("way", WAYS)
@given(
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    seq=st.integers(1, 5),
    width=st.integers(1, 18),
    v_width=st.integers(1, 18),
    kind=st.sampled_from(["causal", "full", "mask", "mask of each head"]),
    scale=st.sampled_from([None, 0.3]),
)
def test_every_way_is_the_formula(
    way: Way, kv_heads: int, group: int, seq: int, width: int, v_width: int, kind: str, scale: float | None
) -> None:
    q, k, v = inputs(kv_heads * group, kv_heads, seq, width, v_width)
    visible = None
    if kind.startswith("mask"):
        heads = 1 if kind == "mask" else kv_heads * group
        visible = torch.rand(2, heads, seq, seq, generator=torch.Generator().manual_seed(seq)) < 0.6
    mixed = mix_by(way, q, k, v, causal=kind == "causal", visible=visible, scale=scale, dropout=0.0)
    expected = by_hand(q, k, v, causal=kind == "causal", visible=visible, scale=scale)
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["padded", "explicit"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_way_has_the_gradient_of_the_kernel(way: Way, masked: bool) -> None:
    visible = torch.ones(6, 6, dtype=torch.bool).tril(-1) if masked else None  # the first row sees nothing
    found = {}
    for each in ("sdpa", way):
        q, k, v = (tensor.requires_grad_() for tensor in inputs(dtype=torch.float64))
        mixed = mix_by(each, q, k, v, causal=not masked, visible=visible, scale=None, dropout=0.0)
        found[each] = [mixed, *torch.autograd.grad((mixed * torch.arange(7)).sum(), (q, k, v))]
    for left, right in zip(found[way], found["sdpa"], strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
    if masked:
        assert not found[way][0][:, :, 0].any()


@pytest.mark.parametrize("way", WAYS)
def test_in_bfloat16_every_way_is_as_exact_as_the_kernel(way: Way) -> None:
    q, k, v = inputs(seq=48, width=16, v_width=16, dtype=torch.bfloat16)
    exact = by_hand(q, k, v, causal=True, visible=None, scale=None)
    kernel = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    mixed = mix_by(way, q, k, v, causal=True, visible=None, scale=None, dropout=0.0)
    assert mixed.dtype == torch.bfloat16
    assert (mixed.double() - exact).norm() <= 2 * (kernel.double() - exact).norm() + 1e-9


@pytest.mark.parametrize("way", WAYS)
def test_dropout_drops_weights_and_keeps_the_mean(way: Way) -> None:
    torch.manual_seed(0)
    # Every value is 1, so the mean over many heads is 1 with dropout too, and single ones are multiples of 1 / (4 * 0.5).
    q, k, v = torch.zeros(64, 64, 4, 16), torch.zeros(64, 64, 4, 16), torch.ones(64, 64, 4, 16)
    mixed = mix_by(way, q, k, v, causal=False, visible=None, scale=None, dropout=0.5)
    assert mixed.mean().item() == pytest.approx(1.0, abs=0.02)
    assert set((mixed * 2).round(decimals=4).unique().tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}


def test_a_choice_is_in_force_where_it_was_made_and_no_longer() -> None:
    q, k, v = inputs(width=16, v_width=16)
    shape = shape_of(q, k, v, causal=True, masked=False)
    seen: list[str] = []

    def product(*arguments: Tensor, alpha: float) -> Tensor:
        seen.append("explicit")
        return real(*arguments, alpha=alpha)

    real = torch.baddbmm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "baddbmm", product)
        attend(q, k, v, causal=True)
        assert not seen
        with choose_ways({shape: "explicit"}):
            attend(q, k, v, causal=True)
            attend(q[:, :, :3], k[:, :, :3], v[:, :, :3], causal=True)  # another length: nobody chose for it
        assert seen == ["explicit"]
        attend(q, k, v, causal=True)
    assert seen == ["explicit"]


def test_shapes_are_counted_with_the_dtype_that_autocast_gives_them() -> None:
    q, k, v = inputs()
    with watch_shapes() as shapes:
        attend(q, k, v, causal=True)
        attend(q[:1], k[:1], v[:1], causal=True)
        with torch.autocast("cpu", torch.bfloat16):
            attend(q, k, v, causal=True, mask=torch.ones(2, 6, dtype=torch.bool))
        attend(q[:, :, :1], k, v, causal=True)  # decoding is nobody's choice
    plain, masked = shapes
    assert shapes == {plain: (2, 2), masked: (1, 2)}
    assert (plain.dtype, plain.causal, plain.masked) == (torch.float32, True, False)
    assert (masked.dtype, masked.causal, masked.masked) == (torch.bfloat16, False, True)
    attend(q, k, v, causal=True)
    assert len(shapes) == 2


def test_a_shape_has_the_ways_that_make_sense_for_it() -> None:
    shape = Shape("cpu", torch.float32, 4, 4, 64, 64, 8, 8, True, False)
    assert possible_ways(shape) == ["sdpa", "padded", "explicit"]
    assert possible_ways(shape._replace(width=16, v_width=48, queries=4096, keys=4096)) == ["sdpa"]
    assert Shape.from_dict(shape.to_dict()) == shape
    assert str(shape) == "causal attention of 64 tokens, 4 heads, width 8"


def test_every_way_compiles_as_one_graph() -> None:
    q, k, v = inputs()
    shape = shape_of(q, k, v, causal=True, masked=False)
    expected = attend(q, k, v, causal=True)
    for way in WAYS:
        torch.compiler.reset()
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        with choose_ways({shape: way}):
            torch.testing.assert_close(compiled(q, k, v, causal=True), expected, rtol=1e-5, atol=1e-6)
    assert math.isfinite(expected.sum().item())


def test_groups_spread_to_heads_give_what_the_groups_give() -> None:
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    visible = torch.ones(5, 5, dtype=torch.bool).tril(1)
    spread = each_its_own(k, 6), each_its_own(v, 6)
    expected = mix_by("sdpa", q, k, v, causal=False, visible=visible, scale=None, dropout=0.0)
    torch.testing.assert_close(
        mix_by("sdpa", q, *spread, causal=False, visible=visible, scale=None, dropout=0.0), expected
    )
