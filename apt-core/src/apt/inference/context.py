"""What a model has read of a batch of texts, and room for what is to come, in memory that is taken once.

Texts of different lengths are padded on the left, so that the next token of every text stands in the same column; masks keep the
padding out of sight, and the model counts each row's own positions. A text may outgrow the model's context: then its last half
is read again and goes on from there, so the memory is bounded and positions stay those that the model was trained on.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from apt.inference.recorded import RecordedStep
from apt.layers import LayerCache
from apt.layers.cache import KVCache
from apt.modeling.model import Decoder

ROUGHLY = 0.05
"""Of the largest score: what a recorded step may differ by, where sums are made in another order and in bfloat16."""


class Context:
    """Rows of ids; `room` for so many tokens a row is taken, the model's context if that is less.

    A text that is longer than the context keeps its end. A row that is `close`d is not read any further.
    """

    @torch.inference_mode()
    def __init__(self, model: Decoder, texts: Sequence[Sequence[int]], room: int, pad: int = 0) -> None:
        self.model, self.pad = model, pad
        self.device = model.embedding.weight.device
        self.limit = model.max_seq_len
        self.texts = [list(text)[-self.limit :] or [pad] for text in texts]
        self._closed = [False] * len(texts)
        self._room = min(room, self.limit)
        self._slots = 0
        """Columns that are taken, padding included."""
        self._waiting: Tensor
        self._mask: Tensor | None = None
        self._cache: list[LayerCache] | None = None
        self._starts: Tensor | None = None
        """The columns of padding before each row, where there are any."""
        self._recorded: RecordedStep | None = None
        self._records = RecordedStep.is_worth_it(model)
        """Whether a token is read as a recording; until one cannot be made."""
        self._is_proven = True
        self._read_anew()

    @torch.inference_mode()
    def logits(self) -> Float[Tensor, "batch vocab"]:
        """Read what waits, and score the next token of every row."""
        # Without a cache everything is read again for each token.
        tokens = self._waiting if self._cache is not None else self._padded()
        if self._cache is not None and tokens.shape[1] == 1 and (step := self._recorded_step(self._cache)) is not None:
            scores = step(tokens)
            if not self._is_proven:
                scores = self._prove(tokens, scores, self._cache)
            self._waiting = self._waiting[:, :0]
            return scores
        mask = None if self._mask is None else self._mask[:, : self._slots]
        output = self.model(tokens, mask=mask, cache=self._cache, last=1)
        self._waiting = self._waiting[:, :0]
        return output.logits[:, -1]

    @torch.inference_mode()
    def add(self, tokens: Sequence[int]) -> None:
        """One more token for each row."""
        for text, token, closed in zip(self.texts, tokens, self._closed, strict=True):
            if not closed:
                text.append(token)
        if self._slots == self._room or any(len(text) > self.limit for text in self.texts):
            self.texts = [text[-max(1, self.limit // 2) :] if len(text) > self.limit else text for text in self.texts]
            self._read_anew()
            return
        column = torch.tensor([[token] for token in tokens], device=self.device)
        self._waiting = torch.cat((self._waiting, column), 1)
        self._slots += 1

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int]) -> None:
        """Several more tokens for the one row there is."""
        (text,) = self.texts
        self._closed = [False]
        text += tokens
        if self._slots + len(tokens) > self._room or len(text) > self.limit:
            self.texts = [text[-self.limit :]]
            self._read_anew()
            return
        self._waiting = torch.cat((self._waiting, torch.tensor([list(tokens)], device=self.device)), 1)
        self._slots += len(tokens)

    def close(self, row: int) -> None:
        """This row has ended; where the others are read anew, it takes no room."""
        self._closed[row] = True

    def _read_anew(self) -> None:
        """Everything waits; the cache is empty."""
        self.texts = [[self.pad] if closed else text for text, closed in zip(self.texts, self._closed, strict=True)]
        lengths = [len(text) for text in self.texts]
        longest = max(lengths)
        self._slots = longest
        # At least half of the context is free after a text was cut, so reading anew is rare.
        self._room = min(self.limit, max(self._room, longest + 1))
        self._mask = self._starts = self._recorded = None
        if min(lengths) < longest:
            columns = torch.arange(self.limit, device=self.device)
            self._starts = torch.tensor([longest - length for length in lengths], device=self.device)
            self._mask = columns >= self._starts[:, None]
        self._waiting = self._padded()
        self._cache = None
        if self.model.supports_kv_cache:
            self._cache = self.model.create_cache(len(self.texts), self._room)

    def _recorded_step(self, cache: list[LayerCache]) -> RecordedStep | None:
        """What reads one more token of each row into the cache, where that can be recorded."""
        if not self._records or not RecordedStep.supports(cache):
            return None
        if self._recorded is None or not self._recorded.fits(cache):
            try:
                self._recorded = RecordedStep(self.model, cast("list[KVCache]", cache), self._starts)
                self._is_proven = False
            except RuntimeError as error:
                # Something in the model waits for the GPU, or allocates where a recording must not.
                reason = str(error).partition("\n")[0]
                warnings.warn(
                    f"the compiled step is not recorded as a CUDA graph, which is slower: {reason}", stacklevel=2
                )
                self._records, self._recorded = False, None
        return self._recorded

    def _prove(self, tokens: Tensor, scores: Tensor, cache: list[LayerCache]) -> Tensor:
        """The scores of the same tokens as they are read otherwise; where a recording has others, nothing is recorded any more.

        A recording reads all of a cache's room with a mask, and not every layer need look at one that it did not give.
        """
        self._is_proven = True
        for each in cache:
            each.length -= tokens.shape[1]
        mask = None if self._mask is None else self._mask[:, : self._slots]
        with torch.compiler.set_stance("force_eager"):  # it is read once
            plain = self.model(tokens, mask=mask, cache=cache, last=1).logits[:, -1]
        if not bool((scores - plain).abs().max() <= ROUGHLY * plain.abs().max()):
            warnings.warn(
                "the compiled step is not recorded as a CUDA graph, which is slower: recorded it gives other scores; an "
                "attention layer does not look at the mask that its cache's `append` returns",
                stacklevel=2,
            )
            self._records, self._recorded = False, None
        return plain

    def _padded(self) -> Tensor:
        """The texts as they are, padded on the left [batch, longest]."""
        rows = [[self.pad] * (self._slots - len(text)) + text for text in self.texts]
        return torch.tensor(rows, device=self.device)
