"""The layer behind `flex`: PyTorch's flex_attention, whose block mask leaves out what a window or causality hides.

Compiled, it is one fused kernel that skips whole blocks of unseen keys (Dong et al. 2024, arXiv:2412.05496); not compiled,
it writes the scores out. A single query, as in decoding, goes the way of `sdpa`: it has nothing to skip.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from apt.builtin.sdpa import SDPAttention
from apt.errors import UserError
from apt.layers.heads import Shape

LEAST_WIDTH = 16
"""The width of heads that the fused kernel has on a GPU at least."""
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(sample, head, query, key) -> whether the query may see the key."""


class FlexAttention(SDPAttention):
    """A = softmax(scale q k^T + mask), y = A v, as `SDPAttention`, by another kernel. No dropout of weights."""

    def __init__(self, shape: Shape, *, bias: str, qk_norm: bool, compiled: bool) -> None:
        super().__init__(shape, 0.0, bias=bias, qk_norm=qk_norm, sinks=False)
        self.compiled = compiled

    def attend(
        self,
        q: Float[Tensor, "batch heads seq width"],
        k: Float[Tensor, "batch kv_heads kv width"],
        v: Float[Tensor, "batch kv_heads kv width"],
        *,
        causal: bool,
        mask: Bool[Tensor, "batch kv"] | None,
        window: int | None,
    ) -> Float[Tensor, "batch heads seq width"]:
        """Raises `UserError` where a gradient is needed and the device has no backward pass, or no kernel for such heads."""
        if q.shape[2] == 1:
            return super().attend(q, k, v, causal=causal, mask=mask, window=window)
        if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
            raise UserError(
                "attention.flex: PyTorch's flex_attention has no backward pass on the CPU; "
                "train on a GPU, or with attention: sdpa, which has the same weights"
            )
        if self.compiled and q.device.type != "cpu" and q.shape[3] < LEAST_WIDTH:
            raise UserError(
                f"attention.flex: heads of width {q.shape[3]}; on a GPU flex_attention's kernel has at least {LEAST_WIDTH}; "
                "use fewer heads, attention.head_width, compiled: false, or attention: sdpa"
            )
        grouped = q.shape[1] != k.shape[1]
        if torch.compiler.is_compiling():
            # With the whole model. Dynamo looks through caches, and breaks the graph at `catch_warnings`.
            hides = causal or window is not None or mask is not None
            blocks = _make_blocks(q.shape[2], k.shape[2], causal, window, q.device, mask) if hides else None
            mixed = _PLAIN(q, k, v, block_mask=blocks, scale=self.shape.scale, enable_gqa=grouped)
        else:
            blocks = (
                _find_blocks(q.shape[2], k.shape[2], causal, window, q.device)
                if mask is None
                else _make_blocks(q.shape[2], k.shape[2], causal, window, q.device, mask)
            )
            # In a step that runs eagerly too: the scores of a long text would not fit.
            with torch.compiler.set_stance("default"), warnings.catch_warnings():
                # Not to be compiled was asked for.
                warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
                kernel = _find_kernel(self.compiled)
                mixed = kernel(q, k, v, block_mask=blocks, scale=self.shape.scale, enable_gqa=grouped)
        assert isinstance(mixed, Tensor)  # it is a pair only where the log-sum-exp is asked for
        return mixed


# torch.compile's own annotations do not say that it can be called.
_PLAIN = cast(Callable[..., object], flex_attention)


@functools.cache
def _find_kernel(compiled: bool) -> Callable[..., object]:
    return torch.compile(_PLAIN) if compiled else _PLAIN


@functools.lru_cache(maxsize=16)
def _find_blocks(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> BlockMask | None:
    """The block mask of these sizes; it is the same for every layer and step."""
    if not causal and window is None:
        return None
    with torch.inference_mode(False):
        return _make_blocks(queries, keys, causal, window, device, None)


def _make_blocks(
    queries: int, keys: int, causal: bool, window: int | None, device: torch.device, mask: Tensor | None
) -> BlockMask:
    samples = None if mask is None else len(mask)
    rule = _make_rule(keys - queries, causal, window, mask)
    return create_block_mask(rule, samples, None, queries, keys, device=device)


def _make_rule(behind: int, causal: bool, window: int | None, mask: Tensor | None) -> Rule:
    def visible(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + behind - key
        seen = distance == distance
        if causal:
            seen = seen & (distance >= 0)
        if window is not None:
            seen = seen & (distance.abs() < window)
        if mask is not None:
            seen = seen & mask[sample, key]
        return seen

    return visible
