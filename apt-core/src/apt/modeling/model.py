"""The decoder-only language model: embeddings, blocks, a last norm, and a head that shares the embeddings' weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apt.core.providers import AttentionProvider
from apt.errors import UserError
from apt.layers import LayerCache, Output, Part
from apt.layers.cache import MemoryCache


@dataclass
class Tally:
    """The losses of a model's blocks, summed, and their metrics."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, list[Tensor]] = field(default_factory=dict)
    blocks: int = 0

    def add(self, losses: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
        """Those of one more block."""
        for name, loss in losses.items():
            self.losses[name] = self.losses[name] + loss if name in self.losses else loss
        for name, metric in metrics.items():
            self.metrics.setdefault(name, []).append(metric)
            if metric.dim():
                self.metrics[f"{name}.{self.blocks}"] = [metric]
        self.blocks += 1

    def means(self) -> dict[str, Tensor]:
        """The metrics, averaged over the blocks that have them."""
        return {name: torch.stack(values).mean(0) for name, values in self.metrics.items()}


class Decoder(nn.Module):
    """tokens [batch, seq] -> `Output`. Losses of the blocks are summed, their metrics averaged; of metrics that are
    vectors, those of block i are there too, as ``name.i``.

    `aligner` is the part that an align provider made; the model holds it, so that its state is saved with the rest,
    and never calls it.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        *,
        dropout: float,
        max_seq_len: int,
        tie_embeddings: bool,
        position_table: nn.Embedding | None = None,
        aligner: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.recompute = False
        """Whether training computes each block's activations anew in the backward pass (Chen et al. 2016, 1604.06174)."""
        self.embedding = embedding
        self.position_table = position_table
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
        if tie_embeddings:
            self.head.weight = embedding.weight
        else:
            self.head = self.head.to_empty(device=embedding.weight.device)
            nn.init.normal_(self.head.weight, std=0.02)
        self.aligner = aligner
        self._step: Callable[..., Part] | None = None

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        mask: Bool[Tensor, "batch kv"] | None = None,
        positions: Int[Tensor, "#batch seq"] | None = None,
        cache: Sequence[LayerCache] | None = None,
        last: int | None = None,
        counted: Bool[Tensor, "batch seq"] | None = None,
    ) -> Output:
        """Score every next token; with `last` only those after so many positions at the end.

        `mask` is True for tokens that are there; with a `cache` it covers earlier ones too. Positions that are not given count
        the tokens that are there, so padding on the left moves nothing. Tokens that are not `counted` are read like others, and
        count in no loss and no metric of a feed-forward layer.
        """
        tally = Tally()
        x = self._pass(self.blocks, tokens, tally, mask=mask, positions=positions, cache=cache, counted=counted)
        hidden = self.norm(x if last is None else x[:, -last:])
        return Output(self.head(hidden), hidden, tally.losses, tally.means())

    def _pass(
        self,
        blocks: Iterable[nn.Module],
        tokens: Int[Tensor, "batch seq"],
        tally: Tally,
        *,
        mask: Bool[Tensor, "batch kv"] | None,
        positions: Int[Tensor, "#batch seq"] | None = None,
        cache: Sequence[LayerCache] | None = None,
        memory_caches: Sequence[MemoryCache] | None = None,
        counted: Bool[Tensor, "batch seq"] | None = None,
        **memory: Tensor,
    ) -> Float[Tensor, "batch seq d_model"]:
        """Tokens through blocks; `memory` is what cross-attention needs, as `TransformerBlock` names it."""
        start = 0 if cache is None else cache[0].length
        if positions is None and (mask is not None or self.position_table is not None):
            # Else they follow what was read, and the layers have a table of them.
            positions = _count_positions(mask, start, tokens)
        x = self._embed(tokens, positions)
        for index, block in enumerate(blocks):
            here = None if cache is None else cache[index]
            given = memory if memory_caches is None else {**memory, "memory_cache": memory_caches[index]}
            if counted is not None:
                given = {**given, "counted": counted}
            if self.recompute and self.training and here is None:
                read = functools.partial(block, mask=mask, positions=positions, tokens=tokens, **given)
                part = checkpoint(read, x, use_reentrant=False)
            elif self._step is not None and here is not None and x.shape[1] == 1:
                part = self._step(block, x, mask=mask, positions=positions, cache=here, tokens=tokens, **given)
            else:
                part = block(x, mask=mask, positions=positions, cache=here, tokens=tokens, **given)
            x, losses, metrics = part
            tally.add(losses, metrics)
        return x

    def all_blocks(self) -> Iterable[nn.Module]:
        """Every block; each may be compiled by itself."""
        return self.blocks

    def compile_step(self, way: Callable[[Callable[..., Part]], Callable[..., Part]] | None = None) -> None:
        """From now on what a block does with one more token of each row is compiled, at its first use and for all blocks at once.

        A `way` is given `torch.compile`'s function (block, x, **what) and gives another. Reading a prompt is not compiled: it is
        long enough to be worth its products alone, and each length would be compiled anew.
        """
        step: Callable[..., Part] = torch.compile(_read, dynamic=True)
        self._step = step if way is None else way(step)

    @property
    def step_is_compiled(self) -> bool:
        """Whether `compile_step` was asked for."""
        return self._step is not None

    def create_cache(self, batch: int, max_seq_len: int | None = None) -> list[LayerCache]:
        """An empty cache for each block. Raises `UserError` where an attention layer cannot decode from one."""
        if not self.supports_kv_cache:
            raise UserError("the model's attention has no KV cache; read the whole text for each token instead")
        weight = self.embedding.weight
        room = self.max_seq_len if max_seq_len is None else max_seq_len
        return [layer.create_cache(batch, room, weight.dtype, weight.device) for layer in self._attention()]

    @property
    def supports_kv_cache(self) -> bool:
        """Whether every attention layer can decode from a cache."""
        makers = (getattr(layer, "apt_provider", None) for layer in self._attention())
        return all(not isinstance(maker, AttentionProvider) or maker.supports_kv_cache() for maker in makers)

    def _attention(self) -> Iterator[Any]:
        """The layers as `apt.layers.AttentionLayer` describes them; a module's type does not say so."""
        for block in self.blocks:
            yield block.attention

    def hidden_after(
        self, tokens: Int[Tensor, "batch seq"], depth: int, *, mask: Bool[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq d_model"]:
        """The states after `depth` blocks."""
        positions = _count_positions(mask, 0, tokens)
        x = self._embed(tokens, positions)
        for block in self.blocks[:depth]:
            x = block(x, mask=mask, positions=positions, tokens=tokens).output
        return x

    def _embed(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        x = self.embedding(tokens)
        if self.position_table is not None and positions is not None:
            x = x + self.position_table(positions)
        embedded: Tensor = self.dropout(x)
        return embedded


def _read(block: Callable[..., Part], x: Tensor, **what: Any) -> Part:
    """A block is an argument, so that blocks of the same form are one compiled function."""
    return block(x, **what)


def _count_positions(mask: Tensor | None, start: int, tokens: Tensor) -> Int[Tensor, "#batch seq"]:
    """Where each token stands among those that are there, `start` of which were read before."""
    seq = tokens.shape[1]
    if mask is None:
        return torch.arange(start, start + seq, device=tokens.device).unsqueeze(0)
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -seq:]
