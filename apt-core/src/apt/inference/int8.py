"""Linear layers whose weights are in eight bits, over PyTorch's own quantised product."""

from __future__ import annotations

import itertools
import warnings
import weakref
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

REDUCED = True
"""Activations take seven of the eight bits: processors without VNNI add pairs of products in 16 bits, which eight overflow."""
LOWEST, HIGHEST = -64.0, 63.0
"""The range of seven bits. A row that holds both ends makes the product's own scale 1, so whole numbers are met exactly."""
FINER = 2 * HIGHEST
"""How much finer the second row is: what rounding leaves is at most a half, and fills the range again."""
SMALLEST = torch.finfo(torch.float32).tiny
FEW = 256
"""So many tokens are multiplied in eight bits. With more of them, two rows each cost more than taking the weights in float32."""

_packed: dict[int, Any] = {}
"""Each layer's packed weights by the layer's number. Compiled code cannot hold them; it holds the number."""
_numbers = itertools.count()


# Bare operators: what `torch.library.custom_op` adds to each call is a fifth of the product of a small matrix.
torch.library.define("apt::multiply_int8", "(Tensor rows, Tensor number, SymInt out_features) -> Tensor")
torch.library.define("apt::unpack_int8", "(Tensor number, SymInt out_features, SymInt in_features) -> Tensor")


@torch.library.impl("apt::multiply_int8", "CPU")
def _multiply(rows: Tensor, number: Tensor, out_features: int) -> Tensor:
    y: Tensor = torch.ops.quantized.linear_dynamic.default(rows, _packed[int(number)], REDUCED)
    return y


@torch.library.impl("apt::multiply_int8", "Meta")
def _shape_of_product(rows: Tensor, number: Tensor, out_features: int) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], out_features))


@torch.library.impl("apt::unpack_int8", "CPU")
def _unpack(number: Tensor, out_features: int, in_features: int) -> Tensor:
    rounded, _ = torch.ops.quantized.linear_unpack(_packed[int(number)])
    weight: Tensor = rounded.dequantize()[:, :in_features]
    return weight.contiguous()


@torch.library.impl("apt::unpack_int8", "Meta")
def _shape_of_weight(number: Tensor, out_features: int, in_features: int) -> Tensor:
    return number.new_empty((out_features, in_features), dtype=torch.float32)


class Int8Linear(nn.Module):
    """y = W x + b with W in int8 and a scale for each row of W; x loses nothing that float32 would show.

    W ~ s * round(W / s) with s = max |row| / 127 (the vector-wise scheme of LLM.int8, Dettmers et al. 2022, arXiv:2208.07339,
    section 2.1). A token's few large channels leave seven bits too few steps for the others, which is what costs most (section 3
    there takes those channels out). Here a token becomes two rows of one product: x / step rounded, and what the rounding left,
    126 times as large; together they have 14 bits. The time of writing is that of reading W, and it is read once for both.

    Made of a trained `nn.Linear`; for inference on the CPU. The product is torch's own `quantized::linear_dynamic`, the operator
    behind `quantize_dynamic`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp_min(SMALLEST)
        rounded = (weight / scales[:, None]).round().to(torch.int8)
        # Two columns of zeros meet the two ends of the range.
        self._pack(nn.functional.pad(rounded, (0, 2)), scales.double())
        self._ends = torch.tensor([LOWEST, HIGHEST])
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float(), requires_grad=False)

    def _pack(self, rounded: Tensor, scales: Tensor) -> None:
        """Hold weights [out, width + 2] in int8, and a scale for each row, under a number of this layer's own."""
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():
            # PyTorch means to remove tensors of quantised types; for a single token nothing else that it offers comes near.
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(rounded, scales, zeros, 0)
            packed = torch.ops.quantized.linear_prepack(quantized, None)
        number = next(_numbers)
        _packed[number] = packed
        weakref.finalize(self, _packed.pop, number)
        # A tensor, so that one compiled block serves all blocks.
        self._number = torch.tensor(number)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which outlive this layer: the weights themselves in place of their number."""
        quantized, _ = torch.ops.quantized.linear_unpack(_packed[int(self._number)])
        # Python's own method, where torch has none, gives the layer's dictionary itself.
        state: dict[str, Any] = {**super().__getstate__()}  # type: ignore[no-untyped-call]
        del state["_number"]
        return {**state, "_weights": (quantized.int_repr(), quantized.q_per_channel_scales())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the weights under a new number."""
        rounded, scales = state.pop("_weights")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack(rounded, scales)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch out"]:
        """The product, in float32."""
        if x.numel() > FEW * self.in_features:
            return nn.functional.linear(x, self.weight, self.bias)
        # Few and cheap operations: for one token they take as long as the product of a small matrix.
        largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True)
        step = largest.clamp_min(SMALLEST).div_(HIGHEST)
        exact = x / step
        coarse = exact.round()
        fine = exact.sub_(coarse).mul_(FINER)
        ends = self._ends.expand(*x.shape[:-1], 2)
        rows = torch.cat((coarse, ends, fine, ends), -1).view(*x.shape[:-1], 2, self.in_features + 2)
        coarse, fine = torch.ops.apt.multiply_int8(rows, self._number, self.out_features).unbind(-2)
        y = torch.add(coarse, fine, alpha=1 / FINER).mul_(step)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Float[Tensor, "out width"]:
        """The weights as they are now, in float32: for layers that use them otherwise than by calling this one."""
        weight: Tensor = torch.ops.apt.unpack_int8(self._number, self.out_features, self.in_features)
        return weight

    def extra_repr(self) -> str:
        """Its sizes, as `nn.Linear` says them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"
