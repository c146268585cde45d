"""Batches by counting: which windows a step sees follows from the seed and the step's number, so resuming is one number.

Each epoch cuts the tokens into windows at a new offset and visits every window once, in an order of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apt.data.corpus import TokenSplit
from apt.hookspecs import Batch


class Batches:
    """Training windows of `seq_len` tokens and their targets."""

    def __init__(self, split: TokenSplit, seq_len: int, batch_size: int, seed: int) -> None:
        self.tokens, self.seq_len, self.batch_size, self.seed = split.tokens, seq_len, batch_size, seed
        self.num_windows = (len(self.tokens) - 1) // seq_len
        self._pass = -1
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)

    @property
    def batches_per_pass(self) -> int:
        """Micro-batches until every window was seen (at least one)."""
        return max(1, self.num_windows // self.batch_size)

    def get(self, index: int) -> Batch:
        """The micro-batch number `index` of the whole run, counted from 0."""
        number, within = divmod(index, self.batches_per_pass)
        if number != self._pass:
            self._pass, self._order = number, self._starts(number)
        chosen = np.arange(within * self.batch_size, (within + 1) * self.batch_size) % len(self._order)
        return gather(self.tokens, self._order[chosen], self.seq_len)

    def _starts(self, number: int) -> NDArray[np.int64]:
        """Where the windows of one pass start, in the order in which they are seen."""
        generator = np.random.default_rng((self.seed, number))
        spare = len(self.tokens) - 1 - self.num_windows * self.seq_len
        offset = generator.integers(spare + 1)
        return generator.permutation(self.num_windows).astype(np.int64) * self.seq_len + offset


def gather(tokens: NDArray[np.generic], starts: NDArray[np.int64], seq_len: int) -> Batch:
    """Windows at `starts` and the tokens that follow each position, in one indexing call."""
    window = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    both: Tensor = torch.from_numpy(window)
    return Batch(both[:, :-1], both[:, 1:])


def num_windows(split: TokenSplit, seq_len: int) -> int:
    """Windows that cover the split; the last may be shorter than `seq_len`."""
    return len(range(0, len(split.tokens) - 1, seq_len))


def windows(split: TokenSplit, seq_len: int, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
    """Non-overlapping windows that cover the split in order; the last may be shorter and is masked.

    With `max_batches`, so many batches of windows that are spread evenly over the split, always the same ones.
    """
    tokens = split.tokens
    starts = np.arange(num_windows(split, seq_len), dtype=np.int64) * seq_len
    if max_batches is not None and max_batches * batch_size < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, max_batches * batch_size).astype(np.int64)]
    for at in range(0, len(starts), batch_size):
        here = starts[at : at + batch_size]
        short = here[-1] + seq_len + 1 - len(tokens)
        if short <= 0:
            yield gather(tokens, here, seq_len)
            continue
        batch = gather(np.concatenate((tokens, np.zeros(short, tokens.dtype))), here, seq_len)
        mask = torch.ones_like(batch.targets, dtype=torch.bool)
        mask[-1, seq_len - short :] = False
        yield Batch(batch.tokens, batch.targets, mask)
