"""The normal compensator: a small detour for the states that a narrow subspace would lose.

It measures how much of a state's energy lies outside the principal subspace of the states, and adds a low-rank
correction where that share exceeds tau. The correction is dense and masked, so the layer compiles whole and never
waits for the device.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from apt_attention_tva.functional import lost_energy, orthonormal


class Compensator(nn.Module):
    """c = [eps2 > tau] sum_{j <= s} a_j u_j <v_j, h>,  a = 0.5 sigmoid(gate(norm(h))), for a state h of width D.

    eps2 is `lost_energy` of h under a projector of its own, P_h [rank, D]. The projector learns from
    ``subspace_loss * mean(eps2)`` alone, a loss that sees the states but does not pull at them; that keeps it at their
    principal subspace, where eps2 exceeds 0.18 on a few tokens and not on all (for a random subspace it is about
    1 - rank / D everywhere). u starts at 0: a fresh compensator changes nothing.
    """

    def __init__(self, d_model: int, rank: int, normals: int, tau: float, subspace_loss: float) -> None:
        super().__init__()
        self.tau, self.subspace_loss = tau, subspace_loss
        self.down = nn.Parameter(torch.empty(rank, d_model))
        self.read = nn.Parameter(torch.empty(normals, d_model))
        self.write = nn.Parameter(torch.empty(normals, d_model))
        self.gate = nn.Linear(d_model, normals)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthonormal P_h and v, u = 0."""
        self.down.copy_(orthonormal(1, *self.down.shape)[0])
        self.read.copy_(orthonormal(1, *self.read.shape)[0])
        self.write.zero_()
        self.gate.reset_parameters()

    def forward(
        self, h: Float[Tensor, "batch seq d_model"], mask: Bool[Tensor, "batch seq"] | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], dict[str, Tensor], dict[str, Tensor]]:
        """The correction of `h`, the loss, and the share of tokens that were corrected.

        `mask` is True for the tokens that count in loss and share.
        """
        lost = lost_energy(h.detach(), self.down)
        over = lost.detach() > self.tau
        gate = 0.5 * self.gate(nn.functional.layer_norm(h, h.shape[-1:])).sigmoid()
        correction = (h @ self.read.T * gate * over.unsqueeze(-1)) @ self.write
        counted = torch.ones_like(lost) if mask is None else mask.to(lost.dtype)
        total = counted.sum().clamp(min=1)
        loss = self.subspace_loss * (lost * counted).sum() / total
        share = (over * counted).sum() / total
        return correction.to(h.dtype), {"tva_subspace": loss}, {"tva_compensated_share": share}
