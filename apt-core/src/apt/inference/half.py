"""Linear layers whose weights are in 16 bits, on a processor: with units for products of bfloat16 and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from apt.inference.packed import PackedLinear, get_packed
from apt.layers.units import has_units

LARGEST, SMALLEST = torch.finfo(torch.float16).max, 2**-16

torch.library.define("apt::multiply_half", "(Tensor x, Tensor number, SymInt out_features) -> Tensor")
torch.library.define("apt::multiply_row", "(Tensor weight, Tensor x) -> Tensor")
torch.library.define("apt::unpack_half", "(Tensor number, SymInt out_features, SymInt in_features) -> Tensor")


@torch.library.impl("apt::multiply_half", "CPU")
def _multiply(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    y: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(x, get_packed(number))
    return y


@torch.library.impl("apt::multiply_half", "Meta")
def _shape_of_product(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.impl("apt::multiply_row", "CPU")
def _multiply_row(weight: Tensor, x: Tensor) -> Tensor:
    return torch.mv(weight, x)


@torch.library.impl("apt::multiply_row", "Meta")
def _shape_of_row(weight: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(weight.shape[0])


@torch.library.impl("apt::unpack_half", "CPU")
def _unpack(number: Tensor, out_features: int, in_features: int) -> Tensor:
    weight: Tensor = HalfLinear.unpack(get_packed(number))[0].to(torch.bfloat16)
    return weight


@torch.library.impl("apt::unpack_half", "Meta")
def _shape_of_weight(number: Tensor, out_features: int, in_features: int) -> Tensor:
    return number.new_empty((out_features, in_features), dtype=torch.bfloat16)


class RowLinear(nn.Module):
    """y = W x + b with W in bfloat16, the same tensor as before; one row is multiplied as a vector.

    oneDNN's product prepares the weights for its units at each call, which pays for many rows. For one of them PyTorch's product
    of a matrix and a vector, with sums in float32, took 0.69 to 0.93 of its time (a Xeon with AMX; docs/log.md). Compiled, an
    operator of our own keeps it: a compiler would write the product out.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch out"]:
        """The product, in the dtype of `x`."""
        if (
            x.numel() != self.in_features or x.dtype != self.weight.dtype
        ):  # which autocast makes one, in this product alone
            return functional.linear(x, self.weight, self.bias)
        multiply = torch.ops.apt.multiply_row if torch.compiler.is_compiling() else torch.mv
        y: Tensor = multiply(self.weight, x.reshape(-1)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Its sizes, as `nn.Linear` says them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class HalfLinear(PackedLinear):
    """y = W x + b with W as bfloat16 has it, held in float16; sums are made in float32.

    PyTorch multiplies bfloat16 on a processor without units for it row by row: one row at two thirds of what memory gives, and
    many rows seven times as slowly as float32. FBGEMM's product (the operator behind `quantize_dynamic` in float16) reads
    weights of the same size and has neither fault. Float16 holds a number of bfloat16 exactly from 2^-17 on, and smaller ones
    to 2^-25; above 65,504 it holds none, and `supports` says so.
    """

    kind = "bf16 as fp16"

    _whole: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.hold(linear.weight.detach())
        self.register_buffer("_whole", None, persistent=False)

    @staticmethod
    def supports(linear: nn.Linear) -> bool:
        """Whether float16 has numbers for the weights: none too large, and not all of them too small."""
        largest = float(linear.weight.detach().abs().max())
        return largest == 0 or SMALLEST <= largest <= LARGEST

    @staticmethod
    def is_worth_it() -> bool:
        """Whether the processor has no units for bfloat16, and PyTorch this product."""
        return not has_units() and torch.backends.quantized.engine in ("x86", "fbgemm")

    @staticmethod
    def pack(*what: Tensor) -> Any:
        """The weights [out, width] as the product takes them."""
        (weight,) = what
        return torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    @staticmethod
    def unpack(packed: Any) -> Sequence[Tensor]:
        """The weights [out, width] in float16."""
        weight, _ = torch.ops.quantized.linear_unpack_fp16(packed)
        return (weight.half(),)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch out"]:
        """The product, in the dtype of `x`."""
        y: Tensor = torch.ops.apt.multiply_half(x.float(), self._number, self.out_features)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    @property
    def weight(self) -> Float[Tensor, "out width"]:
        """The weights in bfloat16. They are kept: unpacking takes longer than a product, and who asks does so at each token."""
        if self._whole is not None:
            return self._whole
        weight: Tensor = torch.ops.apt.unpack_half(self._number, self.out_features, self.in_features)
        if not torch.compiler.is_compiling():
            self._whole = weight
        return weight
