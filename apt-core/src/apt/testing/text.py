"""Checks of what text comes from and goes through: data sources and tokenizers."""

from __future__ import annotations

import argparse
import ast
import inspect
import logging
import pydoc
import tarfile
import tempfile
import typing
from pathlib import Path

from apt.core.providers import DataProvider, Tokenizer, TokenizerProvider
from apt.errors import DataError
from apt.testing.kit import NotApplicable, Subject, check, demand

SAMPLES = (
    "",
    "plain words",
    "two  spaces, a\ttab\nand lines\r\n",
    "naïve café — “quotes” … ½",
    "日本語のテキスト",
    "مرحبا بالعالم",
    "emoji 👩‍👩‍👧 and 🇩🇪",
    "<pad> <bos> <eos> <|endoftext|>",
    "\x00\x01\x7f",
    "x" * 500,
)


def _trained(subject: Subject) -> tuple[TokenizerProvider, Tokenizer]:
    assert isinstance(subject.provider, TokenizerProvider)
    texts = [inspect.getsource(module) for module in (argparse, ast, inspect, logging, pydoc, tarfile, typing)]
    try:
        return subject.provider, subject.provider.train(texts)
    except DataError as error:
        raise NotApplicable(f"the kit's text is too small for these options: {error}") from error


@check("tokenizer")
def round_trip(subject: Subject) -> None:
    """Any text comes back as it was, words that look like special ids too."""
    _, tokenizer = _trained(subject)
    for text in SAMPLES:
        back = tokenizer.decode(tokenizer.encode(text))
        demand(back == text, f"{text!r} comes back as {back!r}")


@check("tokenizer")
def ids(subject: Subject) -> None:
    """Ids lie in the vocabulary, and plain text never gives a special one."""
    provider, tokenizer = _trained(subject)
    said = provider.get_vocab_size()
    demand(said == tokenizer.vocab_size, f"get_vocab_size() is {said}, the tokenizer has {tokenizer.vocab_size}")
    for text in SAMPLES:
        found = list(tokenizer.encode(text))
        outside = [each for each in found if not 3 <= each < tokenizer.vocab_size]
        demand(
            not outside,
            f"{text!r} gives the ids {outside[:5]}; 0, 1 and 2 are special, {tokenizer.vocab_size} too many",
        )
    demand(tokenizer.decode([0, 1, 2]) == "", "the special ids do not vanish when decoded")


@check("tokenizer")
def saved(subject: Subject) -> None:
    """Saved and loaded, it gives the same ids."""
    provider, tokenizer = _trained(subject)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        again = provider.load(Path(folder))
    for text in SAMPLES:
        demand(list(again.encode(text)) == list(tokenizer.encode(text)), f"{text!r} is encoded otherwise after loading")


@check("data")
def documents(subject: Subject) -> None:
    """Documents come in the order of their names, each name once, none empty, twice the same."""
    assert isinstance(subject.provider, DataProvider)
    found, again = list(subject.provider.read()), list(subject.provider.read())
    demand(found, "there are no documents")
    names = [each.name for each in found]
    demand(names == sorted(set(names)), "names are not in order, or one stands twice")
    empty = [each.name for each in found if not each.text.strip()]
    demand(not empty, f"empty documents: {', '.join(empty[:5])}")
    demand(found == again, "reading twice gives other documents")
