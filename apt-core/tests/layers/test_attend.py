"""Attention against its formula written out, for whatever is asked of it together."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apt.layers.attend import attend


def written_out(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, window: int | None, sinks: Tensor | None
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    own = torch.arange(q.shape[2]).unsqueeze(-1) + k.shape[2] - q.shape[2]
    keys = torch.arange(k.shape[2])
    seen = torch.ones(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        seen &= keys <= own
    if window is not None:
        seen &= (own - keys).abs() < window
    if mask is not None:
        seen &= mask[:, None, None, :]
    weights = torch.where(seen, scores.exp(), 0)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks[:, None, None].exp()
    return torch.where(total > 0, weights / total, 0) @ v


@given(
    seed=st.integers(0, 2**20),
    queries=st.integers(1, 9),
    behind=st.integers(0, 9),
    kv_heads=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    masked=st.booleans(),
    window=st.none() | st.integers(1, 20),
    sinks=st.booleans(),
)
def test_it_is_the_formula(
    seed: int,
    queries: int,
    behind: int,
    kv_heads: int,
    causal: bool,
    masked: bool,
    window: int | None,
    sinks: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = queries + behind
    q = torch.randn(2, 4, queries, 6, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, keys, 6, generator=generator, dtype=torch.float64) for _ in "kv")
    mask = torch.rand(2, keys, generator=generator) < 0.7 if masked else None
    logits = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_() if sinks else None
    seen = attend(q, k, v, causal=causal, mask=mask, window=window, sinks=logits)
    right = written_out(q, k, v, causal, mask, window, logits)
    torch.testing.assert_close(seen, right)
    if logits is not None:
        gradients = [torch.autograd.grad(each.square().sum(), logits)[0] for each in (seen, right)]
        torch.testing.assert_close(*gradients)


def test_one_query_of_a_long_text_reads_no_more_keys_than_its_window() -> None:
    q, k, v = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 50, 4), torch.randn(1, 2, 50, 4)
    k[:, :, :-8], v[:, :, :-8] = torch.nan, torch.nan
    assert attend(q, k, v, causal=True, window=8).isfinite().all()
