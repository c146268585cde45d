"""The stateless mathematics of voting."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """H = -sum_v p_v log p_v of p = softmax(logits) [batch, vocab], in nats [batch]; a logit of -inf counts as p = 0."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def vote(logits: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """The token that most of `k` draws from softmax(logits) [vocab] agree on; the likelier one where they tie [].

    Plurality of independent draws, as in self-consistency (Wang et al. 2022, arXiv:2203.11171), of one token instead of one
    answer. With k = 1 it is a plain draw; as k grows it becomes the likeliest token.
    """
    p = logits.float().softmax(-1)
    draws = torch.multinomial(p, k, replacement=True, generator=generator)
    votes = torch.bincount(draws, minlength=p.numel())
    # The probability, at most 1, breaks ties between whole numbers of votes; twice as many votes keep it below one of them.
    return (2.0 * votes + p).argmax()


def elect(logits: Tensor, token: Tensor) -> Tensor:
    """Logits [vocab] under which nothing but `token` can be drawn, whatever the temperature."""
    elected = torch.full_like(logits, -torch.inf)
    elected[token] = 0.0
    return elected


def seed_of(tokens: list[int], seed: int) -> int:
    """A seed that follows from the text so far: the same text votes the same way, in whatever batch it stands."""
    digest = hashlib.blake2b(repr((seed, tokens)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
