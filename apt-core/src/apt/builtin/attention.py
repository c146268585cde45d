"""apt-core's attention: `sdpa`, multi-head or grouped-query, with rotary positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from apt.core.providers import AttentionProvider

if TYPE_CHECKING:
    from apt.builtin.sdpa import SDPAttention


class SDPA(AttentionProvider):
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762) with rotary positions (arXiv:2104.09864)."""

    api_level: ClassVar[int] = 1

    num_kv_heads: int | None = Field(
        default=None, ge=1, description="key-value heads, a divisor of num_heads (grouped queries); none: num_heads"
    )
    rope_theta: float | None = Field(
        default=10000.0, gt=1, description="base of the rotary positions; none: no positions"
    )

    def create_layer(self, d_model: int, num_heads: int, dropout: float = 0.0) -> SDPAttention:
        """See `AttentionProvider.create_layer`. Raises `ValueError` where the sizes do not divide."""
        from apt.builtin.sdpa import SDPAttention

        kv_heads, width = self._sizes(d_model, num_heads)
        return SDPAttention(d_model, num_heads, kv_heads, width, self.rope_theta, dropout)

    def get_parameter_count(self, d_model: int, num_heads: int) -> int:
        """Four matrices, two of them narrower with grouped queries."""
        kv_heads, width = self._sizes(d_model, num_heads)
        return 2 * d_model * width * (num_heads + kv_heads)

    def get_flops_estimate(self, seq_len: int, d_model: int, num_heads: int) -> int:
        """Projections, scores and mixing."""
        return 2 * seq_len * self.get_parameter_count(d_model, num_heads) + 4 * seq_len**2 * d_model

    def get_memory_estimate(self, seq_len: int, d_model: int, num_heads: int, batch_size: int = 1) -> int:
        """The input, q, k, v, the output and each row's log-sum-exp; with positions, turned q and k, and the output anew."""
        kv_heads, width = self._sizes(d_model, num_heads)
        turned = (num_heads + kv_heads) * width + d_model if self.rope_theta else 0
        numbers = 2 * d_model + (num_heads + 2 * kv_heads) * width + turned + num_heads
        angles = seq_len * width * 4 if self.rope_theta else 0
        return 4 * batch_size * seq_len * numbers + angles

    def get_cache_size(self, d_model: int, num_heads: int) -> int:
        """2 H_kv d numbers a token."""
        kv_heads, width = self._sizes(d_model, num_heads)
        return 2 * kv_heads * width

    def _sizes(self, d_model: int, num_heads: int) -> tuple[int, int]:
        """Key-value heads, and the width of a head."""
        kv_heads = num_heads if self.num_kv_heads is None else self.num_kv_heads
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} is not a multiple of num_heads {num_heads}")
        if num_heads % kv_heads:
            raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {kv_heads}")
        width = d_model // num_heads
        if self.rope_theta is not None and width % 2:
            raise ValueError(f"rotary positions need heads of even width, not {width}")
        return kv_heads, width
