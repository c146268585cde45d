"""A shuffled order of any length that takes no memory: the place of each item is computed from its number.

A Feistel network is a bijection of the numbers of 2k bits whatever its round function is (Luby and Rackoff 1988); what it sends
beyond the length is sent on until it falls inside (cycle walking; Black and Rogaway 2002), which keeps it a bijection.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
Numbers = NDArray[np.uint64]


class Order:
    """A permutation of ``0 .. length - 1`` that follows from the seed."""

    def __init__(self, length: int, seed: tuple[int, ...]) -> None:
        self.length = length
        self._half = np.uint64(max(1, (max(1, length - 1).bit_length() + 1) // 2))
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)
        self._keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, places: slice) -> NDArray[np.int64]:
        """The items at these places, in one go."""
        items = self._shuffle(np.arange(*places.indices(self.length), dtype=np.uint64))
        while (outside := np.flatnonzero(items >= self.length)).size:
            items[outside] = self._shuffle(items[outside])
        return items.astype(np.int64)

    def _shuffle(self, numbers: Numbers) -> Numbers:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


def _mix(values: Numbers) -> Numbers:
    """Each value scattered over 64 bits (the finalizer of SplitMix64; Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
