"""The router's module: one matrix from a token to a score for each expert, computed in float32."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional


class LinearRouter(nn.Module):
    """l = W x / T: the scores of the experts, with T the scheduled temperature.

    Always in float32, under autocast and in a bfloat16 model too: a rounding of the scores changes which expert is
    chosen (Fedus et al. 2021, arXiv:2101.03961, section 2.4).
    """

    temperature: Tensor
    balance_weight: Tensor

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, temperature: float, balance_loss: float, init_std: float
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        # Never zeros: with equal scores every token would go to the same k experts.
        nn.init.normal_(self.weight, std=init_std)
        self.register_buffer("temperature", torch.tensor(temperature, dtype=torch.float32))
        self.register_buffer("balance_weight", torch.tensor(balance_loss, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., d_model] -> scores [..., experts] in float32."""
        device = x.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return functional.linear(x.float(), self.weight.float()) / self.temperature
