"""What the processor multiplies in hardware."""

from __future__ import annotations

from functools import cache

import torch


@cache
def has_units() -> bool:
    """Whether the processor has units for products of bfloat16.

    oneDNN says yes of every processor with AVX-512, and without units it multiplies several times as slowly as float32.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if not torch.cpu._is_avx512_supported():
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
