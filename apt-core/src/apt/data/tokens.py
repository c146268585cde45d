"""Tokens in files that are mapped into memory: what is not looked at takes none, whatever the size of the text."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apt.core.providers import Tokenizer
from apt.errors import DataError
from apt.hookspecs import Batch

Ids = NDArray[np.unsignedinteger[Any]]
PAGES = 2**20
"""Bytes that the system may map around a place that is read: Linux maps a whole folio, which readahead makes this large."""
HELD = 2**26
"""Bytes of a file that may stay mapped: beyond them the pages are let go, back to the system's own cache of files."""


class TokenSplit:
    """The tokens of a split, documents one after another, each after the id that starts one; and the bytes they stand for."""

    def __init__(self, tokens: Ids, num_bytes: int, num_documents: int, pages: mmap.mmap | None = None) -> None:
        self.tokens, self.num_bytes, self.num_documents = tokens, num_bytes, num_documents
        self._pages, self._touched = pages, 0

    @classmethod
    def open(cls, path: Path, dtype: str, num_bytes: int, num_documents: int) -> TokenSplit:
        """The split that `TokenWriter` wrote, mapped into memory."""
        with path.open("rb") as file:
            if not path.stat().st_size:
                return cls(np.zeros(0, dtype), num_bytes, num_documents)
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(np.frombuffer(pages, dtype), num_bytes, num_documents, pages)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes that a token stands for on the average."""
        return self.num_bytes / max(1, len(self.tokens))

    def gather(self, starts: NDArray[np.int64], seq_len: int) -> Batch:
        """Windows at `starts` and the tokens that follow each position, in one indexing call.

        What lies beyond the last token is 0, and does not count.
        """
        places = starts[:, None] + np.arange(seq_len + 1)
        last = len(self.tokens) - 1
        mask: Tensor | None = None
        if starts.max() + seq_len <= last:
            window = self.tokens[places].astype(np.int64)
        else:
            window = np.where(places > last, 0, self.tokens[np.minimum(places, last)]).astype(np.int64)
            mask = torch.from_numpy(places[:, 1:] <= last)
        self._let_go(len(starts) * max(PAGES, (seq_len + 1) * self.tokens.itemsize))
        both: Tensor = torch.from_numpy(window)
        return Batch(both[:, :-1], both[:, 1:], mask)

    def _let_go(self, touched: int) -> None:
        self._touched += touched
        if self._touched > HELD and self._pages is not None and len(self._pages) > HELD:
            if hasattr(mmap, "MADV_DONTNEED"):
                self._pages.madvise(mmap.MADV_DONTNEED)
            self._touched = 0


class TokenWriter:
    """A context that writes the tokens of one split to a file."""

    def __init__(self, path: Path, tokenizer: Tokenizer, bos: int) -> None:
        self.tokenizer = tokenizer
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.num_tokens = self.num_bytes = self.num_documents = 0
        self._file = path.open("wb")
        self._bos = np.array([bos], self.dtype)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, pieces: Iterator[str]) -> Iterator[int]:
        """One document; gives the length of each piece when its tokens are written."""
        self.num_documents += 1
        for number, piece in enumerate(pieces):
            if number == 0:
                self._write(self._bos)
            self._write(self._encode(piece))
            self.num_bytes += len(piece.encode())
            yield len(piece)

    def _encode(self, text: str) -> Ids:
        # A tokenizer may have a quicker way to a whole array than through a list of numbers.
        encode = getattr(self.tokenizer, "encode_array", None)
        ids = np.asarray(self.tokenizer.encode(text) if encode is None else encode(text))
        if ids.size and not 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size:
            raise DataError(
                f"data.tokenizer: gives the id {ids.max() if ids.min() >= 0 else ids.min()} for {text[:40]!r} ..., but has "
                f"only {self.tokenizer.vocab_size} ids"
            )
        return ids.astype(self.dtype)

    def _write(self, ids: Ids) -> None:
        self._file.write(ids.tobytes())
        self.num_tokens += len(ids)
