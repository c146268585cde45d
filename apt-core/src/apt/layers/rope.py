"""Rotary positions: pairs of features turn by an angle that grows with the position, so scores depend on distances alone.

Su et al. 2021, arXiv:2104.09864, eq. 14-15 and 34, in the half-split layout (feature i is paired with i + width / 2).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotate(
    x: Float[Tensor, "batch heads seq width"], positions: Int[Tensor, "#batch seq"], theta: float
) -> Float[Tensor, "batch heads seq width"]:
    """Turn queries or keys: pair i by the angle ``position * theta^(-2i / width)``; `width` must be even.

    The angles are float32 whatever the dtype of `x`: bfloat16 cannot tell position 257 from 258.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
