"""What this package offers: `cosine` retrieval. Importing it needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from apt.core.providers import Document, RetrievalProvider
from apt.core.providers.retrieval import Fusion
from apt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from apt_rag.embed import HashedNgrams
    from apt_rag.index import Index
    from apt_rag.retriever import Retriever


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError(f"{value} is not a power of two; {1 << value.bit_length()} is")
    return value


class Cosine(RetrievalProvider):
    """Exact cosine search over passages of text, embedded by hashed word and character n-grams with tf-idf weights.

    It needs no model and no download. It finds what shares words, or parts of words, with the query; it knows no
    synonyms.
    """

    top_k: int = Field(default=5, ge=1, description="passages a query")
    chunk_chars: int = Field(default=800, ge=16, description="the longest passage, in characters")
    overlap: int = Field(default=100, ge=0, description="characters that neighbouring passages may share")
    features: Annotated[int, AfterValidator(_power_of_two)] = Field(
        default=2**15, ge=2**8, le=2**24, description="cells that n-grams are hashed to, a power of two"
    )
    words: int = Field(default=2, ge=1, le=5, description="the longest n-gram of words")
    characters: tuple[int, int] | None = Field(
        default=(3, 5), description="the shortest and longest n-gram of characters in a word; none: whole words alone"
    )
    temperature: float = Field(default=0.1, gt=0, description="of the softmax over scores in weighted_sum")

    _index: Index | None = PrivateAttr(default=None)
    _retriever: Retriever | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _check_sizes(self) -> Cosine:
        if self.overlap > self.chunk_chars // 2:
            raise ValueError(f"overlap {self.overlap} exceeds half of chunk_chars {self.chunk_chars}")
        if self.characters is not None and not 1 <= self.characters[0] <= self.characters[1] <= 8:
            raise ValueError(f"characters {list(self.characters)}: shortest and longest, between 1 and 8")
        return self

    @property
    def embedder(self) -> HashedNgrams:
        """How texts become counts under these options."""
        from apt_rag.embed import HashedNgrams

        return HashedNgrams(self.features, self.words, self.characters)

    @property
    def index(self) -> Index:
        """The index built last, or an empty one."""
        from apt_rag.index import Index

        if self._index is None:
            self._index = Index(self.embedder)
        return self._index

    def create_retriever(self, d_model: int, top_k: int | None = None) -> Retriever:
        """A retriever over the index built last (or an empty one)."""
        from apt_rag.retriever import Retriever

        self._retriever = Retriever(self.index, d_model, self.top_k if top_k is None else top_k, self.temperature)
        return self._retriever

    def build_index(self, corpus: Sequence[Document], embedding_model: object = None) -> Index:
        """Cut the corpus into passages, count their n-grams, and return the index.

        Raises `apt.errors.UserError` for an `embedding_model`: this retriever brings its own.
        """
        from apt_rag.chunk import cut
        from apt_rag.index import Index

        if embedding_model is not None:
            raise UserError(
                f"retrieval.{self.get_name()}: embedding_model: this retriever embeds by hashed n-grams and takes "
                "no model; leave it out, or name a retrieval provider that has one"
            )
        index = Index(self.embedder)
        for document in corpus:
            index.add(cut(document, self.chunk_chars, self.overlap))
        self._index = index
        return index

    def retrieve(
        self, retriever: object, query: str | Sequence[str], top_k: int | None = None
    ) -> tuple[list[list[Document]], Tensor]:
        """The passages nearest to each query, best first, and their cosines [batch, top_k].

        With fewer passages than `top_k` the scores are [batch, passages]. A passage's name is ``document:line``.
        """
        import torch

        found = _own(retriever)([query] if isinstance(query, str) else list(query), top_k)
        scores = torch.tensor([[score for _, score in row] for row in found], dtype=torch.float32)
        documents = [[passage.to_document() for passage, _ in row] for row in found]
        return documents, scores.reshape(len(found), -1) if found else scores.reshape(0, 0)

    def encode_query(self, query: str | Sequence[str]) -> Tensor:
        """Vectors of queries [batch, features], under the weights of the index built last."""
        import torch

        return torch.from_numpy(self.index.encode([query] if isinstance(query, str) else query))

    def encode_document(self, document: str | Sequence[str]) -> Tensor:
        """Vectors of passages [batch, features]: the same as queries'."""
        return self.encode_query(document)

    def fuse_context(
        self,
        hidden_states: Tensor,
        retrieved_docs: Sequence[Sequence[Document]],
        scores: Tensor,
        method: Fusion = "concat",
    ) -> Tensor:
        """Bring passages into `hidden_states` [batch, seq, d_model], by the parameters of the retriever made last.

        ``weighted_sum`` adds a gated mean and keeps the shape; ``concat`` puts the passages before the sequence,
        [batch, k + seq, d_model]. ``cross_attn`` is refused: chunked cross-attention (arXiv:2112.04426) attends to the
        tokens of passages, and this retriever has one vector for each.
        """
        import torch

        if method not in ("weighted_sum", "concat"):
            raise UserError(
                f"retrieval.{self.get_name()}: fuse_context: {method!r} needs the token states of passages, which this "
                "retriever does not have; 'weighted_sum' or 'concat'"
            )
        if self._retriever is None:
            raise UserError(
                f"retrieval.{self.get_name()}: fuse_context: create_retriever comes first, it makes the weights"
            )
        rows = [self.encode_document([document.text for document in row]) for row in retrieved_docs]
        if scores.shape[-1] == 0:
            return hidden_states
        vectors, scores = (each.to(hidden_states.device) for each in (torch.stack(rows), scores))
        return self._retriever.fuse(hidden_states, vectors, scores, method)

    def get_index_size(self) -> int:
        """Passages in the index."""
        return len(self.index)

    def supports_online_retrieval(self) -> bool:
        """Passages can be added and deleted while the index is in use."""
        return True


def _own(retriever: object) -> Retriever:
    from apt_rag.retriever import Retriever

    if not isinstance(retriever, Retriever):
        raise UserError(f"retrieve: {type(retriever).__name__} is not a retriever that `cosine` has made")
    return retriever
