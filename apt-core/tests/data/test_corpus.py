"""The split goes by a document's name, so it is the same everywhere and always."""

from __future__ import annotations

import pytest

from apt.builtin.tokenizer import ByteTokenizer
from apt.core.config import APTConfig, Training
from apt.core.providers import Document
from apt.data.corpus import Corpus, require, split_of, steps_per_epoch
from apt.errors import DataError


def test_the_split_of_a_name_never_changes() -> None:
    assert [split_of(name) for name in ("argparse.py", "json/decoder.py", "typing.py")] == [
        split_of(name) for name in ("argparse.py", "json/decoder.py", "typing.py")
    ]
    shares = [split_of(f"{number}.txt") for number in range(5000)]
    assert shares.count("train") / 5000 == pytest.approx(0.8, abs=0.03)
    assert shares.count("validation") / 5000 == pytest.approx(0.1, abs=0.02)


def test_a_document_that_is_added_moves_no_other() -> None:
    documents = [Document(f"{number}.txt", f"text {number}") for number in range(40)]
    before, after = Corpus.of(documents), Corpus.of([*documents, Document("new.txt", "new")])
    for split, texts in before.texts.items():
        assert set(texts) <= set(after.texts[split])
    assert before.digest != after.digest


def test_few_documents_are_cut_instead() -> None:
    corpus = Corpus.of([Document("a", "0123456789" * 10)])
    assert [len(corpus.texts[split][0]) for split in ("train", "validation", "test")] == [80, 10, 10]


def test_no_text_is_in_two_splits() -> None:
    corpus = Corpus.of([Document(f"{number}", f"<{number}>") for number in range(100)])
    assert sorted(text for texts in corpus.texts.values() for text in texts) == sorted(f"<{n}>" for n in range(100))


def test_each_document_begins_with_the_id_that_says_so() -> None:
    corpus = Corpus.of([Document(f"{number}", "ab") for number in range(100)])
    split = corpus.tokens("train", ByteTokenizer(), 1)
    assert split.tokens.reshape(-1, 3)[:, 0].tolist() == [1] * split.num_documents
    assert split.num_bytes == 2 * split.num_documents
    assert split.bytes_per_token == pytest.approx(2 / 3)


def test_too_little_text_is_refused() -> None:
    split = Corpus.of([Document("a", "x" * 50)]).tokens("validation", ByteTokenizer(), 1)
    with pytest.raises(DataError, match="the validation split has 6 tokens in 1 documents, fewer than max_seq_len"):
        require(split, "validation", 16)


def test_an_epoch_is_what_the_profile_says_or_the_whole_text() -> None:
    config = APTConfig(max_seq_len=10, training=Training(batch_size=2, accumulate=2))
    assert steps_per_epoch(config, 4001) == 100
    assert steps_per_epoch(config, 5) == 1
    stated = config.model_copy(update={"training": Training(steps_per_epoch=7)})
    assert steps_per_epoch(stated, 4001) == 7
