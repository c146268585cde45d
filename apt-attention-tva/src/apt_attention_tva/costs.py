"""What is computed in which order, and how much that is: plain numbers, for the layers and the estimates alike."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK = 128
"""Queries that autopoietic attention computes at once."""


def composing_pays(tokens: int, d_model: int, d_head: int, rank: int) -> bool:
    """Whether ``(P W) x`` costs fewer multiplications than ``P (W x)`` for so many tokens.

    Per head, P W costs r d D once and then r D a token, against d D + r d a token. At r = d / 2 it pays from about d
    tokens on, so training composes the weights and a decoding step does not.
    """
    return tokens * (d_model * d_head + rank * d_head - d_model * rank) > rank * d_head * d_model


def blocks(
    queries: int, keys: int, causal: bool, window: int | None
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The blocks of queries, from and to, and for each the keys, from and to, that any query of it may see.

    The last query stands at the last key. A `window` is as in `apt.layers.attend.attend`.
    """
    before = keys - queries
    for start in range(0, queries, BLOCK):
        end = min(start + BLOCK, queries)
        first, last = 0, before + end if causal else keys
        if window is not None:
            first = max(0, before + start - window + 1)
            last = last if causal else min(keys, before + end + window - 1)
        yield (start, end), (first, last)


def visited_scores(seq_len: int, window: int | None = None) -> int:
    """Scores of one head that causal autopoietic attention computes."""
    visited = blocks(seq_len, seq_len, True, window)
    return sum((end - start) * (last - first) for (start, end), (first, last) in visited)
