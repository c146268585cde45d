"""The routers' modules: a matrix from a token to a score for each expert, computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from apt_moe.functional import over_ranks


class ScoringRouter(nn.Module):
    """l = W x / T: the scores of the experts, with T the scheduled temperature.

    Always in float32, under autocast and in a bfloat16 model too: a rounding of the scores changes which expert is
    chosen (Fedus et al. 2021, arXiv:2101.03961, section 2.4).
    """

    temperature: Tensor

    def __init__(self, d_model: int, num_experts: int, top_k: int, *, temperature: float, init_std: float) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        # Never zeros: with equal scores every token would go to the same k experts.
        nn.init.normal_(self.weight, std=init_std)
        self.register_buffer("temperature", torch.tensor(temperature, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., d_model] -> scores [..., experts] in float32."""
        return _product(x, self.weight) / self.temperature


class LinearRouter(ScoringRouter):
    """Scores, and the scheduled weight of the load-balance loss."""

    balance_weight: Tensor

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, temperature: float, balance_loss: float, init_std: float
    ) -> None:
        super().__init__(d_model, num_experts, top_k, temperature=temperature, init_std=init_std)
        self.register_buffer("balance_weight", torch.tensor(balance_loss, dtype=torch.float32))


class NoisyRouter(LinearRouter):
    """Scores, and noise whose size is learnt: l + eps softplus(W_n x)."""

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, temperature: float, balance_loss: float, init_std: float
    ) -> None:
        super().__init__(
            d_model, num_experts, top_k, temperature=temperature, balance_loss=balance_loss, init_std=init_std
        )
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, d_model))

    def noisy(self, x: Tensor, scores: Tensor) -> Tensor:
        """`scores` [..., experts] of `x` [..., d_model] with fresh noise."""
        return scores + torch.randn_like(scores) * functional.softplus(_product(x, self.noise_weight))


class BiasRouter(ScoringRouter):
    """Scores, and a bias that only chooses: no gradient reaches it, the load moves it.

    `bias` is saved. `load` is what each expert was sent since the last step; a recomputed forward pass counts it twice
    for all experts alike, which the sign in `step` does not see.
    """

    bias: Tensor
    load: Tensor

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, temperature: float, rate: float, init_std: float
    ) -> None:
        super().__init__(d_model, num_experts, top_k, temperature=temperature, init_std=init_std)
        self.rate = rate
        self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("load", torch.zeros(num_experts), persistent=False)

    @torch.no_grad()
    def count(self, indices: Tensor, mask: Tensor | None) -> None:
        """Add the choices `indices` [batch, seq, k] of the tokens where `mask` [batch, seq] is True."""
        counted = torch.ones_like(indices) if mask is None else mask.unsqueeze(-1).expand_as(indices)
        self.load.scatter_add_(0, indices.flatten(), counted.flatten().to(self.load.dtype))

    @torch.no_grad()
    def step(self) -> None:
        """b += u (sign(mean load - load) - the mean of these signs), over all ranks; the count starts again."""
        load = over_ranks(self.load)
        signs = (load.mean() - load).sign()
        self.bias += self.rate * (signs - signs.mean())
        self.load.zero_()


def _product(x: Tensor, weight: Tensor) -> Tensor:
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return functional.linear(x.float(), weight.float())
    with torch.autocast(device, enabled=False):
        return functional.linear(x.float(), weight.float())


class FixedRouter(nn.Module):
    """Nothing to learn: choices weigh alike. How experts are fixed or drawn is in its methods; all give [batch, seq, k]."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k

    def forward(self, indices: Tensor) -> Tensor:
        """1/k for each choice `indices` [batch, seq, k]. Every route goes by here, which is seen as proof that it is in use."""
        return torch.full(indices.shape, 1 / self.top_k, dtype=torch.float32, device=indices.device)

    def hashed(self, tokens: Tensor, seed: int) -> Tensor:
        """The experts with the largest hash of (id, expert, seed); `tokens` [batch, seq]."""
        experts = torch.arange(self.num_experts, device=tokens.device)
        # A number of Python's does not wrap around by itself.
        start = (seed * _PRIMES[2] + 2**63) % 2**64 - 2**63
        mixed = tokens.long().unsqueeze(-1) * self.num_experts + experts + start
        for prime in _PRIMES[:2]:
            # Integers wrap around, and the shift brings high bits down (Steele et al. 2014, SplitMix64).
            mixed = (mixed ^ ((mixed >> 30) & 0x3FFFFFFFF)) * prime
        return (mixed ^ ((mixed >> 31) & 0x1FFFFFFFF)).topk(self.top_k, dim=-1).indices

    def drawn(self, inputs: Tensor) -> Tensor:
        """Different experts for each token, all equally likely; `inputs` [batch, seq, d_model]."""
        scores = torch.rand(*inputs.shape[:2], self.num_experts, device=inputs.device)
        return scores.topk(self.top_k, dim=-1).indices

    def first(self, inputs: Tensor) -> Tensor:
        """The first k for every token."""
        return torch.arange(self.top_k, device=inputs.device).expand(*inputs.shape[:2], self.top_k)


_PRIMES = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, 0x2545F4914F6CDD1D)
"""The constants of SplitMix64 as signed numbers, and one for seeds."""
