"""Tokenizers: text to ids and back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from apt.core.provider import Provider


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer. Ids 0, 1, 2 are padding, start and end of a document, unless the
    profile's pad_token_id, bos_token_id and eos_token_id say else.

    Where it also has `encode_array(text)`, which gives the same ids as a NumPy array, a corpus is encoded by that. A text of more
    than a million characters comes in pieces, cut before a single white space between two words where there is one.
    """

    vocab_size: int

    def encode(self, text: str) -> Sequence[int]:
        """Ids of the text, without special ones."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones vanish. Bytes that are not UTF-8 become U+FFFD."""

    def save(self, folder: Path) -> None:
        """Write what `TokenizerProvider.load` needs."""


class TokenizerProvider(Provider):
    """Makes tokenizers: from a corpus, or from what was saved."""

    kind: ClassVar[str] = "tokenizer"

    @abstractmethod
    def train(self, texts: Iterable[str]) -> Tokenizer:
        """A tokenizer for these texts (the training split alone)."""

    @abstractmethod
    def load(self, folder: Path) -> Tokenizer:
        """The tokenizer that was saved in a run's folder."""

    @abstractmethod
    def get_vocab_size(self) -> int:
        """The number of ids, known before any training."""

    def starts_with_bos(self) -> bool:
        """Whether a prompt starts with bos_token_id, as the texts in training do."""
        return True

    def get_stop_ids(self) -> tuple[int, ...]:
        """Ids that end a text, beside bos_token_id and eos_token_id."""
        return ()
