"""What apt-moe's routers are, as options and factories without PyTorch: who chooses a token's experts, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from apt.core.providers import RouterProvider
from apt.errors import Fault, OptionsError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from apt_moe.router import BiasRouter, LinearRouter, NoisyRouter


class TopK(RouterProvider):
    """Softmax top-k: g = softmax(W x / T) in float32, the k largest are chosen, w = g_chosen / sum g_chosen.

    Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024 (Mixtral), arXiv:2401.04088.
    """

    api_level: ClassVar[int] = 1
    scheduled: ClassVar[Mapping[str, str]] = {"route_temp": "temperature", "balance_loss": "balance_weight"}
    losses: ClassVar[Mapping[str, str]] = {"balance_loss": "balance_loss", "z_loss": "z_loss"}

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
        if self._weighs_1(self.top_k):
            raise ValueError(_TOP_1)
        return self

    def _weighs_1(self, top_k: int) -> bool:
        """Whether a token's only expert weighs 1 whatever the router says, which so has nothing to learn from."""
        return top_k == 1 and self.renormalise

    def keeps_scale(self) -> bool:
        """Where they are renormalised."""
        return self.renormalise

    def create_router(self, d_model: int, num_experts: int, top_k: int | None = None) -> LinearRouter:
        """A router of `num_experts`; `top_k` is the option's value where it is not given."""
        from apt_moe.router import LinearRouter

        top_k = self.top_k if top_k is None else top_k
        if self._weighs_1(top_k):
            raise OptionsError("router", self.get_name(), [Fault("router.top_k", _TOP_1)])
        _check_top_k(self, top_k, num_experts)
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
        """See `RouterProvider.route`; losses are made in training only, and of the scores without noise."""
        from apt_moe import functional
        from apt_moe.router import LinearRouter

        if not isinstance(router, LinearRouter):
            raise TypeError(f"{self.get_name()} routes with its own routers, not with {type(router).__name__}")
        if train and self.jitter:
            inputs = inputs * inputs.new_empty(inputs.shape).uniform_(1 - self.jitter, 1 + self.jitter)
        scores = router(inputs)
        choosing = self._noisy(router, inputs, scores) if train else scores
        if self.renormalise:
            # g_chosen / sum g_chosen is the softmax of the chosen scores alone.
            chosen, indices = choosing.topk(router.top_k, dim=-1)
            weights = chosen.softmax(-1)
        else:
            weights, indices = choosing.softmax(-1).topk(router.top_k, dim=-1)
        if not train:
            return indices, weights, {}
        scores, counted = scores.flatten(0, 1), None if mask is None else mask.flatten()
        if counted is None and type(self).compute_load_balance_loss is TopK.compute_load_balance_loss:
            balance, squares = functional.balance_and_z_loss(scores, indices.flatten(0, 1))
            losses = {"balance_loss": router.balance_weight * balance}
            return indices, weights, losses | ({"z_loss": self.z_loss * squares} if self.z_loss else {})
        sent = functional.expert_mask(indices.flatten(0, 1), router.num_experts, counted)
        losses = {"balance_loss": router.balance_weight * self.compute_load_balance_loss(scores, sent)}
        if self.z_loss:
            losses["z_loss"] = self.z_loss * functional.z_loss(scores, counted)
        return indices, weights, losses

    def _noisy(self, router: LinearRouter, inputs: Tensor, scores: Tensor) -> Tensor:
        """The scores that choose in training."""
        return scores

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


class Switch(TopK):
    """One expert a token, weighed by its raw probability, with jitter (Fedus et al. 2021, arXiv:2101.03961)."""

    top_k: Literal[1] = Field(default=1, description="always 1")
    renormalise: Literal[False] = Field(default=False, description="always false: the router would not learn")
    jitter: float = Field(default=0.01, ge=0, lt=1, description="in training inputs are multiplied by U(1-j, 1+j)")

    def create_router(self, d_model: int, num_experts: int, top_k: int | None = None) -> LinearRouter:
        """A router to one expert."""
        if top_k not in (None, 1):
            fault = Fault(
                "router.top_k", f"{top_k}, but switch sends each token to one expert", "topk_default takes more"
            )
            raise OptionsError("router", self.get_name(), [fault])
        return super().create_router(d_model, num_experts, 1)


class NoisyTopK(TopK):
    """Softmax top-k of l + eps softplus(W_n x), eps ~ N(0, 1), in training; of l in evaluation.

    The noise is as large as the router finds useful: W_n is learnt, from 0. The losses are of l itself.

    Shazeer et al. 2017, arXiv:1701.06538, eq. 4.
    """

    def keeps_groups(self) -> bool:
        """Each expert draws its own noise."""
        return False

    def create_router(self, d_model: int, num_experts: int, top_k: int | None = None) -> NoisyRouter:
        """A router with a second matrix for the noise."""
        from apt_moe.router import NoisyRouter

        plain = super().create_router(d_model, num_experts, top_k)
        return NoisyRouter(
            d_model,
            num_experts,
            plain.top_k,
            temperature=self.temperature,
            balance_loss=self.balance_loss,
            init_std=self.init_std,
        )

    def get_parameter_count(self, d_model: int, num_experts: int) -> int:
        """Two matrices."""
        return 2 * d_model * num_experts

    def _noisy(self, router: LinearRouter, inputs: Tensor, scores: Tensor) -> Tensor:
        from apt_moe.router import NoisyRouter

        if not isinstance(router, NoisyRouter):
            raise TypeError(f"{self.get_name()} routes with its own routers, not with {type(router).__name__}")
        return router.noisy(inputs, scores)


class SigmoidBias(RouterProvider):
    """Balance without an auxiliary loss: s = sigmoid(W x / T); the k largest of s + b are chosen, w = s_chosen / sum.

    After each optimizer step b_e += u (sign(mean load - load_e) - the mean of these signs), so b picks and s weighs.
    The plugin `moe` takes this step, so it must be listed.

    Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437.
    """

    api_level: ClassVar[int] = 1
    scheduled: ClassVar[Mapping[str, str]] = {"route_temp": "temperature"}
    needs_plugin: ClassVar[str | None] = "moe"

    bias_rate: float = Field(default=0.001, gt=0, description="how far b moves in one step")
    route_scale: float = Field(default=1.0, gt=0, description="multiplies the weights; they sum to it")
    temperature: float = Field(default=1.0, gt=0, description="divides the scores; the schedule route_temp moves it")
    sequence_balance: float = Field(
        default=0.0,
        ge=0,
        description="weight of a load-balance loss within each sequence (arXiv:2412.19437, eq. 17-20)",
    )
    init_std: float = Field(default=0.02, gt=0, description="standard deviation of the router's weights at the start")

    @model_validator(mode="after")
    def _router_learns(self) -> SigmoidBias:
        if self.top_k == 1:
            raise ValueError("one chosen expert always has the same weight: the router gets no gradient; use top_k: 2")
        return self

    def keeps_scale(self) -> bool:
        """Where the weights sum to 1."""
        return self.route_scale == 1

    def create_router(self, d_model: int, num_experts: int, top_k: int | None = None) -> BiasRouter:
        """A router with its balancing bias."""
        from apt_moe.router import BiasRouter

        top_k = self.top_k if top_k is None else top_k
        _check_top_k(self, top_k, num_experts)
        return BiasRouter(
            d_model, num_experts, top_k, temperature=self.temperature, rate=self.bias_rate, init_std=self.init_std
        )

    def route(
        self, router: nn.Module, inputs: Tensor, train: bool = True, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `RouterProvider.route`. In training the load is counted for the next step of b."""
        from torch.nn.functional import logsigmoid

        from apt_moe import functional
        from apt_moe.router import BiasRouter

        if not isinstance(router, BiasRouter):
            raise TypeError(f"{self.get_name()} routes with its own routers, not with {type(router).__name__}")
        log_gates = logsigmoid(router(inputs))
        gates = log_gates.exp()
        indices = (gates + router.bias).topk(router.top_k, dim=-1).indices
        # s / sum s as a softmax of log s: where all gates are as good as 0, their ratios are still numbers.
        weights = log_gates.gather(-1, indices).softmax(-1)
        losses = {}
        if train:
            router.count(indices, mask)
            if self.sequence_balance:
                loss = functional.sequence_balance_loss(gates, indices, mask)
                losses["sequence_balance_loss"] = self.sequence_balance * loss
        return indices, self.route_scale * weights, losses

    def compute_load_balance_loss(self, router_logits: Tensor, expert_mask: Tensor) -> Tensor:
        """See `apt_moe.functional.load_balance_loss`; for reports, it is never added."""
        from apt_moe import functional

        return functional.load_balance_loss(router_logits, expert_mask)

    def get_parameter_count(self, d_model: int, num_experts: int) -> int:
        """One matrix; b is no parameter."""
        return d_model * num_experts


def _check_top_k(provider: RouterProvider, top_k: int, num_experts: int) -> None:
    if not 1 <= top_k <= num_experts:
        fault = Fault("router.top_k", f"{top_k} of {num_experts} experts")
        raise OptionsError("router", provider.get_name(), [fault])


_TOP_1 = "a top-1 router whose weight is renormalised to 1 gets no gradient; set renormalise: false, or top_k: 2"
