"""The encoder-decoder: a source is read both ways into a memory, and a target is written that looks at it in every block.

Vaswani et al. 2017, arXiv:1706.03762, in the pre-norm form, with one table of embeddings for source, target and head
(section 3.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apt.layers import LayerCache, Output
from apt.layers.cache import MemoryCache
from apt.modeling.model import Decoder, Tally


class Memory(NamedTuple):
    """What an encoder made of a source: its states, the mask of what is no padding, and the losses and metrics of its parts."""

    states: Float[Tensor, "batch source d_model"]
    mask: Bool[Tensor, "batch source"]
    tally: Tally
    caches: tuple[MemoryCache, ...]
    """What each of the decoder's blocks makes of it; used where a target is written, filled by its first token."""


class EncoderDecoder(Decoder):
    """(target so far [batch, seq], source [batch, source]) -> `Output` of the next target tokens.

    Padding is told by its id: the source is read without it, and the parts do not count it.
    """

    def __init__(
        self,
        embedding: nn.Embedding,
        encoder: Sequence[nn.Module],
        blocks: Sequence[nn.Module],
        encoder_norm: nn.Module,
        norm: nn.Module,
        *,
        dropout: float,
        max_seq_len: int,
        tie_embeddings: bool,
        pad: int,
        bos: int,
        position_table: nn.Embedding | None = None,
    ) -> None:
        super().__init__(
            embedding,
            blocks,
            norm,
            dropout=dropout,
            max_seq_len=max_seq_len,
            tie_embeddings=tie_embeddings,
            position_table=position_table,
        )
        self.encoder, self.encoder_norm = nn.ModuleList(encoder), encoder_norm
        self.pad, self.bos = pad, bos

    def encode(
        self, source: Int[Tensor, "batch source"], *, counted: Bool[Tensor, "batch source"] | None = None
    ) -> Memory:
        """Read sources, padded on the right; for `counted` see `Decoder.forward`."""
        mask = source != self.pad
        tally = Tally()
        states = self._pass(self.encoder, source, tally, mask=mask, counted=counted)
        return Memory(self.encoder_norm(states), mask, tally, tuple(MemoryCache() for _ in self.blocks))

    def forward(  # type: ignore[override]
        self,
        tokens: Int[Tensor, "batch seq"],
        source: Int[Tensor, "batch source"] | Memory,
        *,
        cache: Sequence[LayerCache] | None = None,
        last: int | None = None,
        counted: Bool[Tensor, "batch seq"] | None = None,
    ) -> Output:
        """Score every next token of targets that are padded on the right, or of the `last`; `source` may be encoded already.

        Where nothing of a target is `counted`, nothing of its source is.
        """
        if not isinstance(source, Memory):
            rows = None if counted is None else counted.any(-1, keepdim=True).expand_as(source)
            source = self.encode(source, counted=rows)
        memory = source
        tally = memory.tally if cache is None else Tally()
        mask = None if cache is not None else tokens != self.pad
        x = self._pass(
            self.blocks,
            tokens,
            tally,
            mask=mask,
            cache=cache,
            counted=counted,
            memory_caches=None if cache is None else memory.caches,
            memory=memory.states,
            memory_mask=memory.mask,
        )
        hidden = self.norm(x if last is None else x[:, -last:])
        return Output(self.head(hidden), hidden, tally.losses, tally.means())

    def all_blocks(self) -> Iterable[nn.Module]:
        """The encoder's, then the decoder's."""
        return (*self.encoder, *self.blocks)
