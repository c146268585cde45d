"""Tri-Vein Attention: queries, keys and values pass through one learned projector, and attention happens in its rank.

The projectors stand next to linear maps on both sides, so they are never applied to wide heads where that is slower:
P is multiplied into W_q, W_k, W_v and U into W_o, at each step while training (the gradient reaches all four) and once
for all by `fold`. Keys and values are only ever r wide, in memory and in the cache.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apt.layers import LayerCache, Part
from apt.layers.heads import Heads, Shape
from apt_attention_tva.compensator import Compensator
from apt_attention_tva.costs import composing_pays
from apt_attention_tva.functional import compose_down, compose_up, orthonormal


class VeinHeads(Heads):
    """Narrow heads, with a compensator beside them or none."""

    def __init__(self, shape: Shape, compensator: Compensator | None, dropout: float) -> None:
        super().__init__(shape, dropout)
        self.compensator = compensator

    def finish(
        self, mixed: Tensor, outward: Tensor, x: Tensor, mask: Tensor | None, memory: Tensor | None
    ) -> Tensor | Part:
        """The output of mixed values [batch, heads, seq, width], with what the compensator adds for the states `x`."""
        y = nn.functional.linear(mixed.transpose(1, 2).flatten(2), outward)
        if self.compensator is None:
            return y
        # The mask covers the cached keys too, and the tokens at hand are its last ones; across, it is the memory's.
        counted = None if mask is None or memory is not None else mask[:, -x.shape[1] :]
        correction, losses, metrics = self.compensator(x, counted)
        return Part(y + correction, losses, metrics)


class NarrowAttention(VeinHeads):
    """Plain attention with heads of width r in a model of width D, what `TriVeinAttention.fold` returns.

    `inward` [(H + 2 H_kv) r, D] holds the queries', keys' and values' weights in this order, `outward` [D, H r].
    """

    def __init__(
        self, shape: Shape, inward: Tensor, outward: Tensor, compensator: Compensator | None, dropout: float
    ) -> None:
        super().__init__(shape, compensator, dropout)
        self.inward, self.outward = nn.Parameter(inward), nn.Parameter(outward)

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
        q, k, v = self.split(x, memory, self.inward)
        mixed = self.mix(q, k, v, causal=causal, mask=mask, positions=positions, cross=memory is not None, cache=cache)
        return self.finish(mixed, self.outward, x, mask, memory)


class TriVeinAttention(VeinHeads):
    """A = softmax(q~ k~^T scale + mask), y = U (A v~), out = W_o concat(y); q~ = P q, k~ = P k, v~ = P v, per head.

    `down` P and `up` U [n, r, d], [n, d, r] are one pair (n = 1) or one for each key-value head, orthonormal and
    transposed to one another at the start and free afterwards: tying them would remove nothing from the function and
    put a constraint on the optimizer. Rotary positions turn q~ and k~. With P = U = I it is scaled dot-product
    attention. Without the compensator its functions are exactly those of attention with heads of width r
    (Bhojanapalli et al. 2020, arXiv:2002.07028, is the argument against narrow heads); what it has for itself is the
    cache of 2 H_kv r numbers a token and the conversion of trained models. A relative of multi-head latent attention
    (DeepSeek-V2, arXiv:2405.04434), which shares one latent among all heads.
    """

    def __init__(
        self, shape: Shape, rank: int, per_head: bool, compensator: Compensator | None, dropout: float
    ) -> None:
        super().__init__(shape.narrowed(rank), compensator, dropout)
        d_model, heads, kv_heads, d_head = shape.d_model, shape.num_heads, shape.num_kv_heads, shape.width
        self.rank, self.d_head = rank, d_head
        self.qkv = nn.Linear(d_model, (heads + 2 * kv_heads) * d_head, bias=False)
        self.out = nn.Linear(heads * d_head, d_model, bias=False)
        pairs = kv_heads if per_head else 1
        self.down = nn.Parameter(torch.empty(pairs, rank, d_head))
        self.up = nn.Parameter(torch.empty(pairs, d_head, rank))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthonormal projectors, U = P^T."""
        self.down.copy_(orthonormal(*self.down.shape))
        self.up.copy_(self.down.transpose(-2, -1))

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
            q, k, v = self.split(x, memory, compose_down(self.qkv.weight, self._down_of_each()))
        else:
            q, k, v = self.split(x, memory, self.qkv.weight)
            q, k, v = (heads @ down.transpose(-2, -1) for heads, down in zip((q, k, v), self._downs(), strict=True))
        mixed = self.mix(q, k, v, causal=causal, mask=mask, positions=positions, cross=memory is not None, cache=cache)
        up = self._of_queries(self.up)
        outward = compose_up(self.out.weight, up) if composed else self.out.weight
        if not composed:
            mixed = mixed @ up.transpose(-2, -1)
        return self.finish(mixed, outward, x, mask, memory)

    @torch.no_grad()
    def fold(self) -> NarrowAttention:
        """The same function as plain attention with heads of width r, for inference; it shares the compensator.

        Outputs agree to rounding. P goes into W_q, W_k, W_v and U into W_o; nothing but positions stands between.
        """
        folded = NarrowAttention(
            self.shape,
            compose_down(self.qkv.weight, self._down_of_each()),
            compose_up(self.out.weight, self._of_queries(self.up)),
            self.compensator,
            self.dropout,
        )
        return folded.train(self.training)

    def _composes(self, x: Tensor, memory: Tensor | None) -> bool:
        tokens = x.shape[0] * x.shape[1]
        if memory is not None:
            tokens = max(tokens, memory.shape[0] * memory.shape[1])
        return composing_pays(tokens, self.shape.d_model, self.d_head, self.rank)

    def _of_queries(self, projector: Tensor) -> Tensor:
        """A projector for each query head (or the one for all)."""
        if projector.shape[0] == 1:
            return projector
        return projector.repeat_interleave(self.shape.num_heads // self.shape.num_kv_heads, 0)

    def _downs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._of_queries(self.down), self.down, self.down

    def _down_of_each(self) -> Tensor:
        return self.down if self.down.shape[0] == 1 else torch.cat(self._downs())
