from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from apt.core.providers import Document
from apt.core.registry import registry
from apt.errors import UserError
from apt_rag.provider import Cosine
from apt_rag.retriever import Retriever

CORPUS = [
    Document("copy.txt", "shutil has copyfile, which copies the contents of a file"),
    Document("net.txt", "a socket connects two programs over a network"),
    Document("stat.txt", "the median is the middle number of a sorted list"),
]


def built(**options: object) -> tuple[Cosine, Retriever]:
    provider = Cosine(**options)  # type: ignore[arg-type]
    provider.build_index(CORPUS)
    return provider, provider.create_retriever(8)


def test_the_entry_point_gives_the_provider() -> None:
    assert isinstance(registry.get("retrieval", "cosine", {"top_k": 2}, fallback=False), Cosine)


def test_the_nearest_passage_comes_first_and_says_where_it_stands() -> None:
    provider, retriever = built(top_k=2)
    documents, scores = provider.retrieve(retriever, ["how to copy a file", "which number is the median"])
    assert [row[0].name for row in documents] == ["copy.txt:1", "stat.txt:1"]
    assert scores.shape == (2, 2)
    assert bool((scores[:, 0] >= scores[:, 1]).all())


def test_fewer_passages_than_asked_for_are_all_of_them() -> None:
    provider, retriever = built()
    documents, scores = provider.retrieve(retriever, "file", 10)
    assert len(documents[0]) == 3
    assert scores.shape == (1, 3)


def test_an_empty_index_finds_nothing() -> None:
    provider = Cosine()
    documents, scores = provider.retrieve(provider.create_retriever(8), ["a", "b"])
    assert documents == [[], []]
    assert scores.shape == (2, 0)
    assert provider.get_index_size() == 0
    hidden = torch.randn(2, 3, 8)
    assert torch.equal(provider.fuse_context(hidden, documents, scores), hidden)


def test_no_queries_give_no_rows() -> None:
    provider, retriever = built()
    documents, scores = provider.retrieve(retriever, [])
    assert documents == []
    assert scores.shape[0] == 0


def test_the_index_can_change_while_it_is_in_use() -> None:
    provider, retriever = built()
    assert provider.supports_online_retrieval()
    assert provider.get_index_size() == 3
    assert provider.index.delete("copy.txt") == 1
    assert "copy.txt:1" not in [document.name for document in provider.retrieve(retriever, "copyfile")[0][0]]


def test_scores_are_the_cosines_of_the_vectors() -> None:
    provider, retriever = built(top_k=3)
    documents, scores = provider.retrieve(retriever, "copy a number of files")
    vectors = provider.encode_document([document.text for document in documents[0]])
    assert vectors.shape == (3, provider.features)
    torch.testing.assert_close(scores[0], (vectors @ provider.encode_query("copy a number of files").T)[:, 0])


def test_passages_enter_the_hidden_states() -> None:
    torch.manual_seed(0)
    provider, retriever = built(top_k=2)
    documents, scores = provider.retrieve(retriever, ["copy", "median"])
    hidden = torch.randn(2, 4, 8)
    assert torch.equal(provider.fuse_context(hidden, documents, scores, "weighted_sum"), hidden)
    assert provider.fuse_context(hidden, documents, scores, "concat").shape == (2, 6, 8)
    retriever.fusion.gate.data.fill_(1.0)
    assert not torch.equal(provider.fuse_context(hidden, documents, scores, "weighted_sum"), hidden)


def test_what_is_not_offered_is_refused_in_words() -> None:
    provider, retriever = built()
    documents, scores = provider.retrieve(retriever, "copy")
    with pytest.raises(UserError, match="'cross_attn' needs the token states"):
        provider.fuse_context(torch.randn(1, 4, 8), documents, scores, "cross_attn")
    with pytest.raises(UserError, match="takes no model"):
        provider.build_index(CORPUS, embedding_model=object())
    with pytest.raises(UserError, match="str is not a retriever"):
        provider.retrieve("no retriever", "copy")
    with pytest.raises(UserError, match="create_retriever comes first"):
        Cosine().fuse_context(torch.randn(1, 4, 8), documents, scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 1000}, "1000 is not a power of two; 1024 is"),
        ({"chunk_chars": 100, "overlap": 51}, "overlap 51 exceeds half of chunk_chars 100"),
        ({"characters": (5, 3)}, "shortest and longest"),
        ({"top_k": 0}, "greater than or equal to 1"),
        ({"chunk_size": 5}, "Extra inputs"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Cosine.model_validate(options)


@pytest.mark.parametrize(
    "changed",
    [{"top_k": 1}, {"chunk_chars": 20, "overlap": 0}, {"features": 2**10}, {"words": 1}, {"characters": None}],
)
def test_every_option_of_searching_has_an_effect(changed: dict[str, object]) -> None:
    plain, other = built(), built(**changed)
    query = "copies the contents of a file to the middle"
    (documents, scores), (others, other_scores) = (p.retrieve(r, query) for p, r in (plain, other))
    assert documents != others or not torch.equal(scores, other_scores)


def test_overlap_and_temperature_have_an_effect() -> None:
    text = [Document("d", "one two three four five six seven eight nine ten eleven")]
    sizes = [len(Cosine(chunk_chars=16, overlap=overlap).build_index(text)) for overlap in (0, 8)]
    assert sizes[0] < sizes[1]
    outputs = []
    for temperature in (0.01, 10.0):
        torch.manual_seed(0)
        provider, retriever = built(temperature=temperature)
        retriever.fusion.gate.data.fill_(1.0)
        documents, scores = provider.retrieve(retriever, "copy a number")
        outputs.append(provider.fuse_context(torch.zeros(1, 1, 8), documents, scores, "weighted_sum"))
    assert not torch.allclose(*outputs)
