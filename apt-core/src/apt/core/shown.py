"""What is shown: text that nobody has chosen, such as a model's, and what nobody reads any more."""

from __future__ import annotations

import os
import unicodedata


def harmless(text: str) -> str:
    """The text with its control characters, which a terminal would obey, escaped; it may have lines and tabs."""
    return "".join(
        repr(each)[1:-1] if unicodedata.category(each) == "Cc" and each not in "\n\t" else each for each in text
    )


def to_nowhere(number: int) -> None:
    """Let the stream of this file descriptor, whose reader has gone, go nowhere: what its buffer holds too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
