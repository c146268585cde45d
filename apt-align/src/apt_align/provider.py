"""What apt-align offers: aligners, as options and factories without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from apt.core.providers import AlignProvider
from apt.core.providers.align import Metric

if TYPE_CHECKING:
    from torch import Tensor, nn

    from apt_align.aligner import Aligner


class BiState(AlignProvider):
    """Draws together two states of the same tokens (see `apt_align.aligner.Aligner`).

    `state` says where the two come from: `dropout`, two passes with different dropout (it doubles forward and
    backward; Liang et al. 2021, arXiv:2106.14448); `ema`, a pass of the averaged weights and the model's own (one
    forward more); `layer`, the last layer and an earlier one of the same pass (nearly free).
    """

    api_level: ClassVar[int] = 1
    scheduled: ClassVar[Mapping[str, str]] = {"align_weight": "weight"}

    alpha: float = Field(default=0.35, ge=0, description="how strongly the stable state teaches")
    beta: float = Field(default=0.20, ge=0, description="how far the stable state follows")
    tau_align: float = Field(default=0.15, gt=0, description="the temperature of nce")
    kl_temperature: float = Field(default=1.0, gt=0, description="softens the logits that kl compares")
    state: Literal["dropout", "ema", "layer"] = Field(
        default="dropout", description="where the second state comes from"
    )
    layer: int | None = Field(
        default=None, ge=0, description="for state layer, the earlier block; none: the middle one"
    )
    decay: float = Field(default=0.999, ge=0, lt=1, description="for state ema, how slowly the averaged weights follow")
    metric: Metric | None = Field(
        default=None, description="distance; none: kl of the logits between passes, cosine between layers"
    )
    rank_ratio: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="width of the subspace in which compute_alignment mixes, as a share of d_model",
    )
    weight: float = Field(default=1.0, ge=0, description="multiplies the loss; the schedule align_weight moves it")

    @model_validator(mode="after")
    def _consistent(self) -> BiState:
        if self.state == "layer" and self.metric == "kl":
            raise ValueError("state layer compares hidden states, which are no logits; metric: cosine, l2 or nce")
        if self.state == "layer" and self.alpha == 0 and self.beta > 0:
            raise ValueError("state layer: with alpha: 0 the map from the earlier layer learns nothing; set alpha")
        for option, state in (("layer", "layer"), ("decay", "ema")):
            if self.state != state and getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"{option} is an option of state {state}, but the state is {self.state}")
        if self.state == "ema" and self.beta not in (0, type(self).model_fields["beta"].default):
            raise ValueError("state ema: the averaged weights follow by themselves and get no gradient; set beta: 0")
        return self

    @property
    def distance(self) -> Metric:
        """The metric in use."""
        return self.metric or ("cosine" if self.state == "layer" else "kl")

    def create_aligner(self, d_model: int, alpha: float | None = None, beta: float | None = None) -> Aligner:
        """An aligner; `alpha` and `beta` are the options' values where they are not given."""
        from apt_align.aligner import Aligner

        alpha = self.alpha if alpha is None else alpha
        beta = self.beta if beta is None else beta
        return Aligner(self, d_model, alpha, 0.0 if self.state == "ema" else beta)

    def get_parameter_count(self, d_model: int) -> int:
        """The map from the earlier layer, which the other states do without."""
        return d_model * (d_model + 1) if self.state == "layer" else 0

    def get_step_cost(self) -> float:
        """A second pass with its backward, a forward alone (a third of a step), or next to nothing."""
        return {"dropout": 2.0, "ema": 4 / 3, "layer": 1.0}[self.state]

    def compute_alignment(
        self, aligner: nn.Module, state_1: Tensor, state_2: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `AlignProvider.compute_alignment`; the loss is not yet multiplied by the scheduled weight."""
        from apt_align.aligner import Aligner

        if not isinstance(aligner, Aligner):
            raise TypeError(f"{self.get_name()} computes with its own aligners, not with {type(aligner).__name__}")
        return aligner.mix(state_1, state_2), aligner(state_1, state_2, mask)

    def compute_consistency_loss(
        self, state_1: Tensor, state_2: Tensor, metric: Metric = "cosine", mask: Tensor | None = None
    ) -> Tensor:
        """The distance from `state_1`, the teacher, to `state_2`; for kl both are logits."""
        from apt_align import functional

        if metric == "kl":
            distances = functional.kl(state_1, state_2, self.kl_temperature)
        elif metric == "nce":
            distances = functional.nce(state_1, state_2, self.tau_align, mask)
        else:
            distances = {"cosine": functional.cosine, "l2": functional.l2}[metric](state_1, state_2)
        return functional.mean(distances, mask)

    def supports_asymmetric_alignment(self) -> bool:
        """alpha and beta weigh the two directions."""
        return True
