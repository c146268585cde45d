"""The layer behind `sdpa`: one product in, fused attention, one product out."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apt.layers import LayerCache
from apt.layers.attend import attend
from apt.layers.cache import KVCache
from apt.layers.rope import rotate


class SDPAttention(nn.Module):
    """A = softmax(q k^T / sqrt(d) + mask), y = A v, out = W_o concat(y); q and k turned by their positions.

    Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
    """

    def __init__(
        self, d_model: int, num_heads: int, kv_heads: int, width: int, rope_theta: float | None, dropout: float
    ) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.width = num_heads, kv_heads, width
        self.rope_theta, self.dropout = rope_theta, dropout
        self.qkv = nn.Linear(d_model, (num_heads + 2 * kv_heads) * width, bias=False)
        self.out = nn.Linear(num_heads * width, d_model, bias=False)

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
        q, k, v = self._project(x, memory)
        if memory is None and self.rope_theta is not None:
            if positions is None:
                start = 0 if cache is None else cache.length
                positions = torch.arange(start, start + x.shape[1], device=x.device).unsqueeze(0)
            q, k = rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta)
        if cache is not None:
            if not isinstance(cache, KVCache) or memory is not None:
                raise ValueError("this layer takes its own cache, and none where it attends across")
            k, v = cache.append(k, v)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, causal=causal and memory is None, mask=mask, dropout=dropout)
        return self.out(y.transpose(1, 2).flatten(2))

    def create_cache(self, batch: int, max_seq_len: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """An empty cache of 2 H_kv d numbers a token."""
        return KVCache(batch, self.kv_heads, max_seq_len, self.width, dtype, device)

    def _project(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [batch, heads, seq, width]."""
        sizes = (self.num_heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width)
        if memory is None:
            projected = self.qkv(x).split(sizes, -1)
        else:
            queries, others = torch.split(self.qkv.weight, [sizes[0], 2 * sizes[1]])
            kv = nn.functional.linear(memory, others).chunk(2, -1)
            projected = (nn.functional.linear(x, queries), *kv)
        q, k, v = (each.unflatten(-1, (-1, self.width)).transpose(1, 2) for each in projected)
        return q, k, v
