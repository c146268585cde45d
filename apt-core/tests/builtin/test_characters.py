"""Characters as ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.builtin.characters import UNKNOWN, Characters
from apt.errors import DataError


@given(text=st.text(min_size=1))
def test_a_text_that_was_learnt_comes_back(text: str) -> None:
    tokenizer = Characters(vocab_size=1000).train([text[:1], text[1:]])
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert all(UNKNOWN < each < 1000 for each in ids)
    assert tokenizer.decode([1, *ids, 2]) == text


def test_the_most_frequent_characters_have_ids_and_the_others_share_one() -> None:
    tokenizer = Characters(vocab_size=6).train(["aaabbbc", "dd"])
    assert tokenizer.encode("abcd?") == [4, 5, 3, 3, 3]
    assert tokenizer.decode(tokenizer.encode("abc")) == "ab\ufffd"
    assert tokenizer.vocab_size == Characters(vocab_size=6).get_vocab_size() == 6


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    provider = Characters()
    tokenizer = provider.train(["Zwölf Boxkämpfer"])
    tokenizer.save(tmp_path)
    assert provider.load(tmp_path).encode("Boxer?") == tokenizer.encode("Boxer?")
    with pytest.raises(DataError, match="the run's tokenizer is missing"):
        provider.load(tmp_path / "elsewhere")
