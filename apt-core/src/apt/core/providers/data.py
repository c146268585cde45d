"""Sources of text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from apt.core.provider import Provider


@dataclass(frozen=True)
class Document:
    """A text and where it came from; `name` is stable between machines and orders the corpus."""

    name: str
    text: str


class DataProvider(Provider):
    """Reads a corpus. The trainer splits it 80/10/10 by document, by a hash of each document's name."""

    kind: ClassVar[str] = "data"

    @abstractmethod
    def read(self) -> Sequence[Document]:
        """All documents, in the order of their names.

        Raises `apt.errors.DataError` where a file is missing, empty, binary, or not UTF-8.
        """
