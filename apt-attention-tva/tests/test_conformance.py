"""What every attention must show; COMPONENTS names each fault that one of these catches by the test's name."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apt.core.providers import AttentionProvider
from apt.layers import Part

from .conftest import CASES, D_MODEL, HEADS, output, states, trained

CPU = torch.device("cpu")
SEQ = 13


def loss(result: Tensor | Part, seed: int = 5) -> Tensor:
    """A scalar that every output and every loss of the layer has a part in."""
    mixed = output(result)
    weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(seed), dtype=mixed.dtype)
    return (mixed * weights).sum() + (sum(result.losses.values()) if isinstance(result, Part) else 0.0)


@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (3, 17), (2, 130)])
def test_shape_and_type_are_kept_and_numbers_are_finite_in_bf16(layer: nn.Module, batch: int, seq: int) -> None:
    x = (30 * states(batch, seq)).bfloat16()
    mixed = output(layer.bfloat16()(x))
    assert mixed.shape == x.shape
    assert mixed.dtype == torch.bfloat16
    assert bool(mixed.isfinite().all())


def test_no_output_depends_on_the_future_or_beyond_the_window_by_its_gradient(
    provider: AttentionProvider, layer: nn.Module
) -> None:
    window = provider.get_window() or SEQ
    for training in (False, True):
        layer.train(training)
        x = states(1, SEQ).requires_grad_()
        mixed = output(layer(x))
        for t in range(SEQ):
            (gradient,) = torch.autograd.grad(mixed[0, t].sum(), x, retain_graph=True)
            assert not gradient[0, t + 1 :].any()
            assert not gradient[0, : max(0, t - window + 1)].any()
            assert bool(gradient[0, max(0, t - window + 1) : t + 1].abs().sum(-1).gt(0).all())


def test_a_changed_future_leaves_the_past_as_it_was_bit_for_bit(layer: nn.Module) -> None:
    x = states(2, SEQ)
    mixed = output(layer(x))
    for t in range(1, SEQ):
        changed = torch.cat((x[:, :t], 1e4 * states(2, SEQ - t, seed=t)), 1)
        assert torch.equal(output(layer(changed))[:, :t], mixed[:, :t])


def test_without_causality_every_token_sees_every_other(layer: nn.Module) -> None:
    x = states(1, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(output(layer(x, causal=False))[0, 0].sum(), x)
    assert bool(gradient.abs().sum(-1).gt(0).all())


def test_true_in_the_mask_means_keep(layer: nn.Module) -> None:
    window = layer.shape.window
    x = states(1, SEQ)
    mask = torch.ones(1, SEQ, dtype=torch.bool)
    torch.testing.assert_close(output(layer(x, mask=mask)), output(layer(x)))
    mask[:, 3] = False
    kept = [token for token in range(SEQ) if token != 3 and (window is None or token >= 3 + window)]
    seen = kept if window is None else list(range(4, SEQ))
    positions = torch.tensor([seen])
    torch.testing.assert_close(
        output(layer(x, mask=mask))[:, kept], output(layer(x[:, seen], positions=positions))[:, -len(kept) :]
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seq", [SEQ, 140])
def test_padding_changes_nothing(layer: nn.Module, side: str, seq: int) -> None:
    x, alone = states(2, seq), 4
    mask = torch.ones(2, seq, dtype=torch.bool)
    real = slice(alone, None) if side == "left" else slice(None, -alone)
    mask[1] = False
    mask[1, real] = True
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = x.clone()
    padded[1, ~mask[1]] = 1e4
    mixed = output(layer(padded, mask=mask, positions=positions))
    torch.testing.assert_close(mixed[0:1], output(layer(x[0:1])))
    torch.testing.assert_close(mixed[1:2, real], output(layer(x[1:2, real])))
    padded.requires_grad_()
    loss(output(layer(padded, mask=mask, positions=positions))[1, real]).backward()
    assert padded.grad is not None
    assert bool(padded.grad.isfinite().all())
    assert not padded.grad[1, ~mask[1]].any()


def test_losses_and_metrics_do_not_count_padding(layer: nn.Module) -> None:
    x, mask = states(2, SEQ), torch.ones(2, SEQ, dtype=torch.bool)
    mask[:, -4:] = False
    padded, alone = layer(x, mask=mask), layer(x[:, :-4])
    if not isinstance(padded, Part):
        return
    for name in ("losses", "metrics"):
        for key, value in getattr(padded, name).items():
            torch.testing.assert_close(value, getattr(alone, name)[key])


@settings(max_examples=10)
@given(st.sampled_from(list(CASES)), st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 9))
def test_decoding_in_any_portions_gives_what_one_pass_gives(case: str, portions: list[int], left: int) -> None:
    layer = trained(CASES[case])
    x, seq = states(2, sum(portions)), sum(portions)
    mask = torch.ones(2, seq, dtype=torch.bool)
    mask[1, : min(left, seq - 1)] = False
    cache = layer.create_cache(2, seq, torch.float64, CPU)
    parts, done = [], 0
    for portion in x.split(portions, 1):
        assert cache.length == done
        done += portion.shape[1]
        parts.append(output(layer(portion, mask=mask[:, :done], cache=cache)))
    whole = output(layer(x, mask=mask))
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask])


def test_the_cache_holds_what_the_provider_says(provider: AttentionProvider, layer: nn.Module) -> None:
    cache = layer.create_cache(2, 10, torch.float32, CPU)
    tensors = [value for value in vars(cache).values() if isinstance(value, Tensor) and value.is_floating_point()]
    tokens = min(10, provider.get_window() or 10)
    assert sum(tensor.numel() for tensor in tensors) == 2 * tokens * provider.get_cache_size(D_MODEL, HEADS)


def test_scores_depend_on_distances_alone_where_the_provider_says_so(
    provider: AttentionProvider, layer: nn.Module
) -> None:
    x = states(1, SEQ)
    moved, here = (output(layer(x, positions=torch.arange(start, start + SEQ).unsqueeze(0))) for start in (50, 0))
    # The angles are float32.
    assert torch.allclose(moved, here, atol=1e-5, rtol=1e-5) == provider.depends_on_distances_alone()


def test_positions_matter_unless_there_are_none(layer: nn.Module) -> None:
    x, shape = states(1, SEQ), layer.shape
    stretched = output(layer(x, positions=3 * torch.arange(SEQ).unsqueeze(0)))
    assert torch.allclose(stretched, output(layer(x))) == (shape.rope_theta is None)


def test_across_sequences_the_memory_is_seen_and_nothing_else(layer: nn.Module) -> None:
    x, memory = states(2, 5), states(2, 9, seed=2).requires_grad_()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    mixed = output(layer(x, causal=False, memory=memory, mask=mask))
    assert mixed.shape == x.shape
    (gradient,) = torch.autograd.grad(mixed[:, 0].sum(), memory)
    assert bool(gradient[:, :6].abs().sum(-1).gt(0).all())
    assert not gradient[:, 6:].any()


def test_all_parameters_get_a_gradient_at_the_first_step_and_one_that_moves_them_at_the_second(
    provider: AttentionProvider,
) -> None:
    torch.manual_seed(0)
    layer = provider.create_layer(D_MODEL, HEADS)
    assert isinstance(layer, nn.Module)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        loss(layer(states(2, SEQ).float())).backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
            assert step == 0 or bool(parameter.grad.any()), name
        optimizer.step()


def test_gradients_are_those_of_finite_differences(layer: nn.Module) -> None:
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = states(1, 4).requires_grad_()

    def mixed(x: Tensor, *values: Tensor) -> Tensor:
        return output(torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,)))

    assert torch.autograd.gradcheck(mixed, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("seq", [pytest.param(SEQ, marks=pytest.mark.thorough), 140])
def test_compiled_whole_it_gives_the_same(layer: nn.Module, seq: int) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = states(1, seq)
    eager = torch.autograd.grad(loss(layer(x)), list(layer.parameters()))
    torch.testing.assert_close(torch.autograd.grad(loss(compiled(x)), list(layer.parameters())), eager)
    torch.testing.assert_close(output(compiled(x)), output(layer(x)))


def test_it_is_built_on_the_meta_device_and_filled_from_a_state_dict(
    provider: AttentionProvider, layer: nn.Module
) -> None:
    with torch.device("meta"):
        empty = provider.create_layer(D_MODEL, HEADS)
    assert isinstance(empty, nn.Module)
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    filled = empty.to_empty(device="cpu").double().eval()
    filled.load_state_dict(layer.state_dict(), strict=True)
    x = states(1, SEQ)
    assert torch.equal(output(filled(x)), output(layer(x)))


def test_a_copy_is_independent_and_the_same(layer: nn.Module) -> None:
    other, x = copy.deepcopy(layer), states(1, SEQ)
    assert torch.equal(output(other(x)), output(layer(x)))
    next(other.parameters()).data.zero_()
    assert not torch.equal(output(other(x)), output(layer(x)))


def test_dropout_acts_in_training_alone_and_follows_the_seed(provider: AttentionProvider) -> None:
    layer, x = trained(provider, dropout=0.5), states(1, SEQ)
    torch.testing.assert_close(output(layer(x)), output(trained(provider)(x)))
    state = torch.get_rng_state()
    layer(x)
    assert torch.equal(torch.get_rng_state(), state)
    layer.train()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(output(layer(x)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("seq", [SEQ, 140])
def test_recomputed_activations_give_equal_gradients_and_buffers(provider: AttentionProvider, seq: int) -> None:
    gradients, buffers = [], []
    for recompute in (False, True):
        layer = trained(provider, dropout=0.3).train()
        torch.manual_seed(3)
        x = states(1, seq).requires_grad_()
        mixed = (
            checkpoint(lambda x, layer=layer: output(layer(x)), x, use_reentrant=False)
            if recompute
            else output(layer(x))
        )
        mixed.square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
        buffers.append(dict(layer.named_buffers()))
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(*buffers)


def test_two_runs_give_the_same_bits(layer: nn.Module) -> None:
    x = states(2, SEQ)
    first, second = (torch.autograd.grad(loss(layer(x)), list(layer.parameters())) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_heads_can_change_places(provider: AttentionProvider, layer: nn.Module) -> None:
    heads, kv_heads = HEADS, layer.shape.num_kv_heads
    width = layer.out.weight.shape[1] // heads
    other = copy.deepcopy(layer)
    order = torch.tensor([2, 0, 1])
    kv_order = order if kv_heads == heads else torch.arange(kv_heads)
    with torch.no_grad():
        for own, theirs in zip(layer.qkv.parameters(), other.qkv.parameters(), strict=True):
            q, k, v = own.unflatten(0, (-1, width)).split((heads, kv_heads, kv_heads))
            theirs.copy_(torch.cat((q[order], k[kv_order], v[kv_order])).flatten(0, 1))
        other.out.weight.copy_(layer.out.weight.unflatten(1, (heads, width))[:, order].flatten(1))
        if getattr(layer, "down", None) is not None and layer.down.shape[0] > 1:
            other.down.copy_(layer.down[order])
            other.up.copy_(layer.up[order])
    x = states(1, SEQ)
    torch.testing.assert_close(output(other(x)), output(layer(x)))
