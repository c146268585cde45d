"""Bringing each token to its experts and back: sort by expert once, work on contiguous rows, undo the sort.

Everything has a static shape and stays on the device: how many rows each expert has is a tensor, never a Python number.

Where capacity is limited, an expert takes tokens in the order of their positions. Served by score, or first choices
first, a later token could push out an earlier one: the future would change the past. Padding is served last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Plan(NamedTuple):
    """Where every assignment goes; an assignment is one (token, choice) pair, numbered ``token * k + choice``.

    Rows are assignments in the experts' order; those that found no room come after all experts' rows.
    """

    order: Tensor
    """[rows] the assignment that stands in each row."""
    tokens: Tensor
    """[rows] the token of each row."""
    inverse: Tensor
    """[assignments] the row of each assignment."""
    experts: Tensor
    """[rows] the expert of each row."""
    offsets: Tensor
    """[experts] int32: where each expert's rows end; rows from offsets[-1] on were dropped."""
    kept: Tensor | None
    """[assignments] whether it found room; None where nothing is ever dropped."""
    top_k: int

    def whole(self) -> Tensor:
        """The offsets where the last expert owns the rows that found no room too; their weights are 0."""
        end = self.offsets.new_full((1,), self.order.shape[0])
        return torch.cat([self.offsets[:-1], end])


def plan(
    indices: Tensor,
    num_experts: int,
    *,
    limit: Tensor | None = None,
    counted: Tensor | None = None,
    sent: Tensor | None = None,
) -> Plan:
    """Plan the dispatch of `indices` [tokens, k]. `limit` is a scalar: the rows an expert takes at most.

    `counted` [tokens] is False for padding, which takes only the room that other tokens leave. `sent` [tokens, k] is
    False where a token does not go to the expert after all, as where experts choose their tokens.
    """
    top_k = indices.shape[1]
    flat = indices.reshape(-1)
    rows = torch.arange(flat.numel(), device=flat.device)
    if sent is not None:
        chosen = sent.reshape(-1)
        order, _ = _order(torch.where(chosen, flat, num_experts), num_experts)
        inverse = torch.empty_like(order).scatter_(0, order, rows)
        ends = count(flat, num_experts, chosen).cumsum(0).to(torch.int32)
        return Plan(order, order // top_k, inverse, flat[order], ends, chosen, top_k)
    key = flat
    if limit is not None and counted is not None:
        key = 2 * flat + (~counted).long().repeat_interleave(top_k)
    order, ordered = _order(key, 2 * num_experts)
    if limit is None:
        inverse = torch.empty_like(order).scatter_(0, order, rows)
        return Plan(order, order // top_k, inverse, ordered.to(flat.dtype), _ends(ordered, num_experts), None, top_k)
    experts = flat[order]
    counts = count(flat, num_experts)
    rank = rows - (counts.cumsum(0) - counts)[experts]
    found_room = rank < limit
    to_front, _ = _order((~found_room).long(), 1)
    order, experts, found_room = order[to_front], experts[to_front], found_room[to_front]
    counts = counts.minimum(limit)
    kept = torch.empty_like(found_room).scatter_(0, order, found_room)
    inverse = torch.empty_like(order).scatter_(0, order, rows)
    return Plan(order, order // top_k, inverse, experts, counts.cumsum(0).to(torch.int32), kept, top_k)


def _order(keys: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Where each of the sorted `keys` [assignments] stood, and them sorted; equal ones stay in their order.

    None is above `largest`.
    """
    if keys.device.type == "cuda" and largest < 1 << 15:
        keys = keys.to(torch.int16)  # its sort takes the time that the width of the keys has
    ordered, order = keys.sort(stable=True)
    return order, ordered


def _ends(ordered: Tensor, num_experts: int) -> Tensor:
    """Where each expert's rows end, int32 [experts], from each row's expert `ordered` [rows]."""
    if torch.compiler.is_compiling():
        return count(ordered.long(), num_experts).cumsum(0).to(torch.int32)  # of which a compiler makes one kernel
    each = torch.arange(num_experts, dtype=ordered.dtype, device=ordered.device)
    return torch.searchsorted(ordered, each, right=True, out_int32=True)


def count(experts: Tensor, num_experts: int, counted: Tensor | None = None) -> Tensor:
    """How often each expert occurs in `experts` [assignments], an integer tensor [experts]."""
    ones = torch.ones_like(experts) if counted is None else counted.to(experts.dtype)
    return experts.new_zeros(num_experts).scatter_add_(0, experts, ones)


def dispatch(tokens: Tensor, plan: Plan) -> Tensor:
    """The rows [rows, d_model] of `tokens` [tokens, d_model]; its gradient is a gather and a sum over k, no atomics."""
    rows: Tensor = _Dispatch.apply(tokens, plan.tokens, plan.inverse, plan.top_k)  # type: ignore[no-untyped-call]
    return rows


def combine(rows: Tensor, weights: Tensor, plan: Plan, dtype: torch.dtype | None = None) -> Tensor:
    """sum_j w_j row_j over each token's choices: [tokens, d_model] in `dtype`, or as wide as it was summed: in
    float32, where `weights` [tokens, k] are.

    The weight multiplies the expert's output, not its input, so that equal experts with weights that sum to 1 are the
    one expert. A dropped assignment adds nothing.
    """
    if plan.kept is not None:
        weights = weights * plan.kept.view_as(weights)
    combined: Tensor = _Combine.apply(rows, weights, plan.order, plan.tokens, plan.inverse, dtype)  # type: ignore[no-untyped-call]
    return combined


def _sum_of_rows(rows: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_j w_j rows[index[n, j]]: [tokens, width], in the wider of both dtypes and summed in float32 at least."""
    if (
        rows.dtype in (torch.float32, torch.float64)
        and index.numel()
        and (weights is None or weights.dtype == rows.dtype)
    ):
        return functional.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)  # in one pass
    chosen = rows.index_select(0, index.flatten()).view(*index.shape, rows.shape[1])
    return (chosen if weights is None else chosen * weights.unsqueeze(-1)).sum(1)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return tokens.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return _sum_of_rows(grad, inverse.view(-1, ctx.top_k)), None, None, None


class _Combine(torch.autograd.Function):
    """The gradient comes in the dtype of what went out: in bfloat16 half of the memory is moved that float32 would take."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        order: Tensor,
        tokens: Tensor,
        inverse: Tensor,
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.save_for_backward(rows, weights, order, tokens, inverse)
        summed = _sum_of_rows(rows, inverse.view_as(weights), weights)
        # A conversion that does nothing would lose the gradient, in silence, where PyTorch 2.11 compiles this.
        return summed if dtype in (None, summed.dtype) else summed.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        rows, weights, order, tokens, inverse = ctx.saved_tensors
        if grad.is_cuda:
            grad = grad.to(rows.dtype)  # as under autocast a dense layer's is, and before each is copied k times
        grad = grad.index_select(0, tokens)
        products = grad * rows
        sums = products.sum(1, dtype=torch.promote_types(products.dtype, weights.dtype)).to(weights.dtype)
        of_weights = sums.index_select(0, inverse).view_as(weights)
        return _scaled(grad, weights.reshape(-1).index_select(0, order), rows.dtype), of_weights, None, None, None, None


def _scaled(rows: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows[n] * weights[n]`` in `dtype`, [rows, width]."""
    if rows.device.type == "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return (rows * weights.unsqueeze(1)).to(dtype)
    return torch.mul(
        rows, weights.unsqueeze(1), out=rows.new_empty(rows.shape, dtype=dtype)
    )  # without a copy in float32
