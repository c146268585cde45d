"""Batches by counting: which windows a step sees follows from the seed and the step's number, so resuming is one number.

Each pass cuts the tokens into windows at a new offset and visits every window once, in an order of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apt.core.config import APTConfig
from apt.data.order import Order
from apt.data.pairs import PairBatches, PairSplit, pairs
from apt.data.tokens import TokenSplit
from apt.hookspecs import Batch

BLOCK = 2**16
"""Windows whose places are computed at once; it bounds the memory, and nothing depends on it."""


def send(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of a batch on the device; to a GPU from pinned memory, so that nobody waits for the copy."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)


class Batches:
    """Training windows of `seq_len` tokens and their targets."""

    def __init__(self, split: TokenSplit, seq_len: int, batch_size: int, seed: int) -> None:
        self.split, self.seq_len, self.batch_size, self.seed = split, seq_len, batch_size, seed
        self.num_windows = (len(split.tokens) - 1) // seq_len
        self._block = (-1, -1)
        self._starts: NDArray[np.int64] = np.zeros(0, np.int64)

    @property
    def batches_per_pass(self) -> int:
        """Micro-batches until every window was seen (at least one)."""
        return max(1, self.num_windows // self.batch_size)

    def get(self, index: int) -> Batch:
        """The micro-batch number `index` of the whole run, counted from 0."""
        number, within = divmod(index, self.batches_per_pass)
        starts = np.empty(self.batch_size, np.int64)  # what is too large for the memory is refused here
        done = 0
        while done < self.batch_size:
            block, inside = divmod((within * self.batch_size + done) % self.num_windows, BLOCK)
            some = self._load(number, block)[inside : inside + self.batch_size - done]
            starts[done : done + len(some)] = some
            done += len(some)
        return self.split.gather(starts, self.seq_len)

    def _load(self, number: int, block: int) -> NDArray[np.int64]:
        """Where the windows of one block of one pass start, in the order in which they are seen."""
        if self._block != (number, block):
            spare = len(self.split.tokens) - 1 - self.num_windows * self.seq_len
            offset = np.random.default_rng((self.seed, number)).integers(spare + 1)
            order = Order(self.num_windows, (self.seed, number))
            self._starts = order[block * BLOCK : (block + 1) * BLOCK] * self.seq_len + offset
            self._block = (number, block)
        return self._starts


def make_batches(split: TokenSplit, config: APTConfig) -> Batches | PairBatches:
    """The training batches of a profile."""
    batch_size, seed = config.training.batch_size, config.training.seed
    if isinstance(split, PairSplit):
        return PairBatches(split, batch_size, seed)
    return Batches(split, config.max_seq_len, batch_size, seed)


def num_windows(split: TokenSplit, seq_len: int) -> int:
    """Windows that cover the split, the last of which may be shorter than `seq_len`; or its pairs."""
    if isinstance(split, PairSplit):
        return split.num_pairs
    return len(range(0, len(split.tokens) - 1, seq_len))


def windows(split: TokenSplit, seq_len: int, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
    """Non-overlapping windows that cover the split in order; the last may be shorter and is masked.

    With `max_batches`, so many batches of windows that are spread evenly over the split, always the same ones. A split of
    pairs gives its pairs in the same way.
    """
    if isinstance(split, PairSplit):
        yield from pairs(split, batch_size, max_batches)
        return
    whole = num_windows(split, seq_len)
    count = whole if max_batches is None else min(whole, max_batches * batch_size)
    for at in range(0, count, batch_size):
        chosen = np.arange(at, min(at + batch_size, count), dtype=np.int64)
        if count < whole:
            chosen = chosen * (whole - 1) // max(1, count - 1)
        yield split.gather(chosen * seq_len, seq_len)
