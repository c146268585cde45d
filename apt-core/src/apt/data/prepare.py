"""From a profile to tokens: the text is read, the tokenizer trained and the tokens written once, and found again after that.

What is remembered goes by content: the tokens' key holds the digest of all text and of the tokenizer, so nothing old can be
taken for something new. Where a source can tell in a moment that it has not changed (`DataProvider.fingerprint`), not even the
text is read.
"""

from __future__ import annotations

import hashlib
import inspect
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from apt.core.config import APTConfig
from apt.core.options import canonical
from apt.core.provider import Provider
from apt.core.providers import DataProvider, Tokenizer, TokenizerProvider
from apt.core.resolution import record_of
from apt.core.resolve import Resolved
from apt.data.cache import Cache, Entry, file_digest
from apt.data.corpus import SPLITS, Corpus, Split
from apt.data.pairs import PairSplit
from apt.data.telling import Telling
from apt.data.tokens import TokenSplit, TokenWriter
from apt.errors import UserError

FORMAT = 1
"""Raised when the same text and tokenizer would give other files."""


@dataclass(frozen=True)
class Prepared:
    """A corpus in tokens. `digest` is of all names and texts, `folder` holds the tokens."""

    digest: str
    num_documents: int
    num_bytes: int
    tokenizer: Tokenizer
    splits: Mapping[Split, TokenSplit]
    folder: Path


def prepare(config: APTConfig, resolved: Resolved, console: Console, checkpoint: Path | None = None) -> Prepared:
    """The tokens of a profile's text; the tokenizer is the checkpoint's where there is one.

    Raises `DataError` where the text cannot be read or the cache not be written, `UserError` where the model has too few ids.
    """
    source, provider = resolved.providers["data"], resolved.providers["tokenizer"]
    assert isinstance(source, DataProvider)
    assert isinstance(provider, TokenizerProvider)
    with Telling(console) as telling:
        cache = Cache(config.data.cache, telling.note)
        corpus = _find_corpus(source, cache, telling)
        tokenizer, identity = _find_tokenizer(provider, corpus, cache, telling, checkpoint)
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"model.vocab_size: {config.vocab_size} is less than the tokenizer's {tokenizer.vocab_size} ids"
            )
        key = {"format": FORMAT, "corpus": corpus.digest, "tokenizer": identity, "bos": config.bos_token_id}

        def write(folder: Path) -> dict[str, object]:
            telling.start("writing its tokens", corpus.num_bytes)
            return _write(folder, corpus, tokenizer, config.bos_token_id, telling)

        telling.start("checking the tokens")
        entry = cache.get("tokens", key, write)
    splits = _open(entry)
    if source.gives_pairs():
        splits = {name: PairSplit(split, config) for name, split in splits.items()}
    return Prepared(corpus.digest, corpus.num_documents, corpus.num_bytes, tokenizer, splits, entry.folder)


def _find_corpus(source: DataProvider, cache: Cache, telling: Telling) -> Corpus:
    """The corpus: remembered where its source can tell that it is the same, else read."""

    def scan(folder: Path) -> dict[str, object]:
        telling.start("reading the text")
        corpus = Corpus.scan(source, telling.advance)
        return {
            "digest": corpus.digest,
            "num_documents": corpus.num_documents,
            "num_bytes": corpus.num_bytes,
            "lengths": list(corpus.lengths),
        }

    telling.start("looking for the text")
    seen = source.fingerprint()
    if seen is None:
        telling.start("reading the text")
        return Corpus.scan(source, telling.advance)
    facts = cache.get("corpora", {"format": FORMAT, "source": _identity(source), "fingerprint": seen}, scan).facts
    return Corpus(source, facts["digest"], facts["num_documents"], facts["num_bytes"], tuple(facts["lengths"]))


def _find_tokenizer(
    provider: TokenizerProvider, corpus: Corpus, cache: Cache, telling: Telling, checkpoint: Path | None
) -> tuple[Tokenizer, dict[str, object]]:
    """The tokenizer, and what tells it from others."""

    def train(folder: Path) -> dict[str, object]:
        telling.start("training the tokenizer", corpus.num_bytes * 8 // 10)
        provider.train(telling.follow(corpus.texts("train"))).save(folder)
        return {}

    identity = _identity(provider)
    folder = checkpoint
    if folder is None:
        key = {"format": FORMAT, "corpus": corpus.digest, "tokenizer": identity}
        folder = cache.get("tokenizers", key, train).folder
    tokenizer = provider.load(folder)
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save(Path(place))
        files = {path.name: file_digest(path) for path in sorted(Path(place).iterdir())}
    return tokenizer, {**identity, "files": files}


def _identity(provider: Provider) -> dict[str, object]:
    """Which provider, of what version, with what code and options."""
    record = record_of(provider)
    source = record.sha256 or ""
    with suppress(OSError, TypeError):  # typed into a prompt
        file = inspect.getsourcefile(type(provider))
        source = source or (file_digest(Path(file)) if file else "")
    options = hashlib.sha256(canonical(provider.model_dump(mode="json")).encode()).hexdigest()
    return {"kind": record.kind, "name": record.name, "version": record.version, "source": source, "options": options}


def _write(folder: Path, corpus: Corpus, tokenizer: Tokenizer, bos: int, telling: Telling) -> dict[str, object]:
    with ExitStack() as stack:
        writers = {name: stack.enter_context(TokenWriter(folder / f"{name}.bin", tokenizer, bos)) for name in SPLITS}
        for split, pieces in corpus.parts():
            for length in writers[split].add(pieces):
                telling.advance(length)
    return {
        name: {
            "dtype": writer.dtype.str,
            "num_tokens": writer.num_tokens,
            "num_bytes": writer.num_bytes,
            "num_documents": writer.num_documents,
        }
        for name, writer in writers.items()
    }


def _open(entry: Entry) -> dict[Split, TokenSplit]:
    return {
        name: TokenSplit.open(entry.folder / f"{name}.bin", facts["dtype"], facts["num_bytes"], facts["num_documents"])
        for name in SPLITS
        for facts in [entry.facts[name]]
    }
