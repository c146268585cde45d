"""Attention: one provider owns the projections, the mask, the positions and the cache together."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from apt.core.provider import Provider

if TYPE_CHECKING:
    from apt.layers import AttentionLayer


class AttentionProvider(Provider):
    """Makes attention layers: ``[batch, seq, d_model] -> [batch, seq, d_model]`` (see `apt.layers.AttentionLayer`)."""

    kind: ClassVar[str] = "attention"
    makes: ClassVar[str] = "create_layer"

    @abstractmethod
    def create_layer(self, d_model: int, num_heads: int, dropout: float = 0.0) -> AttentionLayer:
        """A layer of this width; `dropout` is applied to the attention weights in training."""

    @abstractmethod
    def get_parameter_count(self, d_model: int, num_heads: int) -> int:
        """Trainable parameters of one layer, exactly."""

    @abstractmethod
    def get_flops_estimate(self, seq_len: int, d_model: int, num_heads: int) -> int:
        """Floating-point operations of one forward pass over one sequence (a multiply-add is 2; the causal half is
        not deducted), within 10 % of `torch.utils.flop_counter` under the MATH backend."""

    @abstractmethod
    def get_memory_estimate(self, seq_len: int, d_model: int, num_heads: int, batch_size: int = 1) -> int:
        """Bytes of activations that one float32 training forward keeps for the backward pass, within 10 %."""

    @abstractmethod
    def get_cache_size(self, d_model: int, num_heads: int) -> int:
        """Numbers that the KV cache of one layer keeps for each token; 0 where there is no cache."""

    def get_output_dim(self, d_model: int) -> int:
        """The width of the output."""
        return d_model

    def get_window(self) -> int | None:
        """Tokens that each token sees, itself the last; None: all before it."""
        return None

    def needs_position_table(self) -> bool:
        """Whether the model must add a learned table of `max_seq_len` positions to its embeddings for these layers."""
        return False

    def depends_on_distances_alone(self) -> bool:
        """Whether moving the positions of all tokens by as much changes nothing, as with rotary positions or none."""
        return True

    def supports_masking(self) -> bool:
        """Whether the layer honours a key mask (True = keep)."""
        return True

    def supports_kv_cache(self) -> bool:
        """Whether the layer can decode from a cache."""
        return True

    def supports_training(self, device: str) -> bool:
        """Whether the layer has a backward pass on this type of device, such as ``"cpu"`` or ``"cuda"``."""
        return True

    def supports_dropout(self) -> bool:
        """Whether the layer can drop attention weights in training."""
        return True
