"""Feed-forward networks, dense and mixtures of experts alike."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from apt.core.provider import Provider

if TYPE_CHECKING:
    from apt.layers import FFNLayer


class FFNProvider(Provider):
    """Makes feed-forward layers: ``[batch, seq, d_model] -> [batch, seq, d_model]`` (see `apt.layers.FFNLayer`)."""

    kind: ClassVar[str] = "ffn"
    makes: ClassVar[str] = "create_layer"

    @abstractmethod
    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0, activation: str = "gelu") -> FFNLayer:
        """A layer with hidden width `d_ff`."""

    def at_layer(self, index: int, num_layers: int) -> FFNProvider:
        """The provider that makes the layer of block `index`, from 0; another one where blocks are not all alike."""
        return self

    @abstractmethod
    def get_parameter_count(self, d_model: int, d_ff: int) -> int:
        """Trainable parameters of one layer, exactly (all experts, and what is inert, counted)."""

    def get_active_parameter_count(self, d_model: int, d_ff: int) -> int:
        """Parameters that one token meets when everything is switched on; fewer than all in a mixture of experts."""
        return self.get_parameter_count(d_model, d_ff)

    def get_stacked_parameter_count(self, d_model: int, d_ff: int) -> int:
        """Parameters of one layer in stacks of matrices, as experts are: Muon takes matrices alone and leaves these to AdamW."""
        return 0

    @abstractmethod
    def get_flops_estimate(self, seq_len: int, d_model: int, d_ff: int) -> int:
        """Floating-point operations of one forward pass over one sequence when everything is switched on."""

    @abstractmethod
    def get_memory_estimate(self, seq_len: int, d_model: int, d_ff: int, batch_size: int = 1) -> int:
        """Bytes of activations that one float32 training forward keeps for the backward pass, within 10 %."""

    def supports_gating(self) -> bool:
        """Whether the hidden layer is gated (SwiGLU and its kin)."""
        return False
