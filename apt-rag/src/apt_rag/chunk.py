"""Cutting documents into passages: at paragraphs, lines or words, with overlap, each knowing where it came from."""

from __future__ import annotations

from dataclasses import dataclass

from apt.core.providers import Document

BREAKS = ("\n\n", "\n", " ")


@dataclass(frozen=True)
class Passage:
    """A piece of a document: the document's name, the line (from 1) that it starts in, and its text."""

    source: str
    line: int
    text: str

    @property
    def name(self) -> str:
        """``source:line``."""
        return f"{self.source}:{self.line}"

    def to_document(self) -> Document:
        """The passage as a document of its own."""
        return Document(self.name, self.text)


def cut(document: Document, chunk_chars: int, overlap: int) -> list[Passage]:
    """Passages of at most `chunk_chars` characters; each begins at most `overlap` characters before the last one's end.

    A passage ends at the last paragraph, line or word that ends in its second half, in this order of preference, and
    begins at a line or a word where the overlap holds one. Every character that is not white space is in a passage.
    """
    text = document.text
    passages, begin, line, counted = [], 0, 1, 0
    while begin < len(text):
        end = _end(text, begin, chunk_chars)
        piece = text[begin:end]
        stripped = piece.strip()
        if stripped:
            first = begin + piece.index(stripped[0])
            line += text.count("\n", counted, first)
            counted = first
            passages.append(Passage(document.name, line, stripped))
        if end == len(text):
            break
        begin = _begin(text, max(begin + 1, end - overlap), end)
    return passages


def _end(text: str, begin: int, chunk_chars: int) -> int:
    limit = begin + chunk_chars
    if limit >= len(text):
        return len(text)
    for mark in BREAKS:
        found = text.rfind(mark, begin + chunk_chars // 2, limit)
        if found >= 0:
            return found + len(mark)
    return limit


def _begin(text: str, earliest: int, end: int) -> int:
    for mark in BREAKS[1:]:
        found = text.find(mark, earliest, end)
        if found >= 0:
            return found + len(mark)
    return earliest
