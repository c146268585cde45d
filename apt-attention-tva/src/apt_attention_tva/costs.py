"""What is computed in which order, and how much that is: plain numbers, for the layers and the estimates alike."""

from __future__ import annotations

BLOCK = 128
"""Queries that autopoietic attention computes at once."""


def composing_pays(tokens: int, d_model: int, d_head: int, rank: int) -> bool:
    """Whether ``(P W) x`` costs fewer multiplications than ``P (W x)`` for so many tokens.

    Per head, P W costs r d D once and then r D a token, against d D + r d a token. At r = d / 2 it pays from about d
    tokens on, so training composes the weights and a decoding step does not.
    """
    return tokens * (d_model * d_head + rank * d_head - d_model * rank) > rank * d_head * d_model


def visited_scores(seq_len: int) -> int:
    """Scores of one head that causal autopoietic attention computes: each block of queries up to its last key."""
    ends = [min(start + BLOCK, seq_len) for start in range(0, seq_len, BLOCK)]
    return sum((end - start) * end for start, end in zip(range(0, seq_len, BLOCK), ends, strict=True))
