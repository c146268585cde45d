"""apt-core's attention: `sdpa`, `flex` and `flash_v2`, one mathematics over three kernels.

They have the same weights under the same names, so a model that was trained with one is read with another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from apt.core.providers import SizedHeadsProvider

if TYPE_CHECKING:
    from apt.builtin.sdpa import SDPAttention
    from apt.layers.heads import Shape


class _DotProduct(SizedHeadsProvider):
    """The options and sizes that the three share."""

    api_level: ClassVar[int] = 1

    def get_shape(self, d_model: int, num_heads: int) -> Shape:
        """The sizes of a layer. Raises `apt.errors.OptionsError` where they do not fit."""
        from apt.layers.heads import Shape

        width = self.get_head_width(d_model, num_heads)
        theta = self.rope_theta if self.positions == "rope" else None
        kv_heads = self.get_kv_heads(num_heads)
        return Shape(d_model, num_heads, kv_heads, width, width**-0.5, theta, self.rope_scaling, self.window)

    def get_parameter_count(self, d_model: int, num_heads: int) -> int:
        """Four matrices, two of them narrower with grouped queries; biases and norms."""
        width, kv_heads = self.get_head_width(d_model, num_heads), self.get_kv_heads(num_heads)
        inward = (num_heads + 2 * kv_heads) * width
        biases = inward * (self.bias != "none") + d_model * (self.bias == "all")
        return d_model * (inward + num_heads * width) + biases + 2 * width * self.qk_norm

    def get_flops_estimate(self, seq_len: int, d_model: int, num_heads: int) -> int:
        """Projections, scores and mixing; what a window leaves out is not deducted."""
        width, kv_heads = self.get_head_width(d_model, num_heads), self.get_kv_heads(num_heads)
        projections = 2 * d_model * width * (num_heads + kv_heads)
        return 2 * seq_len * projections + 4 * num_heads * width * seq_len**2

    def get_memory_estimate(self, seq_len: int, d_model: int, num_heads: int, batch_size: int = 1) -> int:
        """The input, q, k, v, the mixed values, each row's log-sum-exp, and turned or normed q and k between."""
        width, kv_heads = self.get_head_width(d_model, num_heads), self.get_kv_heads(num_heads)
        inward, turned = (num_heads + 2 * kv_heads) * width, (num_heads + kv_heads) * width
        turns = self.positions == "rope"
        # Turned or normed queries are laid out head by head, so the mixed values are too, and are copied for W_o.
        numbers = d_model + num_heads + inward + num_heads * width
        numbers += (turned + num_heads * width) * (turns or self.qk_norm)
        numbers += (turned + num_heads + kv_heads) * self.qk_norm
        return 4 * (batch_size * seq_len * numbers + seq_len * width * turns)

    def get_cache_size(self, d_model: int, num_heads: int) -> int:
        """2 H_kv d numbers a token."""
        return 2 * self.get_kv_heads(num_heads) * self.get_head_width(d_model, num_heads)


class SDPA(_DotProduct):
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762), over PyTorch's fused kernels.

    Multi-head; grouped-query and multi-query by `num_kv_heads`; sliding-window by `window`.
    """

    sinks: bool = Field(default=False, description="a learned logit a head that a query may look at instead of any key")

    def create_layer(self, d_model: int, num_heads: int, dropout: float = 0.0) -> SDPAttention:
        """See `AttentionProvider.create_layer`. Raises `apt.errors.OptionsError` where the sizes do not divide."""
        from apt.builtin.sdpa import SDPAttention

        shape = self.get_shape(d_model, num_heads)
        return SDPAttention(shape, dropout, bias=self.bias, qk_norm=self.qk_norm, sinks=self.sinks)

    def get_parameter_count(self, d_model: int, num_heads: int) -> int:
        """Four matrices, two of them narrower with grouped queries; biases, norms and sinks."""
        return super().get_parameter_count(d_model, num_heads) + num_heads * self.sinks

    def get_flops_estimate(self, seq_len: int, d_model: int, num_heads: int) -> int:
        """Projections, scores and mixing; a sink is one more key, and makes heads one wider."""
        flops = super().get_flops_estimate(seq_len, d_model, num_heads)
        width = self.get_head_width(d_model, num_heads)
        return flops + 4 * num_heads * ((width + 1) * (seq_len + 1) ** 2 - width * seq_len**2) * self.sinks

    def get_memory_estimate(self, seq_len: int, d_model: int, num_heads: int, batch_size: int = 1) -> int:
        """As without a window or sinks, and the window's mask; with sinks, copies of what the kernel sees."""
        width, kv_heads = self.get_head_width(d_model, num_heads), self.get_kv_heads(num_heads)
        mask = seq_len**2 if self.window is not None and self.window < seq_len else 0
        if not self.sinks:
            return super().get_memory_estimate(seq_len, d_model, num_heads, batch_size) + 4 * mask
        numbers = d_model + num_heads + num_heads * width + (2 * num_heads + 2 * kv_heads) * (width + 1)
        normed = (2 * num_heads + 3 * kv_heads) * width + num_heads + kv_heads
        angles = seq_len * width * (self.positions == "rope")
        return 4 * (batch_size * seq_len * (numbers + normed * self.qk_norm) + angles + mask)


class Flex(_DotProduct):
    """The attention of `sdpa` in PyTorch's flex_attention, which skips the blocks of keys that a window or causality hides.

    It trains on a GPU alone: on the CPU flex_attention has no backward pass, and the run is refused. Weights are not dropped: the
    model's `attention_dropout` must be 0.
    """

    compiled: bool = Field(
        default=True, description="the fused kernel, compiled at first use; false: scores are written out"
    )

    def create_layer(self, d_model: int, num_heads: int, dropout: float = 0.0) -> SDPAttention:
        """See `AttentionProvider.create_layer`. Raises `apt.errors.OptionsError` for sizes, or dropout, that cannot be."""
        from apt.builtin.flex import FlexAttention

        if dropout:
            raise self.refuse("attention_dropout", f"{dropout:g} is not allowed: flex_attention drops no weights", "0")
        return FlexAttention(
            self.get_shape(d_model, num_heads), bias=self.bias, qk_norm=self.qk_norm, compiled=self.compiled
        )

    def supports_training(self, device: str) -> bool:
        """Not on the CPU."""
        return device != "cpu"

    def supports_dropout(self) -> bool:
        """Weights are not dropped."""
        return False


class FlashV2(_DotProduct):
    """The attention of `sdpa` in the kernels of flash-attn (Dao 2023, arXiv:2307.08691): an NVIDIA GPU, bf16 or fp16.

    Say what may stand in where it cannot be had: ``attention: {provider: flash_v2, fallback: [sdpa]}``.
    """

    @classmethod
    def get_dependencies(cls) -> list[str]:
        """flash-attn, whose causality is aligned at the bottom right since 2.1 and whose windows are there since 2.3."""
        return ["flash-attn>=2.3"]

    def create_layer(self, d_model: int, num_heads: int, dropout: float = 0.0) -> SDPAttention:
        """See `AttentionProvider.create_layer`. Raises `apt.errors.OptionsError` for sizes that have no kernel."""
        from apt.builtin.flash import FlashAttention

        shape = self.get_shape(d_model, num_heads)
        if shape.width > 256 or shape.width % 8:
            what = f"heads of width {shape.width}; flash-attn has kernels for multiples of 8 up to 256"
            raise self.refuse("num_heads" if self.head_width is None else "head_width", what)
        return FlashAttention(shape, dropout, bias=self.bias, qk_norm=self.qk_norm, sinks=False)

    def supports_training(self, device: str) -> bool:
        """On a GPU alone."""
        return device == "cuda"
