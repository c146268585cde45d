from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from apt.core.providers import Document
from apt_rag.chunk import cut

TEXT = st.text(st.sampled_from("ab é\n\t"), max_size=300)


@given(TEXT, st.integers(16, 60), st.integers(0, 8))
def test_every_character_that_is_not_white_space_is_in_a_passage(text: str, size: int, overlap: int) -> None:
    # Every letter becomes one of a kind, so that it is known where a passage was taken from.
    unique = "".join(letter if letter.isspace() else chr(0x4E00 + place) for place, letter in enumerate(text))
    passages = cut(Document("d", unique), size, overlap)
    assert {letter for letter in unique if not letter.isspace()} <= set("".join(each.text for each in passages))
    assert all(each.line == unique.count("\n", 0, unique.index(each.text)) + 1 for each in passages)


@given(TEXT, st.integers(16, 60), st.integers(0, 8))
def test_passages_are_short_enough_and_never_blank(text: str, size: int, overlap: int) -> None:
    passages = cut(Document("d", text), size, overlap)
    assert all(0 < len(passage.text) <= size and passage.text.strip() for passage in passages)


def test_a_passage_says_in_which_line_it_begins() -> None:
    document = Document("a.txt", "\n\nfirst paragraph here\n\nsecond paragraph is here\n")
    assert [passage.name for passage in cut(document, 26, 0)] == ["a.txt:3", "a.txt:5"]


def test_passages_end_at_paragraphs_before_lines_and_at_lines_before_words() -> None:
    def texts(text: str) -> list[str]:
        return [passage.text for passage in cut(Document("d", text), 16, 0)]

    assert texts("one two three\n\nfour five") == ["one two three", "four five"]
    assert texts("one two th\nree four five") == ["one two th", "ree four five"]
    assert texts("one two three four five") == ["one two three", "four five"]


def test_neighbours_share_whole_words_of_the_overlap() -> None:
    first, second = cut(Document("d", "alpha beta gamma delta"), 16, 8)
    assert first.text.endswith("beta")
    assert second.text.startswith("beta")
    assert len(cut(Document("d", "x" * 40), 16, 4)) == 3
