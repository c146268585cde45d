"""Scaled dot-product attention with its masks got right, over PyTorch's fused kernels.

PyTorch's ``is_causal`` is aligned at the top left: with fewer queries than keys (decoding) the first query would see only the
first key. Here causality is aligned at the bottom right, and a matrix of queries by keys is made only where a mask or
a chunk of several queries behind a cache needs one.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def attend(
    q: Float[Tensor, "batch heads seq width"],
    k: Float[Tensor, "batch kv_heads kv width"],
    v: Float[Tensor, "batch kv_heads kv v_width"],
    *,
    causal: bool,
    mask: Bool[Tensor, "batch kv"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads seq v_width"]:
    """softmax(scale q k^T + mask) v (Vaswani et al. 2017, arXiv:1706.03762, eq. 1); `scale` is 1/sqrt(width) by default.

    `mask` is True for keys that may be seen. Query i of n sees keys up to ``kv - n + i`` where `causal`. A row that sees
    nothing (padding) gives 0. `heads` may be a multiple of `kv_heads` (grouped queries, arXiv:2305.13245).
    """
    queries, keys = q.shape[2], k.shape[2]
    visible = None if mask is None else mask[:, None, None, :]
    if causal and queries > 1 and (visible is not None or queries != keys):
        lower = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        visible = lower if visible is None else visible & lower
    return functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=visible,
        is_causal=causal and queries > 1 and visible is None,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
