"""Long texts in pieces: cut where no tokenizer looks across, so that pieces give the ids that the whole would give."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

PIECE = 2**20
"""Characters that a tokenizer gets at once, at most."""
SEARCHED = 2**16
"""Characters at a piece's end among which a good cut is looked for."""
_CUT = re.compile(r"(?<=\S)\s(?=\S)")


def in_pieces(chunks: Iterable[str], length: int = PIECE) -> Iterator[str]:
    """The same text in pieces of at most `length` characters: one where it is no longer.

    A cut stands before a single white space between two words, where the pre-tokenizers of byte-level BPE and of words cut too. A
    text without any, such as one line of a gigabyte, is cut where `length` ends.
    """
    held = ""
    for chunk in chunks:
        held += chunk
        start = 0
        while len(held) - start > length:
            end = _cut(held, start, start + length)
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


def _cut(text: str, start: int, end: int) -> int:
    found = [match.start() for match in _CUT.finditer(text, max(start + 1, end - SEARCHED), end + 1)]
    return found[-1] if found else end
