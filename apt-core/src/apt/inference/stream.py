"""Text as its tokens come, in time that does not grow with the text."""

from __future__ import annotations

from apt.core.providers import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What bytes decode to that are no whole character yet."""


class TextStream:
    """Pieces that together are the text of all tokens.

    A token's text may depend on the one before it (a space, half a character), so the tokens of the piece before are decoded
    again with each new one, and what is no whole character yet waits.

    The exception are texts that are no UTF-8: a decoder with byte fallback (SentencePiece) makes a mark of every byte in a row of
    byte tokens that has one wrong byte, also of those before it, which were given out and stay as they were.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._before = 0
        """Where the piece before starts: its tokens are decoded for their neighbours' sake."""
        self._after = 0
        """Tokens that were given out."""

    def add(self, token: int) -> str:
        """The piece that this token completes; empty where it completes none."""
        self._tokens.append(token)
        known, text = self._window()
        if text.endswith(UNFINISHED) or len(text) <= len(known):
            return ""
        self._before, self._after = self._after, len(self._tokens)
        return text[len(known) :]

    def end(self) -> str:
        """What still waited."""
        known, text = self._window()
        return text[len(known) :]

    def _window(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return decode(self._tokens[self._before : self._after]), decode(self._tokens[self._before :])
