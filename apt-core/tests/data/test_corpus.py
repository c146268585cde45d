"""The split goes by a document's name, so it is the same everywhere and always; and nothing is held whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.builtin.tokenizer import ByteTokenizer
from apt.core.config import APTConfig, Training
from apt.core.providers import Document, Pair
from apt.data.corpus import SPLITS, Corpus, require, split_of, steps_per_epoch
from apt.data.tokens import TokenSplit, TokenWriter
from apt.errors import DataError

TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


@dataclass
class Texts:
    documents: Sequence[Document]

    def read(self) -> Iterable[Document]:
        return self.documents


class Chopped(Document):
    """A text in pieces of three characters."""

    def pieces(self) -> Iterator[str]:
        for at in range(0, len(self.text), 3):
            yield self.text[at : at + 3]


def texts_of(documents: Sequence[Document]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, pieces in Corpus.scan(Texts(documents)).parts():
        found[split].append("".join(pieces))
    return found


def tokens_of(documents: Sequence[Document], split: str, folder: Path) -> TokenSplit:
    with TokenWriter(folder / "x.bin", ByteTokenizer(), 1) as writer:
        for each, pieces in Corpus.scan(Texts(documents)).parts():
            if each == split:
                list(writer.add(pieces))
    return TokenSplit.open(folder / "x.bin", writer.dtype.str, writer.num_bytes, writer.num_documents)


def test_the_split_of_a_name_never_changes() -> None:
    names = [f"{number}.txt" for number in range(5000)]
    shares = [split_of(name) for name in names]
    assert [number for number in range(12) if shares[number] == "validation"] == [1, 3, 8, 11]
    assert shares.count("train") / 5000 == pytest.approx(0.8, abs=0.03)
    assert shares.count("validation") / 5000 == pytest.approx(0.1, abs=0.02)


def test_a_document_that_is_added_moves_no_other() -> None:
    documents = [Document(f"{number}.txt", f"text {number}") for number in range(40)]
    more = [*documents, Document("new.txt", "new")]
    before, after = texts_of(documents), texts_of(more)
    assert all(set(texts) <= set(after[split]) for split, texts in before.items())
    assert Corpus.scan(Texts(documents)).digest != Corpus.scan(Texts(more)).digest


def test_few_documents_are_cut_instead() -> None:
    texts = texts_of([Document("a", "0123456789" * 10)])
    assert [len(texts[split][0]) for split in SPLITS] == [80, 10, 10]


@given(st.lists(TEXT, min_size=1, max_size=14))
def test_how_a_text_comes_does_not_matter(texts: list[str]) -> None:
    whole = [Document(f"{number:02}", text) for number, text in enumerate(texts)]
    chopped = [Chopped(each.name, each.text) for each in whole]
    assert texts_of(whole) == texts_of(chopped)
    assert Corpus.scan(Texts(whole)).digest == Corpus.scan(Texts(chopped)).digest
    if len(texts) < 10:
        parts = texts_of(whole)
        assert ["".join(each) for each in zip(*(parts[split] for split in SPLITS), strict=True)] == texts


def test_where_a_source_ends_tells_corpora_of_pairs_apart() -> None:
    one, other = [Pair("a", "\nof it", "source")], [Pair("a", "of it", "source\n")]
    assert Corpus.scan(Texts(one)).digest != Corpus.scan(Texts(other)).digest


def test_no_text_is_in_two_splits() -> None:
    texts = texts_of([Document(f"{number}", f"<{number}>") for number in range(100)])
    assert sorted(text for each in texts.values() for text in each) == sorted(f"<{n}>" for n in range(100))


def test_each_document_begins_with_the_id_that_says_so(tmp_path: Path) -> None:
    split = tokens_of([Document(f"{number}", "ab") for number in range(100)], "train", tmp_path)
    assert split.tokens.reshape(-1, 3)[:, 0].tolist() == [1] * split.num_documents
    assert split.num_bytes == 2 * split.num_documents
    assert split.bytes_per_token == pytest.approx(2 / 3)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    split = tokens_of([Document("a", "x" * 50)], "validation", tmp_path)
    with pytest.raises(DataError, match="the validation split has 6 tokens in 1 documents, fewer than max_seq_len"):
        require(split, "validation", 16)
    with pytest.raises(DataError, match="gives no documents"):
        Corpus.scan(Texts([]))


def test_a_split_into_which_no_document_falls_is_refused_with_what_can_be_done(tmp_path: Path) -> None:
    names = [name for name in map(str, range(40)) if split_of(name) != "validation"]
    split = tokens_of([Document(name, "x" * 50) for name in names[:12]], "validation", tmp_path)
    with pytest.raises(
        DataError, match=r"no document falls into the validation split.*; give more documents, or join them"
    ):
        require(split, "validation", 16)


def test_a_text_that_changes_between_two_readings_is_refused() -> None:
    source = Texts([Document(f"{number}", "abc") for number in range(12)])
    corpus = Corpus.scan(source)
    source.documents = [*source.documents[:-1], Document("11", "abd")]
    with pytest.raises(DataError, match="the text has changed while it was read"):
        list(corpus.texts("train"))
    few = Texts([Document("a", "abc")])
    corpus = Corpus.scan(few)
    few.documents = [Document("a", "abc"), Document("b", "abc")]
    with pytest.raises(DataError, match="has changed"):
        list(corpus.texts("test"))


def test_half_a_character_is_refused_by_the_name_of_its_document() -> None:
    with pytest.raises(DataError, match=r"'x.jsonl:3': holds '\\ud83d', half of a character"):
        Corpus.scan(Texts([Document("x.jsonl:3", "ab\ud83d")]))


def test_a_tokenizer_that_gives_ids_beyond_its_vocabulary_is_told_so(tmp_path: Path) -> None:
    class Wrong(ByteTokenizer):
        vocab_size = 100

    with (
        TokenWriter(tmp_path / "x.bin", Wrong(), 1) as writer,
        pytest.raises(DataError, match=r"gives the id 100 for 'a' ..., but has only 100 ids"),
    ):
        list(writer.add(iter(["a"])))


def test_an_epoch_is_what_the_profile_says_or_the_whole_text() -> None:
    config = APTConfig(max_seq_len=10, training=Training(batch_size=2, accumulate=2))
    assert steps_per_epoch(config, 200) == 100
    assert steps_per_epoch(config, 1) == 1
    stated = config.model_copy(update={"training": Training(steps_per_epoch=7)})
    assert steps_per_epoch(stated, 200) == 7
