"""The stateless mathematics of both attentions.

Symbols: D d_model, H heads, d = D / H head width, r rank. A projector is a pair: `down` P [n, r, d] and `up` U
[n, d, r], where n is 1 (one pair for all heads) or the number of heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def orthonormal(count: int, rank: int, width: int) -> Float[Tensor, "count rank width"]:
    """`count` random matrices [count, rank, width] with orthonormal rows, drawn from torch's generator."""
    drawn = torch.empty(count, width, rank).normal_()
    basis, triangle = torch.linalg.qr(drawn)
    # The sign makes the draw uniform (Mezzadri 2007, arXiv:math-ph/0609050).
    uniform: Tensor = basis * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return uniform.transpose(-2, -1).contiguous()


def compose_down(
    weight: Float[Tensor, "wide d_model"], down: Float[Tensor, "n rank d_head"]
) -> Float[Tensor, "narrow d_model"]:
    """(I (x) P) W: from `weight` [heads * d, D] to [heads * r, D]; n is 1 or heads."""
    heads = weight.view(-1, down.shape[-1], weight.shape[1])
    # bmm, because a broadcast product would copy the weight and keep the copy for the backward pass.
    return torch.bmm(down.expand(len(heads), -1, -1), heads).flatten(0, 1)


def compose_up(
    weight: Float[Tensor, "d_model wide"], up: Float[Tensor, "n d_head rank"]
) -> Float[Tensor, "d_model narrow"]:
    """W (I (x) U): from `weight` [D, heads * d] to [D, heads * r]; n is 1 or heads."""
    heads = weight.view(weight.shape[0], -1, up.shape[-2]).transpose(0, 1)
    return torch.bmm(heads, up.expand(len(heads), -1, -1)).transpose(0, 1).flatten(1)


def lost_energy(h: Float[Tensor, "*some d_model"], down: Float[Tensor, "rank d_model"]) -> Float[Tensor, "*some"]:
    """eps2 = ||h - P^T P h||^2 / ||h||^2, the share of each state's energy outside the subspace of `down` P.

    In [0, 1] for orthonormal rows. Its mean is least for the principal subspace of the states, with
    orthonormal rows (the loss of a tied linear autoencoder; Baldi and Hornik 1989), so minimising it needs no
    constraint on P. A state of zero has lost nothing.
    """
    h, down = h.float(), down.float()
    rest = h - (h @ down.T) @ down
    return rest.square().sum(-1) / h.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)


def broken_line(
    x: Float[Tensor, "*some"],
    slope: Float[Tensor, " hidden"],
    offset: Float[Tensor, " hidden"],
    height: Float[Tensor, " hidden"],
    *,
    weight: float = 1.0,
    through: float = 0.0,
) -> Float[Tensor, "*some"]:
    """through x + weight f(x), f(x) = sum_k height_k relu(slope_k x + offset_k), without a hidden layer in memory.

    A two-layer ReLU map from numbers to numbers is a broken line with a knot at -offset_k / slope_k. Between knots it
    is a straight line, whose two coefficients are prefix sums over the sorted knots; so each element costs one binary
    search and two look-ups, where the hidden layer would hold `hidden` numbers for each. The gradients are the same.
    """
    with torch.no_grad():
        flat = torch.where(offset > 0, -torch.inf, torch.inf)  # a piece without slope is on everywhere or nowhere
        knots, order = torch.where(slope == 0, flat, -offset / slope).sort()
        rising = (slope >= 0)[order].to(height.dtype).unsqueeze(-1)
        passed = torch.bucketize(x, knots, out_int32=True)
    lines = (torch.stack((slope, offset), -1) * (weight * height).unsqueeze(-1))[order]  # [hidden, 2]
    # Left of all knots the falling pieces are on; each knot that is passed switches one off, or a rising one on.
    change = lines * (2 * rising - 1)
    first = (lines * (1 - rising)).sum(0, keepdim=True)
    table = torch.cat((first, first + change.cumsum(0)))  # [hidden + 1, 2]
    if through:
        table = torch.stack((table[:, 0] + through, table[:, 1]), 1)
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        # A compiler fuses the look-up; elsewhere its gradient would be summed in whatever order threads come.
        piece = torch.nn.functional.embedding(passed, table)
        return piece[..., 0] * x + piece[..., 1]
    line: Float[Tensor, "*some"] = _Line.apply(x, table, passed)  # type: ignore[no-untyped-call]
    return line


class _Line(torch.autograd.Function):
    """table[piece, 0] x + table[piece, 1], element by element.

    As one function it keeps x and the pieces alone for the backward pass, and the table's gradient is two sums over
    pieces; PyTorch's own for a look-up was half of the time of a training step.
    """

    @staticmethod
    def forward(x: Tensor, table: Tensor, piece: Tensor) -> Tensor:
        slope, offset = (column.index_select(0, piece.flatten()).view(x.shape) for column in table.unbind(1))
        return torch.addcmul(offset, slope, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, table, piece = ctx.saved_tensors
        slope = table[:, 0].index_select(0, piece.flatten()).view(x.shape)
        if x.device.type == "cpu":
            pieces = piece.flatten()
            sums = [
                table.new_zeros(len(table)).index_add(0, pieces, each.flatten().to(table.dtype))
                for each in (grad * x, grad)
            ]
            return grad * slope, torch.stack(sums, 1), None
        if torch.compiler.is_compiling():
            return grad * slope, torch.ops.apt_attention_tva.piece_sums(grad, x, piece, len(table)), None
        return grad * slope, sums_by_piece(grad, x, piece, len(table)), None


def sums_by_piece(
    grad: Float[Tensor, "*some"], x: Float[Tensor, "*some"], piece: Int[Tensor, "*some"], count: int
) -> Float[Tensor, "count 2"]:
    """For each of `count` pieces, the sums of grad x and of grad over its elements: on a GPU fast, and the same every time.

    There sums of floating-point numbers by atomics depend on the order in which threads come, and all would wait for a
    few addresses. So the numbers are turned into whole ones, of which the largest has 62 bits less those that so many
    terms can fill; sums of these do not depend on an order. Each column of the last axis has sums of its own first.
    """
    if not grad.numel():
        return grad.new_zeros(count, 2)
    steps = 2.0 ** (62 - math.ceil(math.log2(grad.numel())))
    width = grad.shape[-1] if grad.dim() else 1
    index = piece.reshape(-1, width).long()
    sums = []
    # Told to be deterministic, PyTorch would sort the indices; whole numbers need no order.
    told = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch._C._set_deterministic_algorithms(False)
    try:
        for each in (grad * x, grad):
            scale = steps / torch.linalg.vector_norm(each, math.inf).clamp(min=2.0**-60)
            whole = (each * scale).round().long().reshape(-1, width)
            columns = whole.new_zeros(count, width).scatter_add_(0, index, whole)
            sums.append(columns.sum(1).to(grad.dtype) / scale)
    finally:
        torch._C._set_deterministic_algorithms(told[0], warn_only=told[1])
    return torch.stack(sums, 1)


@torch.library.custom_op("apt_attention_tva::piece_sums", mutates_args=())
def piece_sums(grad: Tensor, x: Tensor, piece: Tensor, count: int) -> Tensor:
    """`sums_by_piece` as one step of compiled code."""
    return sums_by_piece(grad, x, piece, count)


@piece_sums.register_fake
def _(grad: Tensor, x: Tensor, piece: Tensor, count: int) -> Tensor:
    return grad.new_empty(count, 2)


def row_entropy(
    scores: Float[Tensor, "*some seq kv"], unseen: Bool[Tensor, "*#some seq kv"]
) -> Float[Tensor, "*some seq 1"]:
    """The entropy of softmax over each row's visible keys, over the logarithm of their number: in [0, 1].

    `unseen` is True for keys that are not visible. A row with one visible key, or none, has entropy 0.
    """
    count = unseen.logical_not().sum(-1, keepdim=True)
    # The lowest finite number, not -inf: a row without visible keys (padding) must not send NaN into the gradient.
    logs = scores.masked_fill(unseen, torch.finfo(scores.dtype).min).log_softmax(-1)
    entropy = -(logs.exp() * logs.masked_fill(unseen, 0.0)).sum(-1, keepdim=True)
    return torch.where(count > 1, entropy / count.clamp(min=2).to(scores.dtype).log(), 0.0).clamp(0.0, 1.0)
