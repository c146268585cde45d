"""Alignment of two states of the same tokens (not alignment in the sense of RLHF)."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from apt.core.provider import Provider

if TYPE_CHECKING:
    from torch import Tensor, nn

Metric = Literal["cosine", "l2", "kl", "nce"]


class AlignProvider(Provider):
    """Makes aligners and computes their losses."""

    kind: ClassVar[str] = "align"
    makes: ClassVar[str] = "create_aligner"
    switched_by: ClassVar[str | None] = "align"

    @abstractmethod
    def create_aligner(self, d_model: int, alpha: float = 0.35, beta: float = 0.20) -> nn.Module:
        """The aligner's parameters and buffers."""

    @abstractmethod
    def compute_alignment(
        self, aligner: nn.Module, state_1: Tensor, state_2: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Align `state_2` to the stable `state_1`, both [batch, seq, d_model].

        Returns the aligned state [batch, seq, d_model] and the loss, a scalar: a mean over the tokens where `mask`
        [batch, seq] is True.
        """

    @abstractmethod
    def compute_consistency_loss(
        self, state_1: Tensor, state_2: Tensor, metric: Metric = "cosine", mask: Tensor | None = None
    ) -> Tensor:
        """The distance of two states [batch, seq, features], a mean over unpadded tokens; 0 for equal states."""

    def get_parameter_count(self, d_model: int) -> int:
        """Trainable parameters of one aligner, exactly."""
        return 0

    def get_extra_passes(self) -> tuple[int, int]:
        """Forward and backward passes that a training step makes for it beyond its own.

        An aligner that says nothing of its states gets those of a second pass.
        """
        return 1, 1

    def get_weight_copies(self) -> int:
        """Copies of the model's weights, in float32, that training keeps for it, such as an average of them."""
        return 0

    def get_step_cost(self) -> float:
        """What a training step with it on costs, in steps without it: a backward pass counts as two forward passes."""
        forward, backward = self.get_extra_passes()
        return 1 + (forward + 2 * backward) / 3

    def get_interpolation_weight(self, epoch: int, max_epochs: int, warmup: int = 5) -> float:
        """0 before `warmup`, then linear to 1 at `max_epochs`."""
        if epoch < warmup:
            return 0.0
        if max_epochs <= warmup:
            return 1.0
        return min(1.0, (epoch - warmup) / (max_epochs - warmup))

    def supports_multi_state(self) -> bool:
        """Whether more than two states can be aligned at once."""
        return False

    def supports_asymmetric_alignment(self) -> bool:
        """Whether the two directions may be weighted differently."""
        return False
