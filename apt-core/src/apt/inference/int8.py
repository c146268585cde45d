"""Linear layers in eight bits, over PyTorch's own quantised product."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

REDUCED = True
"""Activations take seven of the eight bits: processors without VNNI add pairs of products in 16 bits, which eight overflow."""


class Int8Linear(nn.Module):
    """y = W x + b with W in int8, a scale for each row of W, and x in int8 as it comes, a scale for each token.

    W ~ s * round(W / s) with s = max |row| / 127 (LLM.int8's vector-wise scheme without its outliers, Dettmers et al. 2022,
    arXiv:2208.07339, section 2.1). Made of a trained `nn.Linear`; for inference on the CPU. The product is torch's own
    `quantized::linear_dynamic`, the operator behind `quantize_dynamic`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = (weight / scales[:, None]).round().to(torch.int8)
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings():
            # PyTorch means to remove tensors of quantised types; for a single token nothing else that it offers comes near.
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(rounded, scales.double(), zeros, 0)
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float(), requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch out"]:
        """The product, in float32."""
        if x.numel() == self.in_features:
            y = torch.ops.quantized.linear_dynamic(x, self._packed, REDUCED)
        else:
            # The operator has one scale for all tokens, and a single large one would leave few steps for the others.
            size = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            y = torch.ops.quantized.linear_dynamic(x / size, self._packed, REDUCED) * size
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Float[Tensor, "out width"]:
        """The weights as they are now, in float32: for layers that use them otherwise than by calling this one."""
        rounded, _ = torch.ops.quantized.linear_unpack(self._packed)
        weight: Tensor = rounded.dequantize()
        return weight

    def extra_repr(self) -> str:
        """Its sizes, as `nn.Linear` says them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"
