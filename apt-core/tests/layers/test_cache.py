"""Decoding from a cache is the full pass, whatever the options, the portions and the padding, and compiled as well."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from apt.builtin.attention import SDPA
from apt.layers.cache import KVCache

CPU = torch.device("cpu")


def cache(slots: int = 4, window: int | None = None) -> KVCache:
    made = KVCache(1, 1, slots, 1, torch.float32, CPU, window)
    made.k.fill_(torch.nan)
    made.v.fill_(torch.nan)
    return made


def tokens(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32).view(1, 1, -1, 1)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**20),
    portions=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    pad=st.integers(0, 6),
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.none() | st.integers(1, 12),
    sinks=st.booleans(),
    qk_norm=st.booleans(),
    positions=st.sampled_from(["rope", "none"]),
)
def test_reading_in_portions_with_padding_is_reading_at_once(
    seed: int,
    portions: list[int],
    pad: int,
    kv_heads: int,
    window: int | None,
    sinks: bool,
    qk_norm: bool,
    positions: str,
) -> None:
    torch.manual_seed(seed)
    options = {"window": window, "sinks": sinks, "qk_norm": qk_norm, "positions": positions}
    layer = SDPA(num_kv_heads=kv_heads, **options).create_layer(16, 4).double().eval()  # type: ignore[arg-type]
    seq = sum(portions)
    x = torch.randn(2, seq, 16, dtype=torch.float64)
    mask = torch.ones(2, seq, dtype=torch.bool)
    mask[1, : min(pad, seq - 1)] = False
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = layer(x, mask=mask, positions=at)
    kept = layer.create_cache(2, seq, torch.float64, CPU)
    kept.k.fill_(torch.nan)
    kept.v.fill_(torch.nan)
    parts, done = [], 0
    for portion in portions:
        end = done + portion
        parts.append(layer(x[:, done:end], mask=mask[:, :end], positions=at[:, done:end], cache=kept))
        done = end
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask])
    assert kept.slots == (seq if window is None else min(window, seq))
    alone = layer(x[1:, ~mask.all(0) | mask[1]][:, mask[1].logical_not().sum() :])
    torch.testing.assert_close(whole[1:, mask[1]], alone)


def test_a_ring_holds_the_last_tokens_however_long_the_text() -> None:
    ring = cache(slots=100, window=3)
    for number in range(1000):
        k, _, _ = ring.append(tokens(number), tokens(number))
    assert sorted(k.flatten().tolist()) == [997, 998, 999]
    assert ring.k.numel() == 3
    k, _, mask = ring.append(tokens(1000, 1001), tokens(1000, 1001), torch.arange(1002).unsqueeze(0) != 998)
    assert k.flatten().tolist() == [997, 998, 999, 1000, 1001]
    assert mask is not None
    assert mask.tolist() == [[True, False, True, True, True]]


def test_the_mask_of_a_ring_stands_as_its_slots_do() -> None:
    ring = cache(window=3)
    ring.append(tokens(0, 1, 2), tokens(0, 1, 2))
    k, _, mask = ring.append(tokens(3), tokens(3), torch.tensor([[True, True, False, True]]))
    assert mask is not None
    assert sorted(k.flatten()[mask.flatten()].tolist()) == [1, 3]


def test_what_has_no_room_is_refused_and_changes_nothing() -> None:
    full = cache()
    full.append(tokens(0, 1, 2), tokens(0, 1, 2))
    with pytest.raises(ValueError, match="the cache holds 4 tokens; 5 were given"):
        full.append(tokens(3, 4), tokens(3, 4))
    assert full.length == 3


def test_a_cache_is_cropped_where_it_still_has_what_the_next_token_sees() -> None:
    plain, ring = cache(), cache(window=3)
    for kept in (plain, ring):
        kept.append(tokens(0, 1, 2), tokens(0, 1, 2))
        kept.crop(1)
        k, _, _ = kept.append(tokens(5), tokens(5))
        assert k.flatten().tolist() == [0, 5]
    with pytest.raises(ValueError, match="has read 2 tokens and cannot be cropped to 3"):
        plain.crop(3)
    ring.append(tokens(6, 7, 8), tokens(6, 7, 8))
    ring.crop(4)
    with pytest.raises(ValueError, match="keeps the last 3 of 4 tokens and cannot be cropped to 2; read again"):
        ring.crop(2)


@pytest.mark.parametrize("window", [None, 6])
def test_a_compiled_decoding_step_is_compiled_for_no_length_anew(window: int | None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = SDPA(num_kv_heads=2, window=window).create_layer(16, 4).eval()
    counter = CompileCounter()
    step = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(2, 40, 16)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :3] = False
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    right = layer(x, mask=mask, positions=at)
    kept = layer.create_cache(2, 64, torch.float32, CPU)
    kept.k.fill_(torch.nan)
    kept.v.fill_(torch.nan)
    with torch.no_grad():
        parts = [layer(x[:, :4], mask=mask[:, :4], positions=at[:, :4], cache=kept)]
        graphs = []
        for t in range(4, 40):
            parts.append(
                step(x[:, t : t + 1], mask=mask[:, : t + 1].contiguous(), positions=at[:, t : t + 1], cache=kept)
            )
            graphs.append(counter.frame_count)
    torch.testing.assert_close(torch.cat(parts, 1)[mask], right[mask], atol=1e-5, rtol=1e-5)
    # One for the first length, one for every other; a ring has one more, once it is full.
    assert graphs[1] == 2
    assert graphs[-1] == (2 if window is None else graphs[8]) <= 4
