"""Laws of both attentions under options that nobody has chosen: causality, padding, cache, fold."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from apt.core.providers import HeadsProvider, RopeScaling
from apt.layers.cache import KVCache
from apt_attention_tva.provider import TVA, Autopoietic

from .conftest import output

D_MODEL, HEADS, BATCH = 16, 4, 2
CPU = torch.device("cpu")
SCALINGS = [
    RopeScaling(type="linear", factor=2),
    RopeScaling(type="ntk", factor=2),
    RopeScaling(type="yarn", factor=4, original_max_seq_len=8),
    RopeScaling(type="llama3", factor=4, original_max_seq_len=8),
]


@st.composite
def shared(draw: st.DrawFn) -> dict[str, object]:
    """Options that both have."""
    options: dict[str, object] = {
        "num_kv_heads": draw(st.sampled_from([None, 1, 2, 4])),
        "window": draw(st.sampled_from([None, 1, 2, 3, 5, 40])),
        "qk_norm": draw(st.booleans()),
        "positions": draw(st.sampled_from(["rope", "rope", "learned", "none"])),
    }
    if options["positions"] == "rope":
        options |= {"rope_theta": draw(st.sampled_from([100.0, 1e4])), "rope_scaling": draw(st.sampled_from(SCALINGS))}
    return options


@st.composite
def veins(draw: st.DrawFn) -> TVA:
    """Any Tri-Vein attention that fits the sizes."""
    options = draw(shared())
    options |= {
        "project": draw(st.sampled_from(["first", "last"])),
        "head_width": draw(st.sampled_from([None, 8])),
        "per_head": draw(st.booleans()),
        "scale": draw(st.sampled_from(["rank", "head"])),
        "bias": draw(st.sampled_from(["none", "qkv", "all"])),
        "s": draw(st.sampled_from([0, 0, 2])),
        "tau": draw(st.sampled_from([0.0, 0.5])),
    }
    turned = options["positions"] == "rope" and options["project"] == "first"
    ranks = [2, 4] if turned else [1, 2, 3, 4]
    return TVA.model_validate({**options, "rank": draw(st.sampled_from(ranks))})


@st.composite
def autopoietics(draw: st.DrawFn) -> Autopoietic:
    """Any autopoietic attention that fits the sizes."""
    weights = {name: draw(st.sampled_from([0.0, 0.3, 1.0])) for name in ("alpha", "beta", "epsilon")}
    return Autopoietic.model_validate({**draw(shared()), **weights, "init_tau": draw(st.sampled_from([0.8, 1.0, 1.5]))})


ANY = st.one_of(veins(), autopoietics())
quick = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def make(provider: HeadsProvider) -> nn.Module:
    """A layer in float64 whose every parameter has left its starting point."""
    torch.manual_seed(0)
    made = provider.create_layer(D_MODEL, HEADS)
    assert isinstance(made, nn.Module)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made.double().eval()


def states(seq: int) -> Tensor:
    return torch.randn(BATCH, seq, D_MODEL, generator=torch.Generator().manual_seed(seq), dtype=torch.float64)


def masked(seq: int, left: int) -> tuple[Tensor, Tensor]:
    """A mask whose second sample has padding on the left, and the positions of its tokens."""
    mask = torch.ones(BATCH, seq, dtype=torch.bool)
    mask[1, :left] = False
    return mask, (mask.cumsum(-1) - 1).clamp(min=0)


@quick
@given(ANY, st.integers(1, 9), st.booleans())
def test_each_output_depends_on_its_window_of_the_past_and_on_nothing_else(
    provider: HeadsProvider, seq: int, training: bool
) -> None:
    layer, x = make(provider).train(training), states(seq).requires_grad_()
    mixed = output(layer(x))
    assert bool(mixed.isfinite().all())
    window = provider.get_window() or seq
    for t in range(seq):
        (gradient,) = torch.autograd.grad(mixed[0, t].sum(), x, retain_graph=True)
        first = max(0, t - window + 1)
        assert bool(gradient[0, first : t + 1].abs().sum(-1).gt(0).all())
        assert not gradient[0, t + 1 :].any()
        assert not gradient[0, :first].any()
        assert not gradient[1].any()


@quick
@given(ANY, st.integers(2, 9), st.data())
def test_padding_on_the_left_changes_nothing(provider: HeadsProvider, seq: int, data: st.DataObject) -> None:
    left = data.draw(st.integers(1, seq - 1))
    layer, x, (mask, positions) = make(provider), states(seq), masked(seq, left)
    x[1, :left] = 1e3
    mixed = output(layer(x, mask=mask, positions=positions))
    assert bool(mixed.isfinite().all())
    torch.testing.assert_close(mixed[:1], output(layer(x[:1])))
    torch.testing.assert_close(mixed[1:, left:], output(layer(x[1:, left:])))


@quick
@given(ANY, st.lists(st.integers(1, 4), min_size=1, max_size=6), st.booleans(), st.data())
def test_read_in_any_portions_through_a_cache_that_may_roll_it_gives_what_one_pass_gives(
    provider: HeadsProvider, portions: list[int], folds: bool, data: st.DataObject
) -> None:
    seq = sum(portions)
    left = data.draw(st.integers(0, seq - 1))
    layer, x, (mask, positions) = make(provider), states(seq), masked(seq, left)
    whole = output(layer(x, mask=mask, positions=positions))
    if folds and isinstance(provider, TVA):
        layer = layer.fold()
    window = provider.get_window()
    cache = layer.create_cache(BATCH, seq if window is None else max(seq, window), torch.float64, CPU)
    assert isinstance(cache, KVCache)
    assert cache.slots == (seq if window is None else window)
    for each in (cache.k, cache.v):
        each.fill_(torch.nan)
    parts, done = [], 0
    for portion in x.split(portions, 1):
        end = done + portion.shape[1]
        here = {"mask": mask[:, :end], "positions": positions[:, done:end]}
        parts.append(output(layer(portion, cache=cache, **here)))
        done = end
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask])


@quick
@given(veins(), st.integers(1, 30), st.booleans())
def test_folded_it_is_the_same_function(provider: TVA, seq: int, causal: bool) -> None:
    layer, x = make(provider), states(seq)
    folded = layer.fold()
    torch.testing.assert_close(output(folded(x, causal=causal)), output(layer(x, causal=causal)))
    memory = states(seq + 3)
    across = [output(each(x, causal=False, memory=memory)) for each in (folded, layer)]
    torch.testing.assert_close(*across)
    single, low = layer.float(), x.float()
    torch.testing.assert_close(output(single.fold()(low)), output(single(low)), atol=1e-5, rtol=1e-5)


@quick
@given(ANY)
def test_it_counts_its_parameters_and_its_cache(provider: HeadsProvider) -> None:
    layer = make(provider)
    assert provider.get_parameter_count(D_MODEL, HEADS) == sum(each.numel() for each in layer.parameters())
    cache = layer.create_cache(1, 3, torch.float32, CPU)
    assert cache.k.numel() + cache.v.numel() == cache.slots * provider.get_cache_size(D_MODEL, HEADS)
    assert bool(output(layer.bfloat16()(10 * states(5).bfloat16())).isfinite().all())
