"""Retrieval: which passages bear on a query, and how they enter the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from apt.core.provider import Provider
from apt.core.providers.data import Document

if TYPE_CHECKING:
    from torch import Tensor

Fusion = Literal["concat", "cross_attn", "weighted_sum"]


class RetrievalProvider(Provider):
    """Makes retrievers over a corpus of documents. What a retriever is, is the provider's own affair."""

    kind: ClassVar[str] = "retrieval"
    makes: ClassVar[str] = "create_retriever"

    @abstractmethod
    def create_retriever(self, d_model: int, top_k: int = 5) -> object:
        """A retriever over the index built last (or an empty one)."""

    @abstractmethod
    def retrieve(
        self, retriever: object, query: str | Sequence[str], top_k: int | None = None
    ) -> tuple[list[list[Document]], Tensor]:
        """The documents nearest to each query, best first, and their scores [batch, top_k], which never rise."""

    @abstractmethod
    def build_index(self, corpus: Sequence[Document], embedding_model: object = None) -> object:
        """Cut the corpus into passages, encode them, and return the index."""

    @abstractmethod
    def encode_query(self, query: str | Sequence[str]) -> Tensor:
        """Vectors of queries [batch, features]."""

    @abstractmethod
    def encode_document(self, document: str | Sequence[str]) -> Tensor:
        """Vectors of passages [batch, features]."""

    @abstractmethod
    def fuse_context(
        self,
        hidden_states: Tensor,
        retrieved_docs: Sequence[Sequence[Document]],
        scores: Tensor,
        method: Fusion = "concat",
    ) -> Tensor:
        """Bring what was retrieved into `hidden_states` [batch, seq, d_model]."""

    @abstractmethod
    def get_index_size(self) -> int:
        """Passages in the index."""

    def supports_online_retrieval(self) -> bool:
        """Whether documents can be added while the index is in use."""
        return False

    def supports_batch_retrieval(self) -> bool:
        """Whether several queries are searched at once."""
        return True
