"""Pairs of a source and a target, in batches: padded to the longest, the loss on targets alone.

In the files of tokens the two stand one after the other, each after the id that starts a text.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apt.core.config import APTConfig
from apt.data.order import Order
from apt.data.tokens import TokenSplit
from apt.errors import DataError
from apt.hookspecs import Batch

CHUNK = 2**24
"""Tokens that are searched at once for where texts start."""


class PairSplit(TokenSplit):
    """The pairs of a split; `starts` [2 * pairs + 1] is where each text stands, and where the last one ends.

    Raises `DataError` where the id that starts a text stands within one too.
    """

    def __init__(self, tokens: TokenSplit, config: APTConfig) -> None:
        super().__init__(tokens.tokens, tokens.num_bytes, tokens.num_documents // 2)
        self._whole = tokens  # it holds the file
        self.pad, self.bos, self.eos = config.pad_token_id, config.bos_token_id, config.eos_token_id
        found = [
            np.flatnonzero(self.tokens[at : at + CHUNK] == self.bos) + at for at in range(0, len(self.tokens), CHUNK)
        ]
        self.starts: NDArray[np.int64] = np.concatenate([*found, [len(self.tokens)]]).astype(np.int64)
        if len(self.starts) - 1 != tokens.num_documents:
            raise DataError(
                f"model.bos_token_id: the tokenizer gives the id {self.bos} within texts too, so none tells where one starts; "
                "give the id that the tokenizer keeps for that"
            )

    @property
    def num_pairs(self) -> int:
        """How many there are."""
        return len(self.starts) // 2

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of targets that a token which counts stands for, the end's among them. Sources count in neither.

        The bytes of all texts are known together; a target's tokens are taken to hold as many as a source's.
        """
        lengths = np.diff(self.starts) - 1  # without the id before each
        targets = int(lengths[1::2].sum())
        return self.num_bytes * targets / max(1, int(lengths.sum())) / max(1, targets + self.num_pairs)

    def require(self, name: str, longest: int) -> None:
        """Raise `DataError` where there is no pair, or one that is longer than the model reads."""
        if not self.num_pairs:
            raise DataError(
                f"data: the {name} split has no pairs: a hash of its name puts each pair into one of the three, some "
                f"{80 if name == 'train' else 10} of 100 into this one; give more pairs"
            )
        lengths = np.diff(self.starts)
        # A source stands without the id before it, a target with it.
        over = int(((lengths[::2] - 1 > longest) | (lengths[1::2] > longest)).sum())
        if over:
            raise DataError(
                f"data: {over} of the {self.num_pairs} pairs of the {name} split are longer than "
                f"max_seq_len = {longest} tokens; raise model.max_seq_len, or leave them out"
            )

    def take(self, numbers: NDArray[np.int64]) -> Batch:
        """These pairs: sources; targets after the id that starts one; what follows each position, the end's id the last."""
        sources = [self._text(2 * number) for number in numbers]
        targets = [self._text(2 * number + 1) for number in numbers]
        follow = [np.append(each, self.eos) for each in targets]
        begun = [np.insert(each, 0, self.bos) for each in targets]
        wanted = _pad(follow, self.pad)
        lengths = torch.tensor([len(each) for each in follow])
        mask = torch.arange(wanted.shape[1]) < lengths.unsqueeze(-1)
        return Batch(_pad(begun, self.pad), wanted, mask, _pad(sources, self.pad))

    def _text(self, number: int) -> NDArray[np.int64]:
        start, end = self.starts[number], self.starts[number + 1]
        return self.tokens[start + 1 : end].astype(np.int64)


class PairBatches:
    """Training batches of pairs: each pass sees every pair once, in an order that follows from the seed."""

    def __init__(self, split: PairSplit, batch_size: int, seed: int) -> None:
        self.split, self.batch_size, self.seed = split, batch_size, seed

    @property
    def batches_per_pass(self) -> int:
        """Micro-batches until every pair was seen (at least one)."""
        return max(1, self.split.num_pairs // self.batch_size)

    def get(self, index: int) -> Batch:
        """The micro-batch number `index` of the whole run, counted from 0."""
        number, within = divmod(index, self.batches_per_pass)
        order = Order(self.split.num_pairs, (self.seed, number))
        places = (within * self.batch_size + np.arange(self.batch_size)) % len(order)
        return self.split.take(np.concatenate([order[place : place + 1] for place in places]))


def pairs(split: PairSplit, batch_size: int, max_batches: int | None = None) -> Iterator[Batch]:
    """All pairs in order; with `max_batches`, so many batches of pairs that are spread evenly, always the same ones."""
    count = split.num_pairs if max_batches is None else min(split.num_pairs, max_batches * batch_size)
    for at in range(0, count, batch_size):
        chosen = np.arange(at, min(at + batch_size, count), dtype=np.int64)
        if count < split.num_pairs:
            chosen = chosen * (split.num_pairs - 1) // max(1, count - 1)
        yield split.take(chosen)


def _pad(texts: list[NDArray[np.int64]], pad: int) -> Tensor:
    """Texts padded on the right; one column at least."""
    width = max(1, *(len(each) for each in texts))
    rows = np.full((len(texts), width), pad, np.int64)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    return torch.from_numpy(rows)
