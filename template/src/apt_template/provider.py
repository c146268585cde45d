"""What the package offers: options and estimates, without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from apt.core.providers import FFNProvider

if TYPE_CHECKING:
    from apt_template.layer import PowerMLP


class Template(FFNProvider):
    """W_2 relu(W_1 x)^power (power 2: So et al. 2021, arXiv:2109.08668, section 3), times a scheduled gain."""

    api_level: ClassVar[int] = 1
    scheduled: ClassVar[Mapping[str, str]] = {"template_gain": "gain"}

    power: float = Field(default=2.0, ge=1, le=4, description="the exponent after the ReLU")
    gain: float = Field(default=1.0, gt=0, description="multiplies the output; the schedule template_gain moves it")

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0, activation: str = "gelu") -> PowerMLP:
        """See `FFNProvider.create_layer`; `activation` has no say, the ReLU's power is the layer's point."""
        from apt_template.layer import PowerMLP

        return PowerMLP(d_model, d_ff, dropout, self.power, self.gain)

    def get_parameter_count(self, d_model: int, d_ff: int) -> int:
        """Two matrices."""
        return 2 * d_model * d_ff

    def get_flops_estimate(self, seq_len: int, d_model: int, d_ff: int) -> int:
        """Two products."""
        return 4 * seq_len * d_model * d_ff

    def get_memory_estimate(self, seq_len: int, d_model: int, d_ff: int, batch_size: int = 1) -> int:
        """The input, and the hidden layer after the ReLU and after the power."""
        return 4 * batch_size * seq_len * (d_model + 2 * d_ff)
