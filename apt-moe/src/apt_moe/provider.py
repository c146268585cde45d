"""The mixture of experts, as options and a factory without PyTorch; its routers are in `apt_moe.routers`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from apt.core.provider import Slot
from apt.core.providers import FFNProvider, RouterProvider
from apt.errors import Fault, OptionsError
from apt_moe.routers import Switch, TopK

if TYPE_CHECKING:
    from apt_moe.layer import MixtureOfExperts

__all__ = ["MoE", "TopK"]


class Every(BaseModel):
    """The last block of each `every`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: int = Field(ge=1, description="one block with experts in this many")


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
    granularity: int = Field(
        default=1,
        ge=1,
        description="each expert is split into this many of d_ff / granularity; a token gets as many times top_k of them",
    )
    layers: Literal["all"] | Every | tuple[int, ...] = Field(
        default="all",
        description="which blocks have experts: all, {every: n} (the last of each n), or a list from 0; others hold one expert",
    )
    shared: int = Field(
        default=0, ge=0, le=10_000, description="experts of the full width that serve every token, without a weight"
    )
    backend: Literal["auto", "naive", "loop", "bmm", "grouped_mm"] = Field(
        default="auto", description="how experts are run: auto takes the fastest for the device and the sizes"
    )
    moments: Literal["copied", "fresh", "scaled"] = Field(
        default="copied", description="the optimizer's state of the experts at the switch"
    )
    redraw: float = Field(
        default=0.0, ge=0, le=1, description="share of hidden units that each expert draws anew at the switch"
    )
    redraw_seed: int = Field(default=0, ge=0, description="decides which units are drawn anew, and what is drawn")
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
        if info.data.get("capacity") is not None and not router.supports_dynamic_capacity():
            what = (
                f"{router.get_name()} fixes how many tokens an expert takes by top_k, so that a capacity limits nothing"
            )
            raise ValueError(f"{what}; leave capacity and its schedule moe_capacity out, and set top_k")
        granularity = info.data.get("granularity", 1)
        if granularity > 1 and isinstance(router, Switch):
            what = f"switch sends each token to one expert, and granularity: {granularity} to as many times top_k"
            raise ValueError(f"{what}; set granularity: 1, or take topk_default")
        if granularity > 1 and info.data.get("upcycle") and not router.keeps_groups():
            what = f"{router.get_name()} sends a token to some slices of the dense layer and not to others"
            hint = "set granularity: 1, or upcycle: false, or take a router whose scores alone choose, as topk_default"
            raise ValueError(
                f"{what}, so granularity: {granularity} with upcycle: true would change the function; {hint}"
            )
        return router

    @field_validator("expert", mode="after")
    @classmethod
    def _plain_expert(cls, expert: FFNProvider) -> FFNProvider:
        if expert.switched_by is not None:
            raise ValueError(f"an expert is always on, but {expert.get_name()} is switched by {expert.switched_by}")
        return expert

    @field_validator("layers")
    @classmethod
    def _some_layers(cls, layers: str | Every | tuple[int, ...]) -> str | Every | tuple[int, ...]:
        if isinstance(layers, tuple):
            if not layers or len(set(layers)) < len(layers) or min(layers) < 0:
                raise ValueError(f"{list(layers)} is no list of different blocks; they count from 0")
            return tuple(sorted(layers))
        return layers

    def at_layer(self, index: int, num_layers: int) -> FFNProvider:
        """This provider in the blocks that `layers` names, else the expert's own."""
        if isinstance(self.layers, tuple) and self.layers[-1] >= num_layers:
            fault = Fault("ffn.moe.layers", f"there is no block {self.layers[-1]}: the model has {num_layers}, from 0")
            raise OptionsError("ffn", self.get_name(), [fault])
        if isinstance(self.layers, Every):
            if self.layers.every > num_layers:
                what = f"no block would have experts: the model has {num_layers}, and every {self.layers.every}th was asked for"
                raise OptionsError("ffn", self.get_name(), [Fault("ffn.moe.layers.every", what)])
            return self if (index + 1) % self.layers.every == 0 else self.expert
        return self if self.layers == "all" or index in self.layers else self.expert

    def create_layer(self, d_model: int, d_ff: int, dropout: float = 0.0, activation: str = "gelu") -> MixtureOfExperts:
        """A mixture whose experts each have the hidden width `d_ff`, or its part where they are fine-grained."""
        from apt_moe.experts import Experts, make_layer
        from apt_moe.hidden import check_units
        from apt_moe.layer import MixtureOfExperts
        from apt_moe.upcycling import Upcycling, check_rows, check_slices

        sizes = (d_model, d_ff, dropout, activation)
        experts, width = self.experts * self.granularity, self._width(d_ff)
        router = self.router.create_router(d_model, experts, self.router.top_k * self.granularity)
        if self.upcycle and self.granularity > 1:
            check_slices(self.expert, self.granularity, activation)
            check_rows(router, self.router.get_name(), experts, self.granularity)
        made = Experts(self.expert, experts, d_model, width, dropout, activation)
        if self.upcycle and self.redraw:
            check_units(self.expert, made.axes)
        return MixtureOfExperts(
            self.router,
            router,
            made,
            make_layer(self.expert, sizes) if self.upcycle else None,
            math.inf if self.capacity is None else self.capacity,
            shared=[make_layer(self.expert, sizes) for _ in range(self.shared)],
            granularity=self.granularity,
            backend=self.backend,
            upcycling=Upcycling(self.redraw, self.moments, self.redraw_seed),
        )

    def get_parameter_count(self, d_model: int, d_ff: int) -> int:
        """All experts, the router, and the dense layer where it is held."""
        whole = (self.shared + self.upcycle) * self.expert.get_parameter_count(d_model, d_ff)
        experts = self.experts * self.granularity
        routed = experts * self.expert.get_parameter_count(d_model, self._width(d_ff))
        return whole + routed + self.router.get_parameter_count(d_model, experts)

    def get_active_parameter_count(self, d_model: int, d_ff: int) -> int:
        """The experts of a token, and the router; the dense layer rests once the experts are on."""
        shared = self.shared * self.expert.get_parameter_count(d_model, d_ff)
        routed = self._chosen() * self.expert.get_parameter_count(d_model, self._width(d_ff))
        return shared + routed + self.router.get_parameter_count(d_model, self.experts * self.granularity)

    def get_stacked_parameter_count(self, d_model: int, d_ff: int) -> int:
        """The routed experts."""
        return self.experts * self.granularity * self.expert.get_parameter_count(d_model, self._width(d_ff))

    def get_flops_estimate(self, seq_len: int, d_model: int, d_ff: int) -> int:
        """The router and the experts of a token, all of them with `naive`; nothing is assumed to be dropped."""
        shared = self.shared * self.expert.get_flops_estimate(seq_len, d_model, d_ff)
        run = self.experts * self.granularity if self.backend == "naive" else self._chosen()
        routed = self.expert.get_flops_estimate(seq_len * run, d_model, self._width(d_ff))
        return shared + routed + 2 * seq_len * d_model * self.experts * self.granularity

    def get_memory_estimate(self, seq_len: int, d_model: int, d_ff: int, batch_size: int = 1) -> int:
        """The experts' own on their rows, and what routing and combining keep, where the load is even.

        Rows are k a token; where experts choose their tokens one for each expert, of which `bmm` runs k. With `bmm` every expert
        has as many as the busiest: where the load is uneven it takes more, in operations too. With `naive` every expert reads all
        tokens, which are kept once.
        """
        tokens, experts, naive = batch_size * seq_len, self.experts * self.granularity, self.backend == "naive"
        rows = experts if naive or self.router.supports_expert_choice() else self._chosen()
        # Shared experts keep the same input once, and each its output for a weight that is not 1.
        kept = self.expert.get_memory_estimate(seq_len, d_model, d_ff, batch_size) - 4 * tokens * d_model
        run = self._chosen() if self.backend == "bmm" else rows
        routed = self.expert.get_memory_estimate(seq_len * run, d_model, self._width(d_ff), batch_size)
        if naive:
            one = self.expert.get_memory_estimate(seq_len, d_model, self._width(d_ff), batch_size)
            routed = experts * (one - 4 * tokens * d_model)
        copied = rows if self.backend == "bmm" else 0  # what is put in each expert's place
        jittered = isinstance(self.router, TopK) and self.router.jitter > 0  # by numbers that are kept
        routing = 4 * tokens * d_model * (1 + jittered + rows + copied) + 4 * tokens * (4 * experts)
        return self.shared * kept + routed + routing

    def _chosen(self) -> int:
        """Experts that serve a token, shared ones aside."""
        return self.router.top_k * self.granularity

    def _width(self, d_ff: int) -> int:
        """The hidden width of an expert. Raises `OptionsError` where `d_ff` cannot be split so."""
        if d_ff % self.granularity:
            fault = Fault("ffn.moe.granularity", f"{self.granularity} does not divide d_ff, which is {d_ff}")
            raise OptionsError("ffn", self.get_name(), [fault])
        return d_ff // self.granularity

    def supports_gating(self) -> bool:
        """Whether an expert's hidden layer is gated."""
        return self.expert.supports_gating()
