"""apt-core's attention: `sdpa`, multi-head, grouped-query or multi-query, over PyTorch's fused kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from apt.core.providers import HeadsProvider

if TYPE_CHECKING:
    from apt.builtin.sdpa import SDPAttention


class SDPA(HeadsProvider):
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762), over PyTorch's fused kernels.

    Multi-head; grouped-query and multi-query by `num_kv_heads`; sliding-window by `window`.
    """

    api_level: ClassVar[int] = 1

    head_width: int | None = Field(
        default=None, ge=1, description="width of a head; none: d_model / num_heads, which must then divide"
    )
    qk_norm: bool = Field(default=False, description="an RMSNorm of each query and key, over its head's width")
    sinks: bool = Field(default=False, description="a learned logit a head that a query may look at instead of any key")
    bias: Literal["none", "qkv", "all"] = Field(
        default="none", description="where biases are: on queries, keys and values (as in Qwen2), or on the output too"
    )

    def get_head_width(self, d_model: int, num_heads: int) -> int:
        """The option, or d_model / num_heads; even where positions turn. Raises `apt.errors.OptionsError`."""
        if self.head_width is None:
            width, option = super().get_head_width(d_model, num_heads), "num_heads"
        else:
            self.check_groups(num_heads)
            width, option = self.head_width, "head_width"
        if width % 2 and self.positions == "rope":
            raise self.refuse(
                option,
                f"rotary positions turn pairs, and heads of width {width} are odd",
                "an even width, or other positions",
            )
        return width

    def create_layer(self, d_model: int, num_heads: int, dropout: float = 0.0) -> SDPAttention:
        """See `AttentionProvider.create_layer`. Raises `apt.errors.OptionsError` where the sizes do not divide."""
        from apt.builtin.sdpa import SDPAttention
        from apt.layers.heads import Shape

        width = self.get_head_width(d_model, num_heads)
        shape = Shape(
            d_model,
            num_heads,
            self.get_kv_heads(num_heads),
            width,
            width**-0.5,
            self.rope_theta if self.positions == "rope" else None,
            self.rope_scaling,
            self.window,
        )
        return SDPAttention(shape, dropout, bias=self.bias, qk_norm=self.qk_norm, sinks=self.sinks)

    def get_parameter_count(self, d_model: int, num_heads: int) -> int:
        """Four matrices, two of them narrower with grouped queries; biases, norms and sinks."""
        width, kv_heads = self.get_head_width(d_model, num_heads), self.get_kv_heads(num_heads)
        inward = (num_heads + 2 * kv_heads) * width
        biases = inward * (self.bias != "none") + d_model * (self.bias == "all")
        return d_model * (inward + num_heads * width) + biases + 2 * width * self.qk_norm + num_heads * self.sinks

    def get_flops_estimate(self, seq_len: int, d_model: int, num_heads: int) -> int:
        """Projections, scores and mixing; a sink is one more key, and makes heads one wider."""
        width, kv_heads = self.get_head_width(d_model, num_heads), self.get_kv_heads(num_heads)
        projections = 2 * d_model * width * (num_heads + kv_heads)
        sink = int(self.sinks)
        return 2 * seq_len * projections + 4 * num_heads * (width + sink) * (seq_len + sink) ** 2

    def get_memory_estimate(self, seq_len: int, d_model: int, num_heads: int, batch_size: int = 1) -> int:
        """The input, q, k, v, the mixed values, each row's log-sum-exp, and what lies between: turned or normed q and k,
        the copies with a sink, the window's mask."""
        width, kv_heads = self.get_head_width(d_model, num_heads), self.get_kv_heads(num_heads)
        inward, turned = (num_heads + 2 * kv_heads) * width, (num_heads + kv_heads) * width
        turns, sink = self.positions == "rope", int(self.sinks)
        numbers = d_model + num_heads
        if sink:
            numbers += (2 * num_heads + 2 * kv_heads) * (width + 1) + num_heads * width + inward * self.qk_norm
        else:
            # Turned or normed queries are laid out head by head, so the mixed values are too, and are copied for W_o.
            numbers += inward + num_heads * width + (turned + num_heads * width) * (turns or self.qk_norm)
        numbers += (turned + num_heads + kv_heads) * self.qk_norm
        angles = seq_len * width * turns
        mask = seq_len**2 if self.window is not None and self.window < seq_len else 0
        return 4 * (batch_size * seq_len * numbers + angles + mask)

    def get_cache_size(self, d_model: int, num_heads: int) -> int:
        """2 H_kv d numbers a token."""
        return 2 * self.get_kv_heads(num_heads) * self.get_head_width(d_model, num_heads)
