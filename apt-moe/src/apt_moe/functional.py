"""The stateless mathematics of routing.

Symbols: N tokens, E experts, k experts a token. Everything here is float32 or integer, whatever the model's dtype is:
the losses are means over many tokens, and a capacity must not depend on rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apt.layers.sharded import has_ranks


def load_balance_loss(logits: Tensor, expert_mask: Tensor) -> Tensor:
    """E sum_e f_e P_e: 1 when the load is balanced, towards E / k when k experts take everything.

    `logits` [tokens, experts]; `expert_mask` [tokens, experts] is 1 where the token is sent to the expert. f_e is the
    share of all assignments that expert e gets (it sums to 1, so the balanced value does not depend on k), P_e the mean
    probability of expert e. f has no gradient, P has. A token that is sent nowhere (padding) does not count. Under
    data parallelism f is that of the global batch (arXiv:2501.11873), and the ranks' losses have the mean that all tokens
    together have, however many of them each rank counts.

    Fedus et al. 2021, arXiv:2101.03961, eq. 4-6.
    """
    sent = expert_mask.detach().to(torch.float32)
    counted = sent.any(-1)
    sums = over_ranks(torch.cat((sent.sum(0), counted.sum(0, keepdim=True))))
    share = sums[:-1] / sums[:-1].sum().clamp(min=1)
    probability = logits.float().softmax(-1) * counted.unsqueeze(-1)
    mean_probability = probability.sum(0) / (sums[-1].clamp(min=1) / _num_ranks())
    return (logits.shape[-1] * share * mean_probability).sum()


def sequence_balance_loss(gates: Tensor, indices: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over sequences of E sum_e f_e P_e, each taken within one sequence: 1 when balanced.

    `gates` [batch, seq, experts] are positive and are divided by their sum over the experts; `indices` [batch, seq, k];
    `mask` [batch, seq] is False for padding.

    DeepSeek-V3 2024, arXiv:2412.19437, eq. 17-20.
    """
    counted = gates.new_ones(gates.shape[:2]) if mask is None else mask.to(gates.dtype)
    sent = torch.zeros_like(gates).scatter_(2, indices, 1.0) * counted.unsqueeze(-1)
    share = sent.sum(1) / sent.sum((1, 2)).clamp(min=1).unsqueeze(-1)
    total = gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
    probability = gates / total * counted.unsqueeze(-1)
    mean_probability = probability.sum(1) / counted.sum(1).clamp(min=1).unsqueeze(-1)
    return _mean((gates.shape[-1] * share.detach() * mean_probability).sum(-1), None)


def z_loss(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """mean (logsumexp logits)^2 over the tokens where `counted` [tokens] is True: keeps the router's logits small.

    Under data parallelism the mean over the ranks is that over all tokens, however many of them each rank counts.

    Zoph et al. 2022, arXiv:2202.08906, eq. 5.
    """
    squares = logits.float().logsumexp(-1).square()
    if counted is None:
        return _mean(squares, None)
    return (squares * counted).sum() / (over_ranks(counted.sum()).clamp(min=1) / _num_ranks())


def balance_and_z_loss(logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """`load_balance_loss` and `z_loss` of `logits` [tokens, experts] where every token counts and goes to `indices` [tokens, k].

    They are a matter of few numbers and many steps, each of which takes longer to ask for than to do: so both are one function
    with its gradient, of a third of the steps. Compiled, transformed, and over ranks they are made by themselves.
    """
    if torch.compiler.is_compiling() or is_transformed() or _num_ranks() > 1 or not logits.numel():
        return load_balance_loss(logits, expert_mask(indices, logits.shape[-1])), z_loss(logits)
    balance, squares = _Losses.apply(logits.float(), indices)  # type: ignore[no-untyped-call]
    return balance, squares


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        tokens, experts = logits.shape
        logs = logits.log_softmax(-1)
        probability, total = logs.exp(), logits[:, 0] - logs[:, 0]
        sent = expert_mask(indices, experts).sum(0)
        slope = sent * (experts / indices.numel() / tokens)
        ctx.save_for_backward(probability, total, slope, logits)
        return (probability.sum(0) * slope).sum(), total.square().mean()

    @staticmethod
    def backward(ctx: Any, of_balance: Tensor, of_squares: Tensor) -> tuple[Tensor, None]:
        probability, total, slope, logits = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient is asked for that has a gradient itself
            probability, total = logits.softmax(-1), logits.logsumexp(-1)
        slope = slope * of_balance
        rest = total * (of_squares * (2 / len(total))) - (probability * slope).sum(-1)
        return probability * (slope + rest.unsqueeze(-1)), None


def entropy(probabilities: Tensor, counted: Tensor | None = None) -> Tensor:
    """The mean entropy of [tokens, experts] in nats; log E for a router that has not learnt anything."""
    return _mean(torch.special.entr(probabilities).sum(-1), counted)


def capacity(assignments: int, experts: int, top_k: int, factor: Tensor) -> Tensor:
    """The rows that one expert takes at most: max(k, floor(N k / E * factor)), a scalar that stays on the device.

    It equals `RouterProvider.get_capacity`; `factor` is a tensor so that a schedule can move it without
    recompilation, and infinity means no limit. In float32 it is below or above the number that was written (0.7 is
    0.69999999), so it is read to six decimals: exact for a number below 16 that has no more of them.
    """
    written = (factor.double() * 1e6).round() / 1e6
    limit = (written * (assignments / experts)).floor()
    return limit.clamp(min=top_k, max=assignments).long()


def expert_mask(indices: Tensor, num_experts: int, counted: Tensor | None = None) -> Tensor:
    """[tokens, experts], 1 where one of the token's `indices` [tokens, k] is the expert; 0 throughout for padding."""
    mask = indices.new_zeros(len(indices), num_experts, dtype=torch.float32).scatter_(1, indices, 1.0)
    return mask if counted is None else mask * counted.unsqueeze(1)


def over_ranks(counts: Tensor) -> Tensor:
    """Counts summed over the ranks of a data-parallel run; alone, the counts themselves."""
    if _num_ranks() > 1:
        counts = counts.clone()
        torch.distributed.all_reduce(counts)
    return counts


def is_transformed() -> bool:
    """Whether a transform of `torch.func` runs (grad, vmap, jvp ...)."""
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())


def _num_ranks() -> int:
    return torch.distributed.get_world_size() if has_ranks() else 1


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    if counted is None:
        return values.sum() / max(1, values.numel())  # no tokens, no loss: 0, where a mean would be 0 / 0
    return (values * counted).sum() / counted.sum().clamp(min=1)
