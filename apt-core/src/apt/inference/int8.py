"""Linear layers whose weights are in eight bits, over PyTorch's own quantised product."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apt.inference.packed import PackedLinear

REDUCED = True
"""Activations take seven of the eight bits: processors without VNNI add pairs of products in 16 bits, which eight overflow."""
LOWEST, HIGHEST = -64.0, 63.0
"""The range of seven bits. A row that holds both ends makes the product's own scale 1, so whole numbers are met exactly."""
FINER = 2 * HIGHEST
"""How much finer the second row is: what rounding leaves is at most a half, and fills the range again."""
SMALLEST = torch.finfo(torch.float32).tiny
AT_ONCE = 512
"""So many tokens are multiplied together: of twice as many, each takes a third longer."""


class Int8Linear(PackedLinear):
    """y = W x + b with W in int8 and a scale for each row of W; x loses nothing that float32 would show.

    W ~ s * round(W / s) with s = max |row| / 127 (the vector-wise scheme of LLM.int8, Dettmers et al. 2022, arXiv:2208.07339,
    section 2.1). A token's few large channels leave seven bits too few steps for the others, which is what costs most (section 3
    there takes those channels out). Here a token becomes two rows of one product: x / step rounded, and what the rounding left,
    126 times as large; together they have 14 bits. The time of writing is that of reading W, and it is read once for both.

    Made of a trained `nn.Linear`; for inference on the CPU. The product is torch's own `quantized::linear_dynamic`, the operator
    behind `quantize_dynamic`.
    """

    kind = "int8"
    _ends: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp_min(SMALLEST)
        rounded = (weight / scales[:, None]).round().to(torch.int8)
        # Two columns of zeros meet the two ends of the range.
        self.hold(nn.functional.pad(rounded, (0, 2)), scales.double())
        self.register_buffer("_ends", torch.tensor([LOWEST, HIGHEST]), persistent=False)

    @staticmethod
    def pack(*what: Tensor) -> Any:
        """Weights [out, width + 2] in int8, and a scale for each row, as the product takes them."""
        rounded, scales = what
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():
            # PyTorch means to remove tensors of quantised types; for a single token nothing else that it offers comes near.
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(rounded, scales, zeros, 0)
            return torch.ops.quantized.linear_prepack(quantized, None)

    @staticmethod
    def unpack(packed: Any) -> Sequence[Tensor]:
        """The weights [out, width + 2] in int8, and the scale of each row."""
        quantized, _ = torch.ops.quantized.linear_unpack(packed)
        return quantized.int_repr(), quantized.q_per_channel_scales()

    @staticmethod
    def multiply_packed(rows: Tensor, packed: Any) -> Tensor:
        """Of rows that hold both ends of the range."""
        y: Tensor = torch.ops.quantized.linear_dynamic.default(rows, packed, REDUCED)
        return y

    @staticmethod
    def unpack_weight(packed: Any, in_features: int) -> Tensor:
        """In float32, without the two columns for the ends."""
        quantized, _ = torch.ops.quantized.linear_unpack(packed)
        weight: Tensor = quantized.dequantize()[:, :in_features]
        return weight.contiguous()

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch out"]:
        """The product, in float32."""
        if x.numel() <= AT_ONCE * self.in_features:
            return self._multiply(x)
        parts = torch.split(x.reshape(-1, self.in_features), AT_ONCE)
        return torch.cat([self._multiply(part) for part in parts]).view(*x.shape[:-1], self.out_features)

    def _multiply(self, x: Tensor) -> Tensor:
        # Few and cheap operations: for one token they take as long as the product of a small matrix.
        largest = x.abs().amax(-1, keepdim=True)  # as a norm it takes eight times as long for many tokens
        step = largest.clamp_min(SMALLEST).div_(HIGHEST)
        exact = x / step
        coarse = exact.round()
        fine = exact.sub_(coarse).mul_(FINER)
        ends = self._ends.expand(*x.shape[:-1], 2)
        rows = torch.cat((coarse, ends, fine, ends), -1).view(*x.shape[:-1], 2, self.in_features + 2)
        coarse, fine = self.multiply(rows).unbind(-2)
        y = torch.add(coarse, fine, alpha=1 / FINER).mul_(step)
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Float[Tensor, "out width"]:
        """The weights as they are now, in float32."""
        return self.unpack_as(torch.float32)
