"""A text in pieces is the same text, and gives the same ids."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.builtin.tokenizer import BPE
from apt.core.providers import Tokenizer
from apt.data.pieces import in_pieces

CHUNKS = st.lists(st.text(st.sampled_from("ab' \n\t.1é中"), max_size=30), max_size=12)
WORDS = st.lists(
    st.sampled_from(["it's", "  ", "\n", " \n\n ", "one", "two ", " a", ".", "12", "中", " ", "\t"]), max_size=60
)


@given(CHUNKS, st.integers(1, 40))
def test_pieces_are_the_text_and_none_is_too_long(chunks: list[str], length: int) -> None:
    pieces = list(in_pieces(chunks, length))
    assert "".join(pieces) == "".join(chunks)
    assert all(1 <= len(piece) <= length for piece in pieces)


def test_a_short_text_stays_whole_and_a_line_without_spaces_is_cut_where_it_must() -> None:
    assert list(in_pieces(["ab ", "cd"], 5)) == ["ab cd"]
    assert list(in_pieces(["x" * 12], 5)) == ["xxxxx", "xxxxx", "xx"]
    assert list(in_pieces(["one two three"], 9)) == ["one two", " three"]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    pytest.importorskip("tokenizers")
    return BPE(vocab_size=600).train([f"it's one two {n}.\n\n  a  中 {n} 12 three\tfour" for n in range(600)] * 2)


@given(words=WORDS, length=st.integers(20, 40))
def test_pieces_give_the_ids_of_the_whole(bpe: Tokenizer, words: list[str], length: int) -> None:
    text = "x y".join(words)  # a good cut is never far
    ids = [each for piece in in_pieces([text], length) for each in bpe.encode(piece)]
    assert ids == list(bpe.encode(text))
