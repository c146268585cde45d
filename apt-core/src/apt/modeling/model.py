"""The decoder-only language model: embeddings, blocks, a last norm, and a head that shares the embeddings' weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apt.layers import LayerCache, Output


class Decoder(nn.Module):
    """tokens [batch, seq] -> `Output`. Losses of the blocks are summed, their metrics averaged.

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
        aligner: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.embedding = embedding
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

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        mask: Bool[Tensor, "batch kv"] | None = None,
        positions: Int[Tensor, "#batch seq"] | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Output:
        """Score every next token. `mask` is True for tokens that are there; with a `cache` it covers earlier ones too."""
        x = self.dropout(self.embedding(tokens))
        losses: dict[str, Tensor] = {}
        metrics: dict[str, list[Tensor]] = {}
        for index, block in enumerate(self.blocks):
            x, more, seen = block(x, mask=mask, positions=positions, cache=None if cache is None else cache[index])
            for name, loss in more.items():
                losses[name] = losses[name] + loss if name in losses else loss
            for name, metric in seen.items():
                metrics.setdefault(name, []).append(metric)
        hidden = self.norm(x)
        means = {name: torch.stack(values).mean(0) for name, values in metrics.items()}
        return Output(self.head(hidden), hidden, losses, means)

    def create_cache(self, batch: int, max_seq_len: int | None = None) -> list[LayerCache]:
        """An empty cache for each block."""
        weight = self.embedding.weight
        room = self.max_seq_len if max_seq_len is None else max_seq_len
        return [block.attention.create_cache(batch, room, weight.dtype, weight.device) for block in self.blocks]

    def hidden_after(
        self, tokens: Int[Tensor, "batch seq"], depth: int, *, mask: Bool[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq d_model"]:
        """The states after `depth` blocks."""
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks[:depth]:
            x = block(x, mask=mask).output
        return x
