"""A corpus: documents that are read one after another, split by a hash of their names, and never held all at once.

The split depends on a document's name alone, so it is the same on every machine and does not move when documents are added.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from apt.core.config import APTConfig
from apt.core.providers import Document, Pair
from apt.data.pairs import PairSplit
from apt.data.pieces import in_pieces
from apt.data.tokens import TokenSplit
from apt.errors import DataError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
FEW = 10
"""Fewer documents than these are cut in themselves."""


class Source(Protocol):
    """What a corpus is read from: a `DataProvider`, or anything with its one method."""

    def read(self) -> Iterable[Document]:
        """All documents, the same at each call."""


@dataclass(frozen=True)
class Corpus:
    """What one reading of a source has found. `lengths` has the characters of each document where they are fewer than ten."""

    source: Source
    digest: str
    num_documents: int
    num_bytes: int
    lengths: tuple[int, ...]

    @classmethod
    def scan(cls, source: Source, tell: Callable[[int], None] | None = None) -> Corpus:
        """Read all of it once; `tell` hears the length of each piece. Raises `DataError` where there is nothing to read."""
        digest = _Digest()
        number = num_bytes = 0
        lengths: list[int] = []
        for number, document in enumerate(source.read(), 1):
            length = 0
            for piece in digest.follow(document):
                length += len(piece)
                if tell is not None:
                    tell(len(piece))
            num_bytes += document.num_bytes
            if number < FEW:
                lengths.append(length)
        if number == 0:
            raise DataError("data.source: gives no documents")
        return cls(source, digest.hexdigest(), number, num_bytes, tuple(lengths) if number < FEW else ())

    def parts(self) -> Iterator[tuple[Split, Iterator[str]]]:
        """Each document, or each of its three parts, with its split: pieces that must be taken before the next part is asked for.

        Split 80/10/10. With fewer than ten documents each is cut into 80, 10 and 10 hundredths instead. Raises `DataError` at the
        end where the text is not what `scan` has seen.
        """
        digest = _Digest()
        number = 0
        for number, document in enumerate(self.source.read(), 1):
            chunks = digest.follow(document)
            if isinstance(document, Pair):
                # Two texts of one split, however few pairs there are.
                for text in chunks:
                    yield split_of(document.name), iter((text,))
            elif self.lengths:
                # A document too many is told below.
                yield from _cut(chunks, self.lengths[min(number, len(self.lengths)) - 1])
            else:
                yield split_of(document.name), in_pieces(chunks)
            for _ in chunks:
                pass
        if (number, digest.hexdigest()) != (self.num_documents, self.digest):
            raise DataError("data.source: the text has changed while it was read; start again when nobody writes to it")

    def texts(self, split: Split) -> Iterator[str]:
        """The texts of one split, the long ones in pieces: what a tokenizer may learn from."""
        for each, pieces in self.parts():
            if each == split:
                yield from pieces


class _Digest:
    """Of all names and texts, each after its length: so no two corpora look alike."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def follow(self, document: Document) -> Iterator[str]:
        """The document's pieces, as they are put in."""
        try:
            name = document.name.encode()
            self._hash.update(len(name).to_bytes(8, "little") + name)
            self._hash.update(document.num_bytes.to_bytes(8, "little"))
            if isinstance(document, Pair):
                # Two texts: where the one ends and the other begins tells pairs apart too.
                self._hash.update(len(document.source.encode()).to_bytes(8, "little"))
            for piece in document.pieces():
                self._hash.update(piece.encode())
                yield piece
        except UnicodeEncodeError as error:
            raise DataError(
                f"{document.name!a}: holds {error.object[error.start]!a}, half of a character, which UTF-8 cannot say"
            ) from error

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _cut(chunks: Iterator[str], length: int) -> Iterator[tuple[Split, Iterator[str]]]:
    """Three parts of one text of so many characters."""
    held = ""

    def take(count: int) -> Iterator[str]:
        nonlocal held
        while count > 0:
            if not held and not (held := next(chunks, "")):
                return
            part, held = held[:count], held[count:]
            count -= len(part)
            yield part

    first, second = length * 8 // 10, length * 9 // 10
    for split, count in zip(SPLITS, (first, second - first, length - second), strict=True):
        part = take(count)
        yield split, in_pieces(part)
        for _ in part:
            pass


def split_of(name: str) -> Split:
    """The split of a document by its name: eight, one and one tenths of all names."""
    tenth = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def require(split: TokenSplit, name: Split, seq_len: int) -> None:
    """Raise `DataError` where a split has not one window of `seq_len` tokens and their targets, or no pair that fits."""
    if isinstance(split, PairSplit):
        split.require(name, seq_len)
        return
    if not split.num_documents:
        raise DataError(
            f"data: no document falls into the {name} split: a hash of its name puts each of {FEW} or more documents into one of "
            f"the three, some {80 if name == 'train' else 10} of 100 into this one; give more documents, or join them to fewer "
            f"than {FEW}, each of which is cut into 80, 10 and 10 hundredths"
        )
    if len(split.tokens) < seq_len + 1:
        raise DataError(
            f"data: the {name} split has {len(split.tokens)} tokens in {split.num_documents} documents, fewer than "
            f"max_seq_len + 1 = {seq_len + 1}; give more text, or lower model.max_seq_len"
        )


def steps_per_epoch(config: APTConfig, batches_per_pass: int) -> int:
    """Optimizer steps an epoch: as the profile says, else as many as see everything of the training split once."""
    training = config.training
    if training.steps_per_epoch is not None:
        return training.steps_per_epoch
    return max(1, batches_per_pass // training.accumulate)


def first_batch(config: APTConfig, batches_per_pass: int, steps: int) -> int:
    """The number of the micro-batch that the step after `steps` others begins with.

    An epoch that is the text's own begins with a pass, so that none is read twice in it; what a pass has beyond whole steps
    is read in no step of that epoch.
    """
    accumulate = config.training.accumulate
    if not _begins_with_passes(config, batches_per_pass):
        return steps * accumulate
    epoch, within = divmod(steps, steps_per_epoch(config, batches_per_pass))
    return epoch * batches_per_pass + within * accumulate


def steps_before(config: APTConfig, batches_per_pass: int, index: int) -> int:
    """After how many steps a step begins with micro-batch `index`, or with the first one after it that any step begins with."""
    accumulate = config.training.accumulate
    if not _begins_with_passes(config, batches_per_pass):
        return -(-index // accumulate)
    number, within = divmod(index, batches_per_pass)
    epoch = steps_per_epoch(config, batches_per_pass)
    return number * epoch + min(-(-within // accumulate), epoch)


def _begins_with_passes(config: APTConfig, batches_per_pass: int) -> bool:
    """Whether epochs are the text's own, and each begins with a pass."""
    return config.training.steps_per_epoch is None and batches_per_pass >= config.training.accumulate
