"""The tokenizer `char`: an id for each character, as small models of small texts are often trained and compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from apt.builtin.tokenizer import SPECIAL
from apt.core.providers import Tokenizer, TokenizerProvider
from apt.errors import DataError

UNKNOWN = len(SPECIAL)
"""The id of every character that has none of its own."""


class Characters(TokenizerProvider):
    """An id for each of the most frequent characters of the training text, and one for all others, which read as U+FFFD."""

    api_level: ClassVar[int] = 1
    FILE: ClassVar[str] = "characters.json"

    vocab_size: int = Field(
        default=256,
        ge=5,
        le=1_114_112,
        description="ids at most: three special ones, one for unknown characters, the rest for the most frequent ones",
    )

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """Count the characters. Those that are as frequent stand in the order of their code points."""
        counts = Counter[str]()
        for text in texts:
            counts.update(text)
        frequent = sorted(counts, key=lambda character: (-counts[character], character))
        return CharacterTokenizer("".join(sorted(frequent[: self.vocab_size - UNKNOWN - 1])), self.vocab_size)

    def load(self, folder: Path) -> Tokenizer:
        """The tokenizer that was saved. Raises `DataError` where its file is missing."""
        path = folder / self.FILE
        if not path.is_file():
            raise DataError(f"{path}: the run's tokenizer is missing")
        return CharacterTokenizer(json.loads(path.read_text(encoding="utf-8")), self.vocab_size)

    def get_vocab_size(self) -> int:
        """As many as were asked for; a text of fewer characters leaves the last ids unused."""
        return self.vocab_size


class CharacterTokenizer:
    """The characters in the order of their ids."""

    def __init__(self, characters: str, vocab_size: int) -> None:
        self.characters, self.vocab_size = characters, vocab_size
        self._ids = {character: number for number, character in enumerate(characters, UNKNOWN + 1)}

    def encode(self, text: str) -> Sequence[int]:
        """Ids of the text."""
        return [self._ids.get(character, UNKNOWN) for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones vanish."""
        table = {UNKNOWN: "\ufffd", **{number: character for character, number in self._ids.items()}}
        return "".join(table.get(each, "") for each in ids)

    def save(self, folder: Path) -> None:
        """Write characters.json."""
        (folder / Characters.FILE).write_text(json.dumps(self.characters), encoding="utf-8")
