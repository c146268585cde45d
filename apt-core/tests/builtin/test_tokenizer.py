"""Tokenizers: any text comes back."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.builtin.pretrained import Pretrained
from apt.builtin.tokenizer import BPE, Bytes, ByteTokenizer
from apt.core.providers import Tokenizer
from apt.errors import DataError

TEXT = st.text(st.characters(codec="utf-8"))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    pytest.importorskip("tokenizers")
    return BPE(vocab_size=600).train([f"def name_{n}(value): return value + {n}\n" * 3 for n in range(300)])


@given(TEXT)
def test_bytes_bring_back_any_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())
    assert all(3 <= each < 259 for each in ids)


def test_half_a_character_becomes_a_replacement() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([1, *tokenizer.encode("é")[:1]]) == "\ufffd"
    assert Bytes().get_vocab_size() == 259


@given(text=TEXT)
def test_a_bpe_brings_back_any_text(bpe: Tokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert all(3 <= each < bpe.vocab_size for each in ids)


def test_a_bpe_is_shorter_than_bytes_on_what_it_was_trained_on(bpe: Tokenizer) -> None:
    text = "def name_17(value): return value + 17\n"
    assert len(bpe.encode(text)) < len(text) / 2


def test_a_text_that_is_too_small_for_the_vocabulary_is_refused() -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(DataError, match=r"the text gives only .* ids, not 4096; ask for less"):
        BPE().train(["abc"])


def test_a_disk_that_refuses_a_bpe_is_told_as_what_it_is(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    written = (tmp_path / BPE.FILE).read_bytes()
    bpe._trained.save(str(tmp_path / "by_the_library"))  # type: ignore[attr-defined]
    assert (tmp_path / "by_the_library").read_bytes() == written
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            bpe.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_tokenizer_that_was_lost_is_missed(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(DataError, match="the run's tokenizer is missing"):
        BPE().load(tmp_path)


def test_a_pretrained_tokenizer_of_any_model_of_the_library_is_counted_and_a_damaged_file_is_named(
    tmp_path: Path,
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0))
    trained.add_special_tokens(["<s>", "</s>"])
    path = tmp_path / "tokenizer.json"
    trained.save(str(path))
    assert Pretrained(path=str(path)).get_vocab_size() == 5
    for content in ("{", "[]", '{"model": 3}'):
        path.write_text(content)
        with pytest.raises(DataError, match=r"tokenizer\.json: is no file of the tokenizers library"):
            Pretrained(path=str(path)).get_vocab_size()
