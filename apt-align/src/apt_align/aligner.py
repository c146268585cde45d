"""Two states of the same tokens, a stable one and one to align, drawn together; and mixed, where that is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from apt_align.provider import BiState


class Aligner(nn.Module):
    """L = [alpha D(sg(stable) -> align) + beta D(sg(align) -> stable)] / (alpha + beta).

    sg stops the gradient: each half moves one state towards the other as it stands, so that the two cannot meet in a
    constant. alpha is how strongly the stable state teaches, beta how far it follows. Related: R-Drop (2106.14448,
    without sg), Mean Teacher (1703.01780), the balanced KL of DreamerV2 (2010.02193, eq. 3).

    `weight`, a scheduled value, multiplies the loss where it is added to the model's.
    """

    weight: Tensor
    down: Tensor

    def __init__(self, provider: BiState, d_model: int, alpha: float, beta: float) -> None:
        super().__init__()
        self.active = True
        self.alpha, self.beta = alpha, beta
        self.provider = provider
        # An earlier layer speaks of the same tokens in other words; it is translated before it is compared.
        self.predictor = nn.Linear(d_model, d_model) if provider.state == "layer" else None
        self.register_buffer("weight", torch.tensor(provider.weight, dtype=torch.float32))
        rank = max(1, round(d_model * provider.rank_ratio))
        self.register_buffer("down", nn.init.orthogonal_(torch.empty(rank, d_model)))

    def forward(self, stable: Tensor, align: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of two states [batch, seq, features], a mean over the tokens where `mask` [batch, seq] is True."""
        if self.predictor is not None:
            align = self.predictor(align)
        pulls: list[Tensor] = []
        for strength, teacher, student in ((self.alpha, stable, align), (self.beta, align, stable)):
            if strength:
                distance = self.provider.compute_consistency_loss(
                    teacher.detach(), student, self.provider.distance, mask
                )
                pulls.append(strength / (self.alpha + self.beta) * distance)
        return torch.stack(pulls).sum() if pulls else stable.new_zeros((), dtype=torch.float32)

    def idle(self) -> list[nn.Module]:
        """Itself, while it is off or its loss has no weight."""
        weightless = self.weight.item() == 0 or self.alpha == self.beta == 0
        return [self] if weightless or not self.active else []

    def mix(self, stable: Tensor, align: Tensor) -> Tensor:
        """stable + alpha beta U P (align - stable), U = P^T, in a fixed subspace: [batch, seq, d_model].

        Nothing is changed where the states agree, nor with alpha = 0 or beta = 0.
        """
        down = self.down.to(stable.dtype)
        return stable + self.alpha * self.beta * ((align - stable) @ down.t() @ down)
