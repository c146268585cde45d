"""Heads of one width: their rotary positions, their window, their cache, and the mixing of their values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apt.core.providers import RopeScaling
from apt.layers import LayerCache
from apt.layers.attend import attend
from apt.layers.cache import KVCache, MemoryCache
from apt.layers.rope import Turn, apply_turn, get_next_turn, get_turn


class HeadNorm(nn.RMSNorm):
    """RMSNorm over a head's width (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4), in the dtype of what it norms.

    PyTorch's own, under autocast, is given two dtypes, warns, and takes a slow path.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Float[Tensor, "batch heads seq width"]) -> Float[Tensor, "batch heads seq width"]:
        """Each head over the root of its mean square, times the weight."""
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


@dataclass(frozen=True)
class Shape:
    """The sizes of an attention layer; `width` is a head's. Scores are multiplied by `scale`; `rope_theta` is the base
    of the rotary positions, None for no positions; `window` is the number of tokens that each token sees, None for all."""

    d_model: int
    num_heads: int
    num_kv_heads: int
    width: int
    scale: float
    rope_theta: float | None
    rope_scaling: RopeScaling | None = None
    window: int | None = None

    def narrowed(self, width: int) -> Shape:
        """The same with other heads."""
        return dataclasses.replace(self, width=width)


class Heads(nn.Module):
    """Splits projections into heads, turns them by position, keeps the cache, and mixes the values.

    A subclass that has `sinks` [heads] sets them; see `apt.layers.attend.attend`.
    """

    sinks: nn.Parameter | None
    caches_memory = True
    """Where it attends across it takes a `MemoryCache`: the keys and values of a memory are made once."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.shape, self.dropout = shape, dropout
        self.register_parameter("sinks", None)

    def split(
        self,
        x: Float[Tensor, "batch seq d_model"],
        memory: Float[Tensor, "batch kv d_model"] | None,
        weight: Float[Tensor, "inward d_model"],
        bias: Float[Tensor, " inward"] | None = None,
        v_width: int | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x`, keys and values of `memory` (or `x`), each [batch, heads, seq, width].

        `weight` [(H + H_kv) * width + H_kv * v_width, d_model] and `bias` project to all of them; the width is their own,
        and that of the values too where `v_width` is not given. A `MemoryCache` keeps the keys and values of the memory, and
        gives them where it has them.
        """
        if memory is None:
            return self.divide(nn.functional.linear(x, weight, bias), v_width)
        width, v_width = self._widths(weight.shape[0], v_width)
        sizes = [self.shape.num_heads * width, self.shape.num_kv_heads * (width + v_width)]
        ours, theirs = torch.split(weight, sizes)
        our_bias, their_bias = (None, None) if bias is None else torch.split(bias, sizes)
        q = nn.functional.linear(x, ours, our_bias)
        if isinstance(cache, MemoryCache) and cache.kept is not None:
            return _in_heads(q, width), *cache.kept
        both = nn.functional.linear(memory, theirs, their_bias)
        k, v = torch.split(both, [self.shape.num_kv_heads * width, self.shape.num_kv_heads * v_width], -1)
        k, v = _in_heads(k, width), _in_heads(v, v_width)
        if isinstance(cache, MemoryCache):
            cache.keep(k, v)
        return _in_heads(q, width), k, v

    def divide(
        self, projected: Float[Tensor, "batch seq inward"], v_width: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values side by side, as heads [batch, heads, seq, width]."""
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        width, v_width = self._widths(projected.shape[-1], v_width)
        q, k, v = torch.split(projected, [heads * width, kv_heads * width, kv_heads * v_width], -1)
        return _in_heads(q, width), _in_heads(k, width), _in_heads(v, v_width)

    def _widths(self, inward: int, v_width: int | None) -> tuple[int, int]:
        """The widths of queries and keys, and of values, that are `inward` numbers together."""
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        if v_width is None:
            width = inward // (heads + 2 * kv_heads)
            return width, width
        return (inward - kv_heads * v_width) // (heads + kv_heads), v_width

    def mix(
        self,
        q: Float[Tensor, "batch heads seq width"],
        k: Float[Tensor, "batch kv_heads kv width"],
        v: Float[Tensor, "batch kv_heads kv width"],
        *,
        causal: bool,
        mask: Bool[Tensor, "batch all"] | None,
        positions: Int[Tensor, "#batch seq"] | None,
        cross: bool,
        cache: LayerCache | None,
    ) -> Float[Tensor, "batch heads seq width"]:
        """Values mixed by scores, after turning and after what the cache holds.

        Raises `ValueError` for a cache that is not this layer's.
        """
        if cache is not None and not isinstance(cache, MemoryCache if cross else KVCache):
            right = "a MemoryCache where it attends across" if cross else "what its create_cache makes"
            raise ValueError(f"this layer's cache is {right}, not a {type(cache).__name__}")
        if cross:
            return self.attend(q, k, v, causal=False, mask=mask, window=None)
        q, k = self.turn(q, k, positions, None if cache is None else cache.length)
        if isinstance(cache, KVCache):
            k, v, mask = cache.append(k, v, mask)
        return self.attend(q, k, v, causal=causal, mask=mask, window=self.shape.window)

    def turn(
        self,
        q: Float[Tensor, "batch heads seq width"],
        k: Float[Tensor, "batch kv_heads seq width"],
        positions: Int[Tensor, "#batch seq"] | None,
        read: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys of the same tokens turned by their positions, where those are rotary, as they meet and are cached.

        Positions that are not given follow the `read` ones in a cache.
        """
        if self.shape.rope_theta is None:
            return q, k
        turn = self._get_turn(q, self.shape.rope_theta, positions, read)
        return apply_turn(q, turn), apply_turn(k, turn)

    def _get_turn(self, q: Tensor, theta: float, positions: Tensor | None, read: int | None) -> Turn:
        width, scaling = q.shape[-1], self.shape.rope_scaling
        if positions is None:
            start = 0 if read is None else read
            if not torch.compiler.is_compiling():
                return get_next_turn(start, q.shape[2], width, theta, scaling, q.device, whole=read is None)
            positions = torch.arange(start, start + q.shape[2], device=q.device).unsqueeze(0)
        return get_turn(positions, width, theta, scaling)

    def attend(
        self,
        q: Float[Tensor, "batch heads seq width"],
        k: Float[Tensor, "batch kv_heads kv width"],
        v: Float[Tensor, "batch kv_heads kv width"],
        *,
        causal: bool,
        mask: Bool[Tensor, "batch kv"] | None,
        window: int | None,
    ) -> Float[Tensor, "batch heads seq width"]:
        """Softmax attention in PyTorch's fused kernels."""
        return attend(
            q,
            k,
            v,
            causal=causal,
            mask=mask,
            scale=self.shape.scale,
            dropout=self.dropout if self.training else 0.0,
            window=window,
            sinks=self.sinks,
        )

    def create_cache(self, batch: int, max_seq_len: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """An empty cache of 2 H_kv width numbers a token, of no more tokens than the window."""
        shape = self.shape
        return KVCache(batch, shape.num_kv_heads, max_seq_len, shape.width, dtype, device, shape.window)


def _in_heads(x: Tensor, width: int) -> Tensor:
    """[batch, seq, heads * width] to [batch, heads, seq, width]."""
    return x.view(*x.shape[:2], -1, width).transpose(1, 2)
