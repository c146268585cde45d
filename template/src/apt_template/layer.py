"""The layer behind `template`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PowerMLP(nn.Module):
    """y = gain drop(W_2 relu(W_1 x)^power)."""

    gain: Tensor

    def __init__(self, d_model: int, d_ff: int, dropout: float, power: float, gain: float) -> None:
        super().__init__()
        self.power = power
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("gain", torch.tensor(gain, dtype=torch.float32))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """`x` [batch, seq, d_model], each token by itself; `mask` changes nothing."""
        hidden = self.up(x).relu().pow(self.power)
        return self.gain.to(x.dtype) * self.dropout(self.down(hidden))
