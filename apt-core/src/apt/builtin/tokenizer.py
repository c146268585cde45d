"""apt-core's tokenizers: bytes as they are, and a byte-level BPE trained on the corpus."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from apt.core.providers import Tokenizer, TokenizerProvider
from apt.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer as Trained

SPECIAL = ("<pad>", "<bos>", "<eos>")
"""Ids 0, 1 and 2."""


class Bytes(TokenizerProvider):
    """Byte b is id b + 3 (ByT5, Xue et al. 2021, arXiv:2105.13626, with other special ids): any text, 259 ids."""

    api_level: ClassVar[int] = 1

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """There is nothing to learn."""
        return ByteTokenizer()

    def load(self, folder: Path) -> Tokenizer:
        """There is nothing to load."""
        return ByteTokenizer()

    def get_vocab_size(self) -> int:
        """256 bytes and three special ids."""
        return ByteTokenizer.vocab_size


class ByteTokenizer:
    """UTF-8 bytes, shifted by the special ids."""

    vocab_size = 256 + len(SPECIAL)

    def encode(self, text: str) -> Sequence[int]:
        """Ids of the text."""
        return [byte + len(SPECIAL) for byte in text.encode()]

    def encode_array(self, text: str) -> NDArray[np.uint16]:
        """The same, as an array."""
        import numpy as np

        return np.frombuffer(text.encode(), np.uint8).astype(np.uint16) + np.uint16(len(SPECIAL))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones vanish."""
        return bytes(each - len(SPECIAL) for each in ids if len(SPECIAL) <= each < self.vocab_size).decode(
            errors="replace"
        )

    def save(self, folder: Path) -> None:
        """Nothing is needed to load it again."""


class BPE(TokenizerProvider):
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2019), any text."""

    api_level: ClassVar[int] = 1
    FILE: ClassVar[str] = "tokenizer.json"

    vocab_size: int = Field(default=4096, ge=512, le=1_000_000, description="ids, bytes and special ones included")

    @classmethod
    def get_dependencies(cls) -> list[str]:
        """The extra `bpe` brings it."""
        return ["tokenizers>=0.20"]

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """Learn the merges. Raises `DataError` where the texts are too few for so many ids."""
        from tokenizers import Tokenizer as Trained
        from tokenizers import decoders, models, pre_tokenizers, trainers

        trained = Trained(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        trained.train_from_iterator(texts, trainer)
        if trained.get_vocab_size() < self.vocab_size:
            found = trained.get_vocab_size()
            raise DataError(
                f"data.tokenizer.vocab_size: the text gives only {found} ids, not {self.vocab_size}; ask for less"
            )
        return BPETokenizer(trained)

    def load(self, folder: Path) -> Tokenizer:
        """The tokenizer that was saved. Raises `DataError` where its file is missing."""
        from tokenizers import Tokenizer as Trained

        path = folder / self.FILE
        if not path.is_file():
            raise DataError(f"{path}: the run's tokenizer is missing")
        return BPETokenizer(Trained.from_file(str(path)))

    def get_vocab_size(self) -> int:
        """As many as were asked for."""
        return self.vocab_size


class BPETokenizer:
    """A trained BPE of the `tokenizers` library."""

    def __init__(self, trained: Trained) -> None:
        trained.encode_special_tokens = True  # as text: a document that speaks of <eos> does not end there
        self._trained = trained
        self.vocab_size = int(trained.get_vocab_size())

    def encode(self, text: str) -> Sequence[int]:
        """Ids of the text; words that look like special ids stay text."""
        ids: list[int] = self._trained.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ones vanish."""
        return str(self._trained.decode(list(ids), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json."""
        # The library's own writing tells of a full disk by an error without a kind.
        (folder / BPE.FILE).write_text(self._trained.to_str(pretty=True), encoding="utf-8")
