"""Text as vectors without a model: hashed counts of word and character n-grams.

A feature's hash says at which index it counts and with which sign, so that collisions cancel in the mean (Weinberger et
al. 2009, arXiv:0902.2206). The hash is CRC-32 of the feature's bytes, the same in every process and on every machine.
Words find what a text says; character n-grams find `copyfile` for "copy a file" and forgive endings.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int32]
Values = NDArray[np.float32]

ALGORITHM = "crc32 signed n-grams 1"
"""Named in the digest; changes with anything that changes a vector."""

WORD = re.compile(r"[^\W_]+")
SIGN = 1 << 31


@dataclass(frozen=True)
class HashedNgrams:
    """Counts n-grams of up to `words` words, and of `characters` (shortest, longest) inside a word.

    The counts stand in `features` cells, a power of two.
    """

    features: int = 2**15
    words: int = 2
    characters: tuple[int, int] | None = (3, 5)

    @property
    def digest(self) -> str:
        """Two embedders of one digest give the same counts."""
        settings = json.dumps({"algorithm": ALGORITHM, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()

    def count(self, text: str) -> tuple[Indices, Values]:
        """The cells that `text` touches, ascending, and the signed counts in them (never 0)."""
        words = WORD.findall(unicodedata.normalize("NFKC", text).lower())
        hashes = [_of_word(word, self.characters) for word in words]
        for length in range(2, self.words + 1):
            grams = zip(*(words[start:] for start in range(length)), strict=False)
            hashes.append(np.fromiter((_hash(" ".join(gram)) for gram in grams), np.uint32))
        if not hashes:
            return np.empty(0, np.int32), np.empty(0, np.float32)
        every = np.concatenate(hashes)
        cells, inverse = np.unique((every & (self.features - 1)).astype(np.int32), return_inverse=True)
        counts = np.bincount(inverse, weights=np.where(every & SIGN, -1.0, 1.0), minlength=len(cells))
        touched = counts != 0
        return cells[touched], counts[touched].astype(np.float32)


def _hash(feature: str) -> int:
    return zlib.crc32(feature.encode("utf-8", "surrogatepass"))


@lru_cache(maxsize=2**17)
def _of_word(word: str, characters: tuple[int, int] | None) -> NDArray[np.uint32]:
    """Hashes of a word and of the n-grams of characters in it, `<` and `>` marking its ends.

    A `#` keeps n-grams of characters apart from words.
    """
    features = [word]
    if characters is not None:
        marked = f"<{word}>"
        for length in range(characters[0], characters[1] + 1):
            features += [f"#{marked[start : start + length]}" for start in range(len(marked) - length + 1)]
    return np.array([_hash(feature) for feature in features], np.uint32)
