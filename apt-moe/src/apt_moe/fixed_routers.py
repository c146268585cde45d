"""Routers that learn nothing: what a learnt one has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from apt.core.providers import RouterProvider
from apt.errors import Fault, OptionsError, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from apt_moe.router import FixedRouter


class _Fixed(RouterProvider):
    """No parameters, no losses, equal weights."""

    api_level: ClassVar[int] = 1

    def create_router(self, d_model: int, num_experts: int, top_k: int | None = None) -> FixedRouter:
        """What it must remember: the number of experts and of choices."""
        from apt_moe.router import FixedRouter

        top_k = self.top_k if top_k is None else top_k
        if not 1 <= top_k <= num_experts:
            raise OptionsError("router", self.get_name(), [Fault("router.top_k", f"{top_k} of {num_experts} experts")])
        return FixedRouter(num_experts, top_k)

    def compute_load_balance_loss(self, router_logits: Tensor, expert_mask: Tensor) -> Tensor:
        """See `apt_moe.functional.load_balance_loss`; for reports, it is never added."""
        from apt_moe import functional

        return functional.load_balance_loss(router_logits, expert_mask)

    def keeps_groups(self) -> bool:
        """There are no rows that experts could share."""
        return False

    def get_parameter_count(self, d_model: int, num_experts: int) -> int:
        """None."""
        return 0

    def _check(self, router: nn.Module) -> FixedRouter:
        from apt_moe.router import FixedRouter

        if not isinstance(router, FixedRouter):
            raise TypeError(f"{self.get_name()} routes with its own routers, not with {type(router).__name__}")
        return router


class Hash(_Fixed):
    """A token's experts follow from its id alone: the k experts e with the largest hash of (id, e, seed), weight 1/k each.

    Roller et al. 2021, arXiv:2106.04426 (random hash). Every layer can have another `seed`; by default all have the same.
    """

    takes_tokens: ClassVar[bool] = True

    seed: int = Field(default=0, ge=0, description="another seed is another table of experts")

    def route(
        self,
        router: nn.Module,
        inputs: Tensor,
        train: bool = True,
        mask: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `RouterProvider.route`; `tokens` [batch, seq] are the ids. Raises `UserError` without them."""
        if tokens is None:
            raise UserError("router.hash: routes by token id, and was given none; pass tokens=, as the decoder does")
        fixed = self._check(router)
        indices = fixed.hashed(tokens, self.seed)
        return indices, fixed(indices), {}


class Random(_Fixed):
    """In training k different experts are drawn for each token, all alike, with weight 1/k each.

    In evaluation every token goes to the first k: drawing would make it depend on chance, and after training with random
    experts any k of them are as good as any others (Zuo et al. 2021, arXiv:2110.04260, draws there too).
    """

    def route(
        self, router: nn.Module, inputs: Tensor, train: bool = True, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `RouterProvider.route`."""
        fixed = self._check(router)
        indices = fixed.drawn(inputs) if train else fixed.first(inputs)
        return indices, fixed(indices), {}
