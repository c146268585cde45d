from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apt.errors import DataError
from apt_rag.chunk import Passage
from apt_rag.embed import HashedNgrams
from apt_rag.index import Index

WORDS = ["copy", "file", "mode", "socket", "median", "number", "open", "close", "parse", "argument", "queue", "thread"]
SENTENCE = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join)
CORPUS = st.lists(SENTENCE, max_size=12)


def index_of(texts: list[str], embedder: HashedNgrams | None = None) -> Index:
    index = Index(embedder or HashedNgrams(features=2**12))
    index.add(Passage(f"d{number}", 1, text) for number, text in enumerate(texts))
    return index


@given(st.lists(SENTENCE, min_size=1, max_size=12, unique_by=lambda text: frozenset(text.split())))
def test_an_indexed_text_finds_itself_first(texts: list[str]) -> None:
    index = index_of(texts)
    for text in texts:
        passage, score = index.search(text, 1)[0]
        assert passage.text == text
        assert score == pytest.approx(1, abs=1e-9)


@given(CORPUS, SENTENCE, st.integers(1, 20))
def test_scores_never_rise_and_are_cosines_of_the_vectors(texts: list[str], query: str, top_k: int) -> None:
    index = index_of(texts)
    found = index.search(query, top_k)
    scores = [score for _, score in found]
    assert len(found) == min(top_k, len(texts))
    assert scores == sorted(scores, reverse=True)
    everything = (index.encode([passage.text for passage, _ in found]) @ index.encode([query]).T).ravel()
    np.testing.assert_allclose(scores, everything, atol=1e-5)
    best = sorted((index.encode(texts) @ index.encode([query]).T).ravel().tolist(), reverse=True) if texts else []
    np.testing.assert_allclose(scores, best[:top_k], atol=1e-5)


def test_equal_scores_keep_the_order_of_the_index() -> None:
    index = index_of(["copy file", "open socket", "copy file", "copy file"])
    assert [passage.source for passage, _ in index.search("copy file", 3)] == ["d0", "d2", "d3"]


@given(CORPUS, CORPUS, SENTENCE)
def test_adding_and_deleting_leave_what_building_at_once_gives(first: list[str], second: list[str], query: str) -> None:
    changed = index_of(first)
    changed.search(query, 3)
    changed.add(Passage("new", 1, text) for text in second)
    changed.search(query, 3)
    assert changed.delete("new") == len(second)
    assert changed.delete("nobody") == 0
    assert changed.search(query, 5) == index_of(first).search(query, 5)


def test_what_is_deleted_is_not_found() -> None:
    index = index_of(["copy file", "copy mode"])
    index.delete("d0")
    assert [passage.source for passage, _ in index.search("copy file", 5)] == ["d1"]


@settings(max_examples=20)
@given(CORPUS, SENTENCE)
def test_a_saved_index_searches_as_before(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], query: str
) -> None:
    index, folder = index_of(texts), tmp_path_factory.mktemp("index")
    index.save(folder)
    loaded = Index.load(folder, index.embedder)
    assert loaded.passages == index.passages
    assert loaded.search(query, 5) == index.search(query, 5)
    loaded.add([Passage("more", 1, "copy")])
    assert len(loaded) == len(texts) + 1


def test_an_index_of_another_embedder_is_refused(tmp_path: Path) -> None:
    index_of(["copy file"]).save(tmp_path)
    with pytest.raises(DataError, match=r"made by another embedder .*features.*build the index again"):
        Index.load(tmp_path, HashedNgrams(features=2**13))


def test_damaged_and_missing_files_are_said_by_name(tmp_path: Path) -> None:
    embedder = HashedNgrams(features=2**12)
    with pytest.raises(DataError, match="no index here"):
        Index.load(tmp_path, embedder)
    index_of(["copy file"]).save(tmp_path)
    counts = (tmp_path / "counts.npz").read_bytes()
    (tmp_path / "counts.npz").write_bytes(counts[:-1])
    with pytest.raises(DataError, match=r"counts\.npz: not the file"):
        Index.load(tmp_path, embedder)
    about = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(about | {"format": 2}))
    with pytest.raises(DataError, match="format 2, and this version reads 1"):
        Index.load(tmp_path, embedder)
    (tmp_path / "counts.npz").write_bytes(counts)
    (tmp_path / "index.json").write_text(json.dumps(about | {"passages": []}))
    with pytest.raises(DataError, match=r"index\.json has 0 passages and counts\.npz 1"):
        Index.load(tmp_path, embedder)
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "index.json").write_text(damaged)
        with pytest.raises(DataError, match=r"index\.json: damaged"):
            Index.load(tmp_path, embedder)


def test_a_rare_word_weighs_more_than_a_common_one() -> None:
    index = index_of(["copy file", "copy socket", "copy thread", "copy median"])
    assert index.search("copy median", 1)[0][0].source == "d3"
    vector = index.encode(["copy median"])[0]
    cells = {word: index.embedder.count(word)[0] for word in ("copy", "median")}
    assert np.abs(vector[cells["median"]]).max() > np.abs(vector[cells["copy"]]).max()
