"""How passages enter the hidden states: as a gated mean, or as positions of their own.

Causality is the caller's to keep: passages that are given to a token must have been retrieved by what came before it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

WIDTH = 512
"""The width that passages' vectors are folded to before they are projected."""


def fold(vectors: Float[Tensor, "*some features"], width: int = WIDTH) -> Float[Tensor, "*some width"]:
    """Vectors hashed once more, to `width` cells: cells that agree modulo `width` are added.

    Signed hashing makes that another feature hashing of the same text (Weinberger et al. 2009, arXiv:0902.2206), so
    inner products are kept in the mean. `width` divides `features`, or is larger and changes nothing.
    """
    if vectors.shape[-1] <= width:
        return vectors
    return vectors.reshape(*vectors.shape[:-1], -1, width).sum(-2)


class Fusion(nn.Module):
    """The parameters of fusing: a projection from passages' vectors to the model, and a gate that starts at 0."""

    def __init__(self, features: int, d_model: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.project = nn.Linear(min(features, WIDTH), d_model, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))

    def weighted_sum(
        self,
        hidden: Float[Tensor, "batch seq d_model"],
        vectors: Float[Tensor, "batch k features"],
        scores: Float[Tensor, "batch k"],
    ) -> Float[Tensor, "batch seq d_model"]:
        """h + tanh(gate) W sum_k softmax(scores / temperature)_k v_k: h itself until the gate opens.

        The gate is Flamingo's (Alayrac et al. 2022, arXiv:2204.14198).
        """
        weights = (scores / self.temperature).softmax(-1).unsqueeze(-1)
        mean = (weights * self.project(fold(vectors))).sum(1, keepdim=True)
        return torch.add(hidden, self.gate.tanh() * mean.to(hidden.dtype))

    def concat(
        self, hidden: Float[Tensor, "batch seq d_model"], vectors: Float[Tensor, "batch k features"]
    ) -> Float[Tensor, "batch k+seq d_model"]:
        """The passages as k positions before the sequence, the best one first."""
        return torch.cat((self.project(fold(vectors)).to(hidden.dtype), hidden), 1)
