"""Checks of retrievers: a text finds itself, scores never rise, and odd requests are answered."""

from __future__ import annotations

import torch

from apt.core.providers import Document, RetrievalProvider
from apt.testing.kit import Subject, check, demand

TEXTS = (
    "the harvest of wheat in a dry summer",
    "a lock-free queue for many writers",
    "whales sing below three hundred hertz",
    "die Brücke über den Fluss",
    "def parse(line): return line.split(',')",
)


def _fresh(subject: Subject) -> RetrievalProvider:
    """A provider of its own: an index is built in it."""
    provider = subject.provider
    again = type(provider).model_validate(provider.model_dump(mode="json"), context={"registry": subject.registry})
    assert isinstance(again, RetrievalProvider)
    return again


def _documents(count: int = len(TEXTS)) -> list[Document]:
    return [Document(f"{number}.txt", text) for number, text in enumerate(TEXTS[:count])]


@check("retrieval")
def finds_itself(subject: Subject) -> None:
    """An indexed text is the best answer to itself."""
    provider = _fresh(subject)
    provider.build_index(_documents())
    retriever = provider.create_retriever(16)
    for text in TEXTS:
        found, _ = provider.retrieve(retriever, text, 1)
        demand(found[0] and found[0][0].text.strip() == text, f"{text!r} finds {[each.text for each in found[0]]}")


@check("retrieval")
def scores_fall(subject: Subject) -> None:
    """Scores never rise with rank, and two searches give the same."""
    provider = _fresh(subject)
    provider.build_index(_documents())
    retriever = provider.create_retriever(16)
    first, scores = provider.retrieve(retriever, list(TEXTS), 4)
    again, scores_again = provider.retrieve(retriever, list(TEXTS), 4)
    demand(scores.shape == (len(TEXTS), 4), f"scores are {tuple(scores.shape)}, not {(len(TEXTS), 4)}")
    demand((scores.diff(dim=-1) <= 1e-6).all(), "a score rises with rank")
    same = torch.equal(scores, scores_again) and first == again
    demand(same, "the same search gives another answer the second time")


@check("retrieval")
def more_than_there_are(subject: Subject) -> None:
    """Asked for more passages than there are, it gives those that there are."""
    provider = _fresh(subject)
    provider.build_index(_documents(2))
    found, scores = provider.retrieve(provider.create_retriever(16), TEXTS[0], 10)
    demand(len(found[0]) == 2, f"2 passages are indexed, {len(found[0])} come back")
    demand(scores.shape[0] == 1, f"one query, {scores.shape[0]} rows of scores")


@check("retrieval")
def empty_index(subject: Subject) -> None:
    """An empty index gives no passage, and no error."""
    provider = _fresh(subject)
    provider.build_index([])
    found, _ = provider.retrieve(provider.create_retriever(16), TEXTS[0], 3)
    demand(found == [[]], f"nothing is indexed, and {found} comes back")
    demand(provider.get_index_size() == 0, f"nothing is indexed, and the size is {provider.get_index_size()}")


@check("retrieval")
def encodings(subject: Subject) -> None:
    """Queries and passages are encoded to finite vectors of one width."""
    provider = _fresh(subject)
    query, passage = provider.encode_query(list(TEXTS)), provider.encode_document(list(TEXTS))
    demand(query.shape == passage.shape, f"queries are {tuple(query.shape)}, passages {tuple(passage.shape)}")
    demand(query.isfinite().all() and passage.isfinite().all(), "an encoding is not finite")
