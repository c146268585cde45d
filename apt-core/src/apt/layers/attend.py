"""Scaled dot-product attention with its masks got right, over PyTorch's fused kernels.

PyTorch's ``is_causal`` is aligned at the top left: with fewer queries than keys (decoding) the first query would see only the
first key. Here causality is aligned at the bottom right, and a matrix of queries by keys is made only where a mask, a window or
a chunk of several queries behind a cache needs one.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from apt.layers.ways import mix


def attend(
    q: Float[Tensor, "batch heads seq width"],
    k: Float[Tensor, "batch kv_heads kv width"],
    v: Float[Tensor, "batch kv_heads kv v_width"],
    *,
    causal: bool,
    mask: Bool[Tensor, "batch kv"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads seq v_width"]:
    """softmax(scale q k^T + mask) v (Vaswani et al. 2017, arXiv:1706.03762, eq. 1); `scale` is 1/sqrt(width) by default.

    `mask` is True for keys that may be seen. Query i of n sees keys up to ``kv - n + i`` where `causal`. A row that sees
    nothing (padding) gives 0. `heads` may be a multiple of `kv_heads` (grouped queries, arXiv:2305.13245).

    With a `window` a query sees that many keys, its own the last; without causality as many after it too (sliding-window
    attention, Beltagy et al. 2020, arXiv:2004.05150, section 3.1). `sinks` are one logit a head that takes part in the softmax
    and mixes nothing in, so that a head may look nowhere: exp(s_j) / (sum exp(s) + exp(sink)) (the learnable sink of Xiao et
    al. 2023, arXiv:2309.17453, section 3.3, in the form of gpt-oss, arXiv:2508.10925, section 2.2).
    """
    queries, keys = q.shape[2], k.shape[2]
    if window is not None and causal and keys > window + queries - 1:
        # What no query can see is not read: one query of a long text reads `window` keys.
        keys = window + queries - 1
        k, v = k[:, :, -keys:], v[:, :, -keys:]
        mask = None if mask is None else mask[:, -keys:]
    visible = None if mask is None else mask[:, None, None, :]
    banded = window is not None and (queries > 1 or not causal) and keys > window
    if banded or (causal and queries > 1 and (visible is not None or queries != keys)):
        band = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        if causal:
            band = band.tril(keys - queries)
        if banded:
            assert window is not None
            band = band.triu(keys - queries - window + 1)
            band = band if causal else band.tril(keys - queries + window - 1)
        visible = band if visible is None else visible & band
    if sinks is not None:
        return _attend_with_sinks(q, k, v, sinks, causal=causal, visible=visible, scale=scale, dropout=dropout)
    square = causal and queries > 1 and visible is None
    return mix(q, k, v, causal=square, visible=visible, scale=scale, dropout=dropout)


def _attend_with_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    *,
    causal: bool,
    visible: Tensor | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """A sink is one more key whose value is 0 and whose score is the head's logit, whatever the query.

    One more feature makes it so: queries hold sink / scale there, the added key 1 and the others 0. The kernels then need no
    float mask (which, with a gradient, would cost them their fast path). The added key stands first; where causality is the
    kernel's own, an added query keeps the square square.
    """
    queries = q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    squared = causal and queries > 1 and visible is None
    logits = (sinks / scale).to(q.dtype)[None, :, None, None].expand(q.shape[0], -1, queries, 1)
    q = functional.pad(torch.cat((q, logits), -1), (0, 0, int(squared), 0))
    k, v = functional.pad(k, (0, 1, 1, 0)), functional.pad(v, (0, 1, 1, 0))
    k[:, :, 0, -1] = 1
    if visible is not None:
        visible = functional.pad(visible, (1, 0), value=True)
    mixed = mix(q, k, v, causal=squared, visible=visible, scale=scale, dropout=dropout)
    return mixed[:, :, int(squared) :, :-1]
