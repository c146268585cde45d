"""A linear layer of many experts in one product: row n is multiplied by the matrix of the expert that owns it.

There are two kernels. ``loop`` is a matrix product for each expert that owns rows. ``grouped_mm``,
`torch.nn.functional.grouped_mm`, is one kernel on GPUs of compute capability 9 and newer, in bfloat16; in other dtypes it
reads the offsets back and loops, and on the CPU it is a loop too, of which ``loop`` makes use there. What that leaves out: the
gradient of the weights, for which it takes fresh memory at every step, and products with few rows, which without AVX-512 are
twice as fast with the operands exchanged. It has traps: no float32 under compile or on the meta device, an error on expanded
gradients and on sizes that are no multiple of 16 bytes, rows behind the last offset left uninitialised, autocast ignored, and
0 counted FLOPs. The operators here wrap both kernels and have none of them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import flop_registry, register_flop_formula

from apt.layers.units import has_units
from apt_moe.recycle import recycler

Kernel = Literal["loop", "grouped_mm"]
_grouped_mm = functional.grouped_mm if hasattr(functional, "grouped_mm") else torch._grouped_mm  # until PyTorch 2.10

FEW = 0 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16
"""Rows up to which W x^T is faster than x W^T on the CPU (measured, `benchmarks/moe.py kernels`): with AVX-512 it takes 1.1 to
4 times as long, without half."""

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
    upcast = _is_slow(rows)
    few = FEW if transpose and rows.device.type == "cpu" else 0
    at_once = rows.device.type == "cpu" and not upcast and rows.shape[0] > few * offsets.shape[0]
    if (kernel == "grouped_mm" or at_once) and offsets.shape[0] < MOST and _aligned(rows, weight):
        if not rows.shape[0]:
            return rows.new_zeros(0, weight.shape[1 if transpose else 2])
        product = _grouped_mm(rows.contiguous(), weight.transpose(1, 2) if transpose else weight, offs=offsets)
        return _clear_tail(product, offsets) if tail else product
    product = rows.new_empty(rows.shape[0], weight.shape[1 if transpose else 2])
    sizes, matrices = _sizes(offsets, rows.shape[0]), weight.mT if transpose else weight
    *blocks, _ = rows.split_with_sizes(sizes)
    *products, unowned = product.split_with_sizes(sizes)
    for size, block, matrix, out in zip(sizes[:-1], blocks, matrices.unbind(0), products, strict=True):
        if not size:
            continue
        if upcast:
            out.copy_(block.float() @ matrix.float())
        elif size <= few:
            out.copy_(torch.mm(matrix.t(), block.t()).t())
        else:
            torch.mm(block, matrix, out=out)
    unowned.zero_()
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
    sizes, upcast = _sizes(offsets, rows.shape[0]), _is_slow(rows)
    *lefts, _ = grad.t().split_with_sizes(sizes, 1)
    *rights, _ = rows.split_with_sizes(sizes)
    for size, left, right, out in zip(sizes[:-1], lefts, rights, product.unbind(0), strict=True):
        if not size:
            out.zero_()
        elif upcast:
            out.copy_(left.float() @ right.float())
        else:
            torch.mm(left, right, out=out)
    return product


class _Product(torch.autograd.Function):
    """With its context in `forward`: apart from it, PyTorch asks for the function's signature at each call.

    `torch.func` would need it apart, and never comes here: under it a mixture is run by its reference.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor, kernel: str, tail: bool) -> Tensor:
        ctx.save_for_backward(rows, weight, offsets)
        ctx.kernel, ctx.tail = kernel, tail
        return _multiply(rows, weight, offsets, kernel, True, tail)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        rows, weight, offsets = ctx.saved_tensors
        needs_rows, needs_weight, *_ = ctx.needs_input_grad
        if _is_twice():
            return *_twice(grad, rows, weight, offsets, needs_rows, needs_weight), None, None, None
        kernel, tail, grad = ctx.kernel, ctx.tail, grad.contiguous()
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
    sizes = _sizes(offsets, rows.shape[0])
    *grads, _ = grad.split_with_sizes(sizes)
    *blocks, unowned = rows.split_with_sizes(sizes)
    return (
        torch.cat([*map(torch.mm, grads, weight.unbind(0)), torch.zeros_like(unowned)]) if needs_rows else None,
        torch.stack([torch.mm(each.t(), block) for each, block in zip(grads, blocks, strict=True)])
        if needs_weight
        else None,
    )


class _Bias(torch.autograd.Function):
    """``product[n] + bias[e]``, with a gradient that is summed in one order: that of `index_select` is summed by atomics.

    Rows that no expert owns are not in the bias's gradient; where a mixture has such rows, their gradient is 0.
    """

    @staticmethod
    def forward(ctx: Any, product: Tensor, bias: Tensor, offsets: Tensor, experts: Tensor, kernel: str) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.kernel = kernel
        return product + bias.index_select(0, experts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (offsets,) = ctx.saved_tensors
        _, needs_bias, *_ = ctx.needs_input_grad
        of_bias = None
        if needs_bias and _is_twice():
            *grads, _ = grad.split_with_sizes(_sizes(offsets, grad.shape[0]))
            of_bias = torch.stack([each.sum(0) for each in grads])
        elif needs_bias:
            ones = grad.new_ones(grad.shape[0], 16 // grad.element_size())  # the narrowest that the kernel takes
            summed = torch.ops.apt_moe.grouped_outer(grad.contiguous(), ones, offsets, ctx.kernel)
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kernel, ctx.tail = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    rows, weight, offsets = ctx.saved_tensors
    needs_rows, needs_weight, *_ = ctx.needs_input_grad
    if _is_twice():
        return *_twice(grad, rows, weight, offsets, needs_rows, needs_weight), None, None, None
    operators, kernel, tail = torch.ops.apt_moe, ctx.kernel, ctx.tail
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


if torch.ops.aten._grouped_mm not in flop_registry:

    @register_flop_formula(torch.ops.aten._grouped_mm)
    def _(left: tuple[int, ...], right: tuple[int, ...], *args: object, **kwargs: object) -> int:
        # Of [rows, in] by [experts, in, out], or of [out, rows] by [rows, in].
        return 2 * left[0] * left[1] * right[-1]


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


def _sizes(offsets: Tensor, rows: int) -> list[int]:
    """How many of so many `rows` each expert owns, and last those that none does."""
    ends = [0, *offsets.tolist(), rows]
    return [end - start for start, end in pairwise(ends)]
