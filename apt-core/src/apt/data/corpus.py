"""A corpus: documents, split by a hash of their names, as one array of tokens for each split.

The split depends on a document's name alone, so it is the same on every machine and does not move when documents are added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from apt.core.config import APTConfig
from apt.core.providers import Document, Tokenizer
from apt.errors import DataError

Ids = NDArray[np.unsignedinteger[Any]]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of a split, documents one after another, each after the id that starts one; and the bytes they stand for."""

    tokens: Ids
    num_bytes: int
    num_documents: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes that a token stands for on the average."""
        return self.num_bytes / max(1, len(self.tokens))


@dataclass(frozen=True)
class Corpus:
    """The texts of each split, and a digest of all names and texts."""

    texts: dict[Split, list[str]]
    digest: str

    @classmethod
    def of(cls, documents: Sequence[Document]) -> Corpus:
        """Split 80/10/10. With fewer than ten documents each is cut into 80, 10 and 10 hundredths instead."""
        texts: dict[Split, list[str]] = {split: [] for split in SPLITS}
        digest = hashlib.sha256()
        for document in documents:
            for part in (document.name, document.text):
                encoded = part.encode()
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
            if len(documents) < 10:
                first, second = len(document.text) * 8 // 10, len(document.text) * 9 // 10
                pieces = (document.text[:first], document.text[first:second], document.text[second:])
                for split, piece in zip(SPLITS, pieces, strict=True):
                    texts[split].append(piece)
            else:
                texts[split_of(document.name)].append(document.text)
        return cls(texts, digest.hexdigest())

    def tokens(self, split: Split, tokenizer: Tokenizer, bos: int) -> TokenSplit:
        """The split's tokens."""
        texts = self.texts[split]
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        arrays = [np.array([bos, *tokenizer.encode(text)], dtype) for text in texts if text]
        joined: Ids = np.concatenate(arrays) if arrays else np.zeros(0, dtype)
        return TokenSplit(joined, sum(len(text.encode()) for text in texts), len(texts))


def split_of(name: str) -> Split:
    """The split of a document by its name: eight, one and one tenths of all names."""
    tenth = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def require(split: TokenSplit, name: Split, seq_len: int) -> None:
    """Raise `DataError` where a split has not one window of `seq_len` tokens and their targets."""
    if len(split.tokens) < seq_len + 1:
        raise DataError(
            f"data: the {name} split has {len(split.tokens)} tokens in {split.num_documents} documents, fewer than "
            f"max_seq_len + 1 = {seq_len + 1}; give more text, or lower model.max_seq_len"
        )


def steps_per_epoch(config: APTConfig, num_tokens: int) -> int:
    """Optimizer steps an epoch: as the profile says, else as many as see every window of the training split once."""
    training = config.training
    if training.steps_per_epoch is not None:
        return training.steps_per_epoch
    batches = (num_tokens - 1) // config.max_seq_len // training.batch_size
    return max(1, batches // training.accumulate)


def training_texts(corpus: Corpus) -> Iterable[str]:
    """What a tokenizer may learn from."""
    return corpus.texts["train"]
