"""One transformer block, pre-norm: x + drop(attn(norm(x))), across too where it has a memory, then x + drop(ffn(norm(x)))."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apt.core.provider import Provider
from apt.core.resolution import describe
from apt.errors import PluginError
from apt.layers import LayerCache, Part, as_part
from apt.layers.cache import MemoryCache


class TransformerBlock(nn.Module):
    """Attention and a feed-forward network, each behind its norm (Xiong et al. 2020, arXiv:2002.04745, figure 1b).

    With `cross`, an attention layer, and its norm it is the block of an encoder-decoder's decoder: between the two it looks at a
    memory (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3). A block that is not `causal` is an encoder's.
    """

    def __init__(
        self,
        attention: nn.Module,
        ffn: nn.Module,
        attention_norm: nn.Module,
        ffn_norm: nn.Module,
        dropout: float,
        *,
        causal: bool = True,
        cross: nn.Module | None = None,
        cross_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.cross_norm, self.cross = cross_norm, cross
        self.ffn_norm, self.ffn = ffn_norm, ffn
        self.dropout = nn.Dropout(dropout)
        self.causal = causal

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        *,
        mask: Bool[Tensor, "batch kv"] | None = None,
        positions: Int[Tensor, "#batch seq"] | None = None,
        cache: LayerCache | None = None,
        tokens: Int[Tensor, "batch seq"] | None = None,
        memory: Float[Tensor, "batch source d_model"] | None = None,
        memory_mask: Bool[Tensor, "batch source"] | None = None,
        memory_cache: MemoryCache | None = None,
        counted: Bool[Tensor, "batch seq"] | None = None,
    ) -> Part:
        """`mask` is True for tokens that are there; with a `cache` it covers the earlier ones too. Of those that are there,
        only the `counted` count in losses and metrics of the feed-forward layer; attention sees the others too.

        `tokens` are the ids, for a feed-forward layer that asks for them; `memory` is what a decoder of two halves looks at, and
        `memory_cache` where its attention keeps what it makes of that, if it can.
        """
        attended = as_part(
            self.attention(self.attention_norm(x), causal=self.causal, mask=mask, positions=positions, cache=cache)
        )
        x = x + self._drop(attended.output)
        if self.cross is not None and self.cross_norm is not None:
            kept = {"cache": memory_cache} if getattr(self.cross, "caches_memory", False) else {}
            crossed = as_part(self.cross(self.cross_norm(x), causal=False, mask=memory_mask, memory=memory, **kept))
            x = x + self._drop(crossed.output)
            attended = _together(attended, crossed)
        here = None if mask is None else mask[:, -x.shape[1] :]
        if counted is not None:
            here = counted if here is None else here & counted
        asked = {"tokens": tokens} if getattr(self.ffn, "takes_tokens", False) else {}
        mapped = as_part(self.ffn(self.ffn_norm(x), mask=here, **asked))
        losses = {**attended.losses, **mapped.losses}
        metrics = {**attended.metrics, **mapped.metrics}
        if len(losses) < len(attended.losses) + len(mapped.losses):
            self._refuse("loss", set(attended.losses) & set(mapped.losses))
        if len(metrics) < len(attended.metrics) + len(mapped.metrics):
            self._refuse("metric", set(attended.metrics) & set(mapped.metrics))
        return Part(x + self._drop(mapped.output), losses, metrics)

    def _refuse(self, what: str, names: Iterable[str]) -> NoReturn:
        """Raise `PluginError` for what two parts give under one name: one would stand for the other."""
        makers = (getattr(part, "apt_provider", None) for part in (self.attention, self.ffn))
        both = " and ".join(
            describe(each) if isinstance(each, Provider) else "a layer of no provider" for each in makers
        )
        raise PluginError(f"attention and ffn, {both}, both return a {what} called {', '.join(sorted(names))}")

    def _drop(self, x: Tensor) -> Tensor:
        """Without dropout not even a module is called: in eager training of a GPU calls are what is scarce."""
        return x if self.dropout.p == 0 else self.dropout(x)


def _together(one: Part, other: Part) -> Part:
    """The losses of both summed and their metrics averaged, as if they were two layers."""
    losses = {
        name: _sum([each.losses[name] for each in (one, other) if name in each.losses])
        for name in {**one.losses, **other.losses}
    }
    metrics = {
        name: torch.stack([each.metrics[name] for each in (one, other) if name in each.metrics]).mean(0)
        for name in {**one.metrics, **other.metrics}
    }
    return Part(one.output, losses, metrics)


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum(0)
