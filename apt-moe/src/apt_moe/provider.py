"""What apt-moe offers: the mixture-of-experts layer and its routers, as options and factories without PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from apt.core.provider import Slot
from apt.core.providers import FFNProvider, RouterProvider
from apt.errors import Fault, OptionsError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from apt_moe.layer import MixtureOfExperts
    from apt_moe.router import LinearRouter


class TopK(RouterProvider):
    """Softmax top-k: g = softmax(W x / T) in float32, the k largest are chosen, w = g_chosen / sum g_chosen.

    Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024 (Mixtral), arXiv:2401.04088.
    """

    api_level: ClassVar[int] = 1
    scheduled: ClassVar[Mapping[str, str]] = {"route_temp": "temperature", "balance_loss": "balance_weight"}

    balance_loss: float = Field(default=0.01, ge=0, description="weight of the load-balance loss; it can be scheduled")
    z_loss: float = Field(default=0.001, ge=0, description="weight of the router z-loss")
    temperature: float = Field(default=1.0, gt=0, description="divides the scores; the schedule route_temp moves it")
    jitter: float = Field(default=0.0, ge=0, lt=1, description="in training inputs are multiplied by U(1-j, 1+j)")
    renormalise: bool = Field(
        default=True, description="weights of the chosen experts sum to 1; else raw probabilities"
    )
    init_std: float = Field(default=0.02, gt=0, description="standard deviation of the router's weights at the start")

    @model_validator(mode="after")
    def _router_learns(self) -> TopK:
        if self.top_k == 1 and self.renormalise:
            raise ValueError(_TOP_1)
        return self

    def create_router(self, d_model: int, num_experts: int, top_k: int | None = None) -> LinearRouter:
        """A router of `num_experts`; `top_k` is the option's value where it is not given."""
        from apt_moe.router import LinearRouter

        top_k = self.top_k if top_k is None else top_k
        if top_k == 1 and self.renormalise:
            raise OptionsError("router", self.get_name(), [Fault("router.top_k", _TOP_1)])
        if not 1 <= top_k <= num_experts:
            raise OptionsError("router", self.get_name(), [Fault("router.top_k", f"{top_k} of {num_experts} experts")])
        return LinearRouter(
            d_model,
            num_experts,
            top_k,
            temperature=self.temperature,
            balance_loss=self.balance_loss,
            init_std=self.init_std,
        )

    def route(
        self, router: nn.Module, inputs: Tensor, train: bool = True, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `RouterProvider.route`; losses are made in training only."""
        import torch

        from apt_moe import functional
        from apt_moe.router import LinearRouter

        if not isinstance(router, LinearRouter):
            raise TypeError(f"{self.get_name()} routes with its own routers, not with {type(router).__name__}")
        if train and self.jitter:
            inputs = inputs * torch.empty_like(inputs).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = router(inputs)
        weights, indices = logits.softmax(-1).topk(router.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        if not train:
            return indices, weights, {}
        scores = logits.flatten(0, 1)
        sent = torch.zeros_like(scores).scatter_(1, indices.flatten(0, 1), 1.0)
        counted = None if mask is None else mask.flatten()
        if counted is not None:
            sent = sent * counted.unsqueeze(1)
        losses = {"balance_loss": router.balance_weight * self.compute_load_balance_loss(scores, sent)}
        if self.z_loss:
            losses["z_loss"] = self.z_loss * functional.z_loss(scores, counted)
        return indices, weights, losses

    def observe(self, router: nn.Module, inputs: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The entropy of the router's distribution, in nats."""
        from apt_moe import functional

        counted = None if mask is None else mask.flatten()
        return {"router_entropy": functional.entropy(router(inputs).softmax(-1).flatten(0, 1), counted)}

    def compute_load_balance_loss(self, router_logits: Tensor, expert_mask: Tensor) -> Tensor:
        """See `apt_moe.functional.load_balance_loss`."""
        from apt_moe import functional

        return functional.load_balance_loss(router_logits, expert_mask)

    def get_parameter_count(self, d_model: int, num_experts: int) -> int:
        """One matrix."""
        return d_model * num_experts


_TOP_1 = "a top-1 router whose weight is renormalised to 1 gets no gradient; set renormalise: false, or top_k: 2"


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
