"""The keys and values of one attention layer while decoding, in memory that is taken once.

What was read is returned as views of that memory, so a step reads the tokens that are there and never the room that is left. The
number of tokens is a plain integer: `torch.compile` makes it a symbol at the second step, and no later step compiles anew.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Added = tuple[
    Float[Tensor, "batch heads kv width"], Float[Tensor, "batch heads kv width"], Bool[Tensor, "batch kv"] | None
]


class KVCache:
    """Room for `max_seq_len` tokens: 2 * heads * width numbers each.

    With a `window` no more than that many tokens are kept, in a ring: token p is in slot p mod window, and there is room for a
    text of any length (the rolling buffer of Mistral 7B, Jiang et al. 2023, arXiv:2310.06825, section 2).
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        max_seq_len: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        window: int | None = None,
    ) -> None:
        self.rolling = window is not None and window <= max_seq_len
        slots = window if self.rolling and window is not None else max_seq_len
        self.k = torch.zeros(batch, heads, slots, width, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.length = 0

    @classmethod
    def over(
        cls,
        k: Float[Tensor, "batch heads slots width"],
        v: Float[Tensor, "batch heads slots width"],
        length: int,
        *,
        rolling: bool = False,
    ) -> KVCache:
        """A cache in memory that is there, of which `length` tokens were read."""
        cache = cls.__new__(cls)
        cache.k, cache.v, cache.length, cache.rolling = k, v, length, rolling
        return cache

    @property
    def slots(self) -> int:
        """Tokens that there is memory for."""
        return self.k.shape[2]

    def append(
        self,
        k: Float[Tensor, "batch heads seq width"],
        v: Float[Tensor, "batch heads seq width"],
        mask: Bool[Tensor, "batch all"] | None = None,
    ) -> Added:
        """Add the keys and values of new tokens; returns all that the new ones may see, and their part of the mask.

        `mask` covers every token since the beginning. Keys come in the order of their tokens, but for a single token in a full
        ring, whose order does not matter: it sees all of them. Raises `ValueError` where there is no room.
        """
        start, end = self.length, self.length + k.shape[2]
        self.length = end
        if end <= self.slots:
            self.k[:, :, start:end] = k
            self.v[:, :, start:end] = v
            return self.k[:, :, :end], self.v[:, :, :end], mask
        if not self.rolling:
            self.length = start
            raise ValueError(f"the cache holds {self.slots} tokens; {end} were given")
        if k.shape[2] == 1:
            slot = start % self.slots
            self.k[:, :, slot : slot + 1] = k
            self.v[:, :, slot : slot + 1] = v
            seen = None if mask is None else mask[:, -self.slots :].roll(end % self.slots, 1)
            return self.k, self.v, seen
        before = torch.arange(max(0, start - self.slots), start, device=k.device) % self.slots
        keys, values = torch.cat((self.k[:, :, before], k), 2), torch.cat((self.v[:, :, before], v), 2)
        last = torch.arange(max(start, end - self.slots), end, device=k.device)
        self.k[:, :, last % self.slots] = k[:, :, -len(last) :]
        self.v[:, :, last % self.slots] = v[:, :, -len(last) :]
        return keys, values, None if mask is None else mask[:, -keys.shape[2] :]

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on. Raises `ValueError` where a ring has let go of what the next token would see."""
        if not 0 <= length <= self.length:
            raise ValueError(f"the cache has read {self.length} tokens and cannot be cropped to {length}")
        if self.length > self.slots and length < self.length - 1:
            raise ValueError(
                f"the cache keeps the last {self.slots} of {self.length} tokens and cannot be cropped to {length}; read again"
            )
        self.length = length

    def reorder(self, samples: Int[Tensor, " batch"]) -> None:
        """Keep these samples in this order, some twice or not at all, as beams and finished texts need it."""
        self.k, self.v = self.k[samples], self.v[samples]


class MemoryCache:
    """The keys and values that a layer made of a memory, which is the same for every token that attends across to it."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None
        self.length = 0
        """Tokens of the memory; 0 before it was read."""

    def keep(self, k: Float[Tensor, "batch heads kv width"], v: Float[Tensor, "batch heads kv width"]) -> None:
        """These are the memory's."""
        self.kept, self.length = (k, v), k.shape[2]

    def crop(self, length: int) -> None:
        """Raises `ValueError` for any length but its own: a memory is never read again."""
        if length != self.length:
            raise ValueError(f"a memory of {self.length} tokens cannot be cropped to {length}")

    def reorder(self, samples: Int[Tensor, " batch"]) -> None:
        """Keep these samples in this order, some twice or not at all."""
        if self.kept is not None:
            k, v = self.kept
            self.kept = k[samples], v[samples]
