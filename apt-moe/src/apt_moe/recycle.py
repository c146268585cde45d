"""Memory for gradients of expert stacks on the CPU, used again from step to step.

The C library gives blocks of more than 32 MB back to the system as soon as they are freed. The gradient of a stack of
experts is one, freed and made anew at every step, and the page faults of fresh memory cost more than the arithmetic: with
64 experts of 256 x 1024 and 8 rows each 60 ms of 85. Blocks that come from here return here when their last tensor is
gone. What is kept is never more than what was in use at once.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 22
"""Bytes; what is smaller the C library keeps by itself."""


class Recycler:
    """Blocks that were in use, by size in bytes."""

    def __init__(self) -> None:
        # A garbage collection while it is held may give back other blocks in the same thread.
        self._lock = threading.RLock()
        self._free: dict[int, list[np.ndarray[tuple[int], np.dtype[np.uint8]]]] = {}
        self.leased = 0
        """Bytes in use."""
        self.most = 0
        """The most that were ever in use at once."""
        self.idle = 0
        """Bytes that wait to be used again."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A CPU tensor with whatever numbers its memory holds."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if size < SMALLEST:
            return torch.empty(shape, dtype=dtype, device="cpu")
        with self._lock:
            waiting = self._free.get(size)
            block = waiting.pop() if waiting else None
            self.idle -= 0 if block is None else size
            self.leased += size
            self.most = max(self.most, self.leased)
        if block is None:
            block = np.empty(size, np.uint8)
        # The tensor's storage holds the view, and the view dies with it.
        view = block.view()
        weakref.finalize(view, self._give_back, block)
        return torch.from_numpy(view).view(dtype).view(shape)

    def _give_back(self, block: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        with self._lock:
            self.leased -= block.nbytes
            if self.leased + self.idle + block.nbytes <= self.most:
                self.idle += block.nbytes  # first: what is given back meanwhile must find it counted
                self._free.setdefault(block.nbytes, []).append(block)


recycler = Recycler()
"""The one of this process."""
