"""Routers: which experts take which token, and with what weight."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from apt.core.provider import Provider

if TYPE_CHECKING:
    from torch import Tensor, nn


class RouterProvider(Provider):
    """Makes routers, and routes with them."""

    kind: ClassVar[str] = "router"
    makes: ClassVar[str] = "create_router"

    top_k: int = Field(default=2, ge=1, description="experts that each token is sent to")

    @abstractmethod
    def create_router(self, d_model: int, num_experts: int, top_k: int = 2) -> nn.Module:
        """The router's parameters and buffers."""

    @abstractmethod
    def route(
        self, router: nn.Module, inputs: Tensor, train: bool = True, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Route `inputs` [batch, seq, d_model].

        Returns the experts' indices [batch, seq, top_k], their weights [batch, seq, top_k] (>= 0), and the auxiliary
        losses by name, already multiplied by their coefficients. A token where `mask` [batch, seq] is False is routed
        but does not count in the losses.
        """

    @abstractmethod
    def compute_load_balance_loss(self, router_logits: Tensor, expert_mask: Tensor) -> Tensor:
        """E sum_e f_e P_e (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6): 1 when the load is balanced.

        `router_logits` [tokens, experts]; `expert_mask` [tokens, experts] is 1 where the token is sent to the expert.
        """

    @abstractmethod
    def get_parameter_count(self, d_model: int, num_experts: int) -> int:
        """Trainable parameters of one router, exactly."""

    def get_capacity(
        self, batch_size: int, seq_len: int, num_experts: int, top_k: int, capacity_factor: float = 1.25
    ) -> int:
        """Tokens that one expert takes at most: ``max(top_k, int(batch*seq*top_k/num_experts*capacity_factor))``."""
        return max(top_k, int(batch_size * seq_len * top_k / num_experts * capacity_factor))

    def observe(self, router: nn.Module, inputs: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Metrics of how `inputs` [batch, seq, d_model] are routed, detached; asked for in evaluation."""
        return {}

    def keeps_scale(self) -> bool:
        """Whether the weights of a token sum to 1: equal experts, as they are at a switch, then are what each of them is."""
        return True

    def keeps_groups(self) -> bool:
        """Whether experts whose rows of the router's weights are equal are chosen together in training too, or none of them.

        Fine-grained experts that grow out of a dense layer need it: a token has to get all of that layer's slices.
        """
        return True

    def supports_dynamic_capacity(self) -> bool:
        """Whether a capacity limits an expert, and may change while training; where it does not, one is refused."""
        return True

    def takes_mask(self) -> bool:
        """Whether `route` can be told of padding: it has an argument `mask`, or takes any."""
        parameters = inspect.signature(self.route).parameters
        return "mask" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())

    def supports_expert_choice(self) -> bool:
        """Whether experts choose tokens rather than tokens experts."""
        return False
