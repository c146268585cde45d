"""Reading one more token of each row as a recorded CUDA graph: on a GPU starting a token's kernels takes longer than they do.

A recording is bound to memory and sizes. So the caches are read as a whole, with a mask over the room that is left, and where the
token stands is a number on the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apt.layers import LayerCache
from apt.layers.cache import Added, KVCache
from apt.modeling.model import Decoder


class Slots(KVCache):
    """The memory of a `KVCache`, all of it; the next token's place [1] and what may be seen [batch, slots] are tensors."""

    def __init__(self, cache: KVCache, place: Int[Tensor, " 1"], seen: Bool[Tensor, "batch slots"]) -> None:
        self.rolling, self.length, self.k, self.v = False, 0, cache.k, cache.v
        self.place, self.seen = place, seen

    def append(
        self,
        k: Float[Tensor, "batch heads 1 width"],
        v: Float[Tensor, "batch heads 1 width"],
        mask: Bool[Tensor, "batch all"] | None = None,
    ) -> Added:
        """Write the keys and values of one token to its place."""
        self.k.index_copy_(2, self.place, k)
        self.v.index_copy_(2, self.place, v)
        return self.k, self.v, self.seen


class RecordedStep:
    """One more token of each row, read into caches that `supports` allows; `starts` [batch] are the columns of padding before.

    On a GPU it is recorded when it is made; where that cannot be, it raises `RuntimeError` with the caches as they were. On the
    CPU the same is computed without a recording.
    """

    def __init__(self, model: Decoder, caches: Sequence[KVCache], starts: Int[Tensor, " batch"] | None) -> None:
        self.model, self.caches, self.starts = model, caches, starts
        memory = caches[0].k
        self._tokens = torch.zeros(len(memory), 1, dtype=torch.long, device=memory.device)
        self._place = torch.full((1,), caches[0].length, device=memory.device)
        self._columns = torch.arange(caches[0].slots, device=memory.device)
        self._seen = torch.zeros(len(memory), caches[0].slots, dtype=torch.bool, device=memory.device)
        self._slots = [Slots(each, self._place, self._seen) for each in caches]
        self._graph = self._record() if memory.is_cuda else None

    @staticmethod
    def is_worth_it(model: Decoder) -> bool:
        """Whether the model is to write fast, and on a GPU."""
        return model.step_is_compiled and model.embedding.weight.is_cuda

    @staticmethod
    def supports(caches: Sequence[LayerCache]) -> bool:
        """Whether all of them are plain caches, and none is a ring."""
        return all(type(each) is KVCache and not each.rolling for each in caches)

    def fits(self, caches: Sequence[LayerCache]) -> bool:
        """Whether it was made for these caches, and their memory is still what it was."""
        return self.caches is caches and all(
            slots.k is cache.k and slots.v is cache.v for slots, cache in zip(self._slots, self.caches, strict=True)
        )

    def __call__(self, tokens: Int[Tensor, "batch 1"]) -> Float[Tensor, "batch vocab"]:
        """The scores of what follows the tokens. Raises `ValueError` where the caches have no room for them."""
        length = self.caches[0].length
        if length >= self.caches[0].slots:
            raise ValueError(f"the cache holds {self.caches[0].slots} tokens; {length + 1} were given")
        self._tokens.copy_(tokens)
        self._place.fill_(length)
        if self._graph is None:
            logits = self._read()
        else:
            self._graph.replay()
            logits = self._logits.clone()
        for each in self.caches:
            each.length = length + 1
        return logits

    def _read(self) -> Tensor:
        seen = (self._columns <= self._place)[None]
        positions = self._place[None]
        if self.starts is not None:
            seen = seen & (self._columns >= self.starts[:, None])
            positions = positions - self.starts[:, None]
        self._seen.copy_(seen.expand_as(self._seen))
        logits: Tensor = self.model(self._tokens, positions=positions, cache=self._slots, last=1).logits
        return logits[:, -1]

    def _record(self) -> torch.cuda.CUDAGraph:
        """Read a token that is read again, until nothing is compiled or waited for any more, and then once more to record it."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        mode = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*ynchronization debug mode is a prototype.*")
            for _ in range(2):
                self._read()
            try:
                # What waits for the GPU cannot be recorded; here it raises before anything is.
                torch.cuda.set_sync_debug_mode("error")
                self._read()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._read()
        return graph
