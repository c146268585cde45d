"""Each fault that authors make is put into a working layer, and the check that is made for it must find it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from apt.core.providers import AlignProvider, AttentionProvider, FFNProvider, RouterProvider
from apt.core.registry import Registry
from apt.layers import Part
from apt.layers.rope import rotate
from apt.testing import check_provider
from apt.testing.kit import checks_of, get_subject, run_check


class Cache:
    def __init__(self, fault: str) -> None:
        self.k, self.v = torch.empty(0), torch.empty(0)
        self.length = 0
        self.fault = fault

    def crop(self, length):
        if self.fault != "crops the count alone":
            self.k, self.v = self.k[:, :, :length], self.v[:, :, :length]
        self.length = length

    def reorder(self, samples):
        self.k = self.k[samples]
        if self.fault != "reorders keys alone":
            self.v = self.v[samples]
        elif len(samples) != len(self.v):
            self.v = self.v[torch.arange(len(samples)) % len(self.v)]


class Explicit(nn.Module):
    """Attention written out, with one fault."""

    def __init__(self, d_model: int, heads: int, dropout: float, fault: str, window: int | None = None) -> None:
        super().__init__()
        self.heads, self.fault, self.dropout, self.window = heads, fault, dropout, window
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        if fault == "dead parameter":
            self.unused = nn.Parameter(torch.ones(3))
        if fault == "hidden state":
            self.gain = torch.rand(()) + 0.5  # neither a parameter nor a buffer

    def forward(self, x, *, causal=True, mask=None, positions=None, memory=None, cache=None):
        fault, start = self.fault, 0 if cache is None else cache.length
        if positions is None:
            first = 0 if fault == "positions restart at each portion" else start
            positions = torch.arange(first, first + x.shape[1]).unsqueeze(0)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        if fault == "positions are not read":
            positions = torch.arange(start, start + x.shape[1]).unsqueeze(0)
        q, k = rotate(q, positions, 1e4), k if fault == "turns queries alone" else rotate(k, positions, 1e4)
        if fault == "reads the whole room of its cache" and cache is not None:
            cache.room[:, :, :, start : start + x.shape[1]] = torch.stack((k, v))
            cache.length += x.shape[1]
            k, v = cache.room
        elif cache is not None:
            if start:
                last = -1 if fault == "cache off by one" else None
                k, v = torch.cat((cache.k[:, :, :last], k), 2), torch.cat((cache.v[:, :, :last], v), 2)
            cache.k, cache.v = k, v
            cache.length += x.shape[1]
        scores = q @ k.transpose(-1, -2) / (q.shape[-1] ** 0.5)
        seen = self._seen(x.shape[1], k.shape[2], mask, start)
        if fault == "branches on numbers" and scores.max().item() > 1e9:
            scores = scores - scores.max()
        weights = scores.masked_fill(~seen, -1e9).softmax(-2 if fault == "softmax over queries" else -1)
        if fault == "mean over the batch":
            weights = weights - 0.1 * weights.mean(0, keepdim=True)
        if fault == "a trace of what is hidden":
            weights = weights + 1e-12
        noisy = self.training or fault == "dropout in evaluation"
        weights = nn.functional.dropout(weights, 0.0 if fault == "dropout is not read" else self.dropout, noisy)
        mixed = self.out((weights @ v).transpose(1, 2).flatten(2))
        if fault == "mean over time":
            mixed = mixed + 0.1 * x.mean(1, keepdim=True)
        if fault == "hidden state":
            mixed = mixed * self.gain
        if fault == "a gradient from the future":
            mean = x.mean(1, keepdim=True)
            mixed = mixed + (mean - mean.detach())
        return mixed

    def _seen(self, seq: int, kv: int, mask: Tensor | None, start: int) -> Tensor:
        shift = {"sees the next token": 1, "does not see itself": -1}.get(self.fault, 0)
        offset = {"top-left causality when decoding": 0, "reads the whole room of its cache": start}.get(
            self.fault, kv - seq
        )
        seen = torch.ones(seq, kv, dtype=torch.bool).tril(offset + shift)
        if self.fault == "sees its block of four":
            blocks = torch.arange(kv) // 4
            seen = seen | (blocks[-seq:, None] == blocks)
        if self.window is not None and self.fault != "ignores its window":
            seen = seen.triu(offset - self.window + (2 if self.fault == "a window one too narrow" else 1))
        if mask is not None:
            mask = mask[:, -kv:]
            seen = seen & (~mask if self.fault == "inverted mask" else mask)[:, None, None]
        return seen

    def create_cache(self, batch, max_seq_len, dtype, device):
        cache = Cache(self.fault)
        if self.fault == "reads the whole room of its cache":
            width = self.qkv.in_features // self.heads
            cache.room = torch.zeros(2, batch, self.heads, max_seq_len, width, dtype=dtype, device=device)
        return cache


class Faulty(AttentionProvider):
    """Attention written out, with one fault."""

    fault: str = Field(default="", description="what is wrong with it")
    window: int | None = Field(default=None, description="tokens that each token sees")
    positions: str = Field(default="rope", description="what the layer turns its queries and keys by")

    def get_window(self):
        return self.window

    def create_layer(self, d_model, num_heads, dropout=0.0):
        return Explicit(d_model, num_heads, dropout, self.fault, self.window)

    def get_parameter_count(self, d_model, num_heads):
        return 4 * d_model**2 + (3 if self.fault == "dead parameter" else 0)

    def get_flops_estimate(self, seq_len, d_model, num_heads):
        flops = 8 * seq_len * d_model**2 + 4 * seq_len**2 * d_model
        return flops // 2 if self.fault == "half of the operations" else flops

    def get_memory_estimate(self, seq_len, d_model, num_heads, batch_size=1):
        return 1

    def get_cache_size(self, d_model, num_heads):
        return 2 * d_model


def failures(kind: str, provider: type, only: str | None = None, **options: object) -> set[str]:
    """The checks that fail; with `only` no other is run, since most faults are found by several."""
    registry = Registry()
    registry.register(kind, "under_test", provider)
    if only is None:
        return set(check_provider(kind, "under_test", options, registry).failures)
    (law,) = (each for each in checks_of(kind) if each.name == only)
    result = run_check(law, get_subject(kind, "under_test", options, registry))
    return {only} if result.outcome == "failed" else set()


def test_without_a_fault_only_the_memory_estimate_fails_which_is_made_up() -> None:
    assert failures("attention", Faulty) == {"memory_estimate"}
    assert failures("attention", Faulty, window=5) == {"memory_estimate"}


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("inverted mask", "mask_polarity"),
        ("inverted mask", "padding"),
        ("sees the next token", "causality"),
        ("does not see itself", "sees_itself_and_the_past"),
        ("top-left causality when decoding", "decoding"),
        ("cache off by one", "decoding"),
        ("positions restart at each portion", "decoding"),
        ("crops the count alone", "rewinding"),
        ("reorders keys alone", "rewinding"),
        ("softmax over queries", "causality"),
        ("mean over the batch", "samples_are_independent"),
        ("mean over time", "causality"),
        ("dead parameter", "gradients"),
        ("hidden state", "state_dict"),
        ("hidden state", "meta_device"),
        ("dropout in evaluation", "deterministic"),
        ("dropout is not read", "dropout_is_used"),
        ("half of the operations", "flops_estimate"),
        ("sees its block of four", "causality"),
        ("sees its block of four", "no_gradient_from_the_future"),
        ("a trace of what is hidden", "poisoned_future"),
        ("a gradient from the future", "no_gradient_from_the_future"),
        ("reads the whole room of its cache", "decoding"),
        ("turns queries alone", "distances_alone"),
        ("positions are not read", "distances_alone"),
        ("branches on numbers", "compiled"),
    ],
)
def test_a_fault_of_attention_is_found_by_the_check_that_is_made_for_it(fault: str, check: str) -> None:
    assert failures("attention", Faulty, check, fault=fault)


@pytest.mark.parametrize("fault", ["ignores its window", "a window one too narrow"])
def test_a_window_that_is_not_the_one_that_was_asked_for_is_found(fault: str) -> None:
    assert failures("attention", Faulty, "sees_itself_and_the_past", fault=fault, window=5)


class Mapped(nn.Module):
    """A feed-forward network with one fault."""

    def __init__(self, d_model: int, d_ff: int, dropout: float, fault: str) -> None:
        super().__init__()
        self.fault, self.dropout = fault, dropout
        self.up, self.down = nn.Linear(d_model, d_ff, bias=False), nn.Linear(d_ff, d_model, bias=False)
        if fault == "detached branch":
            self.branch = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x, *, mask=None):
        hidden = self.up(x).relu()
        if self.fault == "norm over the sequence":
            hidden = hidden / (1 + hidden.square().mean(1, keepdim=True))
        mixed = nn.functional.dropout(self.down(hidden), self.dropout, self.training)
        if self.fault == "detached branch":
            mixed = mixed + self.branch(x).detach()
        if self.fault == "the future pushes out" and self.training:
            kept = hidden.mean(-1) >= hidden.mean(-1).median(-1, keepdim=True).values
            mixed = mixed * kept.unsqueeze(-1)
        if self.fault == "a loss that counts padding":
            return Part(mixed, {"size": mixed.square().mean()})
        if self.fault == "a detached loss":
            return Part(mixed, {"size": mixed.square().mean().detach()})
        return mixed


class FaultyFFN(FFNProvider):
    """A feed-forward network with one fault."""

    fault: str = Field(default="", description="what is wrong with it")

    def create_layer(self, d_model, d_ff, dropout=0.0, activation="gelu"):
        return Mapped(d_model, d_ff, dropout, self.fault)

    def get_parameter_count(self, d_model, d_ff):
        return 2 * d_model * d_ff + (d_model**2 if self.fault == "detached branch" else 0)

    def get_flops_estimate(self, seq_len, d_model, d_ff):
        return 2 * seq_len * self.get_parameter_count(d_model, d_ff)

    def get_memory_estimate(self, seq_len, d_model, d_ff, batch_size=1):
        return 4 * batch_size * seq_len * (d_model + d_ff)


def test_a_feed_forward_network_without_a_fault_passes() -> None:
    assert failures("ffn", FaultyFFN) == set()


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("norm over the sequence", "tokens_are_independent"),
        ("detached branch", "gradients"),
        ("the future pushes out", "causal_in_training"),
        ("a loss that counts padding", "padding_leaves_no_trace"),
        ("a detached loss", "losses_are_scalars"),
    ],
)
def test_a_fault_of_an_ffn_is_found_by_the_check_that_is_made_for_it(fault: str, check: str) -> None:
    assert failures("ffn", FaultyFFN, check, fault=fault)


class Scores(nn.Module):
    def __init__(self, d_model: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, experts, bias=False)
        self.register_buffer("temperature", torch.ones(()))
        self.offset = torch.randn(experts)  # neither a parameter nor a buffer


class FaultyRouter(RouterProvider):
    """A softmax router with one fault."""

    scheduled: ClassVar[Mapping[str, str]] = {"route_temp": "temperature"}

    fault: str = Field(default="", description="what is wrong with it")

    def create_router(self, d_model, num_experts, top_k=2):
        return Scores(d_model, num_experts)

    def route(self, router, inputs, train=True, mask=None):
        fault = self.fault
        with torch.autocast("cpu", enabled=False):
            logits = router.gate(inputs.float())
        if fault == "hidden state":
            logits = logits + router.offset
        if fault != "temperature without effect":
            logits = logits / router.temperature
        if fault == "later tokens count":
            logits = logits - logits.mean(1, keepdim=True)
        if fault == "the place in the text counts":
            logits = logits + torch.arange(logits.shape[1])[:, None] * torch.arange(logits.shape[2])
        probabilities = (logits / (1 if fault != "mean over the batch" else logits.std(0))).softmax(-1)
        if fault == "exp of raw scores":
            probabilities = logits.exp() / logits.exp().sum(-1, keepdim=True)
        weights, indices = probabilities.topk(self.top_k, -1)
        if fault == "one expert twice":
            indices = indices[..., :1].expand_as(indices)
        if fault == "renormalised top-1" or self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        if fault == "weights above 1":
            weights = 2 * weights
        if fault == "weights below 1" or (train and fault == "weights below 1 in training"):
            weights = weights / 2
        if train and fault == "negative weights in training":
            weights = torch.stack((1 + weights[..., 0], -weights[..., 0]), -1)
        if train and fault == "bfloat16 in training":
            weights = weights.bfloat16()
        if fault == "detached router":
            weights = weights.detach()
        counted = torch.ones(inputs.shape[:2], dtype=torch.bool) if mask is None or "padding" in fault else mask
        loss = self.compute_load_balance_loss(
            logits[counted], nn.functional.one_hot(indices[counted], logits.shape[-1]).sum(1).float()
        )
        losses = {} if fault in ("renormalised top-1", "detached router") else {"balance": loss}
        return indices, weights, losses

    def compute_load_balance_loss(self, router_logits, expert_mask):
        experts = router_logits.shape[-1]
        if not len(router_logits) and self.fault != "the mean of no token":
            return router_logits.sum()
        share = expert_mask.mean(0) / expert_mask.sum(-1).mean()
        if self.fault == "load-balance loss without the load":
            share = torch.full_like(share, 1 / experts)
        sign = -1 if self.fault == "load-balance loss of the wrong sign" else 1
        return sign * experts * (share * router_logits.softmax(-1).mean(0)).sum()

    def get_parameter_count(self, d_model, num_experts):
        return d_model * num_experts


def test_a_router_without_a_fault_passes() -> None:
    assert failures("router", FaultyRouter) == set()


@pytest.mark.parametrize(
    ("fault", "options", "check"),
    [
        ("one expert twice", {}, "choices"),
        ("weights above 1", {}, "weights"),
        ("weights below 1", {}, "weights"),
        ("weights below 1 in training", {}, "weights"),
        ("negative weights in training", {}, "weights"),
        ("bfloat16 in training", {}, "float32"),
        ("later tokens count", {}, "tokens_are_independent"),
        ("the place in the text counts", {}, "tokens_are_independent"),
        ("temperature without effect", {}, "scheduled_buffers"),
        ("detached router", {}, "learns"),
        ("renormalised top-1", {"top_k": 1}, "learns"),
        ("mean over the batch", {}, "calm_in_evaluation"),
        ("load-balance loss without the load", {}, "balance"),
        ("load-balance loss of the wrong sign", {}, "balance"),
        ("padding counts", {}, "losses"),
        ("the mean of no token", {}, "losses"),
        ("exp of raw scores", {}, "finite"),
        ("hidden state", {}, "state_dict"),
    ],
)
def test_a_fault_of_a_router_is_found_by_the_check_that_is_made_for_it(
    fault: str, options: dict[str, object], check: str
) -> None:
    assert failures("router", FaultyRouter, check, fault=fault, **options)


class UntoldRouter(FaultyRouter):
    """It cannot be told of padding."""

    def route(self, router, inputs, train=True):
        return super().route(router, inputs, train)


def test_a_router_that_takes_no_mask_is_told_the_right_signature() -> None:
    assert failures("router", UntoldRouter, "padding")


class Pull(nn.Module):
    def __init__(self, d_model: int, alpha: float, beta: float, fault: str) -> None:
        super().__init__()
        self.alpha, self.beta, self.fault = alpha, beta, fault
        self.map = nn.Linear(d_model, d_model, bias=False)
        self.hidden = torch.rand(()) + 0.5  # neither a parameter nor a buffer


class FaultyAligner(AlignProvider):
    """Draws a mapped state towards a stable one, with one fault."""

    fault: str = Field(default="", description="what is wrong with it")

    def create_aligner(self, d_model, alpha=0.35, beta=0.20):
        return Pull(d_model, alpha, beta, self.fault)

    def compute_alignment(self, aligner, state_1, state_2, mask=None):
        fault, mapped = self.fault, aligner.map(state_2)
        teacher = state_1 if fault == "the teacher moves" else state_1.detach()
        if fault == "everything is detached":
            mapped = mapped.detach()
        if fault == "the aligner's map is not used":
            mapped = state_2
        if fault == "padding counts in the loss":
            mask = None
        loss = aligner.alpha * self.compute_consistency_loss(teacher, mapped, "l2", mask)
        if fault == "pushes apart":
            loss = -loss
        if fault == "log of the loss":
            loss = loss - loss.detach() + (loss.detach() - aligner.alpha * 1.9).clamp(min=0).log()
        if fault == "hidden state":
            loss = loss * aligner.hidden
        if fault == "a loss without weight":
            loss = loss + 0.1
        moved = 0.1 * (aligner.alpha * aligner.beta) * (state_2 - state_1)
        if fault == "moves equal states":
            moved = moved + 0.1 * aligner.alpha * state_1
        return state_1 + moved, loss

    def compute_consistency_loss(self, state_1, state_2, metric="cosine", mask=None):
        one, two = state_1.float(), state_2.float()
        if metric == "kl":
            one, two = one.log_softmax(-1), two.log_softmax(-1)
            distances = (one.exp() * (one - two)).sum(-1)
        else:
            one, two = (each / (each.norm(dim=-1, keepdim=True) + 1e-6) for each in (one, two))
            if self.fault == "norm without a floor":
                one, two = state_1 / state_1.norm(dim=-1, keepdim=True), state_2 / state_2.norm(dim=-1, keepdim=True)
            distances = (one - two).square().sum(-1) / (2 if metric == "cosine" else 1)
        if self.fault == "similarity in place of distance":
            distances = 1 - distances
        if self.fault == "a sum over tokens":
            return distances.sum() if mask is None else (distances * mask).sum()
        return distances.mean() if mask is None else (distances * mask).sum() / mask.sum()

    def get_parameter_count(self, d_model):
        return d_model**2

    def supports_asymmetric_alignment(self):
        return True


def test_an_aligner_without_a_fault_passes() -> None:
    assert failures("align", FaultyAligner) == set()


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("everything is detached", "learns"),
        ("the aligner's map is not used", "learns"),
        ("pushes apart", "learns"),
        ("the teacher moves", "the_teacher_stands_still"),
        ("hidden state", "state_dict"),
        ("log of the loss", "finite"),
        ("norm without a floor", "finite"),
        ("similarity in place of distance", "distances"),
        ("a sum over tokens", "a_mean_over_tokens"),
        ("padding counts in the loss", "a_mean_over_tokens"),
        ("a loss without weight", "neutral_without_weight"),
        ("moves equal states", "neutral_for_equal_states"),
    ],
)
def test_a_fault_of_an_aligner_is_found_by_the_check_that_is_made_for_it(fault: str, check: str) -> None:
    assert check in failures("align", FaultyAligner, fault=fault)


class Silent(FFNProvider):
    option: int = 3

    def create_layer(self, d_model, d_ff, dropout=0.0, activation="gelu"):
        return Mapped(d_model, d_ff, dropout, "")

    def get_parameter_count(self, d_model, d_ff):
        return 2 * d_model * d_ff

    def get_flops_estimate(self, seq_len, d_model, d_ff):
        return 4 * seq_len * d_model * d_ff

    def get_memory_estimate(self, seq_len, d_model, d_ff, batch_size=1):
        return 4 * batch_size * seq_len * (d_model + d_ff)


def test_a_provider_that_says_nothing_of_itself_is_found() -> None:
    assert failures("ffn", Silent) == {"description"}
