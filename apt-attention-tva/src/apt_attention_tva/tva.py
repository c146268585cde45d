"""Tri-Vein Attention: queries, keys and values pass through one learned projector, and attention happens in its rank.

The projectors stand next to linear maps, so they are never applied to wide heads where that is slower: P is multiplied
into W_q, W_k, W_v and U into W_o, at each step while training (the gradient reaches all four) and once for all by `fold`.
Keys and values are only ever r wide in the cache. Where queries and keys are projected last, after norm and
positions, as a converted model needs it, this holds for values alone: positions do not commute with P.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apt.layers import LayerCache, Part
from apt.layers.heads import HeadNorm, Heads, Shape
from apt_attention_tva.compensator import Compensator
from apt_attention_tva.costs import composing_pays
from apt_attention_tva.functional import compose_down, compose_up, orthonormal


@dataclass(frozen=True)
class Between:
    """What stands between the products and is not folded: the norms of queries and keys, and the compensator."""

    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    compensator: Compensator | None = None

    @classmethod
    def make(cls, norm_width: int | None, compensator: Compensator | None) -> Between:
        """Norms of this width (none: no norms)."""
        if norm_width is None:
            return cls(compensator=compensator)
        return cls(HeadNorm(norm_width), HeadNorm(norm_width), compensator)


class VeinHeads(Heads):
    """Heads that meet at rank r; `shape` is that of the narrow heads.

    Where `late`, queries and keys come in full width and are projected by `down` [n, r, d] after norm and positions.
    """

    down: nn.Parameter

    def __init__(self, shape: Shape, late: bool, between: Between, dropout: float) -> None:
        super().__init__(shape, dropout)
        self.late = late
        self.q_norm, self.k_norm = between.q_norm, between.k_norm
        self.compensator = between.compensator

    def meet(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        mask: Tensor | None,
        positions: Tensor | None,
        cross: bool,
        cache: LayerCache | None,
    ) -> Float[Tensor, "batch heads seq rank"]:
        """Values [batch, kv_heads, kv, r] mixed by the scores of queries and keys, normed where that is an option."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cross:
            q, k = self._project_late(q, k)  # there are no positions to wait for
        return self.mix(q, k, v, causal=causal, mask=mask, positions=positions, cross=cross, cache=cache)

    def turn(self, q: Tensor, k: Tensor, positions: Tensor | None, read: int | None) -> tuple[Tensor, Tensor]:
        """As for all heads, and then projected where that comes last."""
        return self._project_late(*super().turn(q, k, positions, read))

    def _project_late(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (project(q, self.of_queries(self.down)), project(k, self.down)) if self.late else (q, k)

    def of_queries(self, projector: Tensor) -> Tensor:
        """A projector for each query head (or the one for all)."""
        if projector.shape[0] == 1:
            return projector
        return projector.repeat_interleave(self.shape.num_heads // self.shape.num_kv_heads, 0)

    def add_correction(self, y: Tensor, x: Tensor, mask: Tensor | None, memory: Tensor | None) -> Tensor | Part:
        """The output `y`, with what the compensator adds for the states `x`."""
        if self.compensator is None:
            return y
        # The mask covers the cached keys too, and the tokens at hand are its last ones; across, it is the memory's.
        counted = None if mask is None or memory is not None else mask[:, -x.shape[1] :]
        correction, losses, metrics = self.compensator(x, counted)
        return Part(y + correction, losses, metrics)


class NarrowAttention(VeinHeads):
    """Plain attention with heads of width r in a model of width D, what `TriVeinAttention.fold` returns.

    `inward` holds the queries', keys' and values' weights in this order, [(H + 2 H_kv) r, D], or
    [(H + H_kv) d + H_kv r, D] where queries and keys are projected last; `outward` is [D, H r].
    """

    def __init__(
        self, shape: Shape, inward: nn.Linear, outward: nn.Linear, late: Tensor | None, between: Between, dropout: float
    ) -> None:
        super().__init__(shape, late is not None, between, dropout)
        self.inward, self.outward = inward, outward
        if late is not None:
            self.down = nn.Parameter(late)

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        *,
        causal: bool = True,
        mask: Bool[Tensor, "batch kv"] | None = None,
        positions: Int[Tensor, "#batch seq"] | None = None,
        memory: Float[Tensor, "batch kv d_model"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq d_model"] | Part:
        """Attend; see `apt.layers.AttentionLayer`."""
        if memory is None:
            # The module is called, so that one of eight bits may stand in for it.
            q, k, v = self.divide(self.inward(x), self.shape.width)
        else:
            q, k, v = self.split(x, memory, self.inward.weight, self.inward.bias, self.shape.width, cache)
        cross = memory is not None
        mixed = self.meet(q, k, v, causal=causal, mask=mask, positions=positions, cross=cross, cache=cache)
        return self.add_correction(self.outward(mixed.transpose(1, 2).flatten(2)), x, mask, memory)


class TriVeinAttention(VeinHeads):
    """A = softmax(q~ k~^T scale + mask), y = U (A v~), out = W_o concat(y); q~ = P q, k~ = P k, v~ = P v, per head.

    `down` P and `up` U [n, r, d], [n, d, r] are one pair (n = 1) or one for each key-value head, orthonormal and
    transposed to one another at the start and free afterwards: tying them would remove nothing from the function and
    put a constraint on the optimizer. Norms (`between`) and rotary positions act on q~ and k~, so scores depend on
    distances alone. With P = U = I it is scaled dot-product attention. Without the compensator its functions are exactly
    those of attention with heads of width r (Bhojanapalli et al. 2020, arXiv:2002.07028, is the argument against narrow
    heads); what it has for itself is the cache of 2 H_kv r numbers a token and the conversion of trained models. A relative
    of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), which shares one latent among all heads.

    Where `late`, norm and positions act on q and k, and P follows: q~_i . k~_j = (P R_i q)^T (P R_j k). That is what a
    trained model of full heads becomes when its turned queries and keys are projected (Eigen Attention, Saxena et al.
    2024, arXiv:2408.05646); the cache is as small, but P no longer folds into W_q and W_k, and scores depend on more than
    distances as far as P and the turns R do not commute.
    """

    def __init__(
        self, shape: Shape, rank: int, per_head: bool, late: bool, bias: str, between: Between, dropout: float
    ) -> None:
        super().__init__(shape.narrowed(rank), late, between, dropout)
        d_model, heads, kv_heads, d_head = shape.d_model, shape.num_heads, shape.num_kv_heads, shape.width
        self.rank, self.d_head = rank, d_head
        self.qkv = nn.Linear(d_model, (heads + 2 * kv_heads) * d_head, bias=bias != "none")
        self.out = nn.Linear(heads * d_head, d_model, bias=bias == "all")
        pairs = kv_heads if per_head else 1
        self.down = nn.Parameter(torch.empty(pairs, rank, d_head))
        self.up = nn.Parameter(torch.empty(pairs, d_head, rank))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthonormal projectors, U = P^T; W_o such that W_o U starts as the output weights of heads of width r would."""
        self.down.copy_(orthonormal(*self.down.shape))
        self.up.copy_(self.down.transpose(-2, -1))
        self.out.reset_parameters()
        self.out.weight.mul_((self.d_head / self.rank) ** 0.5)

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        *,
        causal: bool = True,
        mask: Bool[Tensor, "batch kv"] | None = None,
        positions: Int[Tensor, "#batch seq"] | None = None,
        memory: Float[Tensor, "batch kv d_model"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq d_model"] | Part:
        """Attend; see `apt.layers.AttentionLayer`."""
        composed = self._composes(x, memory)
        if composed:
            weight, bias = self._compose_inward()
            q, k, v = self.split(x, memory, weight, bias, self.rank, cache)
        else:
            q, k, v = self.split(x, memory, self.qkv.weight, self.qkv.bias, cache=cache)
            v = project(v, self.down)
            if not self.late:
                q, k = project(q, self.of_queries(self.down)), project(k, self.down)
        cross = memory is not None
        mixed = self.meet(q, k, v, causal=causal, mask=mask, positions=positions, cross=cross, cache=cache)
        up = self.of_queries(self.up)
        if not composed:
            mixed = project(mixed, up)
        outward = compose_up(self.out.weight, up) if composed else self.out.weight
        y = nn.functional.linear(mixed.transpose(1, 2).flatten(2), outward, self.out.bias)
        return self.add_correction(y, x, mask, memory)

    @torch.no_grad()
    def fold(self) -> NarrowAttention:
        """The same function as plain attention with heads of width r, for inference; it shares norms and compensator.

        Outputs agree to rounding. P goes into W_q, W_k, W_v and U into W_o, since nothing but these products stands
        between; where queries and keys are projected last, P goes into W_v alone.
        """
        folded = NarrowAttention(
            self.shape,
            _linear(*self._compose_inward()),
            _linear(compose_up(self.out.weight, self.of_queries(self.up)), self.out.bias),
            self.down.clone() if self.late else None,
            Between(self.q_norm, self.k_norm, self.compensator),
            self.dropout,
        )
        return folded.train(self.training)

    def _composes(self, x: Tensor, memory: Tensor | None) -> bool:
        tokens = x.shape[0] * x.shape[1]
        if memory is not None:
            tokens = max(tokens, memory.shape[0] * memory.shape[1])
        return composing_pays(tokens, self.shape.d_model, self.d_head, self.rank)

    def _compose_inward(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of narrow queries, keys and values; of narrow values where the others are projected last."""
        if self.late:
            turned = (self.shape.num_heads + self.shape.num_kv_heads) * self.d_head
            sizes = [turned, self.qkv.weight.shape[0] - turned]
            return self._of_inward(lambda all_of_it: _but_last(all_of_it, sizes, self.down))
        down = self.down
        of_each = down if down.shape[0] == 1 else torch.cat((self.of_queries(down), down, down))
        return self._of_inward(lambda all_of_it: compose_down(all_of_it, of_each))

    def _of_inward(self, compose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.qkv.weight, self.qkv.bias
        return compose(weight), None if bias is None else compose(bias.unsqueeze(1)).squeeze(1)


def project(
    heads: Float[Tensor, "batch heads seq from"], projector: Float[Tensor, "n to from"]
) -> Float[Tensor, "batch heads seq to"]:
    """Each head by its projector, or all by one."""
    if projector.shape[0] == 1:
        return nn.functional.linear(heads, projector[0])
    return heads @ projector.transpose(-2, -1)


def _but_last(weight: Tensor, sizes: list[int], down: Tensor) -> Tensor:
    wide, values = torch.split(weight, sizes)
    return torch.cat((wide, compose_down(values, down)))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of these, without drawing any numbers."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer
