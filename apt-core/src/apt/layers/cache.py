"""The keys and values of one attention layer while decoding, in memory that is taken once."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class KVCache:
    """Room for `max_seq_len` tokens: 2 * heads * width numbers each. `append` writes in place and returns views."""

    def __init__(
        self, batch: int, heads: int, max_seq_len: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.k = torch.zeros(batch, heads, max_seq_len, width, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.length = 0

    def append(
        self, k: Float[Tensor, "batch heads seq width"], v: Float[Tensor, "batch heads seq width"]
    ) -> tuple[Float[Tensor, "batch heads kv width"], Float[Tensor, "batch heads kv width"]]:
        """Add the keys and values of new tokens; returns all there are. Raises `ValueError` where there is no room."""
        end = self.length + k.shape[2]
        if end > self.k.shape[2]:
            raise ValueError(f"the cache holds {self.k.shape[2]} tokens; {end} were given")
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]
