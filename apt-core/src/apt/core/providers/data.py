"""Sources of text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from apt.core.provider import Provider


@dataclass(frozen=True)
class Document:
    """A text and where it came from; `name` is stable between machines and orders the corpus.

    A text that is too long for memory comes from a subclass that gives it in `pieces` and says its `num_bytes` beforehand.
    """

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        """The length of the text in UTF-8."""
        return len(self.text.encode())

    def pieces(self) -> Iterator[str]:
        """The text from start to end, in pieces of any length."""
        yield self.text


@dataclass(frozen=True)
class Pair(Document):
    """A text and what is to be written of it: `text` is the target. Its pieces are the two, one after the other."""

    source: str = ""

    @property
    def num_bytes(self) -> int:
        """The length of both in UTF-8."""
        return len(self.source.encode()) + len(self.text.encode())

    def pieces(self) -> Iterator[str]:
        """The source, then the target."""
        yield self.source
        yield self.text


class DataProvider(Provider):
    """Reads a corpus. The trainer splits it 80/10/10 by document, by a hash of each document's name."""

    kind: ClassVar[str] = "data"

    @abstractmethod
    def read(self) -> Iterable[Document]:
        """All documents, in the order of their names, the same at each call: a list, or a generator that holds one at a time.

        Raises `apt.errors.DataError` where a file is missing, empty, binary, or not UTF-8.
        """

    def gives_pairs(self) -> bool:
        """Whether its documents are `Pair`s, for an encoder-decoder."""
        return False

    def fingerprint(self) -> str | None:
        """What tells in a moment whether `read` gives what it gave before, such as sizes and times of files.

        None: only reading tells, so the text is read once more at each start, and its tokens are found by its digest.
        """
        return None
