"""Rotary positions: pairs of features turn by an angle that grows with the position, so scores depend on distances alone.

Su et al. 2021, arXiv:2104.09864, eq. 14-15 and 34, in the half-split layout (feature i is paired with i + width / 2).
"""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apt.core.providers import RopeScaling

Turn = tuple[Float[Tensor, "#batch 1 seq half"], Float[Tensor, "#batch 1 seq half"]]
"""The cosines and sines of all angles, float32."""


def rotate(
    x: Float[Tensor, "batch heads seq width"],
    positions: Int[Tensor, "#batch seq"],
    theta: float,
    scaling: RopeScaling | None = None,
) -> Float[Tensor, "batch heads seq width"]:
    """Turn queries or keys: pair i by the angle ``position * theta^(-2i / width)``; `width` must be even."""
    return apply_turn(x, get_turn(positions, x.shape[-1], theta, scaling))


def get_turn(
    positions: Int[Tensor, "#batch seq"], width: int, theta: float, scaling: RopeScaling | None = None
) -> Turn:
    """The turn of each position, for queries and keys alike.

    The angles are float32 whatever is turned: bfloat16 cannot tell position 257 from 258.
    """
    frequencies = get_frequencies(width, theta, scaling, positions.device)
    angles = positions[:, None, :, None].float() * frequencies
    if scaling is None or scaling.type != "yarn":
        return angles.cos(), angles.sin()
    factor = 0.1 * math.log(scaling.factor) + 1 if scaling.attention_factor is None else scaling.attention_factor
    return angles.cos() * factor, angles.sin() * factor


def get_next_turn(
    start: int, count: int, width: int, theta: float, scaling: RopeScaling | None, device: torch.device, *, whole: bool
) -> Turn:
    """The turn of `count` positions from `start` on, read from a table, which every layer would else compute anew for every
    text, or for every token that is written.

    The table of a `whole` text is as long as the text, since a backward pass keeps it; another has room to go on.
    """
    room = count if whole else 1 << max(10, (start + count - 1).bit_length())
    cos, sin = _get_table(room, width, theta, scaling, device)
    return cos[:, :, start : start + count], sin[:, :, start : start + count]


@functools.lru_cache(maxsize=32)
def _get_table(room: int, width: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Turn:
    # Made outside of inference mode, since it outlives it and gradients may be wanted of what it turns.
    with torch.inference_mode(False), torch.no_grad():
        return get_turn(torch.arange(room, device=device)[None], width, theta, scaling)


def apply_turn(x: Float[Tensor, "batch heads seq width"], turn: Turn) -> Float[Tensor, "batch heads seq width"]:
    """Turn each pair of features of `x`, in its own dtype."""
    cos, sin = (each.to(x.dtype) for each in turn)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def get_frequencies(
    width: int, theta: float, scaling: RopeScaling | None = None, device: torch.device | None = None
) -> Float[Tensor, " half"]:
    """Radians a position that each pair turns by, f_i = theta^(-2i / width), stretched for a context s times as long:

    - linear (position interpolation, Chen et al. 2023, arXiv:2306.15595, eq. 4): f_i / s.
    - ntk (bloc97 2023; Peng et al. 2023, arXiv:2309.00071, eq. 14-15): theta s^(width / (width - 2)) in place of theta, so
      that the slowest pair is slowed s-fold and the fastest not at all.
    - yarn (Peng et al. 2023, section 3.2): pairs that turn more than beta_fast times within the old context L stay, those
      under beta_slow turns are divided by s, between them a ramp over the pair's index. Queries and keys are
      multiplied by 0.1 ln(s) + 1 (eq. 22), so logits by its square.
    - llama3 (Dubey et al. 2024, arXiv:2407.21783, and its reference code): with n_i = L f_i / (2 pi) turns, pairs above
      high_freq_factor stay, pairs below low_freq_factor are divided by s, and between them the two are mixed by
      (n_i - low) / (high - low).
    """
    half = width // 2
    if scaling is not None and scaling.type == "ntk" and width > 2:
        theta = theta * scaling.factor ** (width / (width - 2))
    pairs = torch.arange(half, dtype=torch.float32, device=device)
    frequencies: Tensor = theta ** (-pairs / half)
    if scaling is None or scaling.type == "ntk":
        return frequencies
    slowed = frequencies / scaling.factor
    if scaling.type == "linear":
        return slowed
    assert scaling.original_max_seq_len is not None
    length = scaling.original_max_seq_len
    if scaling.type == "llama3":
        turns = frequencies * (length / (2 * math.pi))
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:
        low = max(math.floor(_pair(scaling.beta_fast, length, half, theta)), 0)
        high = min(math.ceil(_pair(scaling.beta_slow, length, half, theta)), width - 1)
        kept = 1 - (pairs - low) / max(high - low, 1e-3)
    return torch.lerp(slowed, frequencies, kept.clamp(0, 1))


def _pair(turns: float, length: int, half: int, theta: float) -> float:
    """The pair that makes so many turns in `length` positions."""
    return half * math.log(length / (2 * math.pi * turns)) / math.log(theta)
