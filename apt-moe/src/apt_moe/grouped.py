"""A linear layer of many experts in one product: row n is multiplied by the matrix of the expert that owns it.

There are two kernels. ``loop`` is a matrix product for each expert that owns rows; on the CPU nothing was measured to be
faster, since `torch.nn.functional.grouped_mm` is the same loop there, its gradient's memory is fresh at every step, and a
product with few rows is twice as fast with the operands exchanged. ``grouped_mm`` is one kernel on GPUs of compute
capability 9 and newer, in bfloat16; in other dtypes it reads the offsets back and loops. It has traps: no float32 under
compile or on the meta device, an error on expanded gradients and on sizes that are no multiple of 16 bytes, rows behind
the last offset left uninitialised, autocast ignored, and 0 counted FLOPs. The operators here wrap both kernels and have
none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from apt.layers.units import has_units
from apt_moe.recycle import recycler

Kernel = Literal["loop", "grouped_mm"]
_grouped_mm = functional.grouped_mm if hasattr(functional, "grouped_mm") else torch._grouped_mm  # until PyTorch 2.10

FEW = 16
"""Rows up to which W x^T is faster than x W^T on the CPU (measured, `benchmarks/moe.py kernels`)."""

MOST = 1024
"""Experts from which on `torch.nn.functional.grouped_mm` refuses them on GPUs."""


def grouped_linear(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    experts: Tensor,
    kernel: Kernel = "loop",
    tail: bool = True,
) -> Tensor:
    """``rows[n] @ weight[e].T + bias[e]`` with e the expert of row n; rows that no expert owns give ``bias[e]``.

    `rows` [rows, in], sorted by expert; `weight` [experts, out, in]; `bias` [experts, out]; `offsets` [experts] int32,
    where each expert's rows end; `experts` [rows]. `tail` is False where every row has an owner, and none needs to be
    cleared. Under autocast it computes in autocast's dtype.
    """
    device = rows.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows, weight = rows.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if (
        (device == "cuda" or (kernel == "loop" and device == "cpu"))
        and type(rows) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
    ):
        # An operator of our own costs a tenth of a millisecond a call, as much as the product of one token.
        product: Tensor = _Product.apply(rows, weight, offsets, kernel, tail)  # type: ignore[no-untyped-call]
    else:
        product = torch.ops.apt_moe.grouped_mm(rows, weight, offsets, kernel, tail)
    if bias is None:
        return product
    if device == "cpu":
        return product + bias.index_select(0, experts)
    biased: Tensor = _Bias.apply(product, bias, offsets, experts, kernel)  # type: ignore[no-untyped-call]
    return biased


def _multiply(rows: Tensor, weight: Tensor, offsets: Tensor, kernel: str, transpose: bool, tail: bool) -> Tensor:
    """``rows[n] @ weight[e]``, or ``weight[e].T`` where `transpose` is set; rows behind the last offset give 0.

    Without `tail` there are no such rows.
    """
    if kernel == "grouped_mm" and offsets.shape[0] < MOST and _aligned(rows, weight):
        if not rows.shape[0]:
            return rows.new_zeros(0, weight.shape[1 if transpose else 2])
        product = _grouped_mm(rows.contiguous(), weight.transpose(1, 2) if transpose else weight, offs=offsets)
        return _clear_tail(product, offsets) if tail else product
    product = rows.new_empty(rows.shape[0], weight.shape[1 if transpose else 2])
    upcast = _is_slow(rows)
    matrices = weight.unbind(0)
    end = 0
    for expert, start, end in _spans(offsets):
        block, matrix = rows[start:end], matrices[expert]
        if upcast:
            block, matrix = block.float(), matrix.float()
            product[start:end] = block @ (matrix.t() if transpose else matrix)
        elif transpose and end - start <= FEW:
            product[start:end] = torch.mm(matrix, block.t()).t()
        else:
            torch.mm(block, matrix.t() if transpose else matrix, out=product[start:end])
    product[end:] = 0
    return product


def _outer(grad: Tensor, rows: Tensor, offsets: Tensor, kernel: str) -> Tensor:
    """The gradient of the product to its weight: [rows, out] and [rows, in] -> [experts, out, in]."""
    if kernel == "grouped_mm" and offsets.shape[0] < MOST and _aligned(grad, rows):
        if not rows.shape[0]:
            return rows.new_zeros(offsets.shape[0], grad.shape[1], rows.shape[1])
        # The left operand by columns and the right one by rows: so the kernel takes experts without rows, and gives them 0.
        return _grouped_mm(grad.contiguous().t(), rows.contiguous(), offs=offsets)
    shape = (offsets.shape[0], grad.shape[1], rows.shape[1])
    product = recycler.empty(shape, rows.dtype) if rows.device.type == "cpu" else rows.new_empty(shape)
    upcast = _is_slow(rows)
    empty = set(range(shape[0]))
    matrices = product.unbind(0)
    for expert, start, end in _spans(offsets):
        empty.discard(expert)
        left, right = grad[start:end].t(), rows[start:end]
        if upcast:
            matrices[expert].copy_(left.float() @ right.float())
        else:
            torch.mm(left, right, out=matrices[expert])
    for expert in empty:
        matrices[expert].zero_()
    return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, weight: Tensor, offsets: Tensor, kernel: str, tail: bool) -> Tensor:
        return _multiply(rows, weight, offsets, kernel, True, tail)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        rows, weight, offsets = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_rows, needs_weight, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
        if _is_twice():
            return *_twice(grad, rows, weight, offsets, needs_rows, needs_weight), None, None, None
        kernel, tail, grad = ctx.kernel, ctx.tail, grad.contiguous()  # type: ignore[attr-defined]
        return (
            _multiply(grad, weight, offsets, kernel, False, tail) if needs_rows else None,
            _outer(grad, rows, offsets, kernel) if needs_weight else None,
            None,
            None,
            None,
        )


def _is_twice() -> bool:
    """Whether a gradient is asked for that has a gradient itself (``create_graph=True``), which the kernels have not."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _twice(
    grad: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor, needs_rows: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The product's gradients to `rows` and `weight`, in steps that PyTorch knows the gradients of."""
    matrices, spans = weight.unbind(0), list(_spans(offsets))
    owned = spans[-1][2] if spans else 0
    of_rows = [grad[start:end] @ matrices[expert] for expert, start, end in spans]
    outer = {expert: grad[start:end].t() @ rows[start:end] for expert, start, end in spans}
    return (
        torch.cat([*of_rows, torch.zeros_like(rows[owned:])]) if needs_rows else None,
        torch.stack([outer.get(expert, torch.zeros_like(each)) for expert, each in enumerate(matrices)])
        if needs_weight
        else None,
    )


class _Bias(torch.autograd.Function):
    """``product[n] + bias[e]``, with a gradient that is summed in one order: that of `index_select` is summed by atomics.

    Rows that no expert owns are not in the bias's gradient; where a mixture has such rows, their gradient is 0.
    """

    @staticmethod
    def forward(product: Tensor, bias: Tensor, offsets: Tensor, experts: Tensor, kernel: str) -> Tensor:
        return product + bias.index_select(0, experts)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, _, offsets, _, ctx.kernel = inputs  # type: ignore[attr-defined]
        ctx.save_for_backward(offsets)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        (offsets,) = ctx.saved_tensors  # type: ignore[attr-defined]
        _, needs_bias, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
        of_bias = None
        if needs_bias and _is_twice():
            sums = {expert: grad[start:end].sum(0) for expert, start, end in _spans(offsets)}
            of_bias = torch.stack([sums.get(expert, grad.new_zeros(grad.shape[1])) for expert in range(len(offsets))])
        elif needs_bias:
            ones = grad.new_ones(grad.shape[0], 16 // grad.element_size())  # the narrowest that the kernel takes
            summed = torch.ops.apt_moe.grouped_outer(grad.contiguous(), ones, offsets, ctx.kernel)  # type: ignore[attr-defined]
            of_bias = summed[..., 0].contiguous()
        return grad, of_bias, None, None, None


@torch.library.custom_op("apt_moe::grouped_mm", mutates_args=())
def grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor, kernel: str, tail: bool) -> Tensor:
    """[rows, in] by [experts, out, in] -> [rows, out]; rows behind the last offset give 0."""
    return _multiply(rows, weight, offsets, kernel, True, tail)


@torch.library.custom_op("apt_moe::grouped_mm_back", mutates_args=())
def grouped_mm_back(grad: Tensor, weight: Tensor, offsets: Tensor, kernel: str, tail: bool) -> Tensor:
    """The gradient of `grouped_mm` to its rows: [rows, out] by [experts, out, in] -> [rows, in]."""
    return _multiply(grad, weight, offsets, kernel, False, tail)


@torch.library.custom_op("apt_moe::grouped_outer", mutates_args=())
def grouped_outer(grad: Tensor, rows: Tensor, offsets: Tensor, kernel: str) -> Tensor:
    """The gradient of `grouped_mm` to its weight: [rows, out] and [rows, in] -> [experts, out, in]."""
    return _outer(grad, rows, offsets, kernel)


@grouped_mm.register_fake
def _(rows: Tensor, weight: Tensor, offsets: Tensor, kernel: str, tail: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@grouped_mm_back.register_fake
def _(grad: Tensor, weight: Tensor, offsets: Tensor, kernel: str, tail: bool) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[2])


@grouped_outer.register_fake
def _(grad: Tensor, rows: Tensor, offsets: Tensor, kernel: str) -> Tensor:
    return rows.new_empty(offsets.shape[0], grad.shape[1], rows.shape[1])


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    *tensors, ctx.kernel, ctx.tail = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(*tensors)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    rows, weight, offsets = ctx.saved_tensors  # type: ignore[attr-defined]
    needs_rows, needs_weight, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
    if _is_twice():
        return *_twice(grad, rows, weight, offsets, needs_rows, needs_weight), None, None, None
    operators, kernel, tail = torch.ops.apt_moe, ctx.kernel, ctx.tail  # type: ignore[attr-defined]
    grad = grad.contiguous()
    return (
        operators.grouped_mm_back(grad, weight, offsets, kernel, tail) if needs_rows else None,
        operators.grouped_outer(grad, rows, offsets, kernel) if needs_weight else None,
        None,
        None,
        None,
    )


grouped_mm.register_autograd(_backward, setup_context=_save)


@register_flop_formula([torch.ops.apt_moe.grouped_mm, torch.ops.apt_moe.grouped_mm_back])
def _(rows: tuple[int, int], weight: tuple[int, int, int], *args: object, **kwargs: object) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.apt_moe.grouped_outer)
def _(grad: tuple[int, int], rows: tuple[int, int], *args: object, **kwargs: object) -> int:
    return 2 * grad[0] * grad[1] * rows[1]


def _is_slow(rows: Tensor) -> bool:
    """Whether a product in this dtype is slower by tens than one in float32: bfloat16 on CPUs without its instructions."""
    return rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and not has_units()


def _aligned(*operands: Tensor) -> bool:
    """Whether `torch.nn.functional.grouped_mm` takes them: its dtypes, and sizes that are multiples of 16 bytes.

    On a GPU the addresses have to be such multiples too.
    """
    if operands[0].dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if operands[0].device.type == "cuda" and any(operand.data_ptr() % 16 for operand in operands):
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
