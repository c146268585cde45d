"""Linear layers whose weights are in 16 bits, on a processor: with units for products of bfloat16 and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from apt.inference.packed import PackedLinear
from apt.layers.units import has_units

LARGEST, SMALLEST = torch.finfo(torch.float16).max, 2**-16

torch.library.define("apt::multiply_row", "(Tensor weight, Tensor x) -> Tensor")


@torch.library.impl("apt::multiply_row", "CPU")
def _multiply_row(weight: Tensor, x: Tensor) -> Tensor:
    return torch.mv(weight, x)


@torch.library.impl("apt::multiply_row", "Meta")
def _shape_of_row(weight: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(weight.shape[0])


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
        # Under autocast a row may be of another type, which this product alone converts.
        if x.numel() != self.in_features or x.dtype != self.weight.dtype:
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

    @staticmethod
    def multiply_packed(rows: Tensor, packed: Any) -> Tensor:
        """Sums and result in float32."""
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(rows, packed)
        return y

    @staticmethod
    def unpack_weight(packed: Any, in_features: int) -> Tensor:
        """In float16."""
        return HalfLinear.unpack(packed)[0]

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch out"]:
        """The product, in the dtype of `x`."""
        y = self.multiply(x.float())
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    @property
    def weight(self) -> Float[Tensor, "out width"]:
        """The weights in bfloat16. They are kept: unpacking takes longer than a product, and who asks does so at each token."""
        if self._whole is not None:
            return self._whole
        weight = self.unpack_as(torch.bfloat16)
        if not torch.compiler.is_compiling():
            self._whole = weight
        return weight
