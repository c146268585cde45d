"""Checks that attention and feed-forward layers share; `Bench` builds the layer and calls it for each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apt.core.providers import AttentionProvider, FFNProvider
from apt.layers import Part, as_part
from apt.modeling.parts import find_parts
from apt.testing.kit import NotApplicable, Subject, check, demand
from apt.testing.measure import count_flops, demand_close, demand_gradients, demand_near, saved_bytes, scalar

D_MODEL, HEADS, D_FF, SEQ = 48, 4, 80, 13
ENOUGH = 96
"""Tokens that reach every expert of a mixture."""


@dataclass(frozen=True)
class Bench:
    """A layer under test, with what its kind needs to be built and counted."""

    subject: Subject

    def layer(self, seed: int = 0, dropout: float = 0.0) -> nn.Module:
        """The layer, in evaluation mode; without dropout where it has none."""
        provider = self.subject.provider
        if not isinstance(provider, AttentionProvider):
            layer = self.subject.build(D_MODEL, D_FF, dropout, seed=seed).eval()
            if getattr(layer, "takes_tokens", False):
                layer.register_forward_pre_hook(_give_tokens, with_kwargs=True)
            return layer
        return self.subject.build(D_MODEL, HEADS, dropout * provider.supports_dropout(), seed=seed).eval()

    def parameter_count(self) -> int:
        """What the provider says of its parameters."""
        provider = self.subject.provider
        if isinstance(provider, AttentionProvider):
            return provider.get_parameter_count(D_MODEL, HEADS)
        assert isinstance(provider, FFNProvider)
        return provider.get_parameter_count(D_MODEL, D_FF)

    def flops(self, seq: int) -> int:
        """What the provider says of its operations."""
        provider = self.subject.provider
        if isinstance(provider, AttentionProvider):
            return provider.get_flops_estimate(seq, D_MODEL, HEADS)
        assert isinstance(provider, FFNProvider)
        return provider.get_flops_estimate(seq, D_MODEL, D_FF)

    def memory(self, seq: int, batch: int) -> int:
        """What the provider says of its memory."""
        provider = self.subject.provider
        if isinstance(provider, AttentionProvider):
            return provider.get_memory_estimate(seq, D_MODEL, HEADS, batch)
        assert isinstance(provider, FFNProvider)
        return provider.get_memory_estimate(seq, D_MODEL, D_FF, batch)


def _give_tokens(
    layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Ids for a layer that asks for them: the same for each token wherever it stands."""
    return args, {"tokens": (args[0].detach().float().sum(-1) * 1e4).long(), **kwargs}


def states(batch: int, seq: int, seed: int = 1) -> Tensor:
    """Random hidden states [batch, seq, d_model]."""
    return torch.randn(batch, seq, D_MODEL, generator=torch.Generator().manual_seed(seed))


def output(result: Tensor | Part) -> Tensor:
    """The hidden states that a layer returned."""
    return as_part(result).output


@check("attention", "ffn")
def shape(subject: Subject) -> None:
    """[batch, seq, d_model] goes in and comes out, one token too."""
    layer = Bench(subject).layer()
    for batch, seq in ((1, 1), (3, 17)):
        seen = output(layer(states(batch, seq))).shape
        demand(seen == (batch, seq, D_MODEL), f"[{batch}, {seq}, {D_MODEL}] became {list(seen)}")


@check("attention", "ffn")
def remembers_its_maker(subject: Subject) -> None:
    """The layer knows its provider, and has a buffer for each scheduled value."""
    layer = Bench(subject).layer()
    demand(
        getattr(layer, "apt_provider", None) is subject.provider, "the make method was overridden past the base class"
    )
    for part in find_parts(layer):
        for value, buffer in part.provider.scheduled.items():
            if buffer:
                found = dict(part.module.named_buffers(recurse=False)).get(buffer)
                right = found is not None and found.dim() == 0 and found.dtype == torch.float32
                demand(right, f"scheduled value {value}: the module has no zero-dimensional float32 buffer {buffer!r}")
                saved = buffer in part.module.state_dict()
                demand(saved, f"scheduled value {value}: its buffer {buffer!r} is not persistent")


@check("attention", "ffn", gradient=True)
def gradients(subject: Subject) -> None:
    """After two steps every parameter has got a finite gradient that is not zero."""
    layer = Bench(subject).layer().train()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for _ in range(2):  # what starts behind a zero gets its gradient at the second step
        optimizer.zero_grad()
        torch.autograd.backward(scalar(layer(states(2, ENOUGH))))
        first = {name: parameter.grad for name, parameter in layer.named_parameters()}
        optimizer.step()
    demand(first, "the layer has no parameters")
    demand_gradients(layer)


@check("attention", "ffn")
def deterministic(subject: Subject) -> None:
    """In evaluation two calls give the same bits, and no random state is touched."""
    layer = Bench(subject).layer(dropout=0.5)
    state = torch.get_rng_state()
    one, two = (output(layer(states(2, SEQ))) for _ in range(2))
    demand(torch.equal(one, two), "two calls in evaluation differ: dropout or noise is not limited to training")
    demand(torch.equal(state, torch.get_rng_state()), "evaluation draws from the global random state")


@check("attention", "ffn")
def seeded(subject: Subject) -> None:
    """The same seed makes the same weights."""
    bench = Bench(subject)
    one, two = bench.layer(seed=3).state_dict(), bench.layer(seed=3).state_dict()
    wrong = [name for name in one if not torch.equal(one[name], two[name])]
    demand(not wrong, f"weights do not follow torch.manual_seed: {', '.join(wrong[:5])}")


@check("attention", "ffn")
def dropout_is_used(subject: Subject) -> None:
    """Dropout acts in training, where it was asked for."""
    if isinstance(subject.provider, AttentionProvider) and not subject.provider.supports_dropout():
        raise NotApplicable("supports_dropout() is False")
    layer = Bench(subject).layer(dropout=0.5).train()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(output(layer(states(2, SEQ))))
    demand(torch.equal(draws[0], draws[1]), "training does not follow torch.manual_seed")
    demand(not torch.equal(draws[0], draws[2]), "dropout=0.5 changes nothing in training")


@check("attention", "ffn")
def samples_are_independent(subject: Subject) -> None:
    """What one sequence becomes does not depend on the others of its batch."""
    layer = Bench(subject).layer()
    x = states(3, SEQ)
    together = output(layer(torch.cat((x[:1], 1e3 * x[1:]))))
    demand_close(together[:1], output(layer(x[:1])), "a sequence alone and in a batch")


@check("attention", "ffn")
def bf16(subject: Subject) -> None:
    """In bfloat16 large inputs give finite outputs of that type."""
    seen = output(Bench(subject).layer().bfloat16()((30 * states(2, SEQ)).bfloat16()))
    demand(seen.dtype == torch.bfloat16, f"bfloat16 became {seen.dtype}")
    demand(seen.isfinite().all(), "not finite in bfloat16")


@check("attention", "ffn")
def meta_device(subject: Subject) -> None:
    """On the meta device it is built without memory, and filled from a state dict."""
    bench = Bench(subject)
    with torch.device("meta"):
        empty = bench.layer()
    real = [name for name, each in (*empty.named_parameters(), *empty.named_buffers()) if not each.is_meta]
    demand(not real, f"not on the meta device: {', '.join(real)}; create tensors without device='cpu'")
    layer = bench.layer()
    filled = empty.to_empty(device="cpu").eval()
    filled.load_state_dict(layer.state_dict(), strict=True)
    same = torch.equal(output(filled(states(1, SEQ))), output(layer(states(1, SEQ))))
    demand(same, "filled from a state dict it computes something else: some state is no parameter and no buffer")


@check("attention", "ffn")
def state_dict(subject: Subject) -> None:
    """A state dict carries everything from one layer to another."""
    bench = Bench(subject)
    one, other = bench.layer(seed=0), bench.layer(seed=1)
    other.load_state_dict(one.state_dict(), strict=True)
    same = torch.equal(output(one(states(1, SEQ))), output(other(states(1, SEQ))))
    demand(same, "a loaded layer computes something else: some state is no parameter and no buffer")


@check("attention", "ffn")
def parameter_count(subject: Subject) -> None:
    """get_parameter_count is exact."""
    bench = Bench(subject)
    counted = sum(each.numel() for each in bench.layer().parameters() if each.requires_grad)
    demand(bench.parameter_count() == counted, f"the provider says {bench.parameter_count()}, the layer has {counted}")


@check("attention", "ffn", gradient=True)
def flops_estimate(subject: Subject) -> None:
    """get_flops_estimate is within 10 % of what PyTorch counts."""
    bench = Bench(subject)
    layer = bench.layer()
    for seq in (33, 160):
        counted = count_flops(lambda seq=seq: layer(states(1, seq)))  # type: ignore[misc]
        demand_near(bench.flops(seq), counted, f"operations at {seq} tokens")


@check("attention", "ffn", gradient=True)
def memory_estimate(subject: Subject) -> None:
    """get_memory_estimate is within 10 % of the bytes that a forward pass keeps."""
    bench = Bench(subject)
    layer = bench.layer().train()
    for batch, seq in ((1, 160), (3, 96)):
        x = states(batch, seq).requires_grad_()
        kept = saved_bytes(layer, lambda x=x: layer(x))  # type: ignore[misc]
        demand_near(bench.memory(seq, batch), kept, f"bytes at {batch} x {seq} tokens")


@check("attention", "ffn", gradient=True)
def recomputation(subject: Subject) -> None:
    """Under activation checkpointing gradients and buffers are the same."""
    from torch.utils.checkpoint import checkpoint

    seen = []
    for recompute in (False, True):
        layer = Bench(subject).layer(dropout=0.3).train()
        torch.manual_seed(3)
        x = states(1, ENOUGH).requires_grad_()
        result = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        torch.autograd.backward(scalar(result))
        gradients = {name: each.grad for name, each in layer.named_parameters() if each.grad is not None}
        seen.append({**gradients, **dict(layer.named_buffers())})
    for name, right in seen[0].items():
        demand_close(seen[1][name].float(), right.float(), f"{name} with recomputed activations")
