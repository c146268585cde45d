"""Experts that choose their tokens: balanced by construction, and not causal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from apt_moe.routers import TopK

if TYPE_CHECKING:
    from torch import Tensor, nn


class ExpertChoice(TopK):
    """Each expert takes the C = T k / E tokens of a sequence that score highest with it; the softmax is over the experts.

    A token may get no expert, or all. Which ones depends on the tokens that come after it: training sees the future, and
    generation, which cannot, runs another function. So it must be allowed in so many words. Sequences do not see one
    another, and T is each one's own length: padding takes no room. There is no load-balance loss, since the load cannot
    be otherwise. One expert takes at least one token.

    Zhou et al. 2022, arXiv:2202.09368, section 3.2.
    """

    scheduled: ClassVar[Mapping[str, str]] = {"route_temp": "temperature"}

    balance_loss: float = Field(default=0.0, ge=0, le=0, description="always 0: the load is even by construction")
    renormalise: bool = Field(default=False, description="weights of the experts that chose a token sum to 1")
    allow_noncausal: bool = Field(default=False, description="must be true: a token's experts depend on later tokens")

    @model_validator(mode="after")
    def _is_allowed(self) -> ExpertChoice:
        if not self.allow_noncausal:
            raise ValueError(
                "allow_noncausal: false, but experts that choose among all tokens of a sequence let later tokens change "
                "earlier ones, which a decoder must not; use another router, or say allow_noncausal: true"
            )
        return self

    def _weighs_1(self, top_k: int) -> bool:
        return False  # one expert a token on average is no renormalised top-1

    def keeps_scale(self) -> bool:
        """A token that no expert chose gets nothing."""
        return False

    def route(
        self, router: nn.Module, inputs: Tensor, train: bool = True, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """All experts for each token, [batch, seq, experts], with weight 0 where the expert did not choose it."""
        import torch

        from apt_moe import functional
        from apt_moe.router import LinearRouter

        if not isinstance(router, LinearRouter):
            raise TypeError(f"{self.get_name()} routes with its own routers, not with {type(router).__name__}")
        if train and self.jitter:
            inputs = inputs * inputs.new_empty(inputs.shape).uniform_(1 - self.jitter, 1 + self.jitter)
        scores = router(inputs)
        probabilities = scores.softmax(-1)
        wanted = probabilities if mask is None else probabilities.masked_fill(~mask.unsqueeze(-1), -1.0)
        seq, experts = scores.shape[1:]
        room = min(seq, self.get_room(seq, experts, router.top_k))
        best = wanted.topk(room, dim=1).indices  # [batch, room, experts], the best first
        taken = torch.ones_like(best, dtype=torch.bool)
        if mask is not None:
            # The room follows from the sequence's own length, not from that of the longest beside it.
            own = (mask.sum(1) * router.top_k // experts).clamp(min=1)
            taken &= (torch.arange(room, device=best.device) < own[:, None]).unsqueeze(-1)
        chosen = torch.zeros_like(wanted, dtype=torch.bool).scatter_(1, best, taken)
        if mask is not None:
            chosen = chosen & mask.unsqueeze(-1)
        weights = probabilities * chosen
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        indices = torch.arange(experts, device=scores.device).expand_as(scores)
        counted = None if mask is None else mask.flatten()
        losses = {}
        if train and self.z_loss:
            losses["z_loss"] = self.z_loss * functional.z_loss(scores.flatten(0, 1), counted)
        return indices, weights, losses

    def get_room(self, seq: int, experts: int, top_k: int) -> int:
        """The tokens of a sequence that one expert takes."""
        return max(1, seq * top_k // experts)

    def supports_expert_choice(self) -> bool:
        """It is expert choice."""
        return True

    def supports_dynamic_capacity(self) -> bool:
        """The room is fixed by `top_k`, which is the paper's capacity factor."""
        return False
