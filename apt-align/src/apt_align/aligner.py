"""States of the same tokens, a stable one and others to align, drawn together; and mixed, where that is asked for."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from apt_align.evidence import Evidence
    from apt_align.provider import Consistency


class Aligner(nn.Module):
    """L = [alpha D(sg(stable) -> align) + beta D(sg(align) -> stable)] / (alpha + beta).

    sg stops the gradient: each half moves one state towards the other as it stands, so that the two cannot meet in a
    constant. alpha is how strongly the stable state teaches, beta how far it follows. Related: Mean Teacher
    (1703.01780, beta = 0), the balanced KL of DreamerV2 (2010.02193, eq. 3), and R-Drop (2106.14448), which is
    alpha = beta without sg (`stop_gradient`). Of more than two states the loss is the mean over all pairs.

    `weight`, a scheduled value, multiplies the loss where it is added to the model's. `predicts` adds a linear map
    from the state to align, `rank` a fixed subspace for `mix`, `evidence` the memory of state evidence.
    """

    weight: Tensor
    down: Tensor | None

    def __init__(
        self,
        provider: Consistency,
        d_model: int,
        alpha: float,
        beta: float,
        *,
        stop_gradient: bool = True,
        rank: int | None = None,
        predicts: bool = False,
        evidence: Evidence | None = None,
    ) -> None:
        super().__init__()
        self.active = True
        self.alpha, self.beta = alpha, beta
        self.stop_gradient = stop_gradient
        self.provider = provider
        # An earlier layer speaks of the same tokens in other words; it is translated before it is compared.
        self.predictor = nn.Linear(d_model, d_model) if predicts else None
        self.evidence = evidence
        self.register_buffer("weight", torch.tensor(provider.weight, dtype=torch.float32))
        down = None if rank is None else nn.init.orthogonal_(torch.empty(rank, d_model))
        self.register_buffer("down", down)

    def forward(self, stable: Tensor, *align: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of states [batch, seq, features], a mean over the tokens where `mask` [batch, seq] is True."""
        if self.predictor is not None:
            align = tuple(self.predictor(each) for each in align)
        pairs = [self._pair(one, two, mask) for one, two in combinations((stable, *align), 2)]
        return torch.stack(pairs).mean()

    def _pair(self, stable: Tensor, align: Tensor, mask: Tensor | None) -> Tensor:
        pulls: list[Tensor] = []
        for strength, teacher, student in ((self.alpha, stable, align), (self.beta, align, stable)):
            if strength:
                fixed = teacher.detach() if self.stop_gradient else teacher
                distance = self.provider.compute_consistency_loss(fixed, student, self.provider.distance, mask)
                pulls.append(strength / (self.alpha + self.beta) * distance)
        return torch.stack(pulls).sum() if pulls else stable.new_zeros((), dtype=torch.float32)

    def idle(self) -> list[nn.Module]:
        """Itself, while it is off or its loss has no weight."""
        weightless = self.weight.item() == 0 or self.alpha == self.beta == 0
        return [self] if weightless or not self.active else []

    def mix(self, stable: Tensor, align: Tensor) -> Tensor:
        """stable + alpha beta U P (align - stable), U = P^T, in a fixed subspace: [batch, seq, d_model].

        Nothing is changed where the states agree, nor with alpha = 0 or beta = 0, nor by an aligner without a subspace.
        """
        if self.down is None:
            return stable
        down = self.down.to(stable.dtype)
        return stable + self.alpha * self.beta * ((align - stable) @ down.t() @ down)
