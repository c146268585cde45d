"""The mixture of experts, as options and a factory without PyTorch; its routers are in `apt_moe.routers`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from apt.core.provider import Slot
from apt.core.providers import FFNProvider, RouterProvider
from apt_moe.routers import TopK

if TYPE_CHECKING:
    from apt_moe.layer import MixtureOfExperts

__all__ = ["MoE", "TopK"]


class MoE(FFNProvider):
    """A mixture of experts of any feed-forward provider (see `apt_moe.layer.MixtureOfExperts`)."""

    api_level: ClassVar[int] = 1
    switched_by: ClassVar[str | None] = "moe"
    scheduled: ClassVar[Mapping[str, str]] = {"moe_capacity": "capacity_factor"}

    experts: int = Field(default=8, ge=2, description="number of experts")
    capacity: float | None = Field(
        default=None, gt=0, description="capacity factor in training; none: no token is ever dropped"
    )
    upcycle: bool = Field(
        default=True,
        description="hold a dense layer too, which runs until the plugin moe is on and which the experts grow out of",
    )
    router: Slot[RouterProvider] = Field(
        default="topk_default",  # type: ignore[assignment]  # the slot turns a name into a provider
        description="who chooses the experts",
    )
    expert: Slot[FFNProvider] = Field(
        default="default",  # type: ignore[assignment]
        description="what one expert is",
    )

    @field_validator("router", mode="after")
    @classmethod
    def _enough_experts(cls, router: RouterProvider, info: ValidationInfo) -> RouterProvider:
        experts = info.data.get("experts")
        if experts is not None and router.top_k > experts:
            raise ValueError(f"top_k is {router.top_k}, but there are only {experts} experts")
        return router

    @field_validator("expert", mode="after")
    @classmethod
    def _plain_expert(cls, expert: FFNProvider) -> FFNProvider:
        if expert.switched_by is not None:
            raise ValueError(f"an expert is always on, but {expert.get_name()} is switched by {expert.switched_by}")
        return expert

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0, activation: str = "gelu") -> MixtureOfExperts:
        """A mixture whose experts each have the hidden width `d_ff`."""
        from apt_moe.experts import Experts, make_layer
        from apt_moe.layer import MixtureOfExperts

        return MixtureOfExperts(
            self.router,
            self.router.create_router(d_model, self.experts, self.router.top_k),
            Experts(self.expert, self.experts, d_model, d_ff, dropout, activation),
            make_layer(self.expert, (d_model, d_ff, dropout, activation)) if self.upcycle else None,
            math.inf if self.capacity is None else self.capacity,
        )

    def get_parameter_count(self, d_model: int, d_ff: int) -> int:
        """All experts, the router, and the dense layer where it is held."""
        layers = self.experts + self.upcycle
        return layers * self.expert.get_parameter_count(d_model, d_ff) + self.router.get_parameter_count(
            d_model, self.experts
        )

    def get_active_parameter_count(self, d_model: int, d_ff: int) -> int:
        """The k experts of a token, and the router; the dense layer rests once the experts are on."""
        experts = self.router.top_k * self.expert.get_parameter_count(d_model, d_ff)
        return experts + self.router.get_parameter_count(d_model, self.experts)

    def get_flops_estimate(self, seq_len: int, d_model: int, d_ff: int) -> int:
        """The router and k experts a token; nothing is assumed to be dropped."""
        experts = self.expert.get_flops_estimate(seq_len * self.router.top_k, d_model, d_ff)
        return experts + 2 * seq_len * d_model * self.experts

    def get_memory_estimate(self, seq_len: int, d_model: int, d_ff: int, batch_size: int = 1) -> int:
        """The experts' own on k rows a token, and what routing and combining keep."""
        tokens, k = batch_size * seq_len, self.router.top_k
        experts = self.expert.get_memory_estimate(seq_len * k, d_model, d_ff, batch_size)
        return experts + 4 * tokens * d_model * (1 + k) + 4 * tokens * (4 * self.experts)

    def supports_gating(self) -> bool:
        """Whether an expert's hidden layer is gated."""
        return self.expert.supports_gating()
