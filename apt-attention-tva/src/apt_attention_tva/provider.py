"""What this package offers: `tva_default` and `autopoietic` attention. Importing it needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from apt.core.providers import HeadsProvider, SizedHeadsProvider
from apt_attention_tva.costs import BLOCK, composing_pays, visited_scores

if TYPE_CHECKING:
    from apt_attention_tva.autopoietic import AutopoieticAttention
    from apt_attention_tva.tva import TriVeinAttention


class TVA(SizedHeadsProvider):
    """Tri-Vein Attention: heads of rank r behind one learned projector, with a cache of rank width.

    Without the compensator (`s: 0`) it can express exactly what attention with heads of width r can.
    """

    sound: ClassVar[Mapping[str, tuple[float, float, str]]] = {
        "tva_compensated_share": (
            *(0.01, 0.9),
            "the compensator is for the few states that a subspace loses; near 0 it does nothing, near 1 it is an ordinary "
            "low-rank layer; change tau, or r, which sets the subspace's rank",
        )
    }

    r: int = Field(
        default=4, ge=1, description="compression ratio: rank = head width // r, at least 2, rounded up to even"
    )
    rank: int | None = Field(default=None, ge=1, description="the rank itself, in place of r")
    per_head: bool = Field(default=False, description="a projector for each key-value head, not one for the layer")
    scale: Literal["rank", "head"] = Field(
        default="rank", description="scores over sqrt(rank), or over sqrt(head width) as a converted model needs it"
    )
    project: Literal["first", "last"] = Field(
        default="first",
        description="queries and keys are projected before norm and positions, or, as a converted model needs it, after",
    )
    s: int = Field(default=0, ge=0, description="normals of the compensator; 0: no compensator")
    tau: float = Field(default=0.18, ge=0, le=1, description="lost share of energy above which a state is compensated")
    subspace_loss: float = Field(
        default=0.01,
        gt=0,
        description="weight of the loss that keeps the compensator's projector at the principal subspace",
    )

    def turns_whole_heads(self) -> bool:
        """Where queries and keys are projected after they are turned; else the rank must be even."""
        return super().turns_whole_heads() and self.project == "last"

    def get_rank(self, d_model: int, num_heads: int) -> int:
        """The width of queries, keys and values. Raises `apt.errors.OptionsError` where it does not fit the heads."""
        width = self.get_head_width(d_model, num_heads)
        rank = self.rank
        if rank is None:
            rank = max(2, width // self.r)
            rank += rank % 2
        if rank > width:
            raise self.refuse("rank", f"rank {rank} exceeds the head width {width}", f"at most {width - width % 2}")
        if rank % 2 and self.positions == "rope" and self.project == "first":
            raise self.refuse(
                "rank", f"rotary positions turn pairs, and {rank} is odd", f"{rank + 1}, or positions: none"
            )
        return rank

    def create_layer(self, d_model: int, num_heads: int, dropout: float = 0.0) -> TriVeinAttention:
        """A layer of this width. Raises `apt.errors.OptionsError` where the sizes do not fit."""
        from apt.layers.heads import Shape
        from apt_attention_tva.compensator import Compensator
        from apt_attention_tva.tva import Between, TriVeinAttention

        rank, width = self.get_rank(d_model, num_heads), self.get_head_width(d_model, num_heads)
        scale = 1 / math.sqrt(rank if self.scale == "rank" else width)
        theta = self.rope_theta if self.positions == "rope" else None
        kv_heads = self.get_kv_heads(num_heads)
        shape = Shape(d_model, num_heads, kv_heads, width, scale, theta, self.rope_scaling, self.window)
        compensator = (
            Compensator(d_model, self.get_subspace_rank(d_model), self.s, self.tau, self.subspace_loss)
            if self.s
            else None
        )
        late = self.project == "last"
        between = Between.make((width if late else rank) if self.qk_norm else None, compensator)
        return TriVeinAttention(shape, rank, self.per_head, late, self.bias, between, dropout)

    def depends_on_distances_alone(self) -> bool:
        """Not where queries and keys are projected after they are turned: projector and turns do not commute."""
        return not self.turns_whole_heads()

    def get_subspace_rank(self, d_model: int) -> int:
        """The rank of the compensator's projector: d_model // r, at least 1."""
        return max(1, d_model // self.r)

    def get_parameter_count(self, d_model: int, num_heads: int) -> int:
        """Trainable parameters of one layer, exactly."""
        width, rank = self.get_head_width(d_model, num_heads), self.get_rank(d_model, num_heads)
        kv_heads = self.get_kv_heads(num_heads)
        projections = 2 * d_model * width * (num_heads + kv_heads)
        projections += (num_heads + 2 * kv_heads) * width * (self.bias != "none") + d_model * (self.bias == "all")
        projectors = 2 * rank * width * (kv_heads if self.per_head else 1)
        norms = 2 * (width if self.project == "last" else rank) * self.qk_norm
        compensator = d_model * self.get_subspace_rank(d_model) + self.s * (3 * d_model + 1) if self.s else 0
        return projections + projectors + norms + compensator

    def get_flops_estimate(self, seq_len: int, d_model: int, num_heads: int) -> int:
        """Floating-point operations of one forward pass over one sequence, the causal half not deducted."""
        width, rank = self.get_head_width(d_model, num_heads), self.get_rank(d_model, num_heads)
        heads = num_heads + self.get_kv_heads(num_heads)  # those of q and k, and as many of v and the output
        separate = width * seq_len * (d_model + rank)
        pays = composing_pays(seq_len, d_model, width, rank)
        composed = rank * d_model * (width + seq_len) if pays else separate
        projections = heads * (composed + (separate if self.project == "last" else composed))
        compensator = seq_len * d_model * (2 * self.get_subspace_rank(d_model) + 3 * self.s) if self.s else 0
        return 2 * (projections + 2 * num_heads * rank * seq_len**2 + compensator)

    def get_memory_estimate(self, seq_len: int, d_model: int, num_heads: int, batch_size: int = 1) -> int:
        """Bytes that one float32 training forward keeps for the backward pass, without a padding mask or dropout.

        Per token: the input; queries, keys and values as they are projected, normed, turned and meet; the mixed values; a
        number a head of the fused kernel. Wide heads where composing does not pay, and of queries and keys where they are
        projected last. Beside them the composed weights, the angles, and a window's mask.
        """
        width, rank = self.get_head_width(d_model, num_heads), self.get_rank(d_model, num_heads)
        kv_heads, tokens = self.get_kv_heads(num_heads), batch_size * seq_len
        turned, turns, late = num_heads + kv_heads, self.positions == "rope", self.project == "last"
        inner = width if late else rank  # of queries and keys when they are normed and turned
        changed = turns or self.qk_norm
        numbers = d_model + num_heads + turned * inner * changed + turned * (inner + 1) * self.qk_norm
        fixed = seq_len * inner * turns
        if late:
            numbers += turned * rank
        projectors = 0
        if composing_pays(tokens, d_model, width, rank):
            inward = turned * inner + kv_heads * rank
            numbers += inward + num_heads * rank * (1 + (changed or late)) + turned * width * (late and not changed)
            fixed += (inward + num_heads * rank) * d_model
            projectors += kv_heads + num_heads + turned * (not late)
        else:
            wide = kv_heads + turned * (not (late and turns)) + (turned + kv_heads) * (late and self.qk_norm)
            numbers += wide * width + kv_heads * rank + num_heads * (rank + width)
            numbers += turned * rank * (not late and (self.qk_norm or not turns))
            projectors += batch_size * (num_heads + kv_heads + turned * (not late))
        projectors += batch_size * turned * late
        fixed += rank * width * projectors * self.per_head
        if self.s:
            numbers += 2 * d_model + self.get_subspace_rank(d_model) + 4 * self.s + 5
        if self.window is not None and self.window < seq_len:
            fixed += seq_len**2
        return 4 * (tokens * numbers + fixed)

    def get_cache_size(self, d_model: int, num_heads: int) -> int:
        """2 H_kv r numbers a token."""
        return 2 * self.get_kv_heads(num_heads) * self.get_rank(d_model, num_heads)


class Autopoietic(HeadsProvider):
    """Attention whose scores are mixed over heads (alpha), bent by a small learned map (epsilon, sr_ratio), and divided
    by a learned temperature (init_tau) that follows each row's entropy (beta).

    With epsilon, alpha and beta 0 and init_tau 1 it starts as ordinary attention.
    """

    epsilon: float = Field(default=0.08, ge=0, le=1, description="weight of the learned map of scores")
    alpha: float = Field(default=0.0008, ge=0, le=1, description="share of the heads' mean score in each head's")
    beta: float = Field(default=0.003, ge=0, le=1, description="how far the temperature follows a row's entropy")
    sr_ratio: int = Field(
        default=6, ge=1, description="hidden units of the learned map: d_model // sr_ratio, at least 16"
    )
    init_tau: float = Field(default=1.3, gt=0.5, lt=2, description="the temperature that training starts with")
    qk_norm: bool = Field(default=False, description="an RMSNorm of each query and key, over its head's width")

    def get_hidden_width(self, d_model: int) -> int:
        """Hidden units of the learned map: max(16, d_model // sr_ratio), none where epsilon is 0."""
        return max(16, d_model // self.sr_ratio) if self.epsilon else 0

    def create_layer(self, d_model: int, num_heads: int, dropout: float = 0.0) -> AutopoieticAttention:
        """A layer of this width."""
        from apt.layers.heads import Shape
        from apt_attention_tva.autopoietic import AutopoieticAttention

        width = self.get_head_width(d_model, num_heads)
        theta = self.rope_theta if self.positions == "rope" else None
        kv_heads = self.get_kv_heads(num_heads)
        shape = Shape(d_model, num_heads, kv_heads, width, width**-0.5, theta, self.rope_scaling, self.window)
        return AutopoieticAttention(
            shape,
            alpha=self.alpha,
            beta=self.beta,
            epsilon=self.epsilon,
            hidden=self.get_hidden_width(d_model),
            init_tau=self.init_tau,
            qk_norm=self.qk_norm,
            dropout=dropout,
        )

    def get_parameter_count(self, d_model: int, num_heads: int) -> int:
        """Trainable parameters of one layer, exactly."""
        width = self.get_head_width(d_model, num_heads)
        projections = 2 * d_model * width * (num_heads + self.get_kv_heads(num_heads))
        return projections + 3 * self.get_hidden_width(d_model) + 1 + 2 * width * self.qk_norm

    def get_flops_estimate(self, seq_len: int, d_model: int, num_heads: int) -> int:
        """Floating-point operations of the matrix products of one forward pass over one sequence.

        Keys behind a block of queries, or before its window, are not computed, so these are deducted here.
        """
        width = self.get_head_width(d_model, num_heads)
        projections = 2 * seq_len * d_model * width * (num_heads + self.get_kv_heads(num_heads))
        return 2 * (projections + 2 * d_model * visited_scores(seq_len, self.window))

    def get_memory_estimate(self, seq_len: int, d_model: int, num_heads: int, batch_size: int = 1) -> int:
        """Bytes that one float32 training forward keeps for the backward pass, without a mask or dropout.

        One block of queries keeps its scores at each stage; several are computed again and keep q, k, v alone.
        """
        width, kv_heads = self.get_head_width(d_model, num_heads), self.get_kv_heads(num_heads)
        tokens, turns = batch_size * seq_len, self.positions == "rope"
        turned, inward = num_heads + kv_heads, num_heads + 2 * kv_heads
        numbers = tokens * (d_model + num_heads * width) + (2 * seq_len * width if turns else 0)
        numbers += tokens * turned * (width + 1) * self.qk_norm
        if seq_len > BLOCK:
            heads = inward + (turned if turns or self.qk_norm else 0)
            return 4 * (numbers + tokens * heads * width) + visited_scores(seq_len, self.window)
        stages = num_heads * (4 if self.epsilon else 2) + (3 if self.beta else 0)
        # Several key-value heads are copied for the product; a single one is a view of all that is projected.
        heads = num_heads + (2 * kv_heads + inward * self.qk_norm if kv_heads > 1 else num_heads + 2 + turns)
        return 4 * (numbers + tokens * heads * width + tokens * seq_len * stages) + seq_len**2

    def get_cache_size(self, d_model: int, num_heads: int) -> int:
        """2 H_kv d numbers a token."""
        return 2 * self.get_kv_heads(num_heads) * self.get_head_width(d_model, num_heads)
