"""apt-core's feed-forward networks: `default`, two matrices and an activation, and `swiglu`, gated."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from apt.core.providers import FFNProvider

if TYPE_CHECKING:
    from apt.builtin.mlp import GatedMLP, PlainMLP


class MLP(FFNProvider):
    """W_2 act(W_1 x) (Vaswani et al. 2017, arXiv:1706.03762, eq. 2)."""

    api_level: ClassVar[int] = 1

    bias: bool = Field(default=False, description="whether both maps have an offset")

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0, activation: str = "gelu") -> PlainMLP:
        """See `FFNProvider.create_layer`; `activation` is gelu, relu or silu."""
        from apt.builtin.mlp import PlainMLP

        return PlainMLP(d_model, d_ff, dropout, activation, self.bias)

    def get_parameter_count(self, d_model: int, d_ff: int) -> int:
        """Two matrices, and their offsets."""
        return 2 * d_model * d_ff + (d_model + d_ff) * self.bias

    def get_flops_estimate(self, seq_len: int, d_model: int, d_ff: int) -> int:
        """Two products."""
        return 4 * seq_len * d_model * d_ff

    def get_memory_estimate(self, seq_len: int, d_model: int, d_ff: int, batch_size: int = 1) -> int:
        """The input, and the hidden layer before and after the activation."""
        return 4 * batch_size * seq_len * (d_model + 2 * d_ff)


class SwiGLU(FFNProvider):
    """W_2 (silu(W_1 x) * W_3 x) (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    api_level: ClassVar[int] = 1

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0, activation: str = "gelu") -> GatedMLP:
        """See `FFNProvider.create_layer`; the gate is always silu, so `activation` has no say."""
        from apt.builtin.mlp import GatedMLP

        return GatedMLP(d_model, d_ff, dropout)

    def get_parameter_count(self, d_model: int, d_ff: int) -> int:
        """Three matrices."""
        return 3 * d_model * d_ff

    def get_flops_estimate(self, seq_len: int, d_model: int, d_ff: int) -> int:
        """Three products."""
        return 6 * seq_len * d_model * d_ff

    def get_memory_estimate(self, seq_len: int, d_model: int, d_ff: int, batch_size: int = 1) -> int:
        """The input, the gate before and after silu, the other branch, and their product."""
        return 4 * batch_size * seq_len * (d_model + 4 * d_ff)

    def supports_gating(self) -> bool:
        """It is gated."""
        return True
