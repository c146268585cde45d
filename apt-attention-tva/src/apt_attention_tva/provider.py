"""What this package offers: `tva_default` and `autopoietic` attention. Importing it needs no PyTorch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from apt.core.providers import AttentionProvider
from apt.errors import Fault, OptionsError
from apt_attention_tva.costs import BLOCK, composing_pays, visited_scores

if TYPE_CHECKING:
    from apt_attention_tva.autopoietic import AutopoieticAttention
    from apt_attention_tva.tva import TriVeinAttention


class _Heads(AttentionProvider):
    """The options that both attentions share."""

    num_kv_heads: int | None = Field(
        default=None, ge=1, description="heads of keys and values, each shared by a group of query heads; none: as many"
    )
    rope_theta: float | None = Field(
        default=10_000.0, gt=1, description="base of the rotary positions; none: no positions at all"
    )

    def get_kv_heads(self, num_heads: int) -> int:
        """Heads of keys and values in a layer of `num_heads`."""
        return num_heads if self.num_kv_heads is None else self.num_kv_heads

    def get_head_width(self, d_model: int, num_heads: int) -> int:
        """d = d_model / num_heads. Raises `apt.errors.OptionsError` where the numbers of heads do not divide."""
        if d_model % num_heads:
            raise self._refuse("num_heads", f"{num_heads} heads do not divide d_model {d_model}")
        if num_heads % self.get_kv_heads(num_heads):
            raise self._refuse("num_kv_heads", f"{self.num_kv_heads} does not divide the model's {num_heads} heads")
        return d_model // num_heads

    def _refuse(self, option: str, what: str, hint: str = "") -> OptionsError:
        where = "model" if option == "num_heads" else "model.attention"
        return OptionsError(self.kind, self.get_name(), [Fault(f"{where}.{option}", what, hint)])


class TVA(_Heads):
    """Tri-Vein Attention: heads of rank r behind one learned projector, with a cache of rank width.

    Without the compensator (`s: 0`) it can express exactly what attention with heads of width r can.
    """

    r: int = Field(
        default=4, ge=1, description="compression ratio: rank = head width // r, at least 2, rounded up to even"
    )
    rank: int | None = Field(default=None, ge=1, description="the rank itself, in place of r")
    per_head: bool = Field(default=False, description="a projector for each key-value head, not one for the layer")
    scale: Literal["rank", "head"] = Field(
        default="rank", description="scores over sqrt(rank), or over sqrt(head width) as a converted model needs it"
    )
    s: int = Field(default=0, ge=0, description="normals of the compensator; 0: no compensator")
    tau: float = Field(default=0.18, ge=0, le=1, description="lost share of energy above which a state is compensated")
    subspace_loss: float = Field(
        default=0.01,
        gt=0,
        description="weight of the loss that keeps the compensator's projector at the principal subspace",
    )

    def get_rank(self, d_model: int, num_heads: int) -> int:
        """The width of queries, keys and values. Raises `apt.errors.OptionsError` where it does not fit the heads."""
        width = self.get_head_width(d_model, num_heads)
        rank = self.rank
        if rank is None:
            rank = max(2, width // self.r)
            rank += rank % 2
        if rank > width:
            raise self._refuse("rank", f"rank {rank} exceeds the head width {width}", f"at most {width - width % 2}")
        if rank % 2 and self.rope_theta is not None:
            raise self._refuse(
                "rank", f"rotary positions turn pairs, and {rank} is odd", f"{rank + 1}, or rope_theta: null"
            )
        return rank

    def create_layer(self, d_model: int, num_heads: int, dropout: float = 0.0) -> TriVeinAttention:
        """A layer of this width."""
        from apt.layers.heads import Shape
        from apt_attention_tva.compensator import Compensator
        from apt_attention_tva.tva import TriVeinAttention

        rank, width = self.get_rank(d_model, num_heads), self.get_head_width(d_model, num_heads)
        scale = 1 / math.sqrt(rank if self.scale == "rank" else width)
        shape = Shape(d_model, num_heads, self.get_kv_heads(num_heads), width, scale, self.rope_theta)
        compensator = (
            Compensator(d_model, self.get_subspace_rank(d_model), self.s, self.tau, self.subspace_loss)
            if self.s
            else None
        )
        return TriVeinAttention(shape, rank, self.per_head, compensator, dropout)

    def get_subspace_rank(self, d_model: int) -> int:
        """The rank of the compensator's projector: d_model // r, at least 1."""
        return max(1, d_model // self.r)

    def get_parameter_count(self, d_model: int, num_heads: int) -> int:
        """Trainable parameters of one layer, exactly."""
        width, rank = self.get_head_width(d_model, num_heads), self.get_rank(d_model, num_heads)
        kv_heads = self.get_kv_heads(num_heads)
        projections = 2 * d_model * width * (num_heads + kv_heads)
        projectors = 2 * rank * width * (kv_heads if self.per_head else 1)
        compensator = d_model * self.get_subspace_rank(d_model) + self.s * (3 * d_model + 1) if self.s else 0
        return projections + projectors + compensator

    def get_flops_estimate(self, seq_len: int, d_model: int, num_heads: int) -> int:
        """Floating-point operations of one forward pass over one sequence, the causal half not deducted."""
        width, rank = self.get_head_width(d_model, num_heads), self.get_rank(d_model, num_heads)
        heads = 2 * (num_heads + self.get_kv_heads(num_heads))  # those of q, k, v and of the output
        if composing_pays(seq_len, d_model, width, rank):
            projections = heads * rank * d_model * (width + seq_len)
        else:
            projections = heads * width * seq_len * (d_model + rank)
        compensator = seq_len * d_model * (2 * self.get_subspace_rank(d_model) + 3 * self.s) if self.s else 0
        return 2 * (projections + 2 * num_heads * rank * seq_len**2 + compensator)

    def get_memory_estimate(self, seq_len: int, d_model: int, num_heads: int, batch_size: int = 1) -> int:
        """Bytes that one float32 training forward keeps for the backward pass, without a mask or dropout.

        Per token: the input, narrow q, k, v before and after turning, the mixed values, a number a head of the fused
        kernel; wide heads only where composing does not pay. Beside them the composed weights, and the angles.
        """
        width, rank = self.get_head_width(d_model, num_heads), self.get_rank(d_model, num_heads)
        kv_heads, tokens = self.get_kv_heads(num_heads), batch_size * seq_len
        inward, turns = num_heads + 2 * kv_heads, self.rope_theta is not None
        numbers = tokens * (d_model + num_heads) + (2 * seq_len * rank if turns else 0)
        if composing_pays(tokens, d_model, width, rank):
            heads = inward + num_heads + (2 * num_heads + kv_heads if turns else 0)
            numbers += tokens * heads * rank + (inward + num_heads) * rank * d_model
        else:
            numbers += tokens * (inward + num_heads) * (rank + width)
            numbers += batch_size * (inward + num_heads) * rank * width if self.per_head else 0
        if self.s:
            numbers += tokens * (2 * d_model + self.get_subspace_rank(d_model) + 4 * self.s + 5)
        return 4 * numbers

    def get_cache_size(self, d_model: int, num_heads: int) -> int:
        """2 H_kv r numbers a token."""
        return 2 * self.get_kv_heads(num_heads) * self.get_rank(d_model, num_heads)


class Autopoietic(_Heads):
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

    def get_head_width(self, d_model: int, num_heads: int) -> int:
        """d = d_model / num_heads, even where positions turn. Raises `apt.errors.OptionsError` where it is not."""
        width = super().get_head_width(d_model, num_heads)
        if width % 2 and self.rope_theta is not None:
            what = f"rotary positions turn pairs, and heads of width {width} are odd"
            raise self._refuse("num_heads", what, "another number of heads, or rope_theta: null")
        return width

    def get_hidden_width(self, d_model: int) -> int:
        """Hidden units of the learned map: max(16, d_model // sr_ratio), none where epsilon is 0."""
        return max(16, d_model // self.sr_ratio) if self.epsilon else 0

    def create_layer(self, d_model: int, num_heads: int, dropout: float = 0.0) -> AutopoieticAttention:
        """A layer of this width."""
        from apt.layers.heads import Shape
        from apt_attention_tva.autopoietic import AutopoieticAttention

        width = self.get_head_width(d_model, num_heads)
        shape = Shape(d_model, num_heads, self.get_kv_heads(num_heads), width, 1 / math.sqrt(width), self.rope_theta)
        return AutopoieticAttention(
            shape, self.alpha, self.beta, self.epsilon, self.get_hidden_width(d_model), self.init_tau, dropout
        )

    def get_parameter_count(self, d_model: int, num_heads: int) -> int:
        """Trainable parameters of one layer, exactly."""
        width = self.get_head_width(d_model, num_heads)
        projections = 2 * d_model * width * (num_heads + self.get_kv_heads(num_heads))
        return projections + 3 * self.get_hidden_width(d_model) + 1

    def get_flops_estimate(self, seq_len: int, d_model: int, num_heads: int) -> int:
        """Floating-point operations of the matrix products of one forward pass over one sequence.

        Keys behind a block of queries are not computed, so here a part of the causal half is deducted.
        """
        width = self.get_head_width(d_model, num_heads)
        projections = 2 * seq_len * d_model * width * (num_heads + self.get_kv_heads(num_heads))
        return 2 * (projections + 2 * d_model * visited_scores(seq_len))

    def get_memory_estimate(self, seq_len: int, d_model: int, num_heads: int, batch_size: int = 1) -> int:
        """Bytes that one float32 training forward keeps for the backward pass, without a mask or dropout.

        One block of queries keeps its scores at each stage; several are computed again and keep q, k, v alone.
        """
        width, kv_heads = self.get_head_width(d_model, num_heads), self.get_kv_heads(num_heads)
        tokens, turns = batch_size * seq_len, self.rope_theta is not None
        numbers = tokens * (d_model + num_heads * width) + (2 * seq_len * width if turns else 0)
        if seq_len > BLOCK:
            heads = num_heads + 2 * kv_heads + (num_heads + kv_heads if turns else 0)
            return 4 * (numbers + tokens * heads * width) + visited_scores(seq_len)
        stages = num_heads * (6 if self.epsilon else 2) + (3 if self.beta else 0)
        # Several key-value heads are copied for the product; a single one is a view of all that is projected.
        heads = num_heads + (2 * kv_heads if kv_heads > 1 else num_heads + 2 + turns)
        return 4 * (numbers + tokens * heads * width + tokens * seq_len * stages) + seq_len**2

    def get_cache_size(self, d_model: int, num_heads: int) -> int:
        """2 H_kv d numbers a token."""
        return 2 * self.get_kv_heads(num_heads) * self.get_head_width(d_model, num_heads)
