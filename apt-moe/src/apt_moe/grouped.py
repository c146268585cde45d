"""A linear layer of many experts in one product: row n is multiplied by the matrix of the expert that owns it.

`torch.nn.functional.grouped_mm` does this, with traps on the CPU (torch 2.13): no float32 under compile or on the meta
device, an error on expanded gradients and on sizes that are no multiple of 16 bytes, rows behind the last offset left
uninitialised, autocast ignored, and 0 counted FLOPs. The two operators here wrap it and have none of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, experts: Tensor) -> Tensor:
    """``rows[n] @ weight[e].T + bias[e]`` with e the expert of row n; rows that no expert owns give ``bias[e]``.

    `rows` [rows, in], sorted by expert; `weight` [experts, out, in]; `bias` [experts, out]; `offsets` [experts] int32,
    where each expert's rows end; `experts` [rows]. Under autocast it computes in autocast's dtype.
    """
    device = rows.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows, weight = rows.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    product: Tensor = torch.ops.apt_moe.grouped_mm(rows, weight, offsets)
    return product if bias is None else product + bias.index_select(0, experts)


@torch.library.custom_op("apt_moe::grouped_mm", mutates_args=())
def grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """[rows, in] by [experts, out, in] -> [rows, out]; rows behind the last offset give 0."""
    if _aligned(rows, weight):
        product = functional.grouped_mm(rows.contiguous(), weight.transpose(1, 2), offs=offsets)
        return _clear_tail(product, offsets)
    product = rows.new_zeros(rows.shape[0], weight.shape[1])
    for expert, start, end in _spans(offsets):
        torch.mm(rows[start:end], weight[expert].t(), out=product[start:end])
    return product


@torch.library.custom_op("apt_moe::grouped_outer", mutates_args=())
def grouped_outer(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """The gradient of `grouped_mm` to its weight: [rows, out] and [rows, in] -> [experts, out, in]."""
    if _aligned(grad, rows):
        return functional.grouped_mm(grad.contiguous().t(), rows.contiguous(), offs=offsets)
    product = rows.new_zeros(offsets.shape[0], grad.shape[1], rows.shape[1])
    for expert, start, end in _spans(offsets):
        torch.mm(grad[start:end].t(), rows[start:end], out=product[expert])
    return product


@grouped_mm.register_fake
def _(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(offsets.shape[0], grad.shape[1], rows.shape[1])


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, offsets = ctx.saved_tensors  # type: ignore[attr-defined]
    needs_rows, needs_weight, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
    operators = torch.ops.apt_moe
    grad = grad.contiguous()
    return (
        operators.grouped_mm(grad, weight.transpose(1, 2), offsets) if needs_rows else None,
        operators.grouped_outer(grad, rows, offsets) if needs_weight else None,
        None,
    )


grouped_mm.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.apt_moe.grouped_mm)
def _(rows: tuple[int, int], weight: tuple[int, int, int], *args: object, **kwargs: object) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.apt_moe.grouped_outer)
def _(grad: tuple[int, int], rows: tuple[int, int], *args: object, **kwargs: object) -> int:
    return 2 * grad[0] * grad[1] * rows[1]


def _aligned(*operands: Tensor) -> bool:
    """Whether `torch.nn.functional.grouped_mm` takes them: its dtypes, and sizes that are multiples of 16 bytes."""
    if operands[0].dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(size * operand.element_size() % 16 == 0 for operand in operands for size in operand.shape[1:])


def _clear_tail(product: Tensor, offsets: Tensor) -> Tensor:
    """Zeros behind the last offset, where the kernel writes nothing."""
    if product.device.type == "cpu":
        product[int(offsets[-1]) :] = 0
        return product
    # On an accelerator the offset stays on the device: reading it would wait for everything queued so far.
    tail = torch.arange(product.shape[0], device=product.device) >= offsets[-1]
    return product.masked_fill_(tail.unsqueeze(1), 0)


def _spans(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """Each expert that owns rows, with its first row and the one behind its last."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            yield expert, start, end
        start = end
