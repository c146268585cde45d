"""The layer behind `flash_v2`: the kernels of the package flash-attn (Dao 2023, arXiv:2307.08691), on an NVIDIA GPU.

Its functions take [batch, seq, heads, width] in bf16 or fp16, align causality at the bottom right, and have windows and grouped
queries of their own. Padding is taken out before and put back after (`flash_attn_varlen_func`); a step of decoding splits
the keys over the device (`flash_attn_with_kvcache`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apt.builtin.sdpa import SDPAttention
from apt.errors import UserError


class FlashAttention(SDPAttention):
    """A = softmax(scale q k^T + mask), y = A v, as `SDPAttention`, without T x T in memory for windows and padding too."""

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
        """Raises `UserError` for what is to be trained and the kernels cannot compute.

        Where no gradient is wanted, as in scoring and writing in float32, PyTorch's kernels compute the same.
        """
        if not torch.is_grad_enabled() and not has_kernel(q):
            return super().attend(q, k, v, causal=causal, mask=mask, window=window)
        from flash_attn import flash_attn_func, flash_attn_with_kvcache

        demand_flash(q)
        dropout = self.dropout if self.training else 0.0
        # [left, right] of the query's own key; -1: no limit.
        reach = (-1, -1) if window is None else (window - 1, 0 if causal else window - 1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if mask is not None:
            return self._without_padding(q, k, v, causal, mask, reach, dropout).transpose(1, 2)
        if q.shape[1] < k.shape[1] and not torch.is_grad_enabled():
            mixed: Tensor = flash_attn_with_kvcache(
                q, k, v, cache_seqlens=k.shape[1], softmax_scale=self.shape.scale, causal=causal, window_size=reach
            )
        else:
            mixed = flash_attn_func(
                q, k, v, dropout_p=dropout, softmax_scale=self.shape.scale, causal=causal, window_size=reach
            )
        return mixed.transpose(1, 2)

    def _without_padding(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor, reach: tuple[int, int], dropout: float
    ) -> Tensor:
        """The samples' real tokens behind one another.

        Queries are left out with their keys where the kernels count both from the end; those give 0.
        """
        from flash_attn import flash_attn_varlen_func

        batch, queries = q.shape[:2]
        # A full ring's keys are in the order of its slots: its mask ends with another token than the one query.
        counted = queries > 1 and (causal or reach != (-1, -1))
        asking = mask[:, -queries:] if counted else mask.new_ones(batch, queries)
        starts = [torch.nn.functional.pad(each.sum(1).cumsum(0), (1, 0)).int() for each in (asking, mask)]
        longest = [int(each.sum(1).max()) for each in (asking, mask)]
        mixed = flash_attn_varlen_func(
            q[asking],
            k[mask],
            v[mask],
            cu_seqlens_q=starts[0],
            cu_seqlens_k=starts[1],
            max_seqlen_q=longest[0],
            max_seqlen_k=longest[1],
            dropout_p=dropout,
            softmax_scale=self.shape.scale,
            causal=causal,
            window_size=reach,
        )
        padded = q.new_zeros(batch, queries, *mixed.shape[1:])
        padded[asking] = mixed
        return padded


def has_kernel(q: Tensor) -> bool:
    """Whether flash-attn has kernels for such tensors."""
    return q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)


def demand_flash(q: Tensor) -> None:
    """Raise `UserError` for tensors that flash-attn has no kernel for."""
    if not has_kernel(q):
        raise UserError(
            f"attention.flash_v2: flash-attn computes on a GPU in bf16 or fp16, not on {q.device.type} in "
            f"{str(q.dtype).removeprefix('torch.')}; use training.precision: bf16 on a GPU, or attention: sdpa"
        )
