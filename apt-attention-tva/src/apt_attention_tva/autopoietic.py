"""Autopoietic attention: scores that are mixed over heads, bent by a small learned map, and cooled row by row.

Every statistic is a row's own, over the keys that its query may see. So nothing leaks from the future, padding changes
nothing, and a cached step sees what the full pass sees. Rows are computed in blocks, and while training each block is
computed again in the backward pass, so memory holds one block of scores and never T x T.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apt.layers import LayerCache
from apt.layers.heads import HeadNorm, Heads, Shape
from apt_attention_tva.costs import blocks
from apt_attention_tva.functional import broken_line, row_entropy

LINE = ("slope", "offset", "height")
"""The parameters of the learned map of scores, one number a hidden unit; without the map they are not there."""


class AutopoieticAttention(Heads):
    """Z_h = [(1 - alpha) S_h + alpha M + epsilon f(S_h)] / tau_i, then softmax over the visible keys.

    S_h = q_h k_h^T scale; M the mean of S over the heads (a fixed case of Talking-Heads, Shazeer et al. 2020,
    arXiv:2003.02436); f a two-layer ReLU map from scores to scores with `hidden` units, 0 at the start;
    tau_i = tau exp(beta (H_i - 1/2)) with H_i in [0, 1] the entropy of softmax(M_i) over the logarithm of the number of
    visible keys, and tau = 2^tanh(theta) learned: between 1/2 and 2 without a clip whose gradient dies.
    With alpha = epsilon = beta = 0 and tau = 1 it is exactly softmax attention.

    This is the predecessor's idea with row statistics in place of its whole-matrix ones; its own map, measured, was
    0.2 S_h + 0.1 M and let the future into the past. With `qk_norm` queries and keys pass an RMSNorm before they are turned.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        alpha: float,
        beta: float,
        epsilon: float,
        hidden: int,
        init_tau: float,
        qk_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__(shape, dropout)
        self.alpha, self.beta, self.epsilon, self.init_tau = alpha, beta, epsilon, init_tau
        heads, kv_heads, width = shape.num_heads, shape.num_kv_heads, shape.width
        self.qkv = nn.Linear(shape.d_model, (heads + 2 * kv_heads) * width, bias=False)
        self.out = nn.Linear(heads * width, shape.d_model, bias=False)
        self.q_norm = HeadNorm(width) if qk_norm else None
        self.k_norm = HeadNorm(width) if qk_norm else None
        self.theta = nn.Parameter(torch.empty(()))
        self.line = nn.ParameterDict({name: torch.empty(hidden) for name in LINE} if epsilon else {})
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """tau = init_tau, and f = 0 with its knots spread evenly over the usual range of scores."""
        self.theta.fill_(math.atanh(math.log2(self.init_tau)))
        if self.line:
            self.line["slope"].uniform_(-1, 1).sign_()
            self.line["offset"].uniform_(-3, 3)
            self.line["height"].zero_()

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        *,
        causal: bool = True,
        mask: Bool[Tensor, "batch kv"] | None = None,
        positions: Int[Tensor, "#batch seq"] | None = None,
        memory: Float[Tensor, "batch kv d_model"] | None = None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Attend; see `apt.layers.AttentionLayer`."""
        q, k, v = self.split(x, memory, self.qkv.weight, cache=cache)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = self.mix(q, k, v, causal=causal, mask=mask, positions=positions, cross=memory is not None, cache=cache)
        return nn.functional.linear(mixed.transpose(1, 2).flatten(2), self.out.weight)

    def attend(
        self,
        q: Float[Tensor, "batch heads seq width"],
        k: Float[Tensor, "batch kv_heads kv width"],
        v: Float[Tensor, "batch kv_heads kv width"],
        *,
        causal: bool,
        mask: Bool[Tensor, "batch kv"] | None,
        window: int | None,
    ) -> Float[Tensor, "batch heads seq width"]:
        """Mix the values block by block of queries; keys that no query of a block may see are left out."""
        seq, kv = q.shape[2], k.shape[2]
        mixed = []
        for (start, end), (first, last) in blocks(seq, kv, causal, window):
            visible = torch.ones(1, 1, end - start, last - first, dtype=torch.bool, device=q.device)
            here = kv - seq + start - first  # the key of the block's first query
            if causal:
                visible = visible.tril(here)
            if window is not None:
                visible = visible.triu(here - window + 1)
                visible = visible if causal else visible.tril(here + window - 1)
            if mask is not None:
                visible = visible & mask[:, None, None, first:last]
            arguments = (q[:, :, start:end], k[:, :, first:last], v[:, :, first:last], visible.logical_not())
            padded = mask is not None
            if (end - start) < seq and torch.is_grad_enabled():
                mixed.append(checkpoint(self._block, *arguments, padded, use_reentrant=False))
            else:
                mixed.append(self._block(*arguments, padded))
        return torch.cat(mixed, 2) if len(mixed) > 1 else mixed[0]

    def _block(self, q: Tensor, k: Tensor, v: Tensor, unseen: Tensor, padded: bool) -> Tensor:
        (batch, heads, queries, width), kv_heads = q.shape, k.shape[1]
        # A group of query heads shares one key head: their queries are stacked, and no key is copied.
        grouped = (q * self.shape.scale).reshape(batch, kv_heads, -1, width)
        scores = (grouped @ k.transpose(-2, -1)).view(batch, heads, queries, -1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = self.adjust(scores, unseen).softmax(-1)
        if padded:
            # A row that sees nothing (left padding) gets 0, not the mean of what it must not see.
            weights = weights.masked_fill(unseen, 0.0)
        weights = nn.functional.dropout(weights.to(v.dtype), self.dropout, self.training)
        return (weights.view(batch, kv_heads, -1, k.shape[2]) @ v).view(batch, heads, queries, width)

    def adjust(
        self, scores: Float[Tensor, "batch heads seq kv"], unseen: Bool[Tensor, "#batch 1 seq kv"]
    ) -> Float[Tensor, "batch heads seq kv"]:
        """Z of S, in float32 or wider; what is `unseen` gets the lowest number."""
        adjusted = scores
        mean = scores.mean(1, keepdim=True) if self.alpha or self.beta else None
        if self.line:
            units = (self.line[name].to(scores.dtype) for name in LINE)
            adjusted = broken_line(scores, *units, weight=self.epsilon, through=1 - self.alpha)
            if self.alpha and mean is not None:
                adjusted = adjusted.add_(mean, alpha=self.alpha)
        elif self.alpha and mean is not None:
            adjusted = torch.lerp(adjusted, mean, self.alpha)
        coolness = torch.exp2(-self.theta.to(scores.dtype).tanh())
        if self.beta and mean is not None:
            coolness = coolness * torch.exp(self.beta * (0.5 - row_entropy(mean, unseen)))
        return (adjusted * coolness).masked_fill_(unseen, torch.finfo(scores.dtype).min)
