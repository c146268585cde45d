"""Drawing the next token: temperature, top-k, top-p."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apt.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """`temperature` divides the logits, 0 takes the likeliest token; `top_k` and `top_p` cut the tail off first.

    top-p: Holtzman et al. 2020, arXiv:1904.09751. Raises `UserError` for a value out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature: {self.temperature} is not allowed; 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k: {self.top_k} is not allowed; 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not allowed; more than 0, up to 1")

    def draw_rows(self, logits: Float[Tensor, "batch vocab"], generators: Sequence[torch.Generator]) -> list[int]:
        """One token for each row, each drawn by a generator of its own. Raises `UserError` for scores that are no numbers."""
        if self.temperature == 0:
            return _likeliest(logits).tolist()
        rows = zip(logits, generators, strict=True)
        return [int(self.draw(row[None], generator)) for row, generator in rows]

    def draw(self, logits: Float[Tensor, "batch vocab"], generator: torch.Generator) -> Int[Tensor, "batch 1"]:
        """One token for each row. Raises `UserError` for scores that are no numbers."""
        if self.temperature == 0:
            return _likeliest(logits).unsqueeze(-1)
        logits = logits.float()
        largest = logits.amax(-1, keepdim=True)
        _check(largest.isfinite())
        # The likeliest token's score is 0 before it is divided: a temperature near 0 makes no other infinitely likely.
        logits = (logits - largest) / max(self.temperature, torch.finfo(logits.dtype).tiny)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
            # A token is cut where those before it hold the share already; the likeliest always stays.
            cut = ordered.cumsum(-1) - ordered >= self.top_p
            cut[:, 0] = False
            logits = logits.masked_fill(cut.scatter(-1, order, cut), -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def _likeliest(logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
    # Of float32: the largest of a vocabulary of bfloat16 takes PyTorch's CPU kernel twice as long.
    largest, tokens = logits.float().max(-1)
    _check(~largest.isnan())
    return tokens


def _check(good: Bool[Tensor, ...]) -> None:
    if not bool(good.all()):
        raise UserError(
            "the scores of the next token are no finite numbers: the model's weights are none, or a plugin changed its scores"
        )
