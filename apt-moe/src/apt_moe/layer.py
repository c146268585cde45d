"""The mixture of experts: a dense feed-forward layer until it is switched on, then the experts that grew out of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from apt.core.providers import RouterProvider
from apt.errors import UserError
from apt.layers import Part, as_part
from apt_moe import dispatch, functional
from apt_moe.experts import Backend, Experts, choose_backend
from apt_moe.parallel import run_sharded, shard_experts
from apt_moe.upcycling import Upcycling, grow

FEW = 8
"""Choices of experts that are followed one by one in writing: sorting costs as much as some eight experts of a small layer."""

FEW_ON_ACCELERATORS = 16
"""Choices whose matrices are copied in writing, where that takes less than sorting: 6 of them a third, on an H100."""


class MixtureOfExperts(nn.Module):
    """y = c sum_{e in top k} w_e f_e(x) + d sum_s f_s(x), w and the choice from the router, s the shared experts.

    c and d are 1 where the experts are trained from scratch. Where they grow out of a dense layer f, an expert is one of
    m slices of it (``granularity``; a token's weights sum to 1 over k m slices) or all of it (m = 1), and a shared
    expert is all of it. So c = m / (1 + S) and d = 1 / (1 + S) with S shared experts give f at the switch.

    While `active` is False the layer is its dense layer and nothing else runs. Once active, the dense layer is idle.
    In training an expert takes at most ``max(k, floor(N k / E * capacity_factor))`` tokens, the others pass by the
    residual; in evaluation every token is served, where experts choose too but for those that none chose.

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
        backend: Backend | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        self.active = True
        self.router_provider = router_provider
        self.router = router
        self.experts = experts
        self.dense = dense
        self.shared = nn.ModuleList(shared) if shared else None
        self.granularity, self.upcycling = granularity, upcycling
        self.backend = backend
        self.mesh: DeviceMesh | None = None
        """The ranks that share the experts out (`apt_moe.parallel.shard_experts`)."""
        self.takes_mask = router_provider.takes_mask()
        """Whether the router can be told of padding; one that cannot does without where it has no losses."""
        self.takes_tokens = bool(getattr(router_provider, "takes_tokens", False))
        """Whether the router asks for the tokens' ids."""
        self.shared_scale = 1.0 if dense is None else 1 / (1 + len(shared))
        self.routed_scale = 1.0 if dense is None else granularity * self.shared_scale
        self.register_buffer("capacity_factor", torch.tensor(capacity_factor, dtype=torch.float32))
        self._known: tuple[Tensor, int, bool] | None = None
        """The capacity's buffer when it was last read, its version, and whether it was finite."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None, tokens: Tensor | None = None) -> Part:
        """`x` [batch, seq, d_model]; `mask` [batch, seq], False for padding, which counts in no loss and no metric.

        `tokens` [batch, seq], the ids, are for routers that ask for them.
        """
        if not self.active:
            if self.dense is None:
                raise RuntimeError("this mixture holds no dense layer to run while it is off; give it upcycle: true")
            return as_part(self.dense(x, mask=mask))
        routed = {"mask": mask} if mask is not None and self.takes_mask else {}
        if self.takes_tokens and tokens is not None:
            routed["tokens"] = tokens
        indices, weights, losses = self.router_provider.route(self.router, x, self.training, **routed)
        if mask is not None and not self.takes_mask:
            self._check_untold(losses)
        indices, weights = indices.flatten(0, 1), weights.flatten(0, 1)
        if self._is_writing(x, indices):
            experts = self.experts.few if x.device.type == "cpu" else self.experts.gathered
            output, metrics = experts(x.flatten(0, 1), indices, weights), {}
        else:
            plan = self._plan(indices, weights, mask)
            output, metrics = self._run(x.flatten(0, 1), indices, weights, plan), self._metrics(x, indices, plan, mask)
        output = output.to(x.dtype).view_as(x)
        if self.routed_scale != 1:
            output = output * self.routed_scale
        if self.shared is not None:
            for expert in self.shared:
                output = output + as_part(expert(x, mask=mask)).output * self.shared_scale
        return Part(output, losses, metrics)

    def _check_untold(self, losses: Mapping[str, Tensor]) -> None:
        """Raise `UserError` where a router that was not told of padding has let it count."""
        counting = "experts choose it" if self.router_provider.supports_expert_choice() else ""
        if losses and torch.is_grad_enabled():
            counting = f"it counts in {', '.join(sorted(losses))}"
        if counting:
            raise UserError(
                f"router.{self.router_provider.get_name()}: there is padding, and {counting}, since route takes no mask; its "
                "signature is route(router, inputs, train=True, mask=None)"
            )

    def grow_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `apt.layers.Growing`. Experts that were redrawn in part grew out of nothing that other weights tell."""
        dense = {name.removeprefix("dense."): each for name, each in weights.items() if name.startswith("dense.")}
        if not self.active or self.dense is None or self.upcycling.redraw:
            return {}
        return dict(grow(self, dense)) if dense.keys() == dict(self.dense.named_parameters()).keys() else {}

    def _is_writing(self, x: Tensor, indices: Tensor) -> bool:
        """Whether this is one more token of few texts, whose experts are run without sorting.

        On the CPU they are called one after the other, which waits for their numbers and is nothing to compile.
        """
        if (
            x.shape[1] != 1
            or functional.is_transformed()
            or self.training
            or torch.is_grad_enabled()
            or self.backend != "auto"
            or self.mesh is not None
        ):
            return False
        if x.device.type == "cpu":
            return 0 < indices.numel() <= FEW and not torch.compiler.is_compiling()
        return 0 < indices.numel() <= FEW_ON_ACCELERATORS and self.experts.grouped

    def _plan(self, indices: Tensor, weights: Tensor, mask: Tensor | None) -> dispatch.Plan:
        counted = None if mask is None else mask.flatten()
        limit = None
        if self._is_limited() and self.router_provider.supports_dynamic_capacity():
            limit = functional.capacity(
                indices.numel(), self.experts.num_experts, indices.shape[1], self.capacity_factor
            )
        sent = weights > 0 if self.router_provider.supports_expert_choice() else None
        return dispatch.plan(indices, self.experts.num_experts, limit=limit, counted=counted, sent=sent)

    def _run(self, tokens: Tensor, indices: Tensor, weights: Tensor, plan: dispatch.Plan) -> Tensor:
        """sum_e w_e f_e(x) for `tokens` [tokens, d_model]; `indices` and `weights` [tokens, k].

        Under the transforms of `torch.func`, which the kernels do not know, it is by the reference.
        """
        backend = self.backend
        if backend == "auto":
            backend = choose_backend(tokens.device, self.experts.largest, self.experts.num_experts)
        if backend == "naive" or (functional.is_transformed() and self.mesh is None):
            kept = weights if plan.kept is None else weights * plan.kept.view_as(weights)
            shares = kept.new_zeros(len(tokens), self.experts.num_experts).scatter_add(1, indices, kept)
            return self.experts.every(tokens, shares)
        wanted = tokens.dtype
        if tokens.is_cuda and self.experts.grouped and torch.is_autocast_enabled("cuda"):
            tokens = tokens.to(torch.get_autocast_dtype("cuda"))  # before each is copied k times
        rows = dispatch.dispatch(tokens, plan)
        if self.mesh is not None:
            rows = run_sharded(self.experts, rows, plan, self.mesh, backend)
        else:
            offsets, tail = plan.offsets, plan.kept is not None
            if tail and backend == "grouped_mm" and not self.router_provider.supports_expert_choice():
                # The few rows that found no room are run too, with weight 0: clearing what the kernel leaves unwritten
                # would pass over all rows, in each product and its gradient.
                offsets, tail = plan.whole(), False
            rows = self.experts(rows, offsets, plan.experts, backend, tail)
        return dispatch.combine(rows, weights, plan, wanted)

    def _is_limited(self) -> bool:
        """Whether a capacity is to be kept. In compiled code and under `torch.func` it always is: infinity is no limit either.

        Else the number is read, which waits for an accelerator; so there it is read again only after it was changed
        from infinity.
        """
        if not self.training:
            return False
        factor = self.capacity_factor
        if torch.compiler.is_compiling() or factor.is_meta or type(factor) is not Tensor or functional.is_transformed():
            return True
        if factor.device.type == "cpu":
            return math.isfinite(factor.item())
        known = self._known
        if known is None or known[0] is not factor or (known[1] != factor._version and not known[2]):
            known = self._known = (factor, factor._version, math.isfinite(factor.item()))
        return known[2]

    def share_out(self, mesh: DeviceMesh) -> list[nn.Parameter]:
        """Keep this rank's share of the experts; see `apt.layers.Shareable`."""
        return shard_experts(self, mesh)

    def idle(self) -> list[nn.Module]:
        """The dense layer once the experts are on, and the experts and their router until then."""
        if not self.active:
            return [self.router, self.experts, *(() if self.shared is None else (self.shared,))]
        return [] if self.dense is None else [self.dense]

    @torch.no_grad()
    def _metrics(self, x: Tensor, indices: Tensor, plan: dispatch.Plan, mask: Tensor | None) -> dict[str, Tensor]:
        if not self.training and x.shape[1] == 1:
            return {}  # one position is decoding, and nobody reads metrics there
        counted = None if mask is None else mask.flatten().repeat_interleave(plan.top_k)
        if plan.kept is None and counted is None:
            # Every choice counts, so that their number is known; the rest of this would be four steps more.
            load = plan.offsets.diff(prepend=plan.offsets.new_zeros(1)) / max(1, indices.numel())
            metrics = {"moe_load": load, "moe_dropped": x.new_zeros(())}
            return metrics if self.training else metrics | self.router_provider.observe(self.router, x, mask)
        load = dispatch.count(indices.flatten(), self.experts.num_experts, counted).float()
        total = load.sum().clamp(min=1)
        metrics = {"moe_load": load / total, "moe_dropped": x.new_zeros(())}
        if plan.kept is not None:
            kept = plan.kept if counted is None else plan.kept & counted
            if self.router_provider.supports_expert_choice():
                sent = kept.view_as(indices)
                load = sent.sum(0).float()
                metrics["moe_load"] = load / load.sum().clamp(min=1)
                # What no expert chose goes by the residual.
                tokens = x.new_full((), len(sent), dtype=torch.float32) if mask is None else mask.sum()
                metrics["moe_dropped"] = (tokens - sent.any(-1).sum()) / tokens.clamp(min=1)
            else:
                metrics["moe_dropped"] = (load.sum() - kept.sum()) / total
        if not self.training:
            metrics |= self.router_provider.observe(self.router, x, mask)
        return metrics
