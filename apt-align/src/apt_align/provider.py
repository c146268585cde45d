"""What apt-align offers: aligners, as options and factories without PyTorch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from apt.core.providers import AlignProvider
from apt.core.providers.align import Metric

if TYPE_CHECKING:
    from torch import Tensor, nn

    from apt_align.aligner import Aligner

State = Literal["dropout", "ema", "layer", "evidence"]


class Consistency(AlignProvider):
    """What the aligners of this package share: a state that teaches, a state that learns, and their distance."""

    api_level: ClassVar[int] = 1
    scheduled: ClassVar[Mapping[str, str]] = {"align_weight": "weight"}
    losses: ClassVar[Mapping[str, str]] = {"align": "align_weight"}

    weight: float = Field(default=1.0, ge=0, description="multiplies the loss; the schedule align_weight moves it")
    warmup: int | None = Field(
        default=None,
        ge=0,
        description="epochs at weight 0, after which it rises to `weight` at the end of the run; none: no warm-up",
    )
    kl_temperature: float = Field(default=1.0, gt=0, description="softens the logits that kl compares")
    tau_align: float = Field(default=0.15, gt=0, description="the temperature of nce, and of the search for evidence")

    @property
    @abstractmethod
    def source(self) -> State:
        """Where the second state comes from."""

    @property
    @abstractmethod
    def distance(self) -> Metric:
        """The metric in use."""

    @property
    def num_passes(self) -> int:
        """Forward passes with gradient that a step makes, the trainer's own among them."""
        return 2 if self.source == "dropout" else 1

    @property
    def average_decay(self) -> float | None:
        """How slowly the averaged weights follow; none: there are no such weights."""
        return None

    @property
    def scores_all_passes(self) -> bool:
        """Whether the cross entropy is the mean of all passes, not the first one's alone."""
        return False

    def get_extra_passes(self) -> tuple[int, int]:
        """Another pass with its backward, a forward alone, or none."""
        return {"dropout": (self.num_passes - 1, self.num_passes - 1), "ema": (1, 0)}.get(self.source, (0, 0))

    def get_weight_copies(self) -> int:
        """One, where the weights are averaged."""
        return int(self.average_decay is not None)

    def get_weight(self, epoch: int, max_epochs: int) -> float:
        """The weight of the loss where no schedule sets it."""
        if self.warmup is None:
            return self.weight
        return self.weight * self.get_interpolation_weight(epoch, max_epochs, self.warmup)

    def compute_alignment(
        self, aligner: nn.Module, state_1: Tensor, state_2: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `AlignProvider.compute_alignment`; the loss is not yet multiplied by the scheduled weight."""
        from apt_align.aligner import Aligner

        if not isinstance(aligner, Aligner):
            raise TypeError(f"{self.get_name()} computes with its own aligners, not with {type(aligner).__name__}")
        return aligner.mix(state_1, state_2), aligner(state_1, state_2, mask=mask)

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


class BiState(Consistency):
    """Draws together two states of the same tokens (see `apt_align.aligner.Aligner`).

    `state` says where the two come from: `dropout`, two passes with different dropout (it doubles forward and
    backward; Liang et al. 2021, arXiv:2106.14448); `ema`, a pass of the averaged weights and the model's own (one
    forward more); `layer`, the last layer and an earlier one of the same pass (nearly free); `evidence`, what followed
    the most similar states of earlier batches, and the model's own prediction (a search through a memory, which a
    small model's step feels; see `apt_align.evidence.Evidence`).
    """

    alpha: float = Field(default=0.35, ge=0, description="how strongly the stable state teaches")
    beta: float = Field(default=0.20, ge=0, description="how far the stable state follows")
    state: State = Field(default="dropout", description="where the second state comes from")
    layer: int | None = Field(
        default=None, ge=0, description="for state layer, the earlier block; none: the middle one"
    )
    decay: float = Field(default=0.999, ge=0, lt=1, description="for state ema, how slowly the averaged weights follow")
    memory: int = Field(default=4096, ge=1, description="for state evidence, the latest tokens that are searched")
    neighbours: int = Field(default=32, ge=1, description="for state evidence, how many of them speak")
    trust: float = Field(
        default=0.25, gt=0, lt=1, description="for state evidence, their share; the rest is the model's own prediction"
    )
    metric: Metric | None = Field(default=None, description="distance; none: kl of the logits, cosine between layers")
    rank_ratio: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="width of the subspace in which compute_alignment mixes, as a share of d_model",
    )

    @model_validator(mode="after")
    def _consistent(self) -> BiState:
        fields = type(self).model_fields
        if self.state == "layer" and self.metric == "kl":
            raise ValueError("state layer compares hidden states, which are no logits; metric: cosine, l2 or nce")
        if self.state == "layer" and self.alpha == 0 and self.beta > 0:
            raise ValueError("state layer: with alpha: 0 the map from the earlier layer learns nothing; set alpha")
        if self.state == "evidence" and self.metric not in (None, "kl"):
            raise ValueError("state evidence: what followed elsewhere is a distribution over tokens; metric: kl")
        owners = {"layer": "layer", "decay": "ema", "memory": "evidence", "neighbours": "evidence", "trust": "evidence"}
        for option, state in owners.items():
            if self.state != state and getattr(self, option) != fields[option].default:
                raise ValueError(f"{option} is an option of state {state}, but the state is {self.state}")
        if self.state in FIXED_TEACHERS and self.beta not in (0, fields["beta"].default):
            raise ValueError(f"state {self.state}: {FIXED_TEACHERS[self.state]} and get no gradient; set beta: 0")
        if self.neighbours > self.memory:
            raise ValueError(f"neighbours: {self.neighbours} are more than the {self.memory} tokens of memory")
        return self

    @property
    def source(self) -> State:
        """The option `state`."""
        return self.state

    @property
    def distance(self) -> Metric:
        """The option `metric`, or the usual one of the state."""
        return self.metric or ("cosine" if self.state == "layer" else "kl")

    @property
    def average_decay(self) -> float | None:
        """The option `decay` where there is an average."""
        return self.decay if self.state == "ema" else None

    def create_aligner(self, d_model: int, alpha: float | None = None, beta: float | None = None) -> Aligner:
        """An aligner; `alpha` and `beta` are the options' values where they are not given."""
        from apt_align.aligner import Aligner
        from apt_align.evidence import Evidence

        alpha = self.alpha if alpha is None else alpha
        beta = self.beta if beta is None else beta
        evidence = None
        if self.state == "evidence":
            evidence = Evidence(d_model, self.memory, self.neighbours, self.trust, self.tau_align)
        return Aligner(
            self,
            d_model,
            alpha,
            0.0 if self.state in FIXED_TEACHERS else beta,
            rank=max(1, round(d_model * self.rank_ratio)),
            predicts=self.state == "layer",
            evidence=evidence,
        )

    def get_parameter_count(self, d_model: int) -> int:
        """The map from the earlier layer, which the other states do without."""
        return d_model * (d_model + 1) if self.state == "layer" else 0

    def supports_asymmetric_alignment(self) -> bool:
        """alpha and beta weigh the two directions."""
        return True


FIXED_TEACHERS: Mapping[State, str] = {
    "ema": "the averaged weights follow by themselves",
    "evidence": "the tokens that followed elsewhere are what they are",
}


class RDrop(Consistency):
    """R-Drop: passes of the same tokens with different dropout are to predict the same (Liang et al. 2021, 2106.14448).

    L = mean CE of the passes + weight * mean over pairs of [KL(p_i || p_j) + KL(p_j || p_i)] / 2, with no gradient
    stopped. The paper adds the cross entropies of its two passes where this takes their mean, so its alpha is
    2 * weight. It doubles forward and backward; its honest rival is a batch of twice the size.
    """

    num_states: int = Field(default=2, ge=2, le=8, description="passes of each micro-batch; forward and backward each")

    @property
    def source(self) -> State:
        """Passes with different dropout."""
        return "dropout"

    @property
    def distance(self) -> Metric:
        """Of the predictions."""
        return "kl"

    @property
    def num_passes(self) -> int:
        """The option `num_states`."""
        return self.num_states

    @property
    def scores_all_passes(self) -> bool:
        """As in the paper's equation 3."""
        return True

    def create_aligner(self, d_model: int, alpha: float = 1.0, beta: float = 1.0) -> Aligner:
        """An aligner without parameters; both directions weigh the same, so only whether both are 0 counts."""
        from apt_align.aligner import Aligner

        half = float(alpha + beta > 0)
        return Aligner(self, d_model, half, half, stop_gradient=False)

    def supports_multi_state(self) -> bool:
        """Any number of passes: the mean over their pairs."""
        return True


class MeanTeacher(Consistency):
    """Mean Teacher: the averaged weights, without dropout, teach the model (Tarvainen and Valpola 2017, 1703.01780).

    L = CE + weight * D(averaged model -> model); the average gets no gradient and is kept in checkpoints, where
    ``--weights ema`` finds it. With ``weight: 0`` the weights are averaged all the same, which costs no forward pass.
    """

    decay: float = Field(default=0.999, ge=0, lt=1, description="how slowly the averaged weights follow, at the most")
    metric: Metric = Field(default="kl", description="kl of the logits, or cosine, l2 or nce of the last hidden states")

    @property
    def source(self) -> State:
        """A pass of the averaged weights."""
        return "ema"

    @property
    def distance(self) -> Metric:
        """The option `metric`."""
        return self.metric

    @property
    def average_decay(self) -> float | None:
        """The option `decay`."""
        return self.decay

    def create_aligner(self, d_model: int, alpha: float = 1.0, beta: float = 0.0) -> Aligner:
        """An aligner without parameters. There is one direction: `alpha` 0 is no loss, and `beta` has no part in it."""
        from apt_align.aligner import Aligner

        return Aligner(self, d_model, alpha, 0.0)

    def supports_asymmetric_alignment(self) -> bool:
        """One direction alone: the teacher stands still."""
        return True
