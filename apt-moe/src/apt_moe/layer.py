"""The mixture of experts: a dense feed-forward layer until it is switched on, then the experts that grew out of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apt.core.providers import RouterProvider
from apt.layers import Part, as_part
from apt_moe import dispatch, functional
from apt_moe.experts import Experts
from apt_moe.upcycling import Upcycling


class MixtureOfExperts(nn.Module):
    """y = c sum_{e in top k} w_e f_e(x) + d sum_s f_s(x), w and the choice from the router, s the shared experts.

    c and d are 1 where the experts are trained from scratch. Where they grow out of a dense layer f, an expert is one of
    m slices of it (``granularity``; a token's weights sum to 1 over k m slices) or all of it (m = 1), and a shared
    expert is all of it. So c = m / (1 + S) and d = 1 / (1 + S) with S shared experts give f at the switch.

    While `active` is False the layer is its dense layer and nothing else runs. Once active, the dense layer is idle.
    In training an expert takes at most ``max(k, floor(N k / E * capacity_factor))`` tokens, the others pass by the
    residual; in evaluation every token is served.

    Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961; shared and fine-grained experts: Dai et al.
    2024 (DeepSeekMoE), arXiv:2401.06066, eq. 3-11.
    """

    capacity_factor: Tensor

    def __init__(
        self,
        router_provider: RouterProvider,
        router: nn.Module,
        experts: Experts,
        dense: nn.Module | None,
        capacity_factor: float,
        *,
        shared: Sequence[nn.Module] = (),
        granularity: int = 1,
        upcycling: Upcycling = Upcycling(),  # noqa: B008  it is frozen
    ) -> None:
        super().__init__()
        self.active = True
        self.router_provider = router_provider
        self.router = router
        self.experts = experts
        self.dense = dense
        self.shared = nn.ModuleList(shared) if shared else None
        self.granularity, self.upcycling = granularity, upcycling
        self.shared_scale = 1.0 if dense is None else 1 / (1 + len(shared))
        self.routed_scale = 1.0 if dense is None else granularity * self.shared_scale
        self.register_buffer("capacity_factor", torch.tensor(capacity_factor, dtype=torch.float32))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Part:
        """`x` [batch, seq, d_model]; `mask` [batch, seq], False for padding, which counts in no loss and no metric."""
        if not self.active:
            if self.dense is None:
                raise RuntimeError("this mixture holds no dense layer to run while it is off; give it upcycle: true")
            return as_part(self.dense(x, mask=mask))
        routed = {} if mask is None else {"mask": mask}
        indices, weights, losses = self.router_provider.route(self.router, x, self.training, **routed)
        indices, weights = indices.flatten(0, 1), weights.flatten(0, 1)
        counted = None if mask is None else mask.flatten()
        limit = None
        if self.training:
            limit = functional.capacity(
                indices.numel(), self.experts.num_experts, indices.shape[1], self.capacity_factor
            )
        plan = dispatch.plan(indices, self.experts.num_experts, limit=limit, counted=counted)
        rows = dispatch.dispatch(x.flatten(0, 1), plan)
        rows = self.experts(rows, plan.offsets, plan.experts)
        output = dispatch.combine(rows, weights, plan).to(x.dtype).view_as(x)
        if self.routed_scale != 1:
            output = output * self.routed_scale
        if self.shared is not None:
            for expert in self.shared:
                output = output + as_part(expert(x, mask=mask)).output * self.shared_scale
        return Part(output, losses, self._metrics(x, indices, plan, mask))

    def idle(self) -> list[nn.Module]:
        """The dense layer once the experts are on, and the experts and their router until then."""
        if not self.active:
            return [self.router, self.experts, *(() if self.shared is None else (self.shared,))]
        return [] if self.dense is None else [self.dense]

    @torch.no_grad()
    def _metrics(self, x: Tensor, indices: Tensor, plan: dispatch.Plan, mask: Tensor | None) -> dict[str, Tensor]:
        counted = None if mask is None else mask.flatten().repeat_interleave(plan.top_k)
        load = dispatch.count(indices.flatten(), self.experts.num_experts, counted).float()
        total = load.sum().clamp(min=1)
        metrics = {"moe_load": load / total, "moe_dropped": x.new_zeros(())}
        if plan.kept is not None:
            dropped = ~plan.kept if counted is None else ~plan.kept & counted
            metrics["moe_dropped"] = dropped.sum() / total
        if not self.training:
            metrics |= self.router_provider.observe(self.router, x, mask)
        return metrics
