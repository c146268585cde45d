"""What both attentions share: heads of one width, their rotary positions, and their cache."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apt.layers import LayerCache
from apt.layers.attend import attend
from apt.layers.cache import KVCache
from apt.layers.rope import rotate


@dataclass(frozen=True)
class Shape:
    """The sizes of an attention layer; `width` is a head's. Scores are multiplied by `scale`; `rope_theta` is the base
    of the rotary positions, None for no positions."""

    d_model: int
    num_heads: int
    num_kv_heads: int
    width: int
    scale: float
    rope_theta: float | None

    def narrowed(self, width: int) -> Shape:
        """The same with other heads."""
        return dataclasses.replace(self, width=width)


class Heads(nn.Module):
    """Splits projections into heads, turns them by position, keeps the cache, and mixes the values."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout

    def split(self, x: Tensor, memory: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x`, keys and values of `memory` (or `x`), each [batch, heads, seq, any width], by one `weight`
        [(H + 2 H_kv) * width, d_model]."""
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        width = weight.shape[0] // (heads + 2 * kv_heads)
        if memory is None:
            inward = nn.functional.linear(x, weight).split((heads * width, kv_heads * width, kv_heads * width), -1)
        else:
            queries, others = weight.split((heads * width, 2 * kv_heads * width))
            inward = (nn.functional.linear(x, queries), *nn.functional.linear(memory, others).chunk(2, -1))
        q, k, v = (projected.unflatten(-1, (-1, width)).transpose(1, 2) for projected in inward)
        return q, k, v

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        mask: Tensor | None,
        positions: Tensor | None,
        cross: bool,
        cache: LayerCache | None,
    ) -> Tensor:
        """Values mixed by the scores of `q` [batch, H, seq, width] and `k`, `v` [batch, H_kv, kv, width]: like `q`."""
        if cross:
            if cache is not None:
                raise ValueError("cross-attention takes no cache: its keys are those of `memory`")
            return self.attend(q, k, v, causal=False, mask=mask)
        if self.shape.rope_theta is not None:
            if positions is None:
                start = 0 if cache is None else cache.length
                positions = torch.arange(start, start + q.shape[2], device=q.device).unsqueeze(0)
            q, k = rotate(q, positions, self.shape.rope_theta), rotate(k, positions, self.shape.rope_theta)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.attend(q, k, v, causal=causal, mask=mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None) -> Tensor:
        """Softmax attention in PyTorch's fused kernel."""
        dropout = self.dropout if self.training else 0.0
        return attend(q, k, v, causal=causal, mask=mask, dropout=dropout, scale=self.shape.scale)

    def create_cache(self, batch: int, max_seq_len: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """An empty cache of 2 H_kv width numbers a token."""
        return KVCache(batch, self.shape.num_kv_heads, max_seq_len, self.shape.width, dtype, device)
