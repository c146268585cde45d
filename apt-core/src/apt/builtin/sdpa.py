"""The layer behind `sdpa`: one product in, fused attention, one product out."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apt.layers import LayerCache
from apt.layers.heads import HeadNorm, Heads, Shape


class SDPAttention(Heads):
    """A = softmax(scale q k^T + mask), y = A v, out = W_o concat(y); q and k turned by their positions.

    Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped queries: Ainslie et al. 2023, arXiv:2305.13245. With `qk_norm` each
    query and key passes an RMSNorm over its head's width, before it is turned (Henry et al. 2020, arXiv:2010.04245;
    Dehghani et al. 2023, arXiv:2302.05442, section 2). Window and sinks: `apt.layers.attend.attend`.
    """

    def __init__(self, shape: Shape, dropout: float, *, bias: str, qk_norm: bool, sinks: bool) -> None:
        super().__init__(shape, dropout)
        heads, kv_heads, width = shape.num_heads, shape.num_kv_heads, shape.width
        self.qkv = nn.Linear(shape.d_model, (heads + 2 * kv_heads) * width, bias=bias != "none")
        self.out = nn.Linear(heads * width, shape.d_model, bias=bias == "all")
        self.q_norm = HeadNorm(width) if qk_norm else None
        self.k_norm = HeadNorm(width) if qk_norm else None
        if sinks:
            self.sinks = nn.Parameter(torch.zeros(heads))

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        *,
        causal: bool = True,
        mask: Bool[Tensor, "batch kv"] | None = None,
        positions: Int[Tensor, "#batch seq"] | None = None,
        memory: Float[Tensor, "batch kv d_model"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Attend; see `apt.layers.AttentionLayer`."""
        if memory is None:
            q, k, v = self.divide(self.qkv(x))
        else:
            q, k, v = self.split(x, memory, self.qkv.weight, self.qkv.bias, cache=cache)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        y = self.mix(q, k, v, causal=causal, mask=mask, positions=positions, cross=memory is not None, cache=cache)
        return self.out(y.transpose(1, 2).flatten(2))
